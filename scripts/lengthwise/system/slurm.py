"""What this process was given, by a scheduler or a machine: a place, cores, and until when it may run."""

import math
import os
import platform
import re
import subprocess
import time

_SQUEUE_SECONDS = 20


def place() -> str:
    """Where this process runs, for a log: the machine, the SLURM job, the GPUs that it may use."""
    given = {"SLURM job": "SLURM_JOB_ID", "GPU": "CUDA_VISIBLE_DEVICES"}
    return ", ".join(
        [platform.node(), *(f"{what} {os.environ[name]}" for what, name in given.items() if name in os.environ)]
    )


def deadline() -> float:
    """When SLURM is going to end this process, in seconds of the epoch; infinity elsewhere, and where it does not say."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return math.inf
    if end := os.environ.get("SLURM_JOB_END_TIME"):  # of newer versions
        return float(end)
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--format=%L", f"--jobs={job}"],
            capture_output=True,
            text=True,
            timeout=_SQUEUE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return math.inf
    return time.time() + seconds(asked.stdout)


def seconds(text: str) -> float:
    """SLURM's [days-][hours:]minutes:seconds in seconds; infinity for its words, such as UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if not found:
        return math.inf
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
