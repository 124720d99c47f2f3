"""Where this process runs, when SLURM will end it, and what SLURM says of the end of a job."""

import math
import os
import platform
import re
import subprocess
import time

_SQUEUE_SECONDS = 20
# What SLURM writes into the log of a job that it ends. The first pattern found tells the cause: later ones follow from it.
_ENDS = (
    ("memory", r"Detected \d+ oom[-_]kill event(?:s|\(s\))? in (?:step )?\S+\b"),
    ("memory", r"(?:(?:Job|Step) )?\S+ exceeded (?:virtual )?memory limit.*"),
    ("memory", r"Exceeded (?:job|step) memory limit|tasks? \S+: Out Of Memory"),
    ("time", r"\*\*\* .* DUE TO TIME LIMIT \*\*\*"),
    ("node", r"\*\*\* .* (?:DUE TO NODE FAILURE|UNCORRECTABLE MEMORY ERROR).* \*\*\*"),
    ("preempted", r"\*\*\* .* DUE TO (?:PREEMPTION|JOB REQUEUE) \*\*\*"),
    ("cancelled", r"\*\*\* (?:JOB|STEP) .* CANCELLED AT \S+ \*\*\*"),
    ("signal", r"died with <Signals\.\w+: \d+>"),
    ("signal", r"task \d+: (?:Killed|Segmentation fault|Bus error|Illegal instruction|Aborted)"),
)
# The states of failed jobs that name a cause.
_END_STATES = {
    "OUT_OF_MEMORY": "memory",
    "TIMEOUT": "time",
    "DEADLINE": "time",
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
    "PREEMPTED": "preempted",
    "CANCELLED": "cancelled",
}


def describe_host() -> str:
    """Return the host name, SLURM job and visible GPUs, for a log."""
    variables = {"SLURM job": "SLURM_JOB_ID", "GPU": "CUDA_VISIBLE_DEVICES"}
    return ", ".join(
        [platform.node(), *(f"{what} {os.environ[name]}" for what, name in variables.items() if name in os.environ)]
    )


def job_number() -> str | None:
    """Return the number of this process's SLURM job as SLURM's commands show it: 12, or 12_3 in an array."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return os.environ.get("SLURM_JOB_ID")


def deadline() -> float:
    """Return when SLURM will end this process, in seconds since the epoch; infinity without SLURM or without an answer."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return math.inf
    if end := os.environ.get("SLURM_JOB_END_TIME"):  # only newer versions of SLURM set it
        return float(end)
    try:
        squeue = subprocess.run(
            ["squeue", "--noheader", "--format=%L", f"--jobs={job}"],
            capture_output=True,
            text=True,
            timeout=_SQUEUE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return math.inf
    return time.time() + seconds(squeue.stdout)


def seconds(text: str) -> float:
    """Convert SLURM's [days-][hours:]minutes:seconds into seconds; words such as UNLIMITED give infinity."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if not match:
        return math.inf
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def end_in_log(log: str) -> tuple[str, str] | None:
    """Return how a job ended and the words that say it, from the text of its SLURM log; None if the log says nothing.

    The ends: memory, time, node (it failed), preempted, cancelled, signal (for a reason that is not told).
    """
    return next(((kind, found[0]) for kind, pattern in _ENDS if (found := re.search(pattern, log))), None)


def end_in_state(report: str, job: str) -> tuple[str, str] | None:
    """Return how a job ended and its SLURM state, from a text that says "SLURM-job '12' failed, SLURM status is: 'TIMEOUT'"."""
    found = re.search(rf"SLURM-job '{job}' failed.{{0,80}}SLURM status is: '(\w+)'", report)
    return (_END_STATES[found[1]], found[1]) if found and found[1] in _END_STATES else None
