"""Duplicates and shared ids, over all records of a dataset."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.judge import Policy
from lengthwise.ingest.sources import Sources
from lengthwise.ingest.tables import ROWS_PER_GROUP, TableWriter
from lengthwise.system.files import atomic

DIGEST_WORDS = 3  # of eight bytes
ID_SUFFIXED = "id_suffixed"


class RepeatFinder:
    """Finds repeated keys, at eight bytes a key: sorted runs, each at least four times as long as the next."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Whether each of the [n] uint64 keys occurred before, in this call or an earlier one: [n] bool."""
        if not len(keys):
            return np.zeros(0, bool)
        order = np.argsort(keys)  # not stable, which is slower: `first` below takes the least index of equal keys
        keys = keys[order]
        starts = np.append(0, np.flatnonzero(np.diff(keys)) + 1)
        first, keys = np.minimum.reduceat(order, starts), keys[starts]
        known = np.zeros(len(keys), bool)
        for run in self.runs:
            known |= run[np.searchsorted(run[:-1], keys)] == keys
        if not known.all():
            self.runs.append(keys[~known])
        while len(self.runs) > 1 and len(self.runs[-2]) < 4 * len(self.runs[-1]):
            self.runs[-2:] = [
                np.sort(np.concatenate(self.runs[-2:]), kind="stable")
            ]  # a stable sort merges sorted runs quickly
        repeats = np.ones(len(order), bool)
        repeats[first] = known
        return repeats


def repeats_are_repeats(database: duckdb.DuckDBPyConnection, records: Path, counts: dict) -> bool:
    """Whether every duplicate has the same whole digest as an accepted record, not only the same word of it."""
    if not counts["duplicate"]:
        return True
    database.execute(
        "CREATE OR REPLACE TABLE repeated AS SELECT DISTINCT digest FROM read_parquet(?) WHERE status = 'duplicate'",
        [str(records)],
    )
    ((found,),) = database.execute(
        "SELECT count(*) = (SELECT count(*) FROM repeated) FROM read_parquet(?) SEMI JOIN repeated USING (digest)"
        " WHERE status = 'accepted'",
        [str(records)],
    ).fetchall()
    return found


def settle_ids(
    database: duckdb.DuckDBPyConnection, sources: Sources, records: Path, counts: dict, policy: Policy
) -> None:
    """If one id names two sequences, raise LengthwiseError or rename the later records, as the policy says.

    Reading by id could not tell the two sequences apart.
    """
    database.execute(
        "CREATE TABLE shared AS SELECT hash(id) AS key FROM read_parquet(?) GROUP BY key HAVING count(*) > 1",
        [str(records)],
    )
    database.execute(
        "CREATE TABLE suspects AS SELECT record_no, id, coalesce(digest, ''::BLOB) AS variant FROM read_parquet(?)"
        " WHERE hash(id) IN (FROM shared)",
        [str(records)],
    )
    database.execute(
        "CREATE TABLE renamed AS WITH"
        " variants AS (SELECT id, variant, min(record_no) AS first FROM suspects GROUP BY ALL),"
        " numbered AS (SELECT *, row_number() OVER (PARTITION BY id ORDER BY first) AS number,"
        "   min(first) OVER (PARTITION BY id) AS other FROM variants)"
        " SELECT record_no, id AS old, id || '_' || number AS new, other FROM suspects JOIN numbered USING (id, variant)"
        " WHERE number > 1"
    )
    found = database.execute("SELECT other, record_no, old FROM renamed ORDER BY record_no LIMIT 1").fetchall()
    if not found:
        return
    ((one, other, record_id),) = found
    if policy.duplicate_ids == "error":
        (file_of_one, number), (fasta, other_number) = sources.locate(one), sources.locate(other)
        both = f"records {number} and {other_number}"
        if file_of_one != fasta:
            both = f"{sources.named(one)} and its record {other_number}"
        raise LengthwiseError(
            f"{fasta}: {both} have the same id {quoted(record_id)} and different sequences "
            f"({sources.place(one)}; {sources.place(other)}); rename one of them, or set duplicate_ids: suffix"
        )
    taken = database.execute(
        "SELECT renamed.record_no, old, new, old_ones.record_no FROM read_parquet(?) AS old_ones JOIN renamed ON id = new"
        " LIMIT 1",
        [str(records)],
    ).fetchall()
    for number, old, new, other in taken:
        raise LengthwiseError(
            f"{sources.locate(number)[0]}: {sources.named(number)}, {quoted(old)}, would be renamed to {quoted(new)}, but "
            f"{sources.named(other)} has that id "
            "already; rename one of them"
        )
    counts["changes"][ID_SUFFIXED] = _rename(database, records)


def _rename(database: duckdb.DuckDBPyConnection, records: Path) -> int:
    """Rewrite the records with their new ids; returns the number of renamed records."""
    renamed = database.sql("SELECT record_no, new FROM renamed ORDER BY record_no").to_arrow_table()
    numbers, new = renamed.column("record_no").to_numpy(), renamed.column("new")
    file = pq.ParquetFile(records, pre_buffer=False)
    with atomic(records) as part, TableWriter(part, file.schema_arrow) as table:
        for batch in file.iter_batches(ROWS_PER_GROUP):
            first = batch.column("record_no")[0].as_py()
            low, high = np.searchsorted(numbers, [first, first + len(batch)])
            ids, changes = batch.column("id").to_pylist(), batch.column("changes").to_pylist()
            for i, name in zip((numbers[low:high] - first).tolist(), new[low:high].to_pylist(), strict=True):
                ids[i], changes[i] = name, ",".join(filter(None, [changes[i], ID_SUFFIXED]))
            for name, column in (("id", ids), ("changes", changes)):
                batch = batch.set_column(batch.schema.get_field_index(name), name, pa.array(column, pa.string()))
            table.append(batch)
    return len(renamed)


def quoted(record_id: str) -> str:
    return repr(record_id if len(record_id) <= 80 else record_id[:77] + "...")
