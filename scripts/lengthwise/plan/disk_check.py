"""Is there room for what a plan is going to write?"""

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
        What exports will take, see `lengthwise.store.sizes.missing_bytes`.

    Raises
    ------
    LengthwiseError
        The jobs that are not committed, and the exports, have more bytes to write than are free.
    """
    unfinished = uncommitted(store, jobs)
    needed, free = int(unfinished["forecast_bytes"].sum()) + exports_bytes, shutil.disk_usage(store).free
    if needed > free:  # reading their specs takes seconds where there are thousands
        needed -= sum(_made_bytes(store, job) for job in unfinished["job"])
    if needed > free:
        exports = f", {size(exports_bytes)} of them for exports," if exports_bytes else ""
        raise LengthwiseError(
            f"{store}: {size(needed)} are to be written{exports} and {size(free)} are free on its file system; free some space, "
            "set 'results' to another one, store less (see 'snakemake forecast'), or set disk_space: ignore"
        )


def uncommitted(store: Path, jobs: pd.DataFrame) -> pd.DataFrame:
    """The jobs of a plan that have work left."""
    return jobs[
        np.array([not job_record_path(store, job).exists() for job in jobs["job"]], bool)
    ]  # there may be no job


def _made_bytes(store: Path, job: str) -> int:
    """Bytes of a job's shards that are there."""
    shards = pq.read_table(work_order_path(store, job), columns=["shard"]).column("shard").unique().to_pylist()
    return sum(path.stat().st_size for shard in shards if (path := shard_path(store, shard)).exists())
