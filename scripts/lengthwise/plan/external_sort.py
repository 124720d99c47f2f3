"""External sort: sequences of many files by length and digest, out of core.

A bucket sort. Lengths are counted first, and digests are spread evenly, so each sequence's approximate place in the order is
known before anything is sorted. Pass one writes every sequence to the file of its part of the order; pass two sorts one part at a
time. Memory is bounded by the size of a part.
DuckDB's external sort needed about twice the memory for a plan, and failed within limits that suffice here.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_COLUMNS = [("digest", pa.binary(24)), ("length", pa.int32()), ("sequence", pa.binary())]
_ROW = pa.schema([*_COLUMNS, ("source", pa.int32())])
# A sequence's digest, length, source and end offset, beside its residues.
_ROW_BYTES = 24 + 4 + 4 + 4
_BATCH_ROWS = 16_384
# Parts are files that are open at the same time; the usual limit of a process is 1,024.
_MAX_PARTS = 500


class SortedSequences:
    """Rows of `sequences.parquet` files in order of length, digest and file.

    Parameters
    ----------
    files
        Tables with the columns digest, length and sequence; no digest is in one of them twice.
    chosen
        Of each file, a bool for each row: whether it is wanted.
    folder
        An empty scratch folder, on a disk with room for all that is chosen.
    part_bytes
        Bytes sorted at once; memory use is a few times this.
    """

    def __init__(self, files: list[Path], chosen: list[np.ndarray], folder: Path, part_bytes: int):
        self.files, self.chosen = files, chosen
        found: Counter[int] = Counter()
        for _, batch in self._rows(["length"]):
            found.update(dict(zip(*np.unique(batch.column("length"), return_counts=True), strict=True)))
        self.lengths = np.array(sorted(found), np.int64)
        self.counts = np.array([found[length] for length in self.lengths], np.int64)
        self.parts = self._distribute(folder, part_bytes)
        if len(files) > 1:  # then some may be in several
            self._count_once()

    def tables(self, columns: list[str] = _ROW.names) -> Iterator[pa.Table]:
        """These columns, part by part; `repeats` says whether a row is the same sequence as the row before it."""
        by = [("length", "ascending"), ("digest", "ascending"), ("source", "ascending")]
        for path in self.parts:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_stream(file).read_all().select(columns)
                table = table.take(pc.sort_indices(table, sort_keys=by)).combine_chunks()
            words = digest_bytes(table.column("digest").chunk(0)).view(np.uint64)
            repeats = np.zeros(len(table), bool)
            repeats[1:] = (words[1:] == words[:-1]).all(axis=1)
            yield table.append_column("repeats", pa.array(repeats))

    def _rows(self, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(number of the file, chosen rows, at least one) in the order of the files."""
        for source, (path, chosen) in enumerate(zip(self.files, self.chosen, strict=True)):
            start = 0
            file = pq.ParquetFile(path, pre_buffer=False)  # what is read ahead stays in memory to the end
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                own = chosen[start : start + len(batch)]
                start += len(batch)
                if own.any():
                    yield source, batch.filter(pa.array(own))

    def _distribute(self, folder: Path, part_bytes: int) -> list[Path]:
        """Write every row to the file of its part; returns the files in order."""
        sizes = (self.lengths + _ROW_BYTES) * self.counts
        shorter = np.cumsum(sizes) - sizes  # bytes of the sequences that are shorter
        part_bytes = max(part_bytes, int(sizes.sum()) // _MAX_PARTS + 1)
        waiting: defaultdict[int, list[pa.RecordBatch]] = defaultdict(list)
        waiting_bytes = 0
        with ExitStack() as stack:
            writers: dict[int, pa.RecordBatchStreamWriter] = {}

            def write() -> None:
                for part, rows in waiting.items():
                    if part not in writers:
                        writers[part] = stack.enter_context(pa.ipc.new_stream(folder / f"{part}.arrow", _ROW))
                    writers[part].write_table(pa.Table.from_batches(rows).combine_chunks())
                waiting.clear()

            for source, batch in self._rows([name for name, _ in _COLUMNS]):
                digests = digest_bytes(batch.column("digest"))
                share = digests[:, 0] / 2**8 + digests[:, 1] / 2**16
                i = np.searchsorted(self.lengths, batch.column("length"))
                part = ((shorter[i] + sizes[i] * share) // part_bytes).astype(np.int32)
                order = np.argsort(part, kind="stable")
                columns = [*batch.columns, pa.array(np.full(len(batch), source, np.int32))]
                batch = pa.record_batch(columns, schema=_ROW).take(pa.array(order))
                part = part[order]
                for start, stop in pairwise([0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(batch)]):
                    waiting[int(part[start])].append(batch.slice(start, stop - start))
                waiting_bytes += batch.nbytes
                if waiting_bytes > part_bytes:
                    write()
                    waiting_bytes = 0
            write()
        return [folder / f"{part}.arrow" for part in sorted(writers)]

    def _count_once(self) -> None:
        """Count each sequence once, whatever files it is in."""
        self.counts[:] = 0
        for table in self.tables(["digest", "length", "source"]):
            lengths = table.filter(pc.invert(table.column("repeats"))).column("length")
            found, counts = np.unique(lengths, return_counts=True)
            self.counts[np.searchsorted(self.lengths, found)] += counts


def digest_bytes(digests: pa.FixedSizeBinaryArray) -> np.ndarray:
    """[n, 24] uint8, not copied."""
    data = np.frombuffer(digests.buffers()[1], np.uint8)
    return data[24 * digests.offset : 24 * (digests.offset + len(digests))].reshape(-1, 24)
