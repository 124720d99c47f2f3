"""The real workflow, run as a user runs it, in folders of its own."""

import pytest
from project import Project, Run


@pytest.fixture
def project(tmp_path) -> Project:
    return Project.with_example(tmp_path / "project")


@pytest.fixture(scope="session")
def example(tmp_path_factory) -> tuple[Project, Run]:
    """The shipped config, run once to the end, with a short scaling study."""
    project = Project.with_example(tmp_path_factory.mktemp("example") / "project")
    run = project.snakemake("--config", "scaling_seconds=12")
    assert run.code == 0, run.output
    return project, run
