"""Which run works in a folder: noted when it begins, told to a second one."""

import os
import platform
from datetime import datetime
from pathlib import Path

from lengthwise.files import read_json, write_json


def note_run(path: Path) -> None:
    """Note that this process runs here."""
    began = datetime.now().isoformat(sep=" ", timespec="seconds")
    write_json(path, {"host": platform.node(), "process": os.getpid(), "began": began})


def refusal(path: Path) -> str:
    """What somebody whose run the other one's lock refuses should know and do, in one line."""
    unlock = "run snakemake --unlock, then the same command again; jobs that it left at work do no harm"
    if not path.exists():
        return f"another run holds this folder's lock, or was killed: once none is at work, {unlock}"
    run = read_json(path, "host", "process", "began")
    told = f"the run of {run['began']} on {run['host']} (process {run['process']})"
    if run["host"] != platform.node():
        return f"{told} holds this folder's lock: let it finish; if it is gone, {unlock}"
    if Path(f"/proc/{run['process']}").exists():
        return f"{told} is at work here: let it finish; a second one would do the same work"
    return f"{told} was killed: {unlock}"
