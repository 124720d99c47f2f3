"""The real workflow, run as a user runs it, in folders of its own."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from project import Project, Run, random_sequences


@pytest.fixture
def project(tmp_path) -> Project:
    return Project.with_example(tmp_path / "project")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """What a function makes in a new folder of this name, once for all workers. Nobody may change it: copy it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make(name: str, function: Callable[[Path], Any]) -> Any:
        folder, result = root / "once" / name, root / "once" / f"{name}.pickle"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not result.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                result.write_bytes(pickle.dumps(function(folder)))
        return pickle.loads(result.read_bytes())

    return make


@pytest.fixture(scope="session")
def example(made_once, tmp_path_factory) -> tuple[Project, Run]:
    """The shipped config, run once to the end, with a short scaling study."""

    def make(folder: Path) -> tuple[Project, Run]:
        project = Project.with_example(folder / "project")
        run = project.snakemake("--config", "scaling_seconds=12")
        assert run.code == 0, run.output
        return project, run

    project, run = made_once("example", make)
    return project.copy(tmp_path_factory.mktemp("example") / "project"), run


@pytest.fixture(scope="session")
def planned(made_once) -> Project:
    """A project with one job of many shards, planned and not begun; to be copied."""

    def make(folder: Path) -> Project:
        project = Project.with_tiny_model(folder / "project", a=random_sequences(600, seed=11, longest=300))
        project.configure(model="tiny.pt", inputs=["in/*.fasta"], shard_bytes=400_000, batch_tokens=512)
        run = project.snakemake("results/tiny/plan/jobs.tsv")
        assert run.code == 0, run.output
        return project

    return made_once("planned", make)
