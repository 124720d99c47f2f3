"""Why a job failed that wrote no error itself: it was killed for memory, ran out of time, crashed, or its node failed."""

import json
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lengthwise.system.control_groups import count_oom_kills
from lengthwise.system.logging import ERROR_PREFIX, running_mark
from lengthwise.system.machine import host_total
from lengthwise.system.slurm import end_in_log, end_in_state, job_number
from lengthwise.system.text import count, size

# What a job requests that can be too little: megabytes of memory, minutes.
REQUESTS = ("mem_mb", "runtime")
_WORDS = {
    "memory": "killed for memory",
    "time": "out of time",
    "node": "its node failed",
    "preempted": "preempted or requeued",
    "cancelled": "cancelled in SLURM",
    "crash": "crashed",
    "signal": "killed by a signal",
    "unknown": "ended without a word",
}


@dataclass(frozen=True)
class FailedJob:
    """A job that failed for good: after its last retry, if it had any."""

    rule: str
    wildcards: dict[str, str]
    log: Path
    requested: dict[str, int]  # by its last attempt: values of REQUESTS, as far as the rule has them

    @property
    def name(self) -> str:
        return ", ".join([self.rule, *(f"{wildcard} {value}" for wildcard, value in self.wildcards.items())])


@dataclass(frozen=True)
class Evidence:
    """Where to look for the end of a job."""

    since: float  # start of the run, seconds of the epoch
    oom_kills: dict[Path, int]  # of `count_oom_kills` at the start of the run
    slurm_logs: Path  # folder of SLURM's own logs
    workflow_log: str  # what the workflow's engine reported in this run, states of SLURM jobs among it


@dataclass(frozen=True)
class _End:
    kind: str  # a key of _WORDS
    source: str  # where that stands, and in which words
    in_slurm: bool = True


def killed_job_lines(failed: list[FailedJob], evidence: Evidence) -> dict[Path, str]:
    """Say of each killed job what ended it, what it had requested, and what to do.

    Parameters
    ----------
    failed
        The failed jobs whose own logs do not say why.
    evidence
        Where to look.

    Returns
    -------
    {log of a job: its error line}. Jobs of one rule that ended in the same way share a line. A job that was not killed has none.
    """
    alike: dict[tuple[str, str, bool], list[tuple[FailedJob, _End]]] = {}
    for job in sorted(failed, key=lambda job: job.name):
        if end := _find_end(job, evidence):
            alike.setdefault((job.rule, end.kind, end.in_slurm), []).append((job, end))
    return {job.log: _error_line(jobs) for jobs in alike.values() for job, _ in jobs}


def _find_end(job: FailedJob, evidence: Evidence) -> _End | None:
    """The end of a killed job, by the most telling source; None if nothing says that it was killed."""
    mark = _read_mark(job, evidence.since)
    slurm_log = _find_slurm_log(job, mark, evidence)
    in_slurm = slurm_log is not None or bool(mark and mark["slurm_job"] != job_number())
    ends = []
    if slurm_log and (found := end_in_log(_read_recent(slurm_log, evidence.since))):
        ends.append(_End(found[0], f'{slurm_log}: "{found[1]}"'))
    if slurm_log and (found := end_in_state(evidence.workflow_log, slurm_log.stem)):
        ends.append(_End(found[0], f"state of SLURM job {slurm_log.stem}: {found[1]}"))
    if crash := _find_crash(job, evidence.since):
        ends.append(_End("crash", f'{job.log}: "{crash}"', in_slurm))
    if mark:
        ends.append(_end_of_marked(mark, in_slurm, evidence.oom_kills))
    return min(ends, key=lambda end: end.kind in ("signal", "unknown"), default=None)


def _read_mark(job: FailedJob, since: float) -> dict[str, str | None]:
    """The mark of a process that was killed in this run; empty if there is none."""
    with suppress(ValueError, TypeError):
        return {"host": None, "slurm_job": None} | json.loads(_read_recent(running_mark(job.log), since))
    return {}


def _find_slurm_log(job: FailedJob, mark: dict[str, str | None], evidence: Evidence) -> Path | None:
    """SLURM's log of the job's last attempt: rule_<rule>/<wildcards>/<SLURM job>.log; of an array's job in another folder."""
    folder = evidence.slurm_logs / f"rule_{job.rule}" / "_".join(job.wildcards.values())
    found = [*folder.glob("*.log")]
    if not found and mark.get("slurm_job"):
        found = [*evidence.slurm_logs.rglob(f"{mark['slurm_job']}.log")]
    times = {log: _modified_time(log) for log in found}
    return max((log for log in found if times[log] >= evidence.since), key=times.__getitem__, default=None)


def _find_crash(job: FailedJob, since: float) -> str | None:
    """The line with which Python reports a crash of native code in a log."""
    found = re.search(r"^Fatal Python error: .+", _read_recent(job.log, since), re.MULTILINE)
    return found and found[0]


def _read_recent(path: Path, since: float) -> str:
    """A file's text; empty if it is older than the run or cannot be read."""
    with suppress(OSError):
        if _modified_time(path) >= since:
            return path.read_text(errors="replace")
    return ""


def _modified_time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _end_of_marked(mark: dict[str, str | None], in_slurm: bool, oom_kills: dict[Path, int]) -> _End:
    """The end of a process that left its mark: on this machine the kernel's counters tell a kill for memory."""
    if in_slurm:
        return _End("unknown", f"SLURM job {mark['slurm_job']} on {mark['host']}")
    if mark["host"] != platform.node():
        return _End("unknown", f"on {mark['host']}", in_slurm)
    for file, kills in count_oom_kills().items():
        if (risen := kills - oom_kills.get(file, kills)) > 0:
            return _End("memory", f"oom_kill in {file} rose by {risen}; limit: {size(host_total())}", in_slurm)
    files = ", ".join(map(str, oom_kills))
    return _End("signal", f"oom_kill in {files} did not rise" if files else "oom_kill cannot be read here", in_slurm)


def _error_line(jobs: list[tuple[FailedJob, _End]]) -> str:
    """One line for jobs of one rule that ended in the same way; requests and advice are of the one that requested most."""
    job, end = max(jobs, key=lambda pair: tuple(pair[0].requested.get(name, 0) for name in REQUESTS))
    others = f" (and {count(len(jobs) - 1, 'other job')} of this rule)" if len(jobs) > 1 else ""
    requested = ", ".join(f"{name}={job.requested[name]}" for name in REQUESTS if name in job.requested)
    asked = f"; it had asked for {requested}" if requested else ""
    return f"{ERROR_PREFIX}{job.name}{others}: {_WORDS[end.kind]} ({end.source}){asked}: {_advice(job, end)}"


def _advice(job: FailedJob, end: _End) -> str:
    less_memory = ["a smaller batch_tokens", "residency: streamed"] if job.rule.endswith("embed") else []
    match end.kind:
        case "memory" if not end.in_slurm:
            fewer_jobs = f"fewer jobs at once (--resources gpu=1 mem_mb={round(host_total() / 1e6)})"
            return _run_again("more memory", *less_memory, fewer_jobs)
        case "memory":
            return _run_again(*_larger_requests(job, "mem_mb"), *less_memory)
        case "time":
            return _run_again(*_larger_requests(job, "runtime"))
        case "unknown":
            return f"if it needed more memory or time, {_run_again(*_larger_requests(job, *REQUESTS))}"
        case "crash":
            return f"run again; if it crashes again, {job.log} says where"
        case "signal":
            return "run again; if nobody killed it, look for a watchdog (earlyoom, systemd-oomd) or a limit (ulimit -a)"
        case _:  # node, preempted, cancelled
            return _run_again("more --retries")


def _larger_requests(job: FailedJob, *names: str) -> list[str]:
    larger = " ".join(f"{job.rule}:{name}={2 * job.requested[name]}" for name in names if name in job.requested)
    option = f"--set-resources {larger} (or so in the profile, if it has set-resources)"
    return [*([option] if larger else []), "more --retries (each asks for more)"]


def _run_again(*ways: str) -> str:
    *others, last = ways
    return f"run again with {', '.join(others)} or {last}" if others else f"run again, or with {last}"
