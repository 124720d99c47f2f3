"""What a run puts right before it plans: commits whose shards are gone are withdrawn, and leftovers of kills removed."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.system.files import read_json
from lengthwise.system.locks import alone


def broken_job_records(store: Path) -> dict[Path, list[str]]:
    """{commit: its shards that are gone or have another size} of the jobs that must make them again."""
    jobs = store / "jobs"
    if not jobs.is_dir():
        return {}
    files = (entry for folder in _folders(store / "shards") for entry in os.scandir(folder))
    sizes = {entry.name: entry.stat().st_size for entry in files}
    broken = {}
    for job_record in sorted(jobs.glob("*.json")):
        shards = dict(read_json(job_record, "shards")["shards"])
        if missing := [shard for shard, size in shards.items() if sizes.get(f"{shard}.safetensors") != size]:
            broken[job_record] = missing
    return broken


def leftovers(store: Path) -> list[Path]:
    """Temporary files, scratch folders and heartbeats; of those who died, if nobody is at work in the store."""
    found = list(store.glob("running/*.json"))
    for folder, folders, files in os.walk(store):
        hidden = [name for name in (*folders, *files) if name.startswith(".") and name.endswith((".tmp", ".spill"))]
        found += [Path(folder, name) for name in hidden]
        folders[:] = set(folders) - {*hidden, "compiled"}  # that is torch's own
    return sorted(found)


def remove_leftovers(store: Path) -> None:
    """Remove what killed runs and jobs left, as far as this user may, unless one is at work."""
    with suppress(LengthwiseError), alone(store):
        for path in leftovers(store):
            with suppress(OSError):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _folders(path: Path) -> list[str]:
    return [entry.path for entry in os.scandir(path) if entry.is_dir()] if path.is_dir() else []
