"""The places of proteins in windows: a protein is where its windows are."""

from collections.abc import Iterator
from pathlib import Path

import duckdb

from lengthwise.ingest.windows import residues_taken
from lengthwise.store.windows import Piece

_GROUP = 1_000  # proteins in memory


def place_windowed(database: duckdb.DuckDBPyConnection, windowed: Path) -> None:
    """Give each protein in windows the place of its first window, and the worst status of all.

    A protein of which a window has no place gets none; one that a window rejects names no shard.

    Parameters
    ----------
    database
        A session with the table `place` of `lengthwise.jobs.assemble`; gets the table `joined`.
    windowed
        The dataset's `lengthwise.ingest.windows.WINDOWS`.
    """
    database.execute(
        "CREATE TABLE joined AS SELECT protein AS digest, any_value(length) AS length, max(spot.verdict) AS verdict,"
        " bool_and(spot IS NOT NULL) AS whole, list(struct_pack(start, digest, spot) ORDER BY start) AS windows"
        " FROM (SELECT digest AS protein, length, unnest(starts) AS start, unnest(windows) AS digest FROM read_parquet(?))"
        " LEFT JOIN place USING (digest) GROUP BY protein",
        [str(windowed)],
    )
    database.execute("DELETE FROM place WHERE digest IN (SELECT digest FROM joined)")  # whole, under another policy
    database.execute(
        "INSERT INTO place SELECT digest, struct_pack(shard := CASE WHEN verdict = 0 THEN windows[1].spot.shard END,"
        " sequence_no := windows[1].spot.sequence_no, row_start := windows[1].spot.row_start, verdict) FROM joined WHERE whole"
    )


def windowed_proteins(
    database: duckdb.DuckDBPyConnection, window_residues: int
) -> Iterator[tuple[bytes, int, list[Piece]]]:
    """(digest, length, pieces) of each protein in windows whose windows are all good, by digest."""
    proteins = database.sql("SELECT digest, length, windows FROM joined WHERE whole AND verdict = 0 ORDER BY digest")
    for batch in proteins.to_arrow_reader(_GROUP):
        for protein in batch.to_pylist():
            windows, length = protein["windows"], protein["length"]
            taken = residues_taken(length, [window["start"] for window in windows], window_residues)
            yield (
                protein["digest"],
                length,
                [
                    {"first": first, "stop": stop, "start": window["start"], "residues": window_residues}
                    | {"digest": window["digest"], **window["spot"]}
                    for (first, stop), window in zip(taken, windows, strict=True)
                ],
            )
