"""The wheel reads stores where nothing but what it asks for is installed; the source archive runs the workflow."""

import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
EARLIER_STORE = Path(__file__).parent / "data" / "store_of_0e749b6.tar.gz"
# Folders whose files all travel, and the others' files that do.
WHOLE_FOLDERS = ("docs", "envs", "scripts", "tests", "workflow")
SINGLE_FILES = (
    "CITATION.cff",
    "Dockerfile",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "config/README.md",
)
CONFIG_FILES = ("config/config.yaml", "config/example.fasta")

pytestmark = pytest.mark.slow

READ = """
import sys, warnings
from importlib.util import find_spec
from pathlib import Path
import lengthwise
from lengthwise.__main__ import main

assert "site-packages" in lengthwise.__file__, lengthwise.__file__
assert not any(map(find_spec, ("torch", "esm", "snakemake", "psutil", "yaml", "jsonschema", "filelock")))
warnings.filterwarnings("ignore", message=".*RANDOM WEIGHTS")
ds = lengthwise.open(sys.argv[1])
first = ds.ids[0]
assert ds.verify() == len(ds.records)
assert ds.pooled("mean").shape == (len(ds), ds[first].shape[1])
assert ds.where("length > 0").ids[0] == first
try:
    ds["no such id"]
except KeyError as error:
    assert "no such id" in str(error)
try:
    ds.torch()
except lengthwise.LengthwiseError as error:
    print(error)
assert main(["verify", str(Path(sys.argv[1]).parents[1])]) == 0
assert main(["prune", str(Path(sys.argv[1]).parents[1])]) == 0
assert main(["progress", "--once", str(Path(sys.argv[1]).parents[1])]) == 0
assert main(["benchmark"]) == 1
sys.stdout.flush()
sys.stdout.buffer.write(b"ROWS" + ds[first].tobytes())
"""


def run(*command: object, folder: Path) -> bytes:
    """What a command prints; the test fails with it if the command does."""
    done = subprocess.run([*map(str, command)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode(errors="replace")
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive, built from a copy: building writes into the tree."""
    folder = tmp_path_factory.mktemp("archives")
    ignored = (ROOT / ".gitignore").read_text().split()
    anywhere = shutil.ignore_patterns(".git", *(line.strip("/") for line in ignored if not line.startswith("/")))
    at_the_top = {line.strip("/") for line in ignored if line.startswith("/")}

    def left_out(place: str, names: list[str]) -> set[str]:
        return anywhere(place, names) | (at_the_top & {*names} if Path(place) == ROOT else set())

    shutil.copytree(ROOT, folder / "tree", ignore=left_out)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder=folder / "tree")
    return folder / "dist"


@pytest.fixture(scope="module")
def unpacked(archives, tmp_path_factory) -> Path:
    """The source archive, unpacked."""
    (path,) = archives.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def reading_python(archives, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel, and what it asks for."""
    (wheel,) = archives.glob("*.whl")
    folder = tmp_path_factory.mktemp("reading")
    venv.create(folder, with_pip=True)
    run(folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile", wheel, folder=folder)
    return folder / "bin/python"


def test_the_archives_are_fit_for_an_index(archives):
    paths = sorted(archives.iterdir())
    assert len(paths) == 2
    printed = run(sys.executable, "-m", "twine", "check", "--strict", *paths, folder=archives).decode()
    assert len(re.findall("PASSED", printed)) == 2


def test_the_source_archive_has_every_file_of_a_clone(archives, unpacked):
    tree = archives.parent / "tree"
    wanted = {path.relative_to(tree) for name in WHOLE_FOLDERS for path in (tree / name).rglob("*") if path.is_file()}
    wanted |= {Path(name) for name in (*SINGLE_FILES, *CONFIG_FILES)}
    found = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in wanted - found if "lengthwise.egg-info" not in path.parts} == set()
    assert {path.parts[0] for path in found - wanted} <= {"PKG-INFO", "setup.cfg", "MANIFEST.in", "scripts"}


def test_the_wheel_reads_a_store_of_the_earlier_version(reading_python, tmp_path):
    with tarfile.open(EARLIER_STORE) as archive:
        archive.extractall(tmp_path, filter="data")
    (store,) = tmp_path.glob("results/*")
    (shard,) = store.glob("shards/*/*.safetensors")
    printed = run(reading_python, "-c", READ, store / "datasets/a", folder=tmp_path)
    rows = load_file(shard)["layer_2"].tobytes()  # of all the dataset's sequences
    assert len(read := printed.rpartition(b"ROWS")[2]) > 1000
    assert read in rows


def test_the_source_archive_runs_the_demo_and_the_wheel_reads_it(unpacked, reading_python):
    command = ("--cores", 2, "--config", "scaling=false", "device=cpu")
    run(Path(sys.executable).with_name("snakemake"), *command, folder=unpacked)
    dataset = unpacked / "results/demo/datasets/example"
    printed = run(reading_python, "-c", READ, dataset, folder=unpacked.parent).decode(errors="replace")
    assert "weights: good\ndataset example: good, 79 records\n" in printed
    assert "not installed, of the extra 'embed': torch; run: pip install 'CLONE_OR_WHEEL[embed]'\n" in printed
