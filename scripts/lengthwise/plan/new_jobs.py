"""New work becomes jobs: one work order for each."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lengthwise.plan.cuts import Sizes, cut_work
from lengthwise.plan.external_sort import SortedSequences
from lengthwise.plan.work_orders import work_order_table, write_work_order


def write_new_jobs(store: Path, settings: dict, sizes: Sizes, work: SortedSequences) -> Iterator[tuple[str, set[int]]]:
    """Cut new work into shards and jobs, and write the work orders.

    Parameters
    ----------
    store, settings
        The store and its settings.
    sizes
        Caps of jobs and shards.
    work
        The new sequences in order; a sequence of several datasets has a row for each.

    Yields
    ------
    (job, datasets)
        The job's name, and the numbers of the datasets that need it.
    """
    if not len(work.lengths):
        return
    shards, jobs = cut_work(work.lengths, work.counts, settings, sizes)
    rows = _RowReader(work.tables())
    for start, stop in itertools.pairwise(jobs.tolist()):
        job_rows = rows.take(stop - start)
        datasets = set(pc.unique(job_rows.column("source")).to_pylist())
        job_sequences = job_rows.filter(pc.invert(job_rows.column("repeats"))).select(["digest", "length", "sequence"])
        first, last = np.searchsorted(shards, [start, stop])
        work_order = work_order_table(job_sequences, shards[first : last + 1] - start, settings)
        yield write_work_order(store, work_order), datasets


class _RowReader:
    """Reads rows by number of distinct sequences from a stream of sorted tables."""

    def __init__(self, tables: Iterator[pa.Table]):
        self.tables, self.unread = tables, next(tables)

    def take(self, n_sequences: int) -> pa.Table:
        """All rows of the next `n_sequences` sequences, repeats included."""
        parts = []
        while n_sequences:
            first_rows = np.flatnonzero(~self.unread.column("repeats").to_numpy())
            stop = first_rows[n_sequences] if n_sequences < len(first_rows) else len(self.unread)
            parts.append(self.unread[:stop])
            self.unread = self.unread[stop:]
            n_sequences -= min(n_sequences, len(first_rows))
            if n_sequences:
                self.unread = next(self.tables)
        return pa.concat_tables(parts)
