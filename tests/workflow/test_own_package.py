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


def test_parsing_puts_the_package_first_once_and_keeps_what_is_there(tmp_path):
    """As a module of another workflow, whose folder is elsewhere; each job parses again what its run has exported."""
    project = Project.with_tiny_model(tmp_path / "project", a=[b"MKV"])
    scripts = str(ROOT / "scripts")
    outer = tmp_path / "Snakefile"
    outer.write_text(
        "import os, sys\n"
        "configfile: 'config/config.yaml'\n"
        f"module lengthwise:\n    snakefile: {str(ROOT / 'workflow/Snakefile')!r}\n    config: config\n"
        "use rule * from lengthwise\n"
        "print('exported', os.environ['PYTHONPATH'], sys.path.count(os.environ['PYTHONPATH'].split(':')[0]))\n"
    )
    command = project.command("--list-rules")
    command[command.index("--snakefile") + 1] = str(outer)
    for given, expected in {
        None: scripts,
        "/x:/y": f"{scripts}:/x:/y",
        f"/x:{scripts}:": f"{scripts}:/x:",
        f"{scripts}:/x": f"{scripts}:/x",
    }.items():
        environment = {key: value for key, value in project.environment.items() if key != "PYTHONPATH"}
        environment |= {"PYTHONPATH": given} if given else {}
        done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"exported {expected} 1" in done.stdout.splitlines(), done.stdout
