"""The benchmark's table: a row for each engine, with its own rate and errors."""

import csv
import subprocess
import sys

import pytest
import torch

from lengthwise.__main__ import main
from lengthwise.benchmark.sequences import random_sequences, read_fasta
from lengthwise.benchmark.tables import COLUMNS
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.shapes import ModelConfig


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    checkpoint.write_random(folder / "tiny.pt", ModelConfig(2, 32, 2))
    fasta = folder / "in.fasta"
    fasta.write_text("".join(f">{i}\n{s.decode()}\n" for i, s in enumerate(random_sequences(60, 3000))) + ">bad\nM-K\n")
    arguments = ["--checkpoint", str(folder / "tiny.pt"), "--fasta", str(fasta), "--rounds", "2"]
    assert main(["benchmark", *arguments, "--device", "cpu", "--out", str(folder / "out")]) == 0
    assert (folder / "out" / "tiny.png").stat().st_size > 5_000
    with open(folder / "out" / "tiny.tsv") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_each_engine_and_precision_has_a_row(rows):
    names = [(row["engine"], row["precision"]) for row in rows]
    assert ("fair-esm extract.py", "float32") in names
    assert {("Lengthwise", "float32"), ("Lengthwise", "bfloat16")} <= set(names)
    assert tuple(rows[0]) == COLUMNS


def test_errors_are_as_large_as_the_precision_allows(rows):
    by_name = {(row["engine"], row["precision"]): row for row in rows}
    assert float(by_name["fair-esm extract.py", "float32"]["max_error"]) < 2e-5  # padding is exact in fair-esm
    assert float(by_name["Lengthwise", "float32"]["max_error"]) < 2e-5
    assert 1e-4 < float(by_name["Lengthwise", "bfloat16"]["max_error"]) < 0.2
    assert float(by_name["Lengthwise", "bfloat16"]["min_cosine"]) > 0.999


def test_rates_with_the_load_are_lower(rows):
    for row in rows:
        assert 0 < float(row["end_to_end_residues_per_second"]) < float(row["residues_per_second"])
        assert row["peak_bytes"] == ""  # on a CPU the engines share the process's memory


def test_random_sequences_have_the_length_and_the_number_of_residues():
    sequences = random_sequences(300, 1000)
    assert [len(sequence) for sequence in sequences] == [300] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(capsys):
    assert main(["benchmark", "--device", "cuda"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_fasta_is_read_with_rejected_records_left_out(tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nmkv*\n>b\nM-K\n>c\nWWW\n")
    assert read_fasta(tmp_path / "in.fasta") == [b"MKV", b"WWW"]


def test_engine_and_benchmark_need_torch_numpy_safetensors_and_fair_esm_only():
    """A GPU machine may have little else."""
    absent = [
        "pandas",
        "pyarrow",
        "duckdb",
        "Bio",
        "requests",
        "filelock",
        "jsonschema",
        "yaml",
        "crc32c",
        "jinja2",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import lengthwise.__main__, lengthwise.benchmark.command"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
