"""`python -m lengthwise benchmark` on a pretended card: its events, clocks, memory, partial tables."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from order import CONTEXT_BYTES
from pretend import Card
from pretended_machine import SITE, write_machine

from lengthwise.benchmark.contenders import DISK, EXTRACT, MEAN, RESIDUE, STREAMED
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.costs import result_bytes_per_token
from lengthwise.esm2.shapes import ModelConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHAPE = ModelConfig(2, 32, 2)
# Room for this package's batches and for fair-esm's of short proteins; attention's matrices of long ones do not fit.
CARD = Card(total_bytes=CONTEXT_BYTES + (14 << 20))
SHORT, LONG = 60, 1_500
# It answers, as `nvidia-smi` does, in the order of the query.
NVIDIA_SMI = """#!/bin/sh
case "$*" in
*--id=GPU-00000000-0000-0000-0000-000000000001*clocks.max.sm*) echo "580.1, 1980, 2619, 700.00";;
*--id=GPU-00000000-0000-0000-0000-000000000001*clocks.sm,power.draw*) echo "1410, 698.5";;
*) exit 1;;
esac
"""
# In the place of transformers; its model does not load.
PEER = "def __getattr__(name):\n    if name == 'EsmModel':\n        {}\n    raise AttributeError(name)\n"
FAILS_TO_LOAD = PEER.format("raise ValueError('of another torch')")
CRASHES = PEER.format("import os; os._exit(3)")


def run(folder: Path, transformers: str, *arguments: object) -> SimpleNamespace:
    """The command on a machine with the card, and with a package of this source in the place of transformers."""
    for name in ("machine", "packages", "programs"):
        (folder / name).mkdir()
    write_machine(folder / "machine", CARD)
    (folder / "packages" / "transformers" / "models" / "esm").mkdir(parents=True)
    (folder / "packages" / "transformers" / "models" / "esm" / "modeling_esm.py").touch()
    (folder / "packages" / "transformers" / "__init__.py").write_text(transformers)
    (folder / "programs" / "nvidia-smi").write_text(NVIDIA_SMI)
    (folder / "programs" / "nvidia-smi").chmod(0o755)
    write_random(folder / "tiny.pt", SHAPE)
    given = ["--checkpoint", folder / "tiny.pt", "--device", "cuda", "--out", folder / "out", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "lengthwise", "benchmark", *map(str, given)],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, (SITE, folder / "packages", SCRIPTS))),
            "PATH": f"{folder / 'programs'}{os.pathsep}{os.environ['PATH']}",
            "LENGTHWISE_PRETEND": str(folder / "machine"),
            "LD_LIBRARY_PATH": str(folder / "machine"),
            "CUDA_VISIBLE_DEVICES": "2",  # test_rule.py leases the first
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    with open(folder / "out" / "tiny.tsv") as file:
        rows = {(row["engine"], row["precision"], row["sample"]): row for row in csv.DictReader(file, delimiter="\t")}
    noticed = [json.loads(path.read_text()) for path in (folder / "machine").glob("[0-9]*.json")]
    left = sorted(path.name for path in (folder / "out").iterdir())
    return SimpleNamespace(
        code=done.returncode, output=done.stdout, errors=done.stderr, rows=rows, noticed=noticed, left=left
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    limits = "--rounds", 2, "--seconds", 0.2, "--residues", 6_000
    return run(tmp_path_factory.mktemp("card"), FAILS_TO_LOAD, "--length", SHORT, LONG, *limits)


def test_every_type_has_a_row_and_an_engine_that_fails_says_why(measured):
    failed = {key: row["status"] for key, row in measured.rows.items() if row["status"]}
    assert failed == {
        ("transformers", "float16", str(SHORT)): "ValueError: of another torch",
        (EXTRACT, "float32", str(LONG)): "out of memory",
    }
    assert measured.code == 1  # for transformers alone: what does not fit is no failure
    assert set(measured.rows) - set(failed) == {
        (EXTRACT, "float32", str(SHORT)),
        *((name, "float16", str(length)) for name in (RESIDUE, MEAN, DISK) for length in (SHORT, LONG)),
        *((RESIDUE, precision, str(SHORT)) for precision in ("bfloat16", "float32")),
        (STREAMED, "float16", str(SHORT)),
    }
    assert {row["max_error"] for row in measured.rows.values() if row["status"]} == {""}
    assert measured.left == ["tiny.md", "tiny.png", "tiny.tsv"]


def measured_rows(measured) -> dict[tuple[str, str, str], dict[str, str]]:
    return {key: row for key, row in measured.rows.items() if not row["status"]}


def test_rates_clocks_and_products_are_measured_on_the_card(measured):
    for (engine, _, sample), row in measured_rows(measured).items():
        assert float(row["residues_per_second"]) == pytest.approx(int(row["residues"]) / float(row["seconds"]))
        assert (row["clock_mhz"], row["watts"]) == ("1410.0", "698.5")
        assert float(row["matmul_flops"]) > 0
        assert float(row["share_of_matmul"]) > 0
        assert float(row["load_seconds"]) > 0
        assert bool(row["times_extract"]) == (sample == str(SHORT))  # fair-esm did not fit at the other
        assert row["compiled"] == ("True" if engine.startswith(RESIDUE) else "")
    title = "tiny on NVIDIA Pretended 100 of 0.4 GB, driver 580.1, CUDA 13.0, "
    assert title in measured.output
    assert "at most 1980 MHz (memory 2619 MHz) and 700.00 W" in measured.output


def test_errors_are_those_of_each_type(measured):
    rows = measured_rows(measured)
    for name, precision, most in ((EXTRACT, "float32", 2e-5), (RESIDUE, "float32", 2e-5), (RESIDUE, "bfloat16", 0.2)):
        assert float(rows[name, precision, str(SHORT)]["max_error"]) < most
    for name in (RESIDUE, MEAN, DISK, STREAMED):
        assert 1e-5 < float(rows[name, "float16", str(SHORT)]["max_error"]) < 0.02
        assert float(rows[name, "float16", str(SHORT)]["min_cosine"]) > 0.9999


def test_memory_is_that_of_the_formula(measured):
    """The pretended compiler compiles nothing: two layers in one part hold the sums of both beside q, k and v, 28 D in half."""
    for (engine, precision, _), row in measured_rows(measured).items():
        assert int(row["peak_bytes"]) > 0
        if engine == STREAMED:  # its two layers and the sums of a wave are no batch's
            assert row["share_of_formula"] == ""
        if engine == STREAMED or not engine.startswith(RESIDUE):
            continue
        is_half, tokens = precision != "float32", int(row["batch_tokens"])
        itemsize = 2 if is_half else 4
        taken = SHAPE.bytes_per_token(itemsize) + (4 * SHAPE.embed_dim if is_half else 0)
        assert int(row["peak_bytes"]) / tokens == pytest.approx(taken, rel=0.03)
        stored_bytes = result_bytes_per_token(
            SHAPE.embed_dim, 1, ("mean",) if engine == MEAN else ("residue",), itemsize
        )
        formula = SHAPE.bytes_per_token(itemsize, stored_bytes, compiled=True)
        assert float(row["share_of_formula"]) == pytest.approx(int(row["peak_bytes"]) / (tokens * formula))


def test_the_measurement_has_a_jobs_order_and_settings(measured):
    (used,) = [each for each in measured.noticed if each["counts"].get("kernels")]
    assert used["out_of_order"] == []
    assert used["settings"] == "expandable_segments:True"
    assert used["counts"]["compile"] == 4 * 3  # three parts in three types, and streamed


def test_the_markdown_table_is_the_one_that_is_printed(measured):
    assert f"| {SHORT} | {DISK} | float16 | yes |" in measured.output
    assert "| MHz | W |" in measured.output


def test_a_process_that_crashes_leaves_the_table_so_far_and_a_line(tmp_path):
    found = run(tmp_path, CRASHES, "--length", SHORT, "--rounds", 1, "--residues", 1_000)
    assert found.code == 1
    assert list(found.rows) == [(EXTRACT, "float32", str(SHORT))]
    assert float(found.rows[EXTRACT, "float32", str(SHORT)]["residues_per_second"]) > 0
    assert found.left == ["tiny.md", "tiny.tsv"]  # neither weights nor rows
    (line,) = [line for line in found.errors.splitlines() if "lengthwise: error: tiny: " in line]
    assert "Traceback" not in found.errors
    assert "terminated abruptly" in line
