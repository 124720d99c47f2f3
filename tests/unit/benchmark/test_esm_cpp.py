"""esm-cpp beside the other engines, in a process of its environment, and what the benchmark says where it fails."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import lengthwise
from lengthwise.benchmark import contenders, esm_cpp, peers
from lengthwise.benchmark.sequences import random_sequences
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.shapes import ModelConfig

CPU = torch.device("cpu")
TINY = ModelConfig(2, 32, 2)
ROOT = Path(__file__).parents[3]


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.pt"
    checkpoint.write_random(path, TINY)
    return path


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with nothing in it, and its place for modules."""
    folder = tmp_path / "its own"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (modules,) = folder.glob("lib/python*/site-packages")
    return folder, modules


def test_an_environment_without_esm_cpp_is_a_line_of_the_table(tiny, tmp_path, environment):
    with pytest.raises(RuntimeError, match="No module named 'esm_cpp'"):
        esm_cpp.load(tiny, TINY, environment[0], tmp_path)


def test_neither_pythonpath_nor_the_packages_folder_reaches_its_process(tiny, tmp_path, environment, monkeypatch):
    """They have modules for another Python."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "esm_cpp.py").write_text("class Model:\n    load_from_safetensors = print\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    with pytest.raises(RuntimeError, match="No module named 'esm_cpp'"):
        esm_cpp.load(tiny, TINY, environment[0], tmp_path)


def test_a_process_that_dies_is_said_to_have_ended(tiny, tmp_path, environment):
    (environment[1] / "esm_cpp.py").write_text("import os\nos._exit(7)\n")
    with pytest.raises(RuntimeError, match="ended with exit code 7"):
        esm_cpp.load(tiny, TINY, environment[0], tmp_path)


def test_its_weights_are_removed_and_its_process_ends_with_it(tiny, tmp_path, environment):
    """Its threads are as many as torch's."""
    said = tmp_path / "said"
    (environment[1] / "esm_cpp.py").write_text(
        "import os\n"
        "class Model:\n"
        "    def load_from_safetensors(path):\n"
        f"        open({str(said)!r}, 'w').write(f\"{{os.getpid()}} {{os.environ['ESM_NUM_THREADS']}}\")\n"
    )
    folder = tmp_path / "rows"
    folder.mkdir()
    embed = esm_cpp.load(tiny, TINY, environment[0], folder)
    pid, threads = map(int, said.read_text().split())
    assert threads == torch.get_num_threads()
    assert list(folder.iterdir()) == []
    os.kill(pid, 0)
    del embed
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_the_line_that_is_printed_installs_it_and_its_rows_are_fair_esms(tiny, tmp_path):
    environment, said = tmp_path / "its own", []
    found = contenders.contenders_of(tiny, TINY, CPU, tmp_path, contenders.Choice(environment), said.append)
    assert "esm-cpp" not in [name for each in found for name in each.names]
    (line,) = (line for line in said if line.startswith("left out, esm-cpp: "))
    subprocess.run(line.split("; ", 1)[1], shell=True, check=True)
    found = contenders.contenders_of(tiny, TINY, CPU, tmp_path, contenders.Choice(environment), said.append)
    (contender,) = (each for each in found if each.names == ("esm-cpp",))
    embed = contender.load().ways["esm-cpp"]
    sequences = random_sequences(60, 600) + random_sequences(90, 270)
    rows = [row for part in embed(sequences) for row in part.rows]
    for row, expected in zip(rows, peers.reference(tiny, sequences, CPU), strict=True):
        # Its softmax and its GELU are approximate: 5e-3 of the layer's root mean square on the published shapes.
        np.testing.assert_allclose(row, expected, atol=2e-2)
    assert list(embed(sequences)) == []  # timed passes compute logits alone


def test_the_requirements_are_installed_with_the_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setup["package-data"]["lengthwise.benchmark"]
    folder = Path(lengthwise.__file__).parent / "benchmark"
    others = {path.name for path in folder.iterdir() if path.suffix not in (".py", "") and path.is_file()}
    assert {path.name for pattern in patterns for path in folder.glob(pattern)} == others
    assert "esm_cpp_requirements.txt" in others
