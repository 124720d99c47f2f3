"""The time limit of a SLURM job."""

import math
import time

import pytest

from lengthwise.system.slurm import deadline, seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5:07\n", 307), ("1:00:00", 3600), ("2-03:04:05", 183_845), ("0:00", 0), ("UNLIMITED", math.inf), ("", math.inf)],
)
def test_times_of_squeue_become_seconds(text, expected):
    assert seconds(text) == expected


def test_without_a_scheduler_there_is_no_deadline(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert deadline() == math.inf


def test_squeue_is_asked_only_if_the_environment_has_no_end_time(monkeypatch, tmp_path):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 10:00\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline() == pytest.approx(time.time() + 600, abs=5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1234")
    assert deadline() == 1234


def test_without_an_answer_of_squeue_there_is_no_deadline(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline() == math.inf
