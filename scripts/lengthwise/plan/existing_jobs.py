"""Existing jobs: which of a store's work orders still count, and which sequences none of them holds.

All questions are DuckDB queries over the files, so that memory does not grow with the store.
"""

import os
from collections import defaultdict
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise.esm2.status import Status
from lengthwise.plan.work_orders import WORK_ORDER, replace_work_order, write_work_order
from lengthwise.store.paths import job_record_path, shard_path, work_order_path
from lengthwise.store.shard import Shard
from lengthwise.system.files import read_json


class ExistingJobs:
    """The work orders and job records of a store.

    Parameters
    ----------
    store
        The store.
    sequences
        The `sequences.parquet` of each dataset.
    database
        A fresh DuckDB session with its memory limit.
    folder
        A scratch folder.
    """

    def __init__(self, store: Path, sequences: list[Path], database: duckdb.DuckDBPyConnection, folder: Path):
        self.store, self.sequences, self.database = store, sequences, database
        self.empty = folder / "none.parquet"  # read_parquet refuses an empty list of files
        pq.write_table(WORK_ORDER.empty_table(), self.empty)
        self._view("inputs", sequences, "file_index AS dataset, file_row_number AS row, digest, sequence")

    def select(self, retry_rejected: bool) -> tuple[dict[str, set[int]], list[np.ndarray]]:
        """Select the jobs that count; the sequences that they do not hold are new work.

        - A finished job, one with a job record, counts.
        - An unfinished job counts if the datasets need all of its sequences and no other counting job holds any.
        - Finished shards of the remaining jobs go into one new job, which has nothing left to compute.

        Parameters
        ----------
        retry_rejected
            Whether sequences that fitted into no device's memory so far are new work.

        Returns
        -------
        (datasets_of_job, is_new)
            {job: numbers of the datasets that need it}, and for each dataset a bool [n] that marks its new sequences.
        """
        finished = sorted(_names(self.store / "jobs", ".json"))
        existing = _names(self.store / "plan" / "jobs", ".parquet")
        for job in finished:
            if job not in existing:
                self._restore(job)
        self._view_of_jobs("finished_jobs", finished)
        unfinished = sorted(existing - set(finished))
        resumable = self._without_overlaps(self._needed_in_full(unfinished))
        self._view_of_jobs("held", finished + resumable)
        jobs = finished + resumable + self._take_over_shards(sorted(set(unfinished) - set(resumable)))
        self._view_of_jobs("held", jobs)
        self.database.execute("CREATE TABLE retried (digest BLOB)")
        if retry_rejected:
            self._find_retried(finished)
        return self._match(jobs)

    def _match(self, jobs: list[str]) -> tuple[dict[str, set[int]], list[np.ndarray]]:
        """Join the sequences of the datasets with those of these jobs, see `select`."""
        datasets_of_job: dict[str, set[int]] = defaultdict(set)
        is_new = [np.ones(pq.read_metadata(path).num_rows, bool) for path in self.sequences]
        matches = self.database.sql(
            "SELECT job, dataset, row FROM held JOIN inputs USING (digest) ANTI JOIN retried USING (digest)"
        )
        for batch in matches.to_arrow_reader(1 << 20):
            job, dataset, row = (column.to_numpy() for column in batch.columns)
            for number in np.unique(dataset).tolist():
                in_dataset = dataset == number
                is_new[number][row[in_dataset]] = False
                for j in np.unique(job[in_dataset]).tolist():
                    datasets_of_job[jobs[j]].add(number)
        return datasets_of_job, is_new

    def job_sizes(self, jobs: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Sizes of these jobs.

        Returns
        -------
        (totals, by_length)
            A row per job with shards, sequences, residues; and rows of job (its index in `jobs`), length, sequences.
        """
        self._view_of_jobs("listed", jobs)
        totals = self.database.execute(
            "SELECT job, count(DISTINCT shard) AS shards, count(*) AS sequences, sum(length)::BIGINT AS residues"
            " FROM listed GROUP BY job ORDER BY job"
        ).df()
        by_length = self.database.execute("SELECT job, length, count(*) AS sequences FROM listed GROUP BY ALL").df()
        return totals[["shards", "sequences", "residues"]], by_length

    def _view(self, name: str, paths: list[Path], columns: str) -> None:
        """A view over Parquet files; a variable holds their names, which may have any characters."""
        self.database.execute(f"SET VARIABLE {name} = ?", [[str(path) for path in paths]])
        self.database.execute(
            f"CREATE OR REPLACE VIEW {name} AS SELECT {columns} FROM read_parquet(getvariable('{name}'))"
        )

    def _view_of_jobs(self, view: str, jobs: list[str]) -> None:
        """A view (job, shard, digest, length) of these jobs' work orders; job is the index in `jobs`."""
        paths = [work_order_path(self.store, job) for job in jobs]
        self._view(view, [*paths, self.empty], "file_index AS job, shard, digest, length")

    def _needed_in_full(self, unfinished: list[str]) -> list[str]:
        """The unfinished jobs whose sequences the datasets all need and no finished job holds."""
        self._view_of_jobs("unfinished", unfinished)
        needed = self.database.execute(
            "SELECT job, count(*) FROM unfinished SEMI JOIN inputs USING (digest) ANTI JOIN finished_jobs USING (digest)"
            " GROUP BY job ORDER BY job"
        ).fetchall()
        return [
            unfinished[j]
            for j, n in needed
            if n == pq.read_metadata(work_order_path(self.store, unfinished[j])).num_rows
        ]

    def _without_overlaps(self, jobs: list[str]) -> list[str]:
        """These jobs, sorted by name, without those that share a sequence with an earlier selected one."""
        self._view_of_jobs("candidates", jobs)
        self.database.execute(
            "CREATE TABLE shared AS SELECT digest, job FROM candidates"
            " SEMI JOIN (SELECT digest FROM candidates GROUP BY digest HAVING count(*) > 1) USING (digest)"
        )
        overlaps: dict[int, set[int]] = defaultdict(set)
        for later, earlier in self.database.execute(
            "SELECT DISTINCT a.job, b.job FROM shared AS a JOIN shared AS b USING (digest) WHERE a.job > b.job"
        ).fetchall():
            overlaps[later].add(earlier)
        selected: set[int] = set()
        for j in range(len(jobs)):
            if not overlaps[j] & selected:
                selected.add(j)
        return [jobs[j] for j in sorted(selected)]

    def _take_over_shards(self, ignored: list[str]) -> list[str]:
        """Write one job of the ignored jobs' finished shards that hold needed sequences; [] if there is none."""
        self._view_of_jobs("ignored", ignored)
        found = self.database.execute("SELECT shard, min(job) FROM ignored GROUP BY shard ORDER BY shard").fetchall()
        finished = [(shard, j) for shard, j in found if shard_path(self.store, shard).exists()]
        if not finished:
            return []
        self.database.execute("CREATE TABLE finished (shard VARCHAR, job UBIGINT)")
        self.database.executemany("INSERT INTO finished VALUES (?, ?)", finished)
        useful: dict[str, set[bytes]] = defaultdict(set)
        for shard, digest in self.database.execute(
            "SELECT shard, digest FROM ignored SEMI JOIN finished USING (shard, job)"
            " SEMI JOIN inputs USING (digest) ANTI JOIN held USING (digest)"
        ).fetchall():
            useful[shard].add(digest)
        rows: list[pa.Table] = []
        names: list[str] = []
        taken: set[bytes] = set()
        for shard, j in finished:  # sorted by name, so that planning again selects the same ones
            if useful[shard] - taken:
                taken |= useful[shard]
                names.append(shard)
                work_order = pq.read_table(work_order_path(self.store, ignored[j]), filters=[("shard", "=", shard)])
                rows.append(work_order.cast(WORK_ORDER))
        if not rows:
            return []
        return [write_work_order(self.store, names, pa.concat_tables(rows))]

    def _find_retried(self, finished: list[str]) -> None:
        """Fill retried(digest) with the sequences that every finished job rejected because they did not fit into memory."""
        self.database.execute("CREATE TABLE too_long (job UBIGINT, digest BLOB)")
        for j, job in enumerate(finished):
            for name in read_json(job_record_path(self.store, job)).get("does_not_fit", []):
                shard = Shard(shard_path(self.store, name))
                rows = [
                    [j, shard["digests"][i].tobytes()] for i in np.flatnonzero(shard["status"] == Status.DOES_NOT_FIT)
                ]
                if rows:  # none where a later try of the shard succeeded
                    self.database.executemany("INSERT INTO too_long VALUES (?, ?)", rows)
        self.database.execute(
            "INSERT INTO retried SELECT DISTINCT digest FROM too_long ANTI JOIN"
            " (SELECT digest FROM finished_jobs SEMI JOIN too_long USING (digest)"
            " ANTI JOIN too_long USING (job, digest)) USING (digest)"
        )

    def _restore(self, job: str) -> None:
        """Write a finished job's lost work order again from its shards; sequences that no dataset has stay null."""
        names, starts, digests, lengths = [], [], [], []
        for name in read_json(job_record_path(self.store, job))["shards"]:
            shard = Shard(shard_path(self.store, name))
            bounds = shard["offsets"]
            names += [name] * (len(bounds) - 1)
            starts += bounds[:-1].tolist()
            lengths += np.diff(bounds).tolist()
            digests += [digest.tobytes() for digest in shard["digests"]]
        sequence_of = dict(
            self.database.execute(
                "SELECT digest, any_value(sequence) FROM inputs WHERE digest IN (SELECT unnest(?::BLOB[])) GROUP BY digest",
                [digests],
            ).fetchall()
        )
        columns = [names, starts, digests, lengths, [sequence_of.get(digest) for digest in digests]]
        work_order = pa.table(
            [pa.array(c, f.type) for c, f in zip(columns, WORK_ORDER, strict=True)], schema=WORK_ORDER
        )
        replace_work_order(work_order_path(self.store, job), work_order)


def _names(folder: Path, ending: str) -> set[str]:
    """Names of the files with this ending, without it."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries)
        return {name.removesuffix(ending) for name in names if name.endswith(ending) and not name.startswith(".")}
