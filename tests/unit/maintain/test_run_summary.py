"""The run summary says where the embeddings are, or why the run failed and what to do."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lengthwise.maintain.killed_jobs import Evidence
from lengthwise.maintain.run_summary import (
    failure_lines_of,
    forecast_lines_of,
    success_lines_of,
    working_folder,
)
from lengthwise.plan import forecast
from lengthwise.plan.cuts import Sizes
from lengthwise.system.logging import ERROR_PREFIX

NO_EVIDENCE = Evidence(0, {}, Path("no logs of SLURM"), "")


def test_the_reason_in_the_logs_is_given_once(tmp_path):
    (tmp_path / "logs/ingest").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"logs/ingest/{name}.log").write_text(
            f"10:00:00  working\n{ERROR_PREFIX}in.fasta: the file is empty\n"
        )
    _, reason, *rest = failure_lines_of(tmp_path, [], NO_EVIDENCE)
    assert reason == f"{ERROR_PREFIX}in.fasta: the file is empty"
    assert len(rest) == 1
    assert "mend that, then run the same command again" in rest[0]


def test_without_a_reason_in_the_logs_the_summary_points_to_snakemakes_lines(tmp_path):
    lines = failure_lines_of(tmp_path, [], NO_EVIDENCE)
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


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A shell's folder with a working folder in it, and one beside it; the shell's path goes through a symbolic link."""
    for name in ("real/shell/work", "real/beside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("PWD", str(tmp_path / "link/shell"))
    return tmp_path


@pytest.mark.parametrize(
    ("directory", "working", "seen"),
    [
        (None, "shell", ""),
        (None, "beside", ""),  # a `workdir:` in a Snakefile
        (".", "shell", ""),
        ("work", "shell/work", "work"),
        (Path("./work/"), "shell/work", "work"),
        ("../shell/work", "shell/work", "work"),
        ("{link}/shell/work", "shell/work", "work"),
        ("{link}/shell", "shell", ""),
        ("../beside", "beside", "{link}/beside"),
        ("..", "", "{link}"),
        ("{real}/beside", "beside", "{real}/beside"),
        ("{real}/shell/work", "shell/work", "{real}/shell/work"),
    ],
    ids=str,
)
def test_the_working_folder_is_named_as_the_shell_sees_it(folders, monkeypatch, directory, working, seen):
    def full(path):
        return path and str(path).format(link=folders / "link", real=folders / "real")

    monkeypatch.chdir(folders / "real" / working)
    assert working_folder(full(directory)) == full(seen)


@pytest.mark.parametrize("shell", [None, "", "gone", "relative", "/", "/nowhere"])
def test_a_shells_folder_that_cannot_be_true_is_not_relied_on(folders, monkeypatch, shell):
    if shell is None:
        monkeypatch.delenv("PWD")
    else:
        monkeypatch.setenv("PWD", shell)
    monkeypatch.chdir(folders / "real/shell/work")
    assert working_folder("work") == str(folders / "real/shell/work")


def test_all_paths_of_a_summary_are_those_that_the_shell_sees(small_store, monkeypatch):
    store = small_store()
    store.ingest("a", {"x": "M?V", "y": "MKV"})
    store.run()
    (store.path / "report").mkdir()
    (store.path / "report/index.html").touch()
    monkeypatch.chdir(store.folder)
    plain = success_lines_of(Path("results/tiny"), ["a"], [], 0, 1)
    seen = success_lines_of(Path("results/tiny"), ["a"], [], 0, 1, folder="else where")
    paths = ("results/tiny", "config/config.yaml")
    expected = [re.sub(f"({'|'.join(paths)})", r"else where/\1", line) for line in plain]
    assert seen == expected
    assert sum("else where/" in line for line in seen) == 5
    (store.folder / "shell").mkdir()
    (store.folder / "shell/else where").symlink_to("..")
    assert printed_by(seen, store.folder / "shell") == "y (3, 32)\n"
    assert (
        success_lines_of(store.path, ["a"], [], 0, 1, folder="elsewhere")[:-1]
        == success_lines_of(store.path, ["a"], [], 0, 1)[:-1]
    )


def test_error_lines_name_files_as_the_shell_sees_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logged = {
        "in/a.fasta: is empty": "else/in/a.fasta: is empty",
        "results/m/jobs/1.json: damaged": "else/results/m/jobs/1.json: damaged",
        "no room in results/m/shards; see weights/x.pt": "no room in else/results/m/shards; see else/weights/x.pt",
        "/abs/results/m/x and my-weights/y": "/abs/results/m/x and my-weights/y",
        "no file in/a.fasta here": "no file in/a.fasta here",
    }
    (tmp_path / "results/m/logs").mkdir(parents=True)
    log = tmp_path / "results/m/logs/x.log"
    log.write_text("".join(f"{ERROR_PREFIX}{line}\n" for line in logged))
    named = ["weights", "in/a.fasta", "/abs/b.fasta"]
    for folder, lines in {"else": logged.values(), "": logged.keys()}.items():
        found = failure_lines_of(Path("results/m"), [], NO_EVIDENCE, folder, named)[1:-1]
        assert found == [f"{ERROR_PREFIX}{line}" for line in lines]


def test_the_forecast_is_the_text_that_its_job_wrote(small_store, random_proteins):
    store = small_store()
    store.ingest("a", random_proteins(9))
    made = forecast.forecast(store.path, store.settings, {"a": store.inputs("a")}, Sizes(60, 1 << 20), "auto", 2)
    forecast.write(made, store.path / "forecast")
    written = (store.path / "forecast/forecast.txt").read_text().splitlines()
    assert forecast_lines_of(store.path, 0) == ["", *written]
    assert forecast_lines_of(store.path, time.time() + 60) == []
