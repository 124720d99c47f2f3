"""The sequences of a dataset as they were embedded, found by their digests in the store's table of sequences."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.digests import digest_all

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


class Sequences:
    """The table `inputs/<dataset>/sequences.parquet`, read a row group at a time.

    Parameters
    ----------
    path
        The table. It is opened when a sequence is asked for.
    """

    def __init__(self, path: Path):
        self.path = path
        self._last: tuple[int, pa.LargeBinaryArray] | None = None  # the row group that was read last

    def at(self, digests: np.ndarray) -> pa.LargeStringArray:
        """The sequences [n] with these digests [n, 24].

        Raises
        ------
        LengthwiseError
            The table is missing or damaged, or lacks one of them.
        """
        try:
            found = self._take(self._rows_of(digests))
        except (OSError, pa.ArrowException) as error:
            raise self._unusable("is missing or damaged") from error
        _, ends, residues = found.buffers()
        bounds = np.frombuffer(ends, np.int64, len(found) + 1)
        if (digest_all(residues.to_pybytes() if residues else b"", bounds) != digests).any():
            raise self._unusable("is damaged")
        return found.cast(pa.large_string())

    def _rows_of(self, digests: np.ndarray) -> np.ndarray:
        """The rows [n] of the table."""
        keys, rows = self._by_key
        wanted = _keys(digests)
        at = np.searchsorted(keys, wanted)
        if not len(keys) or (keys[np.minimum(at, len(keys) - 1)] != wanted).any():
            raise self._unusable("is of another content of the FASTA file")
        return rows[at]

    def _take(self, rows: np.ndarray) -> pa.LargeBinaryArray:
        """The sequences in these rows [n], each row group read once."""
        groups = np.searchsorted(self._group_ends, rows, side="right")
        parts, order = [], []
        for group in np.unique(groups).tolist():
            numbers = np.flatnonzero(groups == group)
            start = self._group_ends[group - 1] if group else 0
            parts.append(self._group(group).take(pa.array(rows[numbers] - start)))
            order.append(numbers)
        if not parts:
            return pa.array([], pa.large_binary())
        back = np.argsort(np.concatenate(order), kind="stable")
        return pa.concat_arrays(parts).take(pa.array(back))

    def _group(self, group: int) -> pa.LargeBinaryArray:
        if self._last is None or self._last[0] != group:
            column = self._file.read_row_group(group, ["sequence"])["sequence"].cast(pa.large_binary())
            self._last = group, column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        return self._last[1]

    @cached_property
    def _file(self) -> "ParquetFile":
        from pyarrow.parquet import ParquetFile  # takes 35 ms, which most readers need not wait for

        return ParquetFile(self.path)

    @cached_property
    def _group_ends(self) -> np.ndarray:
        metadata = self._file.metadata
        return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    @cached_property
    def _by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """The first eight bytes of the digests in ascending order, and the row of each. Others than these are checked later."""
        column = self._file.read(["digest"])["digest"]
        chunks = [np.frombuffer(chunk.buffers()[1], np.uint8, 24 * len(chunk)) for chunk in column.chunks]
        keys = _keys(np.concatenate([np.empty(0, np.uint8), *chunks]).reshape(-1, 24))
        rows = np.argsort(keys, kind="stable")
        return keys[rows], rows

    def _unusable(self, what: str) -> LengthwiseError:
        return LengthwiseError(f"{self.path}: {what}; run snakemake, which reads the FASTA file again")


def _keys(digests: np.ndarray) -> np.ndarray:
    """The first eight bytes of digests [n, 24] as numbers [n]."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]
