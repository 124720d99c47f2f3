"""The records of the run in a working folder: who it is, for a second run, and its inputs, for its jobs."""

import hashlib
import math
import os
import platform
from datetime import datetime
from pathlib import Path

import psutil

from lengthwise.system.files import read_json, stamp, write_json

RUN_RECORD = Path(".snakemake/lengthwise.json")
# A process's creation time shifts when the system clock is set.
_CREATION_TOLERANCE_SECONDS = 60


def this_run() -> dict:
    """Host, process id, start and working folder of this run."""
    began = datetime.now().isoformat(sep=" ", timespec="seconds")
    created = psutil.Process().create_time()  # in a container it may differ from `began`
    return {"host": platform.node(), "process": os.getpid(), "began": began, "created": created, "folder": os.getcwd()}


def record_run(path: Path) -> None:
    """Write `this_run` to the JSON file `path`."""
    write_json(path, this_run())


def inputs_of(datasets: dict[str, list[str]], may_be_made: bool = False) -> dict[str, list[dict]]:
    """{dataset: path, bytes, mtime_ns, ctime_ns of each file} of {dataset: paths}.

    With `may_be_made` a file that is not there has its path alone.

    Raises
    ------
    OSError
        A file is gone.
    """
    return {
        name: [
            {"path": path} if may_be_made and not os.path.exists(path) else {"path": path, **stamp(Path(path))}
            for path in paths
        ]
        for name, paths in datasets.items()
    }


def record_inputs(store: str, inputs: dict[str, list[dict]]) -> None:
    """Write the `inputs_of` a run as it found them when it began, for its jobs: whatever comes, moves or goes meanwhile."""
    write_json(_inputs_path(store), inputs)


def recorded_inputs(store: str) -> dict[str, list[dict]] | None:
    """The inputs of this working folder's run in this store; None if it recorded none."""
    path = _inputs_path(store)
    return read_json(path) if path.exists() else None


def _inputs_path(store: str) -> Path:
    """A file for each store: a workflow may have several modules, and a folder several configs."""
    return (
        Path(".snakemake")
        / f"lengthwise_inputs_{hashlib.sha256(os.path.abspath(store).encode()).hexdigest()[:16]}.json"
    )


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
