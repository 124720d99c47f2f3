"""Cleanup before a run is planned: find job records whose shards are missing, and remove what killed runs left."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.system.files import read_json
from lengthwise.system.locks import exclusive_store_lock

_LEFTOVER_ENDINGS = (".tmp", ".spill", ".running")


def broken_job_records(store: Path) -> dict[Path, str]:
    """Find job records that are damaged, or with shards that are missing or have another size.

    Parameters
    ----------
    store
        The store.

    Returns
    -------
    {path of the job record: why, in a few words}. A run embeds these jobs again once their records are removed.
    """
    jobs = store / "jobs"
    if not jobs.is_dir():
        return {}
    files = (entry for folder in _subfolders(store / "shards") for entry in os.scandir(folder))
    size_bytes = {}
    for entry in files:
        with suppress(FileNotFoundError):  # a temporary file that a job at work has renamed
            size_bytes[entry.name] = entry.stat().st_size
    broken = {}
    for job_record in sorted(jobs.glob("*.json")):
        try:
            shards = dict(read_json(job_record, "shards")["shards"])
        except (LengthwiseError, ValueError, TypeError):
            broken[job_record] = "its record is damaged"
            continue
        if missing := [shard for shard, size in shards.items() if size_bytes.get(f"{shard}.safetensors") != size]:
            broken[job_record] = f"the shard {missing[0]} is missing or truncated"
    return broken


def leftovers(store: Path) -> list[Path]:
    """Find temporary files, scratch folders, heartbeats and marks of running rules.

    While nothing works in the store, killed processes left them.
    """
    found = list(store.glob("running/*.json"))
    for folder, folders, files in os.walk(store):
        hidden = [name for name in (*folders, *files) if name.startswith(".") and name.endswith(_LEFTOVER_ENDINGS)]
        found += [Path(folder, name) for name in hidden]
        folders[:] = set(folders) - set(hidden)
    return sorted(found)


def remove_leftovers(store: Path) -> None:
    """Remove the leftovers that this user may remove; none while a run or a job works in the store."""
    with suppress(LengthwiseError), exclusive_store_lock(store):
        for path in leftovers(store):
            with suppress(OSError):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder and its content."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _subfolders(path: Path) -> list[str]:
    return [entry.path for entry in os.scandir(path) if entry.is_dir()] if path.is_dir() else []
