"""The disk check: whether the file system has room for what a plan will write."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.store.paths import job_record_path, shard_path, work_order_path
from lengthwise.system.text import size


def require_space(store: Path, jobs: pd.DataFrame, exports_bytes: int = 0) -> None:
    """Refuse work that the store's file system cannot hold.

    Parameters
    ----------
    store
        The store.
    jobs
        The table of `lengthwise.plan.planner.plan`.
    exports_bytes
        Bytes of the exports still to be written, see `lengthwise.store.sizes.missing_bytes`.

    Raises
    ------
    LengthwiseError
        The unfinished jobs and the exports have more bytes to write than are free.
    """
    unfinished = unfinished_jobs(store, jobs)
    needed, free = int(unfinished["forecast_bytes"].sum()) + exports_bytes, shutil.disk_usage(store).free
    if needed > free:  # only then, because reading thousands of work orders takes seconds
        needed -= sum(_finished_bytes(store, job) for job in unfinished["job"])
    if needed > free:
        exports = f", {size(exports_bytes)} of them for exports," if exports_bytes else ""
        raise LengthwiseError(
            f"{store}: {size(needed)} are to be written{exports} and {size(free)} are free on its file system; free some space, "
            "set 'results' to another one, store less (see 'snakemake forecast'), or set disk_space: ignore"
        )


def unfinished_jobs(store: Path, jobs: pd.DataFrame) -> pd.DataFrame:
    """The rows of a plan's jobs that have no job record."""
    has_no_record = [not job_record_path(store, job).exists() for job in jobs["job"]]
    return jobs[np.array(has_no_record, bool)]  # the type matters where there is no job


def _finished_bytes(store: Path, job: str) -> int:
    """Bytes of a job's shards that exist."""
    shards = pq.read_table(work_order_path(store, job), columns=["shard"]).column("shard").unique().to_pylist()
    return sum(path.stat().st_size for shard in shards if (path := shard_path(store, shard)).exists())
