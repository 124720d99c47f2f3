"""Plan: which sequences no finished shard holds yet, cut into shards and jobs.

A job's spec is an immutable Parquet file named by its content. Planning again with the same inputs gives the same specs; a
new FASTA adds specs for its new sequences only.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.costs import forecast_seconds
from lengthwise.plan.external_sort import Ordered
from lengthwise.plan.job_requests import ask
from lengthwise.plan.work_orders import WorkOrders, work_order_table, write_work_order
from lengthwise.store.layout import layout
from lengthwise.store.paths import job_record_path
from lengthwise.store.settings import require, shape_of
from lengthwise.store.sizes import bytes_per_sequence
from lengthwise.system.database import out_of_core
from lengthwise.system.files import atomic, read_json, scratch_folder

JOBS_COLUMNS = ["job", "datasets", "shards", "sequences", "residues", "longest", "forecast_bytes", "forecast_seconds"]

JOBS_COLUMNS += ["mem_mb", "disk_mb", "runtime_minutes"]

# A kill costs at most one shard, so none is forecast to take longer than this.
SHARD_SECONDS = 120.0

# A job's spec is made and read whole: this bounds the memory for its sequences, each of which takes about so much beside its
# residues, as a row here and as Python's objects in `embed`.
JOB_BYTES, BYTES_BESIDE = 1 << 28, 150

# Snakemake looks at every job of a plan; jobs grow rather than become more.
MAX_JOBS = 5_000

# Of the memory for planning, a part that is sorted at once takes this share.
_PARTS_IN_MEMORY = 8


@dataclass(frozen=True)
class Sizes:
    """How large jobs and shards may be; jobs are larger where there would be more than `MAX_JOBS` new ones."""

    job_seconds: float
    shard_bytes: int
    slowdown: float = 1.0  # seconds that a forecast second takes, see `lengthwise.plan.throughput.slowdown`


def plan(
    store: Path,
    sequences: dict[str, Path],
    sizes: Sizes,
    jobs_tsv: Path,
    memory_bytes: int = 1 << 30,
    retry_rejected: bool = False,
) -> pd.DataFrame:
    """Write the specs of the work that is left, and the table of all jobs that the datasets stand on.

    Parameters
    ----------
    store
        The store, with its settings.json.
    sequences
        {dataset: its sequences.parquet}.
    sizes
        Caps of new jobs and shards; specs that exist keep theirs.
    jobs_tsv
        The table to write; its rows are what this returns.
    memory_bytes
        What joins and sorts may take before they spill to disk.
    retry_rejected
        Whether sequences that no device's memory held so far are work again.

    Raises
    ------
    LengthwiseError
        Settings, or a shard of a commit whose spec is gone, are damaged.
    """
    settings, files = require(store), list(sequences.values())
    with scratch_folder(jobs_tsv.parent / ".spill") as spill:
        with _work_orders(store, files, spill, memory_bytes) as work_orders:
            users, todo = work_orders.standing(retry_rejected)
        ordered = Ordered(files, todo, spill, memory_bytes // _PARTS_IN_MEMORY)
        for job, datasets in _write_work_orders(store, settings, sizes, ordered):
            # An earlier try of the same sequences is taken back; its shards stay until the next try replaces them.
            job_record_path(store, job).unlink(missing_ok=True)
            users[job] |= datasets
        with _work_orders(store, files, spill, memory_bytes) as work_orders:
            table = _jobs_table(work_orders, users, list(sequences), settings, sizes.slowdown)
    table = table.join(ask(table, settings, read_json(store / "weights.json", "bytes")["bytes"]))[JOBS_COLUMNS]
    with atomic(jobs_tsv) as part:
        table.to_csv(part, sep="\t", index=False)
    return table


def read_jobs(jobs_tsv: Path) -> pd.DataFrame:
    """The table that `plan` wrote."""
    return pd.read_csv(jobs_tsv, sep="\t", dtype={"job": str, "datasets": str}, keep_default_na=False)


def cut(costs: np.ndarray, cap: float, counts: np.ndarray | int = 1) -> np.ndarray:
    """Greedy cuts of consecutive items into runs that each cost at most `cap`; one item alone may cost more.

    Parameters
    ----------
    costs
        Of an item, or of each of `counts` items that follow one another.
    cap
        In the same unit.
    counts
        How many items have each cost.

    Returns
    -------
    The bounds of the runs, from 0 to the number of items.
    """
    items = np.append(0, np.cumsum(np.broadcast_to(counts, np.shape(costs))))
    total = np.append(0.0, np.cumsum(costs * counts))  # the cost of so many items; between these it grows evenly
    bounds = [0]
    while bounds[-1] < items[-1]:
        cost = np.interp(bounds[-1], items, total)
        stop = int(np.interp(cost + cap * (1 + 1e-12), total, items))
        bounds.append(max(stop, bounds[-1] + 1))
    return np.array(bounds)


@contextmanager
def _work_orders(store: Path, files: list[Path], spill: Path, memory_bytes: int) -> Iterator[WorkOrders]:
    """The store's specs, to be asked within this memory; what does not fit is spilled."""
    with out_of_core("plan", memory_bytes, spill / "duckdb", threads=2) as database:
        try:
            yield WorkOrders(store, files, database, spill)
        except (duckdb.InvalidInputException, pa.ArrowInvalid) as error:
            what = str(error).splitlines()[0]
            raise LengthwiseError(f"{store}: a damaged file ({what}); remove that file and run again") from error


def cut_work(lengths: np.ndarray, counts: np.ndarray, settings: dict, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of shards and of jobs, in sequences sorted by length; so many sequences have each length."""
    seconds = sizes.slowdown * forecast_seconds(lengths, shape_of(settings), settings["device"])
    most = np.broadcast_to(lengths[-1], counts.sum())
    overhead = len(layout(most, settings)[0]) + 8  # the header, and the end of the last sequence in offsets
    cost = np.maximum(
        seconds / min(SHARD_SECONDS, sizes.job_seconds),
        bytes_per_sequence(lengths, settings) / (sizes.shard_bytes - overhead),
    )
    shards = cut(cost, 1.0, counts)

    def per_shard(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(values * counts)])  # piecewise linear in the number of sequences
        return np.diff(np.interp(shards, np.concatenate([[0], np.cumsum(counts)]), sums))

    job_cost = np.maximum(per_shard(seconds) / sizes.job_seconds, per_shard(lengths + BYTES_BESIDE) / JOB_BYTES)
    jobs = cut(job_cost, 1.0)
    if len(jobs) - 1 > MAX_JOBS:
        jobs = cut(job_cost, job_cost.sum() / MAX_JOBS + job_cost.max())
    return shards, shards[jobs]


def _write_work_orders(store: Path, settings: dict, sizes: Sizes, work: Ordered) -> Iterator[tuple[str, set[int]]]:
    """Cut new work into shards and jobs, and write one spec per job; yields jobs and the numbers of their datasets."""
    if not len(work.lengths):
        return
    shards, jobs = cut_work(work.lengths, work.counts, settings, sizes)
    rows = _Rows(work.tables())
    for start, stop in itertools.pairwise(jobs.tolist()):
        taken = rows.take(stop - start)
        datasets = set(pc.unique(taken.column("source")).to_pylist())
        taken = taken.filter(pc.invert(taken.column("repeats"))).select(["digest", "length", "sequence"])
        first, last = np.searchsorted(shards, [start, stop])
        work_order = work_order_table(taken, shards[first : last + 1] - start, settings)
        yield write_work_order(store, pc.unique(work_order.column("shard")).to_pylist(), work_order), datasets


class _Rows:
    """Takes any number of sequences at a time, each with its repeats, from tables in order."""

    def __init__(self, tables: Iterator[pa.Table]):
        self.tables, self.rest = tables, next(tables)

    def take(self, n: int) -> pa.Table:
        parts = []
        while n:
            firsts = np.flatnonzero(~self.rest.column("repeats").to_numpy())
            stop = firsts[n] if n < len(firsts) else len(self.rest)
            parts.append(self.rest[:stop])
            self.rest = self.rest[stop:]
            n -= min(n, len(firsts))
            if n:
                self.rest = next(self.tables)
        return pa.concat_tables(parts)


def _jobs_table(
    work_orders: WorkOrders, users: dict[str, set[int]], datasets: list[str], settings: dict, slowdown: float
) -> pd.DataFrame:
    """One row for each job that some dataset stands on."""
    jobs = sorted(users)
    table, by_length = work_orders.sizes(jobs)
    table["job"] = jobs
    table["datasets"] = [",".join(sorted(datasets[i] for i in users[job])) for job in jobs]
    # Work is sorted, so a job's sequences have few lengths.
    lengths, counts = by_length["length"].to_numpy(), by_length["sequences"].to_numpy()
    by_length["forecast_bytes"] = bytes_per_sequence(lengths, settings) * counts
    by_length["forecast_seconds"] = (
        slowdown * forecast_seconds(lengths, shape_of(settings), settings["device"]) * counts
    )
    forecast = by_length.groupby("job").agg({"length": "max", "forecast_bytes": "sum", "forecast_seconds": "sum"})
    return table.join(forecast.rename(columns={"length": "longest"}).round({"forecast_seconds": 3}))
