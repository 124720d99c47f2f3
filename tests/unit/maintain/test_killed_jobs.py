"""The last lines name a job that ended without a word of its own: how, what it had requested, and what to do."""

import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest

from lengthwise.maintain import killed_jobs
from lengthwise.maintain.killed_jobs import Evidence, FailedJob
from lengthwise.maintain.run_summary import failure_lines_of
from lengthwise.system.logging import ERROR_PREFIX, SIGTERM_LINE, running_mark

JOB = "10dd0d57a9e05048"
SINCE = 1_000_000_000.0
COUNTER = Path("/sys/fs/cgroup/memory/user/memory.oom_control")
MEMORY_ADVICE = "run again with --set-resources embed:mem_mb=800 (or so in the profile, if it has set-resources)"

# Texts of real logs: of SLURM 22.05 and, where they differ, of others.
SLURM_LOGS = {
    "killed by SLURM's own sampling": (
        "slurmstepd-localhost: error: StepId=1.0 exceeded memory limit (139747328 > 104857600), being killed\n"
        "slurmstepd-localhost: error: Exceeded job memory limit\n"
        "srun: Job step aborted: Waiting up to 4 seconds for job step to finish.\n"
        "srun: error: localhost: task 0: Killed\n",
        'killed for memory ({log}: "StepId=1.0 exceeded memory limit (139747328 > 104857600), being killed")',
    ),
    "killed by a control group, version 1": (
        "srun: error: localhost: task 0: Out Of Memory\n"
        "slurmstepd-localhost: error: Detected 1 oom-kill event(s) in StepId=2.0. Some of your processes may have been killed"
        " by the cgroup out-of-memory handler.\n",
        'killed for memory ({log}: "Detected 1 oom-kill event(s) in StepId=2.0")',
    ),
    "killed by a control group, version 2": (
        "Command 'python embed.py' died with <Signals.SIGKILL: 9>.\n"
        "slurmstepd: error: Detected 1 oom_kill event in StepId=440575.0. Some of the step tasks have been OOM Killed.\n"
        "srun: error: nid001277: tasks 1-3: Out Of Memory\n"
        "srun: Terminating StepId=440575.0\n"
        "slurmstepd: error: *** STEP 440575.0 ON nid001277 CANCELLED AT 2023-12-05T07:16:01 ***\n",
        'killed for memory ({log}: "Detected 1 oom_kill event in StepId=440575.0")',
    ),
    "killed by a control group, an old SLURM": (
        "slurmstepd: error: Detected 2 oom-kill event(s) in step 3756240.batch cgroup.\n",
        'killed for memory ({log}: "Detected 2 oom-kill event(s) in step 3756240.batch")',
    ),
    "out of time": (
        "slurmstepd-localhost: error: *** STEP 3.0 ON localhost CANCELLED AT 2024-04-20T09:09:37 DUE TO TIME LIMIT ***\n"
        "slurmstepd-localhost: error: *** JOB 3 ON localhost CANCELLED AT 2024-04-20T09:09:37 DUE TO TIME LIMIT ***\n",
        'out of time ({log}: "*** STEP 3.0 ON localhost CANCELLED AT 2024-04-20T09:09:37 DUE TO TIME LIMIT ***")',
    ),
    "preempted": (
        "slurmstepd: error: *** JOB 32391783 ON cn119 CANCELLED AT 2021-06-18T13:05:36 DUE TO PREEMPTION ***\n",
        "preempted or requeued ({log}:",
    ),
    "a node failed": (
        "slurmstepd: error: *** JOB 5 ON cn1 CANCELLED AT 2021-06-18T13:05:36 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR"
        " DETAILS ***\n",
        "its node failed ({log}:",
    ),
    "cancelled": (
        "slurmstepd-localhost: error: *** JOB 4 ON localhost CANCELLED AT 2024-04-20T09:09:37 ***\n"
        "srun: forcing job termination\n",
        'cancelled in SLURM ({log}: "*** JOB 4 ON localhost CANCELLED AT 2024-04-20T09:09:37 ***")',
    ),
    "killed by a signal": (
        "CalledProcessError in file embed.smk, line 51:\n"
        "Command 'set -euo pipefail; python embed.py' died with <Signals.SIGKILL: 9>.\n",
        'killed by a signal ({log}: "died with <Signals.SIGKILL: 9>")',
    ),
}


class Run:
    """A run's store and SLURM's logs, as failed jobs left them."""

    def __init__(self, folder: Path):
        self.store, self.slurm_logs = folder / "results", folder / "slurm"
        self.oom_kills: dict[Path, int] = {}
        self.workflow_log = ""

    def job(self, rule="embed", text="10:00:00  on cn1\n", mark=None, **wildcards) -> FailedJob:
        """A failed job with this text in its log, and with the mark of a process that was killed."""
        wildcards = wildcards or {"job": JOB}
        log = self.store / "logs" / rule / f"{next(iter(wildcards.values()))}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text)
        if mark is not None:
            here = {"host": platform.node(), "slurm_job": None}
            running_mark(log).write_text(json.dumps(here | mark))
        return FailedJob(rule, wildcards, log, {"mem_mb": 400, "runtime": 30})

    def slurm_log(self, text: str, number: int = 7, folder: str = f"rule_embed/{JOB}") -> Path:
        path = self.slurm_logs / folder / f"{number}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def lines(self, *failed: FailedJob) -> list[str]:
        """The error lines among the last lines."""
        evidence = Evidence(SINCE, self.oom_kills, self.slurm_logs, self.workflow_log)
        lines = failure_lines_of(self.store, list(failed), evidence)
        return [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(killed_jobs, "host_total", lambda: 2_000_000_000)
    return Run(tmp_path)


@pytest.fixture
def count_kills(monkeypatch):
    """The kernel's count of kills for memory, now."""

    def set_count(kills: int) -> None:
        monkeypatch.setattr(killed_jobs, "count_oom_kills", lambda: {COUNTER: kills})

    return set_count


@pytest.mark.parametrize(("text", "expected"), SLURM_LOGS.values(), ids=SLURM_LOGS)
def test_slurms_log_says_how_a_job_ended(run, text, expected):
    log = run.slurm_log(text)
    (line,) = run.lines(run.job(mark={"host": "cn1", "slurm_job": "7"}))
    assert line.startswith(f"embed, job {JOB}: {expected.format(log=log)}")
    assert "; it had asked for mem_mb=400, runtime=30: run again" in line


@pytest.mark.parametrize("end", ["killed by SLURM's own sampling", "out of time", "cancelled"])
def test_slurms_reason_takes_the_place_of_a_sigterm(run, end):
    text, expected = SLURM_LOGS[end]
    log = run.slurm_log(text)
    (line,) = run.lines(run.job(text=f"10:00:00  on cn1\n{SIGTERM_LINE}\n"))
    assert expected.format(log=log) in line


def test_a_sigterm_that_slurm_does_not_explain_is_told_as_it_is(run):
    run.slurm_log("srun: error: cn1: task 0: Exited with exit code 1\n")
    (line,) = run.lines(run.job(text=f"{SIGTERM_LINE}\n"))
    assert f"{ERROR_PREFIX}{line}" == SIGTERM_LINE


def test_a_job_that_gave_its_reason_gets_no_second_line(run):
    run.slurm_log(SLURM_LOGS["out of time"][0])
    failed = run.job(text=f"{ERROR_PREFIX}in.fasta: the file is empty\n", mark={})
    assert run.lines(failed) == ["in.fasta: the file is empty"]


@pytest.mark.parametrize(
    ("end", "advice"),
    [
        (
            "killed by SLURM's own sampling",
            f"{MEMORY_ADVICE}, more --retries (each asks for more), a smaller batch_tokens or residency: streamed",
        ),
        ("out of time", f"{MEMORY_ADVICE.replace('mem_mb=800', 'runtime=60')} or more --retries (each asks for more)"),
        ("a node failed", "run again, or with more --retries"),
        ("preempted", "run again, or with more --retries"),
        ("killed by a signal", "run again; if nobody killed it, look for a watchdog"),
    ],
)
def test_each_end_has_its_advice(run, end, advice):
    run.slurm_log(SLURM_LOGS[end][0])
    (line,) = run.lines(run.job())
    assert f": {advice}" in line


def test_batches_are_the_matter_of_embed_alone(run):
    run.slurm_log(SLURM_LOGS["killed by SLURM's own sampling"][0], folder="rule_ingest/a")
    (line,) = run.lines(run.job("ingest", dataset="a"))
    assert line.startswith("ingest, dataset a: killed for memory")
    assert line.endswith("or more --retries (each asks for more)")


def test_the_last_attempt_counts(run):
    first = run.slurm_log(SLURM_LOGS["out of time"][0], number=7)
    os.utime(first, (SINCE + 1, SINCE + 1))
    run.slurm_log(SLURM_LOGS["killed by SLURM's own sampling"][0], number=8)
    (line,) = run.lines(run.job())
    assert "killed for memory" in line


def test_a_log_of_an_earlier_run_tells_nothing_of_this_one(run):
    failed = run.job(mark={})
    for path in (run.slurm_log(SLURM_LOGS["out of time"][0]), running_mark(failed.log)):
        os.utime(path, (SINCE - 1, SINCE - 1))
    assert run.lines(failed) == []


def test_an_arrays_log_is_found_by_its_number(run):
    run.slurm_log(SLURM_LOGS["out of time"][0], number="12_3", folder="rule_embed")
    (line,) = run.lines(run.job(mark={"host": "cn1", "slurm_job": "12_3"}))
    assert "out of time" in line


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("SLURM-job '7' failed due to a node failure, SLURM status is: 'NODE_FAIL'. Failed nodes", "its node failed"),
        ("SLURM-job '7' failed, SLURM status is: 'OUT_OF_MEMORY'. Detailed failure reason", "killed for memory"),
        ("SLURM-job '7' failed, SLURM status is: 'TIMEOUT'. Detailed failure reason", "out of time"),
    ],
)
def test_a_silent_log_leaves_it_to_the_state_that_snakemake_was_told(run, report, expected):
    run.slurm_log("srun: got SIGCONT\n")
    run.workflow_log = f"    message: SLURM-job '6' failed, SLURM status is: 'FAILED'.\n    message: {report}\n"
    (line,) = run.lines(run.job(mark={"host": "cn1", "slurm_job": "7"}))
    assert line.startswith(f"embed, job {JOB}: {expected} (state of SLURM job 7: ")


def test_a_job_of_which_slurm_says_nothing_ended_without_a_word(run):
    run.slurm_log("srun: got SIGCONT\n")
    run.workflow_log = "SLURM-job '7' failed, SLURM status is: 'FAILED'."
    (line,) = run.lines(run.job(mark={"host": "cn1", "slurm_job": "7"}))
    assert line == (
        f"embed, job {JOB}: ended without a word (SLURM job 7 on cn1); it had asked for mem_mb=400, runtime=30: if it needed"
        " more memory or time, run again with --set-resources embed:mem_mb=800 embed:runtime=60"
        " (or so in the profile, if it has set-resources) or more --retries (each asks for more)"
    )


def test_a_kill_for_memory_on_this_machine_is_known_by_the_kernels_count(run, count_kills):
    run.oom_kills = {COUNTER: 2}
    count_kills(3)
    (line,) = run.lines(run.job(mark={}))
    assert line == (
        f"embed, job {JOB}: killed for memory (oom_kill in {COUNTER} rose by 1; limit: 2.0 GB); it had asked for mem_mb=400,"
        " runtime=30: run again with more memory, a smaller batch_tokens, residency: streamed or fewer jobs at once"
        " (--resources gpu=1 mem_mb=2000)"
    )


def test_another_kill_on_this_machine_is_not_called_one_for_memory(run, count_kills):
    run.oom_kills = {COUNTER: 2}
    count_kills(2)
    (line,) = run.lines(run.job(mark={}))
    assert f"killed by a signal (oom_kill in {COUNTER} did not rise)" in line
    assert "run again; if nobody killed it, look for a watchdog (earlyoom, systemd-oomd)" in line


def test_where_kills_are_not_counted_the_line_says_so(run, monkeypatch):
    monkeypatch.setattr(killed_jobs, "count_oom_kills", dict)
    (line,) = run.lines(run.job(mark={}))
    assert "killed by a signal (oom_kill cannot be read here)" in line


def test_the_counts_of_this_machine_tell_nothing_of_another(run, count_kills):
    run.oom_kills = {COUNTER: 2}
    count_kills(3)
    (line,) = run.lines(run.job(mark={"host": "cn1"}))
    assert "ended without a word (on cn1)" in line


def test_a_run_inside_of_a_slurm_job_judges_its_jobs_by_this_machines_counts(run, count_kills, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run.oom_kills = {COUNTER: 2}
    count_kills(3)
    (line,) = run.lines(run.job(mark={"slurm_job": "7"}))
    assert "killed for memory (oom_kill in" in line


def test_a_crash_is_known_by_pythons_own_line(run):
    failed = run.job(
        text='Fatal Python error: Bus error\n\nCurrent thread (most recent call first):\n  File "a.py"\n', mark={}
    )
    (line,) = run.lines(failed)
    assert f'crashed ({failed.log}: "Fatal Python error: Bus error")' in line
    assert line.endswith(f"run again; if it crashes again, {failed.log} says where")


def test_a_failed_job_that_came_to_its_own_end_leaves_the_reason_to_snakemake(run):
    assert run.lines(run.job()) == []  # its outputs are missing, for example


def test_jobs_that_ended_alike_share_a_line(run, count_kills):
    count_kills(0)
    run.oom_kills = {COUNTER: 0}
    jobs = [run.job(mark={}, job=f"{i:016x}") for i in range(40)]
    jobs[7] = replace(jobs[7], requested={"mem_mb": 900, "runtime": 30})
    line, other = run.lines(*jobs, run.job("plan", mark={}, dataset="plan"))
    assert line.startswith("embed, job 0000000000000007 (and 39 other jobs of this rule): killed by a signal")
    assert "asked for mem_mb=900, runtime=30" in line
    assert other.startswith("plan, ")


def test_a_job_that_requested_nothing_is_named_without_a_request(run, count_kills):
    run.oom_kills = {COUNTER: 0}
    count_kills(0)
    failed = FailedJob("fetch_model", {}, run.job("fetch_model", mark={}).log, {})
    (line,) = run.lines(failed)
    assert line.startswith(f"fetch_model: killed by a signal (oom_kill in {COUNTER} did not rise): run again")
