"""Prune: list or delete the files of a store that no dataset uses."""

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.maintain.cleanup import leftovers, remove
from lengthwise.plan.planner import read_jobs
from lengthwise.store.manifest import read_manifest
from lengthwise.store.paths import QUARANTINE_ENDING, job_record_path, work_order_path
from lengthwise.system.files import read_json
from lengthwise.system.locks import exclusive_store_lock


def prune(store: Path, delete: bool = False) -> dict[Path, int]:
    """Find the files that no dataset uses, and delete them on request. Without `delete` it needs no permission to write.

    A dataset is in use while its folder in ``datasets/`` exists or the plan has it. A job in use keeps all its files. Unused
    are shards, metrics, work orders and job records of other jobs; tables of inputs that were removed; leftovers of killed
    processes; quarantined files; and GPU code that earlier versions kept in ``compiled/``.

    Parameters
    ----------
    store
        The store.
    delete
        Delete the files too.

    Returns
    -------
    {path: bytes} of the unused files and folders.

    Raises
    ------
    LengthwiseError
        A run or a job works in the store, or a missing or damaged file leaves unknown what is in use.
    """
    if not (store / "settings.json").exists():
        raise LengthwiseError(f"{store}/settings.json: No such file; only a store with its settings is pruned")
    with exclusive_store_lock(store, required=delete):
        unused = {path: _size_bytes(path) for path in _unused(store)}
        if delete:
            for path in unused:
                remove(path)
    return unused


def _unused(store: Path) -> list[Path]:
    """Job records come first: a job without one counts as not made, so a deletion can stop anywhere."""
    jobs, shards, datasets = _used(store)
    inputs = [folder for folder in sorted(store.glob("inputs/*")) if folder.name not in datasets]
    folders = [*inputs, *store.glob("compiled")]
    others = (*store.rglob(f"*{QUARANTINE_ENDING}"), *leftovers(store))
    return [
        *_not_in(jobs, store.glob("jobs/*.json")),
        *_not_in(shards, store.glob("shards/*/*.safetensors")),
        *_not_in(shards, store.glob("metrics/**/*.parquet")),
        *_not_in(jobs, store.glob("plan/jobs/*.parquet")),
        *folders,
        *(path for path in others if not {*folders} & {*path.parents}),
    ]


def _used(store: Path) -> tuple[set[str], set[str], set[str]]:
    """The jobs of the plan and the manifests, all shards of these jobs, and the datasets."""
    if not (store / "plan" / "jobs.tsv").exists():
        raise LengthwiseError(f"{store}: no plan here (no plan/jobs.tsv); run snakemake, or give results/<model>")
    planned = read_jobs(store / "plan" / "jobs.tsv")
    jobs: set[str] = set(planned["job"])
    shards: set[str] = set()
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
    """The shards of a job: of its job record if it is finished, else of its work order."""
    if job_record_path(store, job).exists():
        return set(read_json(job_record_path(store, job), "shards")["shards"])
    work_order = work_order_path(store, job)
    if not work_order.exists():
        return set()
    try:
        return set(pq.read_table(work_order, columns=["shard"])["shard"].unique().to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise LengthwiseError(f"{work_order}: damaged; run snakemake, which makes it again, and then prune") from error


def _not_in(used: set[str], paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.stem not in used)


def _size_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)
    return path.stat().st_size


def run(store: Path, delete: bool) -> int:
    """Print the unused files, and delete them on request; returns the exit code."""
    unused = prune(store, delete)
    for path, size_bytes in unused.items():
        print(f"{size_bytes:>16,}  {path}")
    what = "deleted" if delete else "that no dataset uses" + ("; --delete deletes it" if unused else "")
    print(f"{sum(unused.values()):>16,}  bytes {what}")
    return 0
