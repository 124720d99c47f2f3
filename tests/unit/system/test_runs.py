"""What a second run in the same folder prints."""

import os
import platform
import subprocess

import psutil

from lengthwise.system.files import read_json, write_json
from lengthwise.system.runs import explain_lock, record_run


def test_a_running_run_asks_the_user_to_wait(tmp_path):
    record_run(tmp_path / "run.json")
    assert "is at work here: let it finish" in explain_lock(tmp_path / "run.json")
    assert "--unlock" not in explain_lock(tmp_path / "run.json")


def test_a_killed_run_is_named_and_needs_unlock(tmp_path):
    record_run(tmp_path / "run.json")
    gone = subprocess.Popen(["true"])
    gone.wait()
    record = read_json(tmp_path / "run.json")
    write_json(tmp_path / "run.json", record | {"process": gone.pid})
    assert "was killed: run snakemake --unlock" in explain_lock(tmp_path / "run.json")


def test_a_later_process_with_the_id_of_a_killed_run_is_not_that_run(tmp_path):
    record_run(tmp_path / "run.json")
    record = read_json(tmp_path / "run.json")
    write_json(tmp_path / "run.json", record | {"created": psutil.Process().create_time() - 3600})
    assert "was killed: run snakemake --unlock" in explain_lock(tmp_path / "run.json")


def test_a_record_of_an_earlier_version_is_judged_by_its_process_id(tmp_path):
    record = {"host": platform.node(), "process": os.getpid(), "began": "2024-05-01 12:00:00"}
    write_json(tmp_path / "run.json", record)
    assert "the run of 2024-05-01 12:00:00" in explain_lock(tmp_path / "run.json")
    assert "is at work here: let it finish" in explain_lock(tmp_path / "run.json")


def test_a_run_whose_process_is_hidden_counts_as_running(tmp_path, monkeypatch):
    record_run(tmp_path / "run.json")

    def hidden(number):
        raise psutil.NoSuchProcess(number)

    monkeypatch.setattr(psutil, "Process", hidden)
    assert "is at work here: let it finish" in explain_lock(tmp_path / "run.json")


def test_a_run_on_another_machine_is_named(tmp_path):
    record_run(tmp_path / "run.json")
    record = read_json(tmp_path / "run.json")
    write_json(tmp_path / "run.json", record | {"host": "login2"})
    assert "on login2" in explain_lock(tmp_path / "run.json")
    assert "if it is gone, run snakemake --unlock" in explain_lock(tmp_path / "run.json")


def test_a_lock_without_a_record_suggests_unlock(tmp_path):
    assert "--unlock" in explain_lock(tmp_path / "run.json")
