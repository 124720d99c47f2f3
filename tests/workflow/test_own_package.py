"""A clone's own package is imported, whatever other one is installed where Snakemake runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT, Project

import lengthwise

# A conda of which Snakemake asks its version, its folder and a new environment.
CONDA = """#!/bin/bash
case "$1 $2" in
"info --json") echo '{{"conda_prefix": "{folder}", "platform": "linux-64"}}' ;;
"--version ") echo "conda 25.1.1" ;;
"config --get") echo '{{"get": {{"channel_priority": "strict"}}}}' ;;
"env create") '{python}' -m venv --without-pip "${{@: -1}}" && cp '{pth}' "${{@: -1}}"/lib/python*/site-packages ;;
esac
"""


class WithOther(Project):
    """A clone, run by a Python of its own in which another package of that name is installed."""

    def __init__(self, folder: Path, python: Path, first_in_path: str):
        super().__init__(folder, folder.parent / "the clone")
        self.python, self.first_in_path = python, first_in_path

    def command(self, *arguments: str) -> list[str]:
        return [str(self.python), *super().command(*arguments)[1:]]

    @property
    def environment(self) -> dict[str, str]:
        environment = super().environment
        del environment["PYTHONPATH"]
        return environment | {"PATH": self.first_in_path + environment["PATH"]}


@pytest.fixture
def other(tmp_path):
    """Makes a project whose Python has another `lengthwise`: a copy among its packages, or one that a .pth file names."""

    def make(installed: str) -> WithOther:
        python = tmp_path / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True)
        (packages,) = python.glob("lib/python*/site-packages")
        real = [path for path in sys.path if path.endswith("site-packages")]
        folder = packages if installed == "copy" else tmp_path / "elsewhere"
        (packages / "real.pth").write_text("".join(f"{path}\n" for path in (folder, *real)))
        (folder / "lengthwise").mkdir(parents=True)
        (folder / "lengthwise" / "__init__.py").write_text('raise ImportError("the other package")\n')
        project = WithOther(tmp_path / "project", python / "bin" / "python", conda(tmp_path / "conda", packages))
        made = Project.with_tiny_model(tmp_path / "project", a=[b"MKV"])
        assert made.folder == project.folder
        for name in ("workflow", "scripts", "envs"):
            shutil.copytree(ROOT / name, project.checkout / name)
        return project

    def conda(folder: Path, packages: Path) -> str:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "activate").write_text('export PATH="$1/bin:$PATH"\n')
        script = folder / "bin" / "conda"
        script.write_text(CONDA.format(folder=folder, python=sys.executable, pth=packages / "real.pth"))
        script.chmod(0o755)
        return f"{script.parent}{os.pathsep}"

    return make


@pytest.mark.parametrize(
    ("installed", "arguments"),
    [
        ("copy", []),
        pytest.param("editable", ["--software-deployment-method", "conda"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_rule_imports_the_clones_package(other, installed, arguments):
    project = other(installed)
    done = subprocess.run([project.python, "-c", "import lengthwise"], capture_output=True, text=True)
    assert "the other package" in done.stderr
    run = project.snakemake(*arguments)
    assert run.code == 0, run.output
    assert ("Activating conda environment" in run.output) == bool(arguments)
    manifest = json.loads((project.store / "datasets/a/manifest.json").read_text())
    assert [job["versions"]["lengthwise"] for job in manifest["made_by"]] == [lengthwise.__version__]


def test_parsing_leaves_path_and_environment_to_the_other_workflow(tmp_path):
    """As a module: names of this workflow's scripts (`plan`, `export`) are free for the other's own Python modules."""
    project = Project.with_tiny_model(tmp_path / "project", a=[b"MKV"])
    outer = tmp_path / "Snakefile"
    outer.write_text(
        "import os, sys\n"
        f"times = lambda: sys.path.count({str(ROOT / 'scripts')!r})\n"
        "before = times()\n"
        "configfile: 'config/config.yaml'\n"
        "shell.prefix('true; ')\n"
        f"module lengthwise:\n    snakefile: {str(ROOT / 'workflow/Snakefile')!r}\n    config: config\n"
        "use rule * from lengthwise\n"
        "print('left', os.environ.get('PYTHONPATH'), times() - before, shell._process_prefix)\n"
    )
    command = project.command("--list-rules", "--software-deployment-method", "conda")
    command[command.index("--snakefile") + 1] = str(outer)
    environment = project.environment | {"PYTHONPATH": "/x:/y"}
    done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left /x:/y 0 true; " in done.stdout.splitlines(), done.stdout
