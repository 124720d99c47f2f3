"""What a run puts right before it plans: commits whose shards are gone are withdrawn."""

import os
from pathlib import Path

from lengthwise.files import read_json


def broken_commits(store: Path) -> dict[Path, list[str]]:
    """{commit: its shards that are gone or have another size} of the jobs that must make them again."""
    jobs = store / "jobs"
    if not jobs.is_dir():
        return {}
    files = (entry for folder in _folders(store / "shards") for entry in os.scandir(folder))
    sizes = {entry.name: entry.stat().st_size for entry in files}
    broken = {}
    for commit in sorted(jobs.glob("*.json")):
        shards = dict(read_json(commit, "shards")["shards"])
        if missing := [shard for shard, size in shards.items() if sizes.get(f"{shard}.safetensors") != size]:
            broken[commit] = missing
    return broken


def _folders(path: Path) -> list[str]:
    return [entry.path for entry in os.scandir(path) if entry.is_dir()] if path.is_dir() else []
