"""Windows: a long protein cut into overlapping stretches, each a sequence of its own.

All windows of a protein have the same length. They begin `window_residues - overlap` residues apart, and the last one ends where
the protein ends. A residue's row is taken from the window whose middle is nearest to it, of two the first.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lengthwise.ingest.digests import digest
from lengthwise.ingest.tables import SEQUENCES, WINDOWED

if TYPE_CHECKING:
    from pathlib import Path

    import duckdb

    from lengthwise.ingest.judge import Judged


def window_starts(length: int, window_residues: int, overlap: int) -> list[int]:
    """The first residue of each window, from 0, of a protein that is longer than a window."""
    last = length - window_residues
    return [*range(0, last, window_residues - overlap), last]


def residues_taken(length: int, starts: list[int], window_residues: int) -> list[tuple[int, int]]:
    """Of each window the residues whose rows are taken: (first, stop) in the protein. Together they are all residues, once."""
    ends = [(one + other + window_residues - 1) // 2 + 1 for one, other in pairwise(starts)]
    return list(zip([0, *ends], [*ends, length], strict=True))


@dataclass(frozen=True)
class Windowed:
    """The records of a chunk that are embedded in windows."""

    chosen: np.ndarray  # [n] bool, of the chunk's records
    proteins: pa.RecordBatch  # rows of `WINDOWED`
    windows: pa.RecordBatch  # rows of `SEQUENCES`


def cut_windows(judged: "Judged", accepted: np.ndarray, window_residues: int, overlap: int) -> Windowed:
    """Cut the accepted records of more than `window_residues` residues into windows.

    Parameters
    ----------
    judged, accepted
        The chunk's n records, and which of them are accepted: [n] bool.
    window_residues, overlap
        Residues of a window, and residues that a window shares with the next one.
    """
    chosen = accepted & (judged.lengths > window_residues)
    proteins = judged.sequences().filter(pa.array(chosen))
    starts = [window_starts(length, window_residues, overlap) for length in proteins["length"].to_pylist()]
    cut = [
        [whole[start : start + window_residues] for start in own]
        for whole, own in zip(proteins["sequence"].to_pylist(), starts, strict=True)
    ]
    digests = [[digest(window) for window in windows] for windows in cut]
    lists = [pa.array(starts, WINDOWED.field("starts").type), pa.array(digests, WINDOWED.field("windows").type)]
    sequences = [window for windows in cut for window in windows]
    columns = [
        pa.array([name for names in digests for name in names], pa.binary(24)),
        pa.array([window_residues] * len(sequences), pa.int32()),
        pa.array(sequences, pa.binary()),
    ]
    return Windowed(
        chosen,
        pa.record_batch([*proteins.columns, *lists], schema=WINDOWED),
        pa.record_batch(columns, schema=SEQUENCES),
    )


def windows_are_whole(
    database: "duckdb.DuckDBPyConnection", records: "Path", sequences: "Path", windowed: "Path"
) -> bool:
    """Whether `sequences` has every window and every other accepted sequence once; their digests were told apart by one word."""
    paths = {"records": str(records), "sequences": str(sequences), "windowed": str(windowed)}
    ((same,),) = database.execute(
        "SELECT count(*) = (SELECT count(*) FROM read_parquet($sequences)) FROM ("
        " SELECT unnest(windows) AS digest FROM read_parquet($windowed) UNION"
        " SELECT digest FROM read_parquet($records) WHERE status = 'accepted'"
        " AND digest NOT IN (SELECT digest FROM read_parquet($windowed)))",
        paths,
    ).fetchall()
    return same
