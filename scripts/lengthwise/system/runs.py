"""Which run works in a folder: noted when it begins, told to a second one."""

import math
import os
import platform
from datetime import datetime
from pathlib import Path

import psutil

from lengthwise.system.files import read_json, write_json

# The time of a process's creation moves with the clock, which may be set meanwhile.
_SLACK_SECONDS = 60


def note_run(path: Path) -> None:
    """Note that this process runs here."""
    began = datetime.now().isoformat(sep=" ", timespec="seconds")
    created = psutil.Process().create_time()  # as psutil computes it, not by `began`: in a container the two may differ
    write_json(path, {"host": platform.node(), "process": os.getpid(), "began": began, "created": created})


def refusal(path: Path) -> str:
    """What somebody whose run the other one's lock refuses should know and do, in one line."""
    unlock = "run snakemake --unlock, then the same command again; jobs that it left at work do no harm"
    if not path.exists():
        return f"another run holds this folder's lock, or was killed: once none is at work, {unlock}"
    run = read_json(path, "host", "process", "began")
    told = f"the run of {run['began']} on {run['host']} (process {run['process']})"
    if run["host"] != platform.node():
        return f"{told} holds this folder's lock: let it finish; if it is gone, {unlock}"
    if _is_alive(run["process"], run.get("created", math.inf)):  # a record of an earlier version lacks it
        return f"{told} is at work here: let it finish; a second one would do the same work"
    return f"{told} was killed: {unlock}"


def _is_alive(process: int, created: float) -> bool:
    """Whether a process is still there; one that was created later only has its number."""
    if not psutil.pid_exists(process):
        return False
    try:
        return psutil.Process(process).create_time() <= created + _SLACK_SECONDS
    except psutil.Error:  # hidden by the system; to take it for alive does no harm
        return True
