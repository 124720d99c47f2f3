"""The last lines of a run whose jobs are killed: by a signal, for memory, with the run."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import Project, Run, ShardLock, wait_for

from control_group import memory_group
from lengthwise.maintain.cleanup import leftovers

DONE = "results/tiny/datasets/a/manifest.json"
# More than Snakemake's own process needs, and less than that and a job with torch.
TOO_LITTLE_BYTES = 280_000_000


@pytest.fixture
def project(planned, tmp_path) -> Project:
    return planned.copy(tmp_path / "project")


@pytest.fixture
def job(project) -> str:
    (work_order,) = project.store.glob("plan/jobs/*.parquet")
    return work_order.stem


@pytest.fixture
def lock(project, job) -> Iterator[ShardLock]:
    lock = ShardLock(project, job)
    yield lock
    lock.open()


def start(project: Project, lock: ShardLock, *arguments: str) -> subprocess.Popen:
    """Start a run, and wait until its job is in its middle, where it stays."""
    process = project.begin(DONE, *arguments)
    wait_for(lambda: lock.has() or process.poll() is not None)
    assert process.poll() is None, process.stdout.read()
    return process


def end(process: subprocess.Popen) -> Run:
    output, _ = process.communicate(timeout=60)
    return Run(process.returncode, output)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        pytest.param(signal.SIGKILL, "killed by a signal (oom_kill ", id="SIGKILL"),
        pytest.param(signal.SIGSEGV, 'Fatal Python error: Segmentation fault")', id="SIGSEGV", marks=pytest.mark.slow),
    ],
)
def test_a_job_that_is_killed_or_crashes_is_named(project, job, lock, number, words):
    process = start(project, lock)
    lock.kill(number)
    run = end(process)
    assert run.code != 0
    (line,) = run.errors
    assert line.startswith(f"lengthwise: error: embed, job {job}: ")
    assert words in line
    assert "; it had asked for mem_mb=" in line
    assert run.output.rstrip().endswith("Finished work is kept: mend that, then run the same command again.")
    lock.open()
    assert leftovers(project.store)
    assert project.snakemake(DONE).code == 0
    assert leftovers(project.store) == []


def test_a_killed_job_whose_retry_succeeds_is_no_failure(project, lock):
    process = start(project, lock, "--retries", "1")
    lock.kill()
    lock.open()
    run = end(process)
    assert run.code == 0, run.output
    assert run.errors == []
    assert "Records     600" in run.output
    assert leftovers(project.store) == []


def test_of_a_run_that_is_interrupted_no_job_counts_as_killed(project, lock):
    process = start(project, lock)
    os.killpg(process.pid, signal.SIGINT)
    run = end(process)
    lock.open()
    assert run.code != 0
    assert run.errors == []
    assert leftovers(project.store) == []


@pytest.fixture
def small_memory() -> Iterator[Path]:
    with memory_group(TOO_LITTLE_BYTES) as processes:
        yield processes


def test_a_job_that_its_control_group_kills_for_memory_is_named(project, job, small_memory):
    command = ["sh", "-c", f'echo $$ >{small_memory} && exec "$@"', "sh", *project.command(DONE)]
    done = subprocess.run(
        command, cwd=project.folder, env=project.environment, capture_output=True, text=True, timeout=60
    )
    run = Run(done.returncode, done.stdout + done.stderr)
    assert run.code != 0
    (line,) = run.errors
    assert line.startswith(
        f"lengthwise: error: embed, job {job}: killed for memory (oom_kill in {small_memory.parent}/"
    )
    assert "rose by 1; limit: 280 MB); it had asked for mem_mb=" in line
    assert line.endswith("residency: streamed or fewer jobs at once (--resources gpu=1 mem_mb=280)")
