"""Existing jobs: which of a store's work orders still count, and which sequences none of them holds.

All questions are DuckDB queries over the files, so that memory does not grow with the store.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.status import Status
from lengthwise.plan.cuts import MAX_WORK_ORDER_BYTES, SEQUENCE_OVERHEAD_BYTES, cut_runs
from lengthwise.plan.record import read_plan_record
from lengthwise.plan.work_orders import (
    WORK_ORDER,
    finished_sequences,
    is_intact,
    write_work_order_of_shards,
)
from lengthwise.store.manifest import read_manifest
from lengthwise.store.paths import shard_path, work_order_path
from lengthwise.store.settings import require
from lengthwise.store.shard import Shard, is_complete
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
        self.settings = require(store)
        self.empty = folder / "none.parquet"  # read_parquet refuses an empty list of files
        pq.write_table(WORK_ORDER.empty_table(), self.empty)
        self._view("inputs", sequences, "file_index AS dataset, file_row_number AS row, digest")

    def select(self, retry_rejected: bool) -> tuple[dict[str, set[int]], list[np.ndarray]]:
        """Select the jobs that count; the sequences that they do not hold are new work.

        - A finished job, one with a job record, counts.
        - An unfinished job of the last plan counts if the datasets need all of its sequences and no finished job holds any.
        - Other finished shards that hold needed sequences go into a new job, which has nothing left to compute.

        A finished job's work order that is lost or damaged is written again from its shards.

        Parameters
        ----------
        retry_rejected
            Whether sequences that fitted into no device's memory so far are new work.

        Returns
        -------
        (datasets_of_job, is_new)
            {job: numbers of the datasets that need it}, and for each dataset a bool [n] that marks its new sequences.
        """
        last_plan = _jobs_of_last_plan(self.store)
        job_records = self._read_job_records(last_plan)
        finished = sorted(job_records)
        for job in finished:
            if not self._is_intact(job):
                write_work_order_of_shards(self.store, list(job_records[job]["shards"]), self.settings, job)
        self._view_of_jobs("finished_jobs", finished)
        kept = self._needed_in_full(_names(self.store / "plan" / "jobs", ".parquet") - {*finished}, last_plan)
        self._view_of_jobs("held", finished + kept)
        jobs = finished + kept + self._take_over_shards()
        self._view_of_jobs("held", jobs)
        self.database.execute("CREATE TABLE retried (digest BLOB)")
        if retry_rejected:
            self._find_retried(job_records)
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

    def _read_job_records(self, last_plan: set[str] | None) -> dict[str, dict]:
        """The job records by job.

        A job of a killed run may write its record just after a later plan has given its shards to another job. That record is
        removed, unless a manifest names it, so that a shard is in one record.
        """
        folder = self.store / "jobs"
        job_records = {job: read_json(folder / f"{job}.json", "shards") for job in sorted(_names(folder, ".json"))}
        listed = Counter(shard for job_record in job_records.values() for shard in job_record["shards"])
        late = {
            job
            for job in job_records.keys() - (job_records.keys() if last_plan is None else last_plan)
            if any(listed[shard] > 1 for shard in job_records[job]["shards"])
        }
        with suppress(LengthwiseError, OSError):  # a damaged manifest leaves open what it needs
            manifests = self.store.glob("datasets/*/manifest.json") if late else []
            for job in late.difference(*(read_manifest(manifest)["jobs"] for manifest in manifests)):
                (folder / f"{job}.json").unlink()
                del job_records[job]
        return job_records

    def _needed_in_full(self, unfinished: set[str], last_plan: set[str] | None) -> list[str]:
        """The unfinished jobs of the last plan whose sequences the datasets all need and no finished job holds.

        Jobs of one plan share no sequence. Where it is unknown which is the last plan's, any job may be: then of those that
        share a sequence only the first by name is a candidate.
        """
        candidates = sorted(filter(self._is_intact, unfinished if last_plan is None else unfinished & last_plan))
        self._view_of_jobs("candidates", candidates)
        rows = "(SELECT min(job) AS job, digest FROM candidates GROUP BY digest)" if last_plan is None else "candidates"
        needed = self.database.execute(
            f"SELECT job, count(*) FROM {rows} SEMI JOIN inputs USING (digest) ANTI JOIN finished_jobs USING (digest)"
            " GROUP BY job ORDER BY job"
        ).fetchall()
        return [
            candidates[j]
            for j, n in needed
            if n == pq.read_metadata(work_order_path(self.store, candidates[j])).num_rows
        ]

    def _is_intact(self, job: str) -> bool:
        return is_intact(work_order_path(self.store, job), self.settings["fingerprint"])

    def _take_over_shards(self) -> list[str]:
        """Write jobs of the finished shards that no job of `held` lists and that hold needed sequences; one at most, usually."""
        listed = {shard for (shard,) in self.database.execute("SELECT DISTINCT shard FROM held").fetchall()}
        self.database.execute("CREATE TABLE orphans (shard VARCHAR, digest BLOB, length INTEGER)")
        for path in self.store.glob("shards/*/*.safetensors"):
            if path.stem not in listed:
                with suppress(LengthwiseError):  # a damaged one holds nothing
                    orphan = finished_sequences(self.store, path.stem, self.settings)
                    if is_complete(path, orphan["digest"].to_pylist(), self.settings["fingerprint"]):
                        self.database.register("orphan", orphan)
                        self.database.execute("INSERT INTO orphans SELECT ?, digest, length FROM orphan", [path.stem])
        # Of the shards that hold a sequence the first by name is taken, so that planning again takes the same ones.
        taken = self.database.execute(
            "SELECT shard, sum(length + ?) FROM orphans SEMI JOIN (SELECT min(shard) AS shard FROM orphans"
            " SEMI JOIN inputs USING (digest) ANTI JOIN held USING (digest) GROUP BY digest) USING (shard)"
            " GROUP BY shard ORDER BY shard",
            [SEQUENCE_OVERHEAD_BYTES],
        ).fetchall()
        shards, n_bytes = [shard for shard, _ in taken], [float(n) for _, n in taken]
        return [
            write_work_order_of_shards(self.store, shards[start:stop], self.settings)
            for start, stop in pairwise(cut_runs(np.array(n_bytes), MAX_WORK_ORDER_BYTES).tolist())
        ]

    def _find_retried(self, job_records: dict[str, dict]) -> None:
        """Fill retried(digest) with the sequences that every finished job rejected because they did not fit into memory."""
        self.database.execute("CREATE TABLE too_long (job UBIGINT, digest BLOB)")
        for j, job_record in enumerate(job_records.values()):
            for name in job_record.get("does_not_fit", []):
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


def remove_rivals(store: Path, planned: Iterable[str]) -> None:
    """Remove the work orders that are neither of this plan nor of a finished job. Their finished shards stay.

    A job of a killed run that still lives ends once its work order is gone.
    """
    for job in _names(store / "plan" / "jobs", ".parquet") - _names(store / "jobs", ".json") - {*planned}:
        with suppress(OSError):  # of another user; the next plan ignores it too
            work_order_path(store, job).unlink()


def _jobs_of_last_plan(store: Path) -> set[str] | None:
    """The jobs of the last plan and finished ones, from its record; None where that is missing or damaged."""
    record = read_plan_record(store)
    if record is None:
        return None
    return {Path(name).stem for name in record["files"] if name.startswith("jobs/")}


def _names(folder: Path, ending: str) -> set[str]:
    """Names of the files with this ending, without it."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries)
        return {name.removesuffix(ending) for name in names if name.endswith(ending) and not name.startswith(".")}
