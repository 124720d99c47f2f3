"""Prune: find, and delete if asked to, what no dataset of a store uses any more."""

import os
from pathlib import Path

import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.maintain.cleanup import leftovers, remove
from lengthwise.maintain.verify import QUARANTINED
from lengthwise.plan.planner import read_jobs
from lengthwise.store.manifest import read_manifest
from lengthwise.store.paths import job_record_path, work_order_path
from lengthwise.system.files import read_json
from lengthwise.system.locks import alone


def prune(store: Path, delete: bool = False) -> dict[Path, int]:
    """What no dataset uses, as {path: bytes}.

    A dataset is used as long as its folder in ``datasets/`` is there or the plan has it. Jobs are kept or deleted whole. Beside
    shards, metrics, specs and commits these are the tables of inputs that went, temporary files, and what `verify` set aside.

    Parameters
    ----------
    store
        The store.
    delete
        Whether to delete it, too.

    Raises
    ------
    LengthwiseError
        A run or a job is at work, or it is not certain what is used.
    """
    if not (store / "settings.json").exists():
        raise LengthwiseError(f"{store}/settings.json: No such file; only a store with its settings is pruned")
    with alone(store):
        unused = {path: _size(path) for path in _unused(store)}
        if delete:
            for path in unused:
                remove(path)
    return unused


def _unused(store: Path) -> list[Path]:
    """Commits first: without its commit nothing of a job counts."""
    jobs, shards, datasets = _used(store)
    inputs = [folder for folder in sorted(store.glob("inputs/*")) if folder.name not in datasets]
    aside = [path for path in (*store.rglob(f"*{QUARANTINED}"), *leftovers(store)) if not {*inputs} & {*path.parents}]
    return [
        *_others(store, "jobs/*.json", jobs),
        *_others(store, "shards/*/*.safetensors", shards),
        *_others(store, "metrics/**/*.parquet", shards),
        *_others(store, "plan/jobs/*.parquet", jobs),
        *inputs,
        *aside,
    ]


def _used(store: Path) -> tuple[set[str], set[str], set[str]]:
    """The jobs that the plan and the datasets stand on, all their shards, and the datasets."""
    if not (store / "plan" / "jobs.tsv").exists():
        raise LengthwiseError(f"{store}: no plan here (no plan/jobs.tsv); run snakemake, or give results/<model>")
    planned = read_jobs(store / "plan" / "jobs.tsv")
    jobs, shards = set(planned["job"]), set()
    datasets = {name for names in planned["datasets"] for name in names.split(",")}
    for folder in sorted(path for path in store.glob("datasets/*") if path.is_dir()):
        if (folder / "manifest.json").exists():
            manifest = read_manifest(folder / "manifest.json")
            jobs, shards = jobs | set(manifest["jobs"]), shards | set(manifest["shards"])
        elif folder.name not in datasets:
            raise LengthwiseError(
                f"{folder}: has no manifest, so what it uses is unknown; run snakemake to complete it, or remove the folder"
            )
        datasets.add(folder.name)
    for job in jobs:
        shards |= _shards_of(store, job)
    return jobs, shards, datasets


def _shards_of(store: Path, job: str) -> set[str]:
    """What a job made, or is to make."""
    if job_record_path(store, job).exists():
        return set(read_json(job_record_path(store, job), "shards")["shards"])
    work_order = work_order_path(store, job)
    return (
        set(pq.read_table(work_order, columns=["shard"])["shard"].unique().to_pylist())
        if work_order.exists()
        else set()
    )


def _others(store: Path, pattern: str, used: set[str]) -> list[Path]:
    return sorted(path for path in store.glob(pattern) if path.stem not in used)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)
    return path.stat().st_size


def run(store: Path, delete: bool) -> int:
    """Print what no dataset uses, and delete it if asked to."""
    unused = prune(store, delete)
    for path, size in unused.items():
        print(f"{size:>16,}  {path}")
    what = "deleted" if delete else "that no dataset uses" + ("; --delete deletes it" if unused else "")
    print(f"{sum(unused.values()):>16,}  bytes {what}")
    return 0
