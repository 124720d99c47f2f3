"""The run summary says where the embeddings are, or why the run failed and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lengthwise.maintain.run_summary import failure_lines_of, success_lines_of
from lengthwise.system.logging import ERROR_PREFIX


def test_the_reason_in_the_logs_is_given_once(tmp_path):
    (tmp_path / "logs/ingest").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"logs/ingest/{name}.log").write_text(
            f"10:00:00  working\n{ERROR_PREFIX}in.fasta: the file is empty\n"
        )
    _, reason, *rest = failure_lines_of(tmp_path, 0)
    assert reason == f"{ERROR_PREFIX}in.fasta: the file is empty"
    assert len(rest) == 1
    assert "mend that, then run the same command again" in rest[0]


def test_without_a_reason_in_the_logs_the_summary_points_to_snakemakes_lines(tmp_path):
    lines = failure_lines_of(tmp_path, 0)
    assert "Snakemake's lines above say why" in lines[1]
    assert "run the same command again to go on" in lines[2]


def lines_of(store) -> list[str]:
    return success_lines_of(store.path, store.datasets, [], 0, 1)


def printed_by(lines: list[str], folder) -> str:
    """What a user gets who pastes the command under "Next"."""
    (command,) = [line.removeprefix("Next ") for line in lines if line.startswith("Next ")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("outputs", "shape"),
    [(["residue", "mean"], "(7, 32)"), (["mean", "residue"], "(7, 32)"), (["mean"], "(32,)"), (["bos"], "(32,)")],
    ids=str,
)
def test_the_next_command_prints_the_shape_of_an_embedding(small_store, outputs, shape):
    store = small_store(outputs=outputs)
    store.ingest("rejected", {"x": "M?V"})
    store.ingest("it's a", {"bad": "M-V", "first": "MKVLAAG", "second": "MKV"})
    store.run()
    assert printed_by(lines_of(store), store.folder) == f"first {shape}\n"


def test_the_next_command_prints_the_records_where_all_were_rejected(small_store):
    store = small_store()
    store.ingest("rejected", {"x": "M?V"})
    store.run()
    assert "invalid_byte" in printed_by(lines_of(store), store.folder)
