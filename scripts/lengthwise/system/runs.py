"""The record of the run in a working folder, which explains the folder's lock to a second run."""

import math
import os
import platform
from datetime import datetime
from pathlib import Path

import psutil

from lengthwise.system.files import read_json, write_json

# A process's creation time shifts when the system clock is set.
_CREATION_TOLERANCE_SECONDS = 60


def record_run(path: Path) -> None:
    """Write the host, process id and start of this run to the JSON file `path`."""
    began = datetime.now().isoformat(sep=" ", timespec="seconds")
    created = psutil.Process().create_time()  # in a container it may differ from `began`
    write_json(path, {"host": platform.node(), "process": os.getpid(), "began": began, "created": created})


def explain_lock(path: Path) -> str:
    """Return one line for the user of a second run: who holds the folder's lock, and what to do."""
    unlock = "run snakemake --unlock, then the same command again; jobs of that run that are still running do no harm"
    if not path.exists():
        return f"another run holds this folder's lock, or was killed: once no run is at work, {unlock}"
    run = read_json(path, "host", "process", "began")
    first_run = f"the run of {run['began']} on {run['host']} (process {run['process']})"
    if run["host"] != platform.node():
        return f"{first_run} holds this folder's lock: let it finish; if it is gone, {unlock}"
    if _is_alive(run["process"], run.get("created", math.inf)):  # records of earlier versions lack "created"
        return f"{first_run} is at work here: let it finish; a second run would do the same work"
    return f"{first_run} was killed: {unlock}"


def _is_alive(process: int, created: float) -> bool:
    """Whether the process exists. A process created later reuses the id."""
    if not psutil.pid_exists(process):
        return False
    try:
        return psutil.Process(process).create_time() <= created + _CREATION_TOLERANCE_SECONDS
    except psutil.Error:  # the system hides the process; assume it is alive, which only means to wait
        return True
