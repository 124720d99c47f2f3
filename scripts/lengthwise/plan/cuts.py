"""Where work, sorted by length, is cut into shards and jobs."""

from dataclasses import dataclass

import numpy as np

from lengthwise.esm2.costs import forecast_seconds
from lengthwise.store.layout import layout
from lengthwise.store.settings import shape_of
from lengthwise.store.sizes import bytes_per_sequence

# A kill loses the shards in progress, so none is forecast to take longer.
MAX_SHARD_SECONDS = 120.0
# A job holds its whole work order in memory.
MAX_WORK_ORDER_BYTES = 1 << 28
# Memory that a sequence of a work order takes beside its residues: its row, and Python's objects.
SEQUENCE_OVERHEAD_BYTES = 150
# Snakemake's time grows with the number of jobs, so a larger plan has larger jobs.
MAX_JOBS = 5_000


@dataclass(frozen=True)
class Sizes:
    """Caps of new jobs and shards. Jobs exceed theirs where a plan would have more than `MAX_JOBS` new ones."""

    job_seconds: float
    shard_bytes: int
    slowdown: float = 1.0  # measured seconds per forecast second, see `lengthwise.plan.throughput.slowdown`


def cut_work(lengths: np.ndarray, counts: np.ndarray, settings: dict, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Cut sequences, sorted by length, into shards and the shards into jobs.

    Parameters
    ----------
    lengths
        [n] distinct lengths in residues, ascending.
    counts
        [n] sequences of each length.
    settings
        The store's settings.
    sizes
        The caps.

    Returns
    -------
    (shards, jobs)
        Bounds, as numbers of sequences, of the shards [shards + 1] and of the jobs [jobs + 1]. Each bound of a job is
        a bound of a shard too.
    """
    seconds = sizes.slowdown * forecast_seconds(lengths, shape_of(settings), settings["device"])
    longest = np.broadcast_to(lengths[-1], counts.sum())
    overhead_bytes = len(layout(longest, settings)[0]) + 8  # the header, and the last entry of offsets
    shard_cost = np.maximum(
        seconds / min(MAX_SHARD_SECONDS, sizes.job_seconds),
        bytes_per_sequence(lengths, settings) / (sizes.shard_bytes - overhead_bytes),
    )
    shards = cut_runs(shard_cost, 1.0, counts)

    def per_shard(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(values * counts)])  # piecewise linear in the number of sequences
        return np.diff(np.interp(shards, np.concatenate([[0], np.cumsum(counts)]), sums))

    job_cost = np.maximum(
        per_shard(seconds) / sizes.job_seconds, per_shard(lengths + SEQUENCE_OVERHEAD_BYTES) / MAX_WORK_ORDER_BYTES
    )
    jobs = cut_runs(job_cost, 1.0)
    if len(jobs) - 1 > MAX_JOBS:
        jobs = cut_runs(job_cost, job_cost.sum() / MAX_JOBS + job_cost.max())
    return shards, shards[jobs]


def cut_runs(costs: np.ndarray, cap: float, counts: np.ndarray | int = 1) -> np.ndarray:
    """Cut consecutive items greedily into runs of at most `cap` in cost; a run of one item may cost more.

    Parameters
    ----------
    costs
        [n] the cost of an item of each group.
    cap
        In the unit of `costs`.
    counts
        [n] consecutive items in each group.

    Returns
    -------
    The bounds of the runs, from 0 to the number of items.
    """
    items = np.append(0, np.cumsum(np.broadcast_to(counts, np.shape(costs))))
    total = np.append(0.0, np.cumsum(costs * counts))  # cost of the first items; linear between two entries
    bounds = [0]
    while bounds[-1] < items[-1]:
        cost = np.interp(bounds[-1], items, total)
        stop = int(np.interp(cost + cap * (1 + 1e-12), total, items))
        bounds.append(max(stop, bounds[-1] + 1))
    return np.array(bounds)
