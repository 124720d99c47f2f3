"""The benchmark's table: a row for each engine, with its own rate and errors."""

import argparse
import csv
import math
import os
import platform
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from lengthwise.__main__ import _parser, main
from lengthwise.benchmark import card, command, contenders, matmul, peers, weights
from lengthwise.benchmark.cell import stride_of, timed
from lengthwise.benchmark.contenders import DISK, EXTRACT, MEAN, RESIDUE, STREAMED, Choice, Loaded
from lengthwise.benchmark.measure import Limits
from lengthwise.benchmark.peers import Part
from lengthwise.benchmark.sequences import random_sequences, read_fasta
from lengthwise.benchmark.tables import COLUMNS
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import ModelConfig

CPU = torch.device("cpu")
SCRIPTS = Path(card.__file__).parents[2]
TINY = ModelConfig(2, 32, 2)
# What a machine with a GPU may lack.
ABSENT = ["psutil", "pynvml", "duckdb", "jsonschema", "requests", "filelock", "yaml", "jinja2", "matplotlib", "h5py"]
ABSENT += ["isal", "backports", "snakemake", "Bio", "transformers"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    checkpoint.write_random(path, TINY)
    return path


def table(folder: Path) -> list[dict]:
    with open(folder / "tiny.tsv") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def request(tiny: Path, out: Path, lengths=(60,), residues=3_000, **limits) -> command.Request:
    out.mkdir(exist_ok=True)
    limits = Limits(**{"rounds": 2, **limits})
    return command.Request(
        "tiny", tiny, CPU, None, lengths, residues, limits, 2, out, Choice(out / "absent", emulated=True)
    )


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    fasta = folder / "in.fasta"
    fasta.write_text("".join(f">{i}\n{s.decode()}\n" for i, s in enumerate(random_sequences(60, 3000))) + ">bad\nM-K\n")
    arguments = ["--checkpoint", str(tiny), "--fasta", str(fasta), "--rounds", "2", "--emulated", "--esm-cpp", "absent"]
    assert main(["benchmark", *arguments, "--device", "cpu", "--out", str(folder / "out")]) == 0
    assert (folder / "out" / "tiny.png").stat().st_size > 5_000
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["tiny.md", "tiny.png", "tiny.tsv"]
    assert f"| {RESIDUE} | bfloat16 | no |" in (folder / "out" / "tiny.md").read_text()
    return table(folder / "out")


def test_each_engine_and_precision_has_a_row(rows):
    names = [(row["engine"], row["precision"]) for row in rows]
    assert (EXTRACT, "float32") in names
    assert {
        (RESIDUE, "float32"),
        (RESIDUE, "bfloat16"),
        (MEAN, "float32"),
        (DISK, "float32"),
        (STREAMED, "float32"),
    } <= set(names)
    assert tuple(rows[0]) == COLUMNS
    assert {row["status"] for row in rows} == {""}
    assert {row["residues"] for row in rows} == {"3000"}  # without limits each embeds everything


def test_errors_are_as_large_as_the_precision_allows(rows):
    by_name = {(row["engine"], row["precision"]): row for row in rows}
    assert float(by_name[EXTRACT, "float32"]["max_error"]) < 2e-5  # padding is exact in fair-esm
    for name in (RESIDUE, MEAN, DISK, STREAMED):
        assert float(by_name[name, "float32"]["max_error"]) < 2e-5
    assert 1e-4 < float(by_name[RESIDUE, "bfloat16"]["max_error"]) < 0.2
    assert float(by_name[RESIDUE, "bfloat16"]["min_cosine"]) > 0.999


def test_rates_are_those_of_the_timed_passes_and_what_a_cpu_does_not_have_is_empty(rows):
    for row in rows:
        assert float(row["residues_per_second"]) == pytest.approx(int(row["residues"]) / float(row["seconds"]))
        assert float(row["load_seconds"]) > 0
        assert row["peak_bytes"] == row["clock_mhz"] == ""  # on a CPU the engines share the process's memory


def test_each_row_says_whether_its_layers_were_compiled(rows, tiny, monkeypatch):
    assert {row["compiled"] for row in rows if row["engine"].startswith(RESIDUE)} == {"False"}
    assert {row["compiled"] for row in rows if not row["engine"].startswith(RESIDUE)} == {""}
    engine = Engine(tiny, CPU, "float32", Output((2,), ("residue",), "float32"))
    assert Loaded({}, engine).is_compiled is False
    engine.model.compile()
    assert Loaded({}, engine).is_compiled is True


def test_every_length_is_measured_and_an_engine_embeds_what_its_time_suffices_for(tiny, tmp_path):
    found, title = command.measure_model(request(tiny, tmp_path, (60, 200), 2_000_000, seconds=0.5))
    assert title.startswith("tiny on ")
    assert {row["sample"] for row in table(tmp_path)} == {"60", "200"}
    for row in found:
        assert 0 < row["residues"] < 2_000_000
    found = [row for row in found if row["engine"] != "transformers"]  # if it is installed
    assert {(row["engine"], row["precision"]) for row in found if row["sample"] == "200"} == {
        (EXTRACT, "float32"),
        *((name, "float32") for name in (RESIDUE, MEAN, DISK)),
    }


def test_a_pass_takes_about_its_share_of_the_time_and_holds_a_full_batch():
    sequences = [b"A" * 100] * 100_000

    def embed(given):
        def parts():
            time.sleep(len(given) * 1e-5)
            yield Part([])

        return parts()

    stride = stride_of(Loaded({}), embed, sequences, CPU, 2, 0.4)
    assert 0.1 < len(sequences[::stride]) * 1e-5 < 0.25
    assert stride_of(Loaded({}), embed, sequences, CPU, 2, math.inf) == 2
    stride = stride_of(Loaded({}, least_tokens=50_000 * 102), embed, sequences, CPU, 2, 0.4)
    assert len(sequences[::stride]) == 50_000


def test_rows_are_dropped_as_they_come():
    """Else a pass would hold pinned buffers for all of its batches, which a job never does."""
    alive: list[weakref.ref] = []

    def embed(_):
        for _ in range(10):
            rows = np.zeros((1, 1))
            alive.append(weakref.ref(rows))
            yield Part([rows], None)
            del rows
            assert sum(each() is not None for each in alive) <= 1

    timed(embed, [], CPU)
    assert len(alive) == 10


def test_products_are_not_waited_for_one_by_one(monkeypatch):
    waits, products = [], []
    monkeypatch.setattr(matmul, "synchronize", waits.append)
    matmul_of = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: products.append(1) or matmul_of(x, y))
    assert matmul.matmul_rate(TINY, CPU, torch.float32, 500) > 0
    assert len(products) > 100 * len(waits) / 2


def test_the_products_have_the_shapes_of_the_engines_own(tiny, tmp_path, monkeypatch):
    asked = []
    from lengthwise.benchmark import measure

    monkeypatch.setattr(measure, "matmul_rate", lambda config, device, dtype, tokens: asked.append(tokens) or 1e9)
    command.measure_model(request(tiny, tmp_path, residues=12_000))
    assert set(asked) == {2_046}  # 33 sequences of 62 tokens, of at most 2,048


def test_an_engine_that_fails_is_said_to_and_the_others_are_measured(tiny, tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise torch.OutOfMemoryError("as CUDA raises it")

    monkeypatch.setattr(peers, "load_extract_loop", refused)
    monkeypatch.setattr(contenders, "_to_disk", lambda *_: lambda _: 1 / 0)
    found, _ = command.measure_model(request(tiny, tmp_path))
    status = {(row["engine"], row["precision"]): row["status"] for row in found}
    assert status[EXTRACT, "float32"] == "out of memory"
    assert status[DISK, "float32"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in capsys.readouterr().out
    (bfloat16,) = (row for row in found if row["precision"] == "bfloat16" and row["engine"] == RESIDUE)
    assert bfloat16["residues_per_second"] > 0
    assert bfloat16["times_extract"] is None


def test_what_would_begin_after_the_last_minute_is_left_out(tiny, tmp_path, capsys):
    found, _ = command.measure_model(request(tiny, tmp_path, deadline=time.time()))
    assert found == []
    assert "no time left for Lengthwise" in capsys.readouterr().out


def pid_of(_: command.Request) -> tuple[list, str]:
    return [], f"process {os.getpid()}"


def test_each_model_has_a_process_of_its_own(tmp_path, capsys):
    given = argparse.Namespace(device="cpu", minutes=1, out=tmp_path, checkpoint=None, model=["a", "b"], length=[60])
    given.residues = given.fasta = given.threads = None
    given.rounds, given.seconds, given.emulated, given.esm_cpp = 1, 1, False, tmp_path
    assert command.run(given, pid_of) == 0
    pids = [line for line in capsys.readouterr().out.splitlines() if line.startswith("process ")]
    assert len({*pids, f"process {os.getpid()}"}) == 3


def run_command(*arguments: object, **options) -> subprocess.Popen:
    command_line = [sys.executable, "-m", "lengthwise", "benchmark", *map(str, arguments)]
    return subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def test_each_engine_is_printed_as_it_ends_and_what_is_left_out_is_said(tiny, tmp_path, capsys):
    found, title = command.measure_model(request(tiny, tmp_path, (60, 90), residues=600))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"{title}: 60: 10 sequences, 600 residues; 90: 6 sequences, 540 residues, 2 rounds; tables in "
    )
    for row in found:
        (end,) = (
            i for i, x in enumerate(lines) if x.startswith(f"{row['sample']}: {row['engine']}, {row['precision']}: ")
        )
        assert f" {row['residues_per_second']:,.0f} residues/s, {row['times_extract']:.2f} times" in lines[end]
        # By the last round's line the loading is long over.
        loading, round_ends = f"loading {row['engine']}", f"{row['sample']}, round 2 of 2: "
        assert next(i for i, x in enumerate(lines) if x.startswith(loading.split(",")[0])) < end
        assert end < next(i for i, x in enumerate(lines) if x.startswith(round_ends))
    (line,) = (line for line in lines if line.startswith("left out, esm-cpp: "))
    assert line.endswith("esm_cpp_requirements.txt")


def test_an_engine_whose_time_is_over_is_printed_once(tiny, tmp_path, capsys):
    command.measure_model(request(tiny, tmp_path, residues=6_000, rounds=50, seconds=0.01))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"60: {EXTRACT}, float32: ") for line in lines) == 1


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN can be limited on x86 alone")
def test_a_type_that_the_device_emulates_is_left_out_unless_asked_for(tiny, tmp_path):
    """oneDNN, limited to AVX2, has no products in bfloat16."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS), "ONEDNN_MAX_CPU_ISA": "AVX2"}
    for more, precisions in ((), {"float32"}), (("--emulated",), {"float32", "bfloat16"}):
        arguments = ["--checkpoint", tiny, "--device", "cpu", "--out", tmp_path, "--residues", 600, "--rounds", 1]
        said, _ = run_command(*arguments, *more, env=environment, cwd=tmp_path).communicate()
        assert {row["precision"] for row in table(tmp_path)} == precisions
        assert ("left out, bfloat16: this device emulates it" in said) == (not more)


def test_git_ignores_the_folder_of_the_tables():
    root = SCRIPTS.parent
    (out,) = {_parser().parse_args(["benchmark"]).out, _parser().parse_args(["benchmark"]).esm_cpp.parent}
    if not (root / ".git").exists():
        pytest.skip("this is no clone")
    assert subprocess.run(["git", "check-ignore", "-q", f"{out}/"], cwd=root).returncode == 0


def test_an_interrupted_run_ends_at_once_with_what_it_measured(tiny, tmp_path):
    """The command alone gets the signal, as by `kill -INT`: it does not wait for the measurement."""
    arguments = ["--checkpoint", tiny, "--device", "cpu", "--out", tmp_path, "--residues", 2_000_000]
    run = run_command(*arguments, "--length", *range(60, 110), env=os.environ | {"PYTHONPATH": str(SCRIPTS)})
    try:
        ends = time.monotonic() + 120
        while not (tmp_path / "tiny.tsv").exists():
            assert run.poll() is None, run.stdout.read()
            assert time.monotonic() < ends
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert f"interrupted; what was measured is in {tmp_path}" in output
    assert "Traceback" not in output
    assert not (tmp_path / "work").exists()


def test_a_killed_run_leaves_what_it_measured_and_no_process(tiny, tmp_path):
    lengths = range(60, 110)
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    arguments = ["--checkpoint", tiny, "--device", "cpu", "--out", tmp_path, "--residues", 2_000_000]
    run = run_command(*arguments, "--length", *lengths, env=environment)
    try:
        ends = time.monotonic() + 120
        while not (tmp_path / "tiny.tsv").exists() or not table(tmp_path)[-1]["residues_per_second"]:
            assert run.poll() is None, run.stdout.read()
            assert time.monotonic() < ends
            time.sleep(0.1)
        children = psutil.Process(run.pid).children(recursive=True)
    finally:
        run.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(children, timeout=20)
    assert left == []
    measured = [row for row in table(tmp_path) if row["residues_per_second"]]
    assert {EXTRACT, RESIDUE, MEAN, DISK} <= {row["engine"] for row in measured}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.md", "tiny.tsv"]  # no weights and no rows
    assert measured[0]["engine"] in (tmp_path / "tiny.md").read_text()


def test_torch_numpy_safetensors_and_fair_esm_suffice_with_three_more_for_rows_on_disk(tiny, tmp_path):
    """A GPU machine may have little else."""
    stubs = tmp_path / "absent"
    stubs.mkdir()
    for name in ABSENT:
        (stubs / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is absent')\n")
    environment = os.environ | {"PYTHONPATH": f"{stubs}{os.pathsep}{SCRIPTS}"}
    for more, engines in ((), {EXTRACT, RESIDUE, MEAN, DISK}), (("pyarrow", "crc32c"), {EXTRACT, RESIDUE, MEAN}):
        for name in more:
            (stubs / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is absent')\n")
        arguments = ["--checkpoint", tiny, "--device", "cpu", "--out", tmp_path, "--residues", 600, "--rounds", 1]
        run = run_command(*arguments, env=environment, cwd=tmp_path)
        said, _ = run.communicate()
        assert run.returncode == 0, said
        assert "left out, transformers: transformers is absent; the extra [benchmark] has it" in said.splitlines()
        assert "left out, streamed weights: psutil is absent" in said.splitlines()
        assert {row["engine"] for row in table(tmp_path)} == engines


def test_random_sequences_have_the_length_and_the_number_of_residues():
    sequences = random_sequences(300, 1000)
    assert [len(sequence) for sequence in sequences] == [300] * 3


def test_large_models_repeat_a_layer_and_embed_as_fair_esm_does(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MOST_PARAMETERS", 0)
    path = tmp_path / "repeated.pt"
    weights.write_weights(path, ModelConfig(24, 64, 2))
    assert path.stat().st_size < 3 * 4 * ModelConfig(1, 64, 2).parameters
    engine = Engine(path, CPU, "float32", Output((24,), ("residue",), "float32"))
    sequences = random_sequences(60, 600)
    (result,) = engine.embed([sequences])
    expected = np.concatenate(peers.reference(path, sequences, CPU))
    np.testing.assert_allclose(result.arrays["layer_24"], expected, atol=1e-4)


@pytest.fixture
def gpu_of_words(tmp_path, monkeypatch):
    """A stand-in for nvidia-smi, which says what it was asked."""
    facts = SimpleNamespace(uuid="0a-b", total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '*--id=GPU-0a-b*--query-gpu=driver_version,clocks.max.sm,*) echo "580.1, 1980, 2619, [N/A]";;\n'
        '*--id=GPU-0a-b*--query-gpu=clocks.sm,power.draw*) echo "1410, 698.5";;\n'
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return program


def test_the_card_says_its_driver_and_its_clocks_while_it_works(gpu_of_words, monkeypatch):
    cuda = torch.device("cuda")
    said = card.description(cuda)
    assert "NVIDIA H100 of 80.0 GB, driver 580.1," in said
    assert "at most 1980 MHz (memory 2619 MHz) and ? W" in said
    with card.sampled(cuda) as clocks:
        assert clocks == {}
    assert clocks == {"clock_mhz": 1410.0, "watts": 698.5}
    gpu_of_words.write_text("#!/bin/sh\necho Field is not a valid field to query.\nexit 2\n")
    with card.sampled(cuda) as clocks:
        pass
    assert clocks == {}
    monkeypatch.setenv("PATH", "")
    with card.sampled(cuda) as clocks:
        pass
    assert clocks == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(capsys):
    assert main(["benchmark", "--device", "cuda"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_fasta_is_read_with_rejected_records_left_out(tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nmkv*\n>b\nM-K\n>c\nWWW\n")
    assert read_fasta(tmp_path / "in.fasta") == [b"MKV", b"WWW"]
