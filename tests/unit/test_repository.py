"""Files that other programs read: they are valid, and agree with the package."""

from pathlib import Path

import pytest
import yaml

import lengthwise

ROOT = Path(__file__).resolve().parents[2]
YAML = sorted([*ROOT.glob(".github/**/*.yml"), ROOT / "CITATION.cff", ROOT / ".snakemake-workflow-catalog.yml"])


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_is_valid(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_citation_is_of_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lengthwise.__version__


def test_the_catalog_finds_what_it_wants():
    """Source: the Snakemake Workflow Catalog's page on adding workflows."""
    assert (ROOT / "workflow" / "Snakefile").is_file()
    assert (ROOT / "config" / "README.md").is_file()
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage["mandatory-flags"]["flags"] == "--resources gpu=1"
    assert {*usage["software-stack-deployment"]} == {"conda", "apptainer", "apptainer+conda"}


def test_problems_are_reported_with_info():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "problem.yml").read_text())
    (info,) = [part for part in form["body"] if part.get("id") == "info"]
    assert "python -m lengthwise info" in info["attributes"]["description"]


def test_the_ci_of_the_host_runs_ours():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["ci"]["steps"]
    assert steps[-1] == {"run": "bash .ci/run"}


def test_the_container_installs_by_the_readmes_line():
    dockerfile = (ROOT / "Dockerfile").read_text()
    (install,) = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("pip install -e") and "snakemake" in line
    ]
    wanted = install.split(" && ")[0].removeprefix("pip install ").replace("'", "")
    assert f"pip install --no-cache-dir {wanted}" in dockerfile.replace("'", "").replace('"', "")
