"""What pyproject.toml asks for, what says that a part of it is missing, and the conda environments."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lengthwise.system.extras import MODULES

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {
    "torch": "pytorch",
    "duckdb": "python-duckdb",
    "isal": "python-isal",
    "matplotlib": "matplotlib-base",
    "build": "python-build",
}


def required(extra: str) -> dict[str, str]:
    """Versions by name that an extra asks for, or a plain installation (""), without the extras that it includes."""
    texts = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    requirements = [Requirement(text) for text in texts]
    return {found.name: str(found.specifier) for found in requirements if found.name != PROJECT["name"]}


@pytest.mark.parametrize("extra", MODULES)
def test_the_modules_of_an_extra_are_those_of_its_packages(extra):
    """The package whose distribution brings a top-level module; several may share one (`backports`)."""
    brings = packages_distributions()
    found = {canonicalize_name(name) for module in MODULES[extra] for name in brings[module.partition(".")[0]]}
    wanted = {canonicalize_name(name) for name in required(extra)}
    assert wanted <= found
    assert len(MODULES[extra]) == len(wanted)


@pytest.mark.parametrize(
    ("file", "extras", "left_out"),
    [
        ("lengthwise", ("", "embed", "workflow"), {"snakemake"}),
        ("development", ("", "embed", "workflow", "slurm", "example", "test"), set()),
    ],
)
def test_a_conda_environment_asks_for_the_same_versions(file, extras, left_out):
    wanted = {name: versions for extra in extras for name, versions in required(extra).items()}
    wanted = {CONDA_NAMES.get(name, name): version for name, version in wanted.items() if name not in left_out}
    lines = yaml.safe_load((ROOT / "envs" / f"{file}.yaml").read_text())["dependencies"]
    found = dict(line.partition(" ")[::2] for line in lines if line != "c-compiler")
    assert found.pop("python") == PROJECT["requires-python"]
    assert {name: parts(version.replace("==", "=")) for name, version in wanted.items()} == {
        name: parts(version) for name, version in found.items()
    }


def parts(versions: str) -> set[str]:
    return set(versions.split(","))


WITHOUT = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def without(modules: str, code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a process in which modules are not installed."""
    command = [sys.executable, "-c", f"{WITHOUT}\n{code}", modules, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    )


def test_a_command_says_which_extra_brings_what_is_missing():
    run = "from lengthwise.__main__ import main; sys.exit(main(sys.argv[2:]))"
    done = without("torch", run, "benchmark")
    assert done.returncode == 1
    assert done.stderr == (
        f"lengthwise: error: not installed, of the extra 'embed': torch; run: pip install -e '{ROOT}[embed]'\n"
    )


def test_info_needs_no_more_than_reading():
    done = without("torch,psutil", "from lengthwise.__main__ import main; sys.exit(main(sys.argv[2:]))", "info")
    assert (done.returncode, done.stderr) == (0, "")
    assert "memory" not in done.stdout


RULE = """
from lengthwise.system.logging import reporting
with reporting(sys.argv[2]):
    from lengthwise.ingest import decompress
"""


def test_a_rule_says_which_extra_brings_what_is_missing(tmp_path):
    done = without("backports", RULE, str(tmp_path / "rule.log"))
    assert done.returncode == 1
    assert re.fullmatch(
        r"lengthwise: error: not installed, of the extra 'embed': backports.zstd; run: .*\n", done.stderr
    )


def test_an_installed_package_without_the_wanted_part_is_not_called_missing():
    code = """
from lengthwise.system.extras import named_extras
with named_extras():
    import numpy.no_such_part
"""
    assert without("", code).stderr.endswith("ModuleNotFoundError: No module named 'numpy.no_such_part'\n")


def test_reading_for_torch_says_which_extra_brings_it():
    code = """
from lengthwise.read.dataset import Dataset
Dataset.torch(object.__new__(Dataset))
"""
    done = without("torch", code)
    assert "LengthwiseError: not installed, of the extra 'embed': torch; run: pip install" in done.stderr


@pytest.mark.parametrize("module", ["torch", "tqdm"])
def test_embedding_from_python_says_which_extra_brings_what_is_missing(module):
    for call in ("load('demo')", "embed(['MKT'], model='demo')"):
        done = without(module, f"import lengthwise; lengthwise.{call}")
        assert f"LengthwiseError: not installed, of the extra 'embed': {module}; run: pip install" in done.stderr


def test_a_run_names_all_that_is_missing_before_it_begins():
    code = "from lengthwise.system.extras import require_workflow; require_workflow()"
    assert without("", code).returncode == 0
    done = without("torch,h5py", code)
    assert "not installed, of the extra 'workflow': torch, h5py; run: pip install -e" in done.stderr


def test_the_commands_help_imports_nothing_that_is_slow():
    done = without("numpy,pyarrow,pandas,duckdb,torch,snakemake,psutil,jsonschema,yaml", "import lengthwise.__main__")
    assert (done.returncode, done.stderr) == (0, "")
