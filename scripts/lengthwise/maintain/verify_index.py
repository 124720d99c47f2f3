"""Checks of a dataset's index against its manifest and its shards."""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.status import Status
from lengthwise.ingest.digests import digest_name
from lengthwise.maintain.quarantine import Problem, first_line
from lengthwise.store.shard import Shard
from lengthwise.store.windows import Windows

_STORED = """
    CREATE VIEW stored AS
    SELECT record_no, id, status, shard, sequence_no, row_start, length, digest FROM records
    WHERE digest NOT IN (SELECT protein FROM windows)
    UNION ALL
    SELECT record_no, id, status, windows.* EXCLUDE (protein) FROM records JOIN windows ON records.digest = protein
"""
# Records of a damaged sequence that are named; the others are counted.
MAX_NAMED_RECORDS = 5


@contextmanager
def index_database(index: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB session with the index as the table `records`, and as `stored` with a row for each window of a protein in windows.

    Raises
    ------
    LengthwiseError
        The index, or the table of windows, is missing or damaged, or a query found it so.
    """
    try:
        with tempfile.TemporaryDirectory() as spill, duckdb.connect(config={"temp_directory": spill}) as database:
            database.register("records", pyarrow.dataset.dataset(index, format="parquet"))
            database.register("windows", Windows(index.parent).flat())
            database.execute(_STORED)
            yield database
    except (OSError, pa.ArrowException, duckdb.Error, ValueError, IndexError, TypeError) as error:
        raise LengthwiseError(f"{index}: missing or damaged ({first_line(error)})") from error


def check_counts(database: duckdb.DuckDBPyConnection, index: Path, manifest: dict) -> None:
    """Compare the index's counts of records and its shards with the manifest's.

    Raises
    ------
    LengthwiseError
        They differ.
    """
    found = dict(database.execute("SELECT status, count(*) FROM records GROUP BY status ORDER BY status").fetchall())
    expected = {status: n for status in ("accepted", "duplicate", "rejected") if (n := manifest[status])}
    if found != expected or sum(found.values()) != manifest["records"]:
        raise LengthwiseError(f"{index}: has other records ({found}) than the manifest says ({expected})")
    shards = database.execute("SELECT DISTINCT shard FROM stored WHERE shard IS NOT NULL").fetchall()
    if {shard for (shard,) in shards} != set(manifest["shards"]):
        raise LengthwiseError(f"{index}: names other shards than the manifest")


def sequences_that_differ(
    database: duckdb.DuckDBPyConnection, index: Path, shards: dict[str, Shard]
) -> dict[str, list[int]]:
    """Find the sequences whose rows or status in the shard differ from the index.

    Parameters
    ----------
    database, index
        The session of `index_database`, and the index's path.
    shards
        {name: shard}; the index's records in other shards are left out.

    Returns
    -------
    {shard: numbers of its sequences}

    Raises
    ------
    LengthwiseError
        The index names another sequence than the shard has at that number.
    """
    differing: dict[str, set[int]] = {}
    batches = database.sql(
        "SELECT shard, sequence_no, row_start, length, digest, status = 'rejected' AS rejected FROM stored"
        " WHERE shard IN (SELECT unnest(?::VARCHAR[])) ORDER BY shard",
        params=[list(shards)],
    ).to_arrow_reader(100_000)
    current, tensors = "", {}
    for batch in batches:
        names = batch["shard"].to_numpy(zero_copy_only=False)
        columns = ("sequence_no", "row_start", "length", "rejected")
        records = {name: batch[name].to_numpy(zero_copy_only=False) for name in columns}
        records["digest"] = np.frombuffer(b"".join(batch["digest"].to_pylist()), np.uint8).reshape(-1, 24)
        starts = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1]])).tolist()
        for start, stop in itertools.pairwise([*starts, len(names)]):
            if names[start] != current:
                current = names[start]
                tensors = {name: shards[current].read(name) for name in ("digests", "offsets", "status")}
            found = _compare({name: column[start:stop] for name, column in records.items()}, tensors)
            if found is None:
                raise LengthwiseError(
                    f"{index}: its places in {shards[current].path.name} are not those of its sequences"
                )
            if found:
                differing.setdefault(current, set()).update(found)
    return {name: sorted(numbers) for name, numbers in differing.items()}


def _compare(records: dict[str, np.ndarray], shard: dict[str, np.ndarray]) -> list[int] | None:
    """Numbers of the sequences whose rows or status differ; None where the digests differ."""
    numbers, offsets, status = records["sequence_no"], shard["offsets"], shard["status"]
    if numbers.min() < 0 or numbers.max() >= len(status) or (shard["digests"][numbers] != records["digest"]).any():
        return None
    differs = (offsets[numbers] != records["row_start"]) | (np.diff(offsets)[numbers] != records["length"])
    differs |= (status[numbers] != Status.GOOD) != records["rejected"]
    return numbers[differs].tolist()


def problems_of_sequences(indexes: list[Path], shard: Shard, numbers: list[int], what: str) -> list[Problem]:
    """A problem for each of these sequences of a shard, with the records of the indexes that read it."""
    digests = shard.read("digests")
    readers: dict[int, list[str]] = {}
    for index in indexes:
        for number, ids in _records_of(index, shard, numbers).items():
            readers.setdefault(number, []).extend(f"{record_id} of {index.parent.name}" for record_id in ids)
    problems = []
    for number in numbers:
        records = readers.get(number, [])
        more = f" and {len(records) - MAX_NAMED_RECORDS} more" if len(records) > MAX_NAMED_RECORDS else ""
        who = f"it is {', '.join(records[:MAX_NAMED_RECORDS])}{more}" if records else "no record is known to read it"
        digest = digest_name(digests[number].tobytes())
        problems.append(Problem(f"{shard.path}: sequence {number}, {digest}, {what}; {who}", shard.path))
    return problems


def _records_of(index: Path, shard: Shard, numbers: list[int]) -> dict[int, list[str]]:
    """{sequence number in the shard: ids of its records}; empty if the index is damaged."""
    with suppress(LengthwiseError), index_database(index) as database:
        return dict(
            database.execute(
                "SELECT sequence_no, list(id ORDER BY record_no) FROM stored"
                " WHERE shard = ? AND sequence_no IN (SELECT unnest(?::INTEGER[])) GROUP BY sequence_no",
                [shard.path.stem, numbers],
            ).fetchall()
        )
    return {}
