"""Specs: jobs' work orders; which of those that exist count, and what is left to do beside them.

A spec is an immutable Parquet file named by its content. What is asked of all of them is asked of the files, out of core.
"""

import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise.esm2.status import Status
from lengthwise.plan.external_sort import digest_bytes
from lengthwise.store.layout import shard_name
from lengthwise.store.paths import job_record_path, shard_path, work_order_path
from lengthwise.store.shard import Shard
from lengthwise.system.files import atomic, read_json

WORK_ORDER = pa.schema(
    [
        ("shard", pa.string()),
        ("row_start", pa.int64()),
        ("digest", pa.binary(24)),
        ("length", pa.int32()),
        ("sequence", pa.binary()),
    ]
)


class WorkOrders:
    """The specs of a store, to ask questions of.

    Parameters
    ----------
    store
        The store.
    sequences
        The `sequences.parquet` of each dataset.
    database
        A fresh connection to DuckDB, with its limits.
    folder
        A scratch folder.
    """

    def __init__(self, store: Path, sequences: list[Path], database: duckdb.DuckDBPyConnection, folder: Path):
        self.store, self.sequences, self.database = store, sequences, database
        self.none = folder / "none.parquet"  # something to read where there is no spec
        pq.write_table(WORK_ORDER.empty_table(), self.none)
        self._view("inputs", sequences, "file_index AS dataset, file_row_number AS row, digest, sequence")

    def standing(self, retry_rejected: bool) -> tuple[dict[str, set[int]], list[np.ndarray]]:
        """Choose the specs that count; what they do not hold is new work.

        Committed ones count. An unfinished one does if all of it is wanted and no other that counts holds any of it. Of
        the rest, the shards that were finished are taken over by a new job, which has nothing left to compute.

        Returns
        -------
        (users, todo)
            Of each job that counts, the numbers of the datasets that stand on it; of each dataset, a bool for each of its
            sequences: whether it is new work.
        """
        job_records = sorted(_names(self.store / "jobs", ".json"))
        there = _names(self.store / "plan" / "jobs", ".parquet")
        for job in job_records:
            if job not in there:
                self._restore(job)
        self._name("committed", job_records)
        unfinished = sorted(there - set(job_records))
        fitting = self._without_rivals(self._fitting(unfinished))
        self._name("held", job_records + fitting)
        jobs = job_records + fitting + self._taken_over(sorted(set(unfinished) - set(fitting)))
        self._name("held", jobs)
        self.database.execute("CREATE TABLE again (digest BLOB)")
        if retry_rejected:
            self._find_unfit(job_records)
        users = defaultdict(set)
        todo = [np.ones(pq.read_metadata(path).num_rows, bool) for path in self.sequences]
        found = self.database.sql(
            "SELECT job, dataset, row FROM held JOIN inputs USING (digest) ANTI JOIN again USING (digest)"
        )
        for batch in found.to_arrow_reader(1 << 20):
            job, dataset, row = (column.to_numpy() for column in batch.columns)
            for number in np.unique(dataset).tolist():
                own = dataset == number
                todo[number][row[own]] = False
                for j in np.unique(job[own]).tolist():
                    users[jobs[j]].add(number)
        return users, todo

    def sizes(self, jobs: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(shards, sequences, residues) of each of these jobs, and (job, length, sequences); a job is its number here."""
        self._name("listed", jobs)
        whole = self.database.execute(
            "SELECT job, count(DISTINCT shard) AS shards, count(*) AS sequences, sum(length)::BIGINT AS residues"
            " FROM listed GROUP BY job ORDER BY job"
        ).df()
        by_length = self.database.execute("SELECT job, length, count(*) AS sequences FROM listed GROUP BY ALL").df()
        return whole[["shards", "sequences", "residues"]], by_length

    def _view(self, name: str, paths: list[Path], columns: str) -> None:
        self.database.execute(f"SET VARIABLE {name} = ?", [[str(path) for path in paths]])
        self.database.execute(
            f"CREATE OR REPLACE VIEW {name} AS SELECT {columns} FROM read_parquet(getvariable('{name}'))"
        )

    def _name(self, view: str, jobs: list[str]) -> None:
        """The view (job, shard, digest, length) of these jobs' specs; a job is its number here."""
        paths = [work_order_path(self.store, job) for job in jobs]
        self._view(view, [*paths, self.none], "file_index AS job, shard, digest, length")

    def _fitting(self, unfinished: list[str]) -> list[str]:
        """The unfinished specs of which all is wanted and no committed one holds any."""
        self._name("unfinished", unfinished)
        wanted = self.database.execute(
            "SELECT job, count(*) FROM unfinished SEMI JOIN inputs USING (digest) ANTI JOIN committed USING (digest)"
            " GROUP BY job ORDER BY job"
        ).fetchall()
        return [
            unfinished[j]
            for j, n in wanted
            if n == pq.read_metadata(work_order_path(self.store, unfinished[j])).num_rows
        ]

    def _without_rivals(self, jobs: list[str]) -> list[str]:
        """These jobs, in the order of their names, but for those that share a sequence with one before."""
        self._name("fitting", jobs)
        self.database.execute(
            "CREATE TABLE shared AS SELECT digest, job FROM fitting"
            " SEMI JOIN (SELECT digest FROM fitting GROUP BY digest HAVING count(*) > 1) USING (digest)"
        )
        rivals = defaultdict(set)
        for one, other in self.database.execute(
            "SELECT DISTINCT a.job, b.job FROM shared AS a JOIN shared AS b USING (digest) WHERE a.job > b.job"
        ).fetchall():
            rivals[one].add(other)
        chosen: set[int] = set()
        for j in range(len(jobs)):
            if not rivals[j] & chosen:
                chosen.add(j)
        return [jobs[j] for j in sorted(chosen)]

    def _taken_over(self, ignored: list[str]) -> list[str]:
        """The job, if any, that takes over finished shards of ignored ones, where they hold what is wanted and not held."""
        self._name("ignored", ignored)
        found = self.database.execute("SELECT shard, min(job) FROM ignored GROUP BY shard ORDER BY shard").fetchall()
        finished = [(shard, j) for shard, j in found if shard_path(self.store, shard).exists()]
        if not finished:
            return []
        self.database.execute("CREATE TABLE finished (shard VARCHAR, job UBIGINT)")
        self.database.executemany("INSERT INTO finished VALUES (?, ?)", finished)
        useful = defaultdict(set)
        for shard, digest in self.database.execute(
            "SELECT shard, digest FROM ignored SEMI JOIN finished USING (shard, job)"
            " SEMI JOIN inputs USING (digest) ANTI JOIN held USING (digest)"
        ).fetchall():
            useful[shard].add(digest)
        rows, names, taken = [], [], set()
        for shard, j in finished:  # in the order of their names, so that planning again takes over the same ones
            if useful[shard] - taken:
                taken |= useful[shard]
                names.append(shard)
                work_order = pq.read_table(work_order_path(self.store, ignored[j]), filters=[("shard", "=", shard)])
                rows.append(work_order.cast(WORK_ORDER))
        if not rows:
            return []
        return [write_work_order(self.store, names, pa.concat_tables(rows))]

    def _find_unfit(self, job_records: list[str]) -> None:
        """Fill again(digest) with what did not fit into the memory of a committed job's device, and is good in no other."""
        self.database.execute("CREATE TABLE unfit (job UBIGINT, digest BLOB)")
        for j, job in enumerate(job_records):
            for name in read_json(job_record_path(self.store, job)).get("does_not_fit", []):
                shard = Shard(shard_path(self.store, name))
                rows = [
                    [j, shard["digests"][i].tobytes()] for i in np.flatnonzero(shard["status"] == Status.DOES_NOT_FIT)
                ]
                if rows:  # none where a later try of the same shard fit
                    self.database.executemany("INSERT INTO unfit VALUES (?, ?)", rows)
        self.database.execute(
            "INSERT INTO again SELECT DISTINCT digest FROM unfit ANTI JOIN"
            " (SELECT digest FROM committed SEMI JOIN unfit USING (digest) ANTI JOIN unfit USING (job, digest)) USING (digest)"
        )

    def _restore(self, job: str) -> None:
        """Write the lost spec of a committed job again, from its shards; sequences that no input has any more stay empty."""
        names, starts, digests, lengths = [], [], [], []
        for name in read_json(job_record_path(self.store, job))["shards"]:
            shard = Shard(shard_path(self.store, name))
            bounds = shard["offsets"]
            names += [name] * (len(bounds) - 1)
            starts += bounds[:-1].tolist()
            lengths += np.diff(bounds).tolist()
            digests += [digest.tobytes() for digest in shard["digests"]]
        known = dict(
            self.database.execute(
                "SELECT digest, any_value(sequence) FROM inputs WHERE digest IN (SELECT unnest(?::BLOB[])) GROUP BY digest",
                [digests],
            ).fetchall()
        )
        columns = [names, starts, digests, lengths, [known.get(digest) for digest in digests]]
        work_order = pa.table(
            [pa.array(c, f.type) for c, f in zip(columns, WORK_ORDER, strict=True)], schema=WORK_ORDER
        )
        _write(work_order_path(self.store, job), work_order)


def work_order_table(work: pa.Table, shards: np.ndarray, settings: dict) -> pa.Table:
    """The spec of one job: rows of digest, length and sequence, cut into shards at these bounds."""
    digests = memoryview(digest_bytes(work.column("digest").combine_chunks())).cast("B")
    lengths = work.column("length").to_numpy()
    names, row_starts = [], []
    for start, stop in itertools.pairwise(shards.tolist()):
        names.append(shard_name(settings["fingerprint"], [digests[24 * start : 24 * stop]]))
        row_starts.append(np.concatenate([[0], np.cumsum(lengths[start : stop - 1], dtype=np.int64)]))
    shard_of = pa.array(np.repeat(np.arange(len(names)), np.diff(shards)))
    columns = [pa.array(names).take(shard_of), pa.array(np.concatenate(row_starts)), *work.columns]
    return pa.table(columns, schema=WORK_ORDER)


def write_work_order(store: Path, shards: list[str], work_order: pa.Table) -> str:
    """Write a spec unless it is there; returns its job's name, which its shards give, in order."""
    job = hashlib.sha256("".join(shards).encode()).hexdigest()[:16]
    if not work_order_path(store, job).exists():
        _write(work_order_path(store, job), work_order)
    return job


def _write(path: Path, work_order: pa.Table) -> None:
    with atomic(path) as part:
        pq.write_table(work_order, part, 65_536, compression="zstd", use_dictionary=["shard", "length"])


def _names(folder: Path, ending: str) -> set[str]:
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        found = (entry.name for entry in entries)
        return {name.removesuffix(ending) for name in found if name.endswith(ending) and not name.startswith(".")}


@dataclass(frozen=True)
class PlannedShard:
    """A shard that is to be made: sequences of ascending length."""

    name: str
    digests: list[bytes]
    lengths: np.ndarray
    sequences: list[bytes]


def read_work_order(work_order: Path) -> Iterator[PlannedShard]:
    """The shards of a spec, in its order."""
    table = pq.read_table(work_order)  # whole: `plan` bounds it (JOB_BYTES)
    names = table.column("shard").to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1]]))
    for start, stop in itertools.pairwise([*starts.tolist(), len(names)]):
        rows = table.slice(start, stop - start)
        digests, lengths, sequences = (rows.column(name) for name in ("digest", "length", "sequence"))
        yield PlannedShard(names[start], digests.to_pylist(), lengths.to_numpy(), sequences.to_pylist())
