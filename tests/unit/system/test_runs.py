"""What a second run is told."""

import json
import os
import platform
import subprocess

import psutil

from lengthwise.system.runs import note_run, refusal


def test_a_run_that_is_alive_is_to_be_waited_for(tmp_path):
    note_run(tmp_path / "run.json")
    assert "is at work here: let it finish" in refusal(tmp_path / "run.json")
    assert "--unlock" not in refusal(tmp_path / "run.json")


def test_a_run_that_was_killed_left_its_lock(tmp_path):
    note_run(tmp_path / "run.json")
    gone = subprocess.Popen(["true"])
    gone.wait()
    noted = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(noted | {"process": gone.pid}))
    assert "was killed: run snakemake --unlock" in refusal(tmp_path / "run.json")


def test_another_process_with_the_number_of_a_killed_run_is_not_that_run(tmp_path):
    note_run(tmp_path / "run.json")
    noted = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(noted | {"created": psutil.Process().create_time() - 3600}))
    assert "was killed: run snakemake --unlock" in refusal(tmp_path / "run.json")


def test_the_record_of_an_earlier_version_goes_by_the_number_alone(tmp_path):
    noted = {"host": platform.node(), "process": os.getpid(), "began": "2024-05-01 12:00:00"}
    (tmp_path / "run.json").write_text(json.dumps(noted))
    assert "the run of 2024-05-01 12:00:00" in refusal(tmp_path / "run.json")
    assert "is at work here: let it finish" in refusal(tmp_path / "run.json")


def test_a_run_whose_process_the_system_hides_is_to_be_waited_for(tmp_path, monkeypatch):
    note_run(tmp_path / "run.json")

    def hidden(number):
        raise psutil.NoSuchProcess(number)

    monkeypatch.setattr(psutil, "Process", hidden)
    assert "is at work here: let it finish" in refusal(tmp_path / "run.json")


def test_a_run_on_another_machine_is_named(tmp_path):
    note_run(tmp_path / "run.json")
    noted = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(noted | {"host": "login2"}))
    assert "on login2" in refusal(tmp_path / "run.json")
    assert "if it is gone, run snakemake --unlock" in refusal(tmp_path / "run.json")


def test_a_lock_of_nobody_known_is_told_as_such(tmp_path):
    assert "--unlock" in refusal(tmp_path / "run.json")
