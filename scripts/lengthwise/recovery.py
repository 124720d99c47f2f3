"""What a run puts right before it plans: commits whose shards are gone are withdrawn."""

import os
from pathlib import Path

from lengthwise.files import read_json


def withdraw_broken_commits(store: Path) -> list[str]:
    """Remove each job's commit that names a shard which is no longer there, so that the job makes just that shard again.

    Returns
    -------
    A line for each, for people.
    """
    jobs = store / "jobs"
    if not jobs.is_dir():
        return []
    there = {name.partition(".")[0] for folder in _folders(store / "shards") for name in os.listdir(folder)}
    withdrawn = []
    for commit in sorted(jobs.glob("*.json")):
        missing = [shard for shard in read_json(commit)["shards"] if shard not in there]
        if missing:
            commit.unlink()
            withdrawn.append(
                f"lengthwise: {len(missing)} of job {commit.stem}'s shards are gone ({missing[0]}); they will be made again"
            )
    return withdrawn


def _folders(path: Path) -> list[str]:
    return [entry.path for entry in os.scandir(path) if entry.is_dir()] if path.is_dir() else []
