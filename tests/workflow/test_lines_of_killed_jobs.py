"""The last lines of a run whose jobs are killed: by a signal, for memory, with the run."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from project import Project, Run, random_sequences

from lengthwise.maintain.cleanup import leftovers

DONE = "results/tiny/datasets/a/manifest.json"
# More than Snakemake's own process needs, and less than that and a job with torch.
TOO_LITTLE_BYTES = 280_000_000


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A project with one job of many shards, planned and not begun."""
    folder = tmp_path_factory.mktemp("last_lines") / "project"
    project = Project.with_tiny_model(folder, a=random_sequences(600, seed=11, longest=300))
    project.configure(model="tiny.pt", inputs=["in/*.fasta"], shard_bytes=400_000, batch_tokens=512)
    run = project.snakemake("results/tiny/plan/jobs.tsv")
    assert run.code == 0, run.output
    return project


@pytest.fixture
def project(planned, tmp_path) -> Project:
    return planned.copy(tmp_path / "project")


@pytest.fixture
def job(project) -> str:
    (work_order,) = project.store.glob("plan/jobs/*.parquet")
    return work_order.stem


def start(project: Project, *arguments: str) -> subprocess.Popen:
    """Start a run, and wait until its job has made a shard."""
    process = project.begin(DONE, *arguments)
    while not project.shards():
        time.sleep(0.01)
        assert process.poll() is None, process.stdout.read()
    return process


def send(project: Project, number: signal.Signals) -> None:
    (job,) = project.script_processes()
    os.kill(job, number)


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
def test_a_job_that_is_killed_or_crashes_is_named(project, job, number, words):
    process = start(project)
    send(project, number)
    run = end(process)
    assert run.code != 0
    (line,) = run.errors
    assert line.startswith(f"lengthwise: error: embed, job {job}: ")
    assert words in line
    assert "; it had asked for mem_mb=" in line
    assert run.output.rstrip().endswith("Finished work is kept: mend that, then run the same command again.")
    assert leftovers(project.store)
    assert project.snakemake(DONE).code == 0
    assert leftovers(project.store) == []


def test_a_killed_job_whose_retry_succeeds_is_no_failure(project):
    process = start(project, "--retries", "1")
    send(project, signal.SIGKILL)
    run = end(process)
    assert run.code == 0, run.output
    assert run.errors == []
    assert "Records     600" in run.output
    assert leftovers(project.store) == []


def test_of_a_run_that_is_interrupted_no_job_counts_as_killed(project):
    process = start(project)
    os.killpg(process.pid, signal.SIGINT)
    run = end(process)
    assert run.code != 0
    assert run.errors == []
    assert leftovers(project.store) == []


@pytest.fixture
def small_memory() -> Path:
    """A control group with little memory, of version 1 or 2: the file that takes in processes."""
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / f"lengthwise-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(TOO_LITTLE_BYTES))  # exists where the controller is there
            yield group / "cgroup.procs"
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip(
        "A KILL BY A CONTROL GROUP WAS NOT TESTED: none can be made here (it needs root and a writable /sys/fs/cgroup)"
    )


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
    assert line.endswith("a smaller batch_tokens or fewer jobs at once (--resources gpu=1 mem_mb=280)")
