"""Counts and lengths of the datasets' own records, from their indexes: a job may hold sequences of others."""

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from lengthwise.esm2.shapes import TRAINED_RESIDUES
from lengthwise.system.database import out_of_core
from lengthwise.system.files import scratch_folder

MAX_AT_ONCE = 10_000_000  # sequences of a pass over the digests, which take about 50 bytes each
# Four bins an octave. One begins right after the training length, so that none is on both sides of it.
BOUNDS = np.unique(np.rint((TRAINED_RESIDUES + 1) * 2.0 ** (np.arange(-40, 84) / 4)).astype(int))


@dataclass(frozen=True)
class Proteins:
    """What the datasets of a report hold."""

    sequences: int  # distinct ones, of all datasets together
    residues: int  # of those
    median: int | None  # length of accepted records; None where there are none
    longest: int | None
    lengths: pd.DataFrame  # a row per dataset, status and bin of lengths: the table `lengths`
    by_dataset: pd.DataFrame  # dataset -> beyond_training, longest


def count_proteins(manifests: dict[str, Path], spill: Path, memory_bytes: int = 1 << 30) -> Proteins:
    """Count the records of datasets by status and length, and their distinct sequences.

    One dataset costs a scan of two columns. Several cost a grouping of their digests, in passes that fit into memory.

    Parameters
    ----------
    manifests
        {dataset: path of its manifest}, the index beside it.
    spill
        A folder for what does not fit into memory; it is removed again.
    memory_bytes
        Memory for counting.
    """
    with scratch_folder(spill) as scratch, out_of_core("summarize", memory_bytes, scratch, threads=1) as database:
        _count_lengths(database, manifests)
        accepted = database.execute(
            "SELECT length, sum(records)::BIGINT AS records FROM counted WHERE status = 'accepted' GROUP BY length"
            " ORDER BY length"
        ).df()
        sequences, residues = int(accepted["records"].sum()), int((accepted["length"] * accepted["records"]).sum())
        if len(manifests) > 1:
            sequences, residues = _count_distinct(database, manifests, sequences)
        median = np.searchsorted(accepted["records"].cumsum(), accepted["records"].sum() / 2)
        lengths = database.execute(
            "SELECT dataset, status, length_from, length_to, sum(records)::BIGINT AS records FROM counted"
            " ASOF JOIN bins ON counted.length >= bins.length_from GROUP BY ALL ORDER BY dataset, status, length_from"
        ).df()
        by_dataset = database.execute(
            f"SELECT dataset, coalesce(sum(records) FILTER (length > {TRAINED_RESIDUES}), 0)::BIGINT AS beyond_training,"
            " max(length)::BIGINT AS longest FROM counted WHERE status = 'accepted' GROUP BY dataset"
        ).df()
    return Proteins(
        sequences,
        residues,
        int(accepted["length"][median]) if len(accepted) else None,
        int(accepted["length"].iloc[-1]) if len(accepted) else None,
        lengths.astype({"dataset": "string", "status": "string"}),
        by_dataset.set_index("dataset").reindex(list(manifests)).astype("Int64").fillna({"beyond_training": 0}),
    )


def _count_distinct(database: duckdb.DuckDBPyConnection, manifests: dict[str, Path], accepted: int) -> tuple[int, int]:
    """Distinct accepted sequences of all datasets, and their residues."""
    passes = -(-accepted // MAX_AT_ONCE)
    found = [0, 0]
    for number in range(passes):
        counts = database.execute(
            "SELECT count(*), coalesce(sum(length), 0) FROM (SELECT any_value(length) AS length FROM read_parquet($paths)"
            " WHERE status = 'accepted' AND hash(digest) % $passes = $number GROUP BY digest)",
            {"paths": _indexes(manifests), "passes": passes, "number": number},
        ).fetchall()[0]
        found = [before + int(more) for before, more in zip(found, counts, strict=True)]
    return found[0], found[1]


def _indexes(manifests: dict[str, Path]) -> list[str]:
    return [str(path.parent / "index.parquet") for path in manifests.values()]


def _count_lengths(database: duckdb.DuckDBPyConnection, manifests: dict[str, Path]) -> None:
    """Create the tables `counted` (records by dataset, status and length) and `bins`."""
    database.register("datasets", pd.DataFrame({"dataset": list(manifests), "path": _indexes(manifests)}, dtype=str))
    starts = np.append(0, BOUNDS)
    database.register("bounds", pd.DataFrame({"length_from": starts[:-1], "length_to": starts[1:]}))
    database.execute("CREATE TABLE bins AS FROM bounds")
    if not manifests:
        database.execute("CREATE TABLE counted (dataset VARCHAR, status VARCHAR, length INTEGER, records BIGINT)")
        return
    database.execute(
        "CREATE TABLE counted AS SELECT dataset, status, coalesce(length, 0) AS length, count(*) AS records"
        " FROM read_parquet($paths, filename = 'path') JOIN datasets USING (path) GROUP BY ALL",
        {"paths": _indexes(manifests)},
    )
