"""Where this process runs, and when SLURM will end it."""

import math
import os
import platform
import re
import subprocess
import time

_SQUEUE_SECONDS = 20


def describe_host() -> str:
    """Return the host name, SLURM job and visible GPUs, for a log."""
    variables = {"SLURM job": "SLURM_JOB_ID", "GPU": "CUDA_VISIBLE_DEVICES"}
    return ", ".join(
        [platform.node(), *(f"{what} {os.environ[name]}" for what, name in variables.items() if name in os.environ)]
    )


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
