"""The tables of ingest: their columns, and a writer of Parquet files."""

from pathlib import Path

import numpy as np
import pyarrow as pa

RECORDS = pa.schema(
    [
        ("record_no", pa.int64()),
        ("id", pa.string()),
        ("description", pa.string()),
        ("digest", pa.binary(24)),
        ("length", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("changes", pa.string()),
        ("full_length", pa.int32()),  # of a truncated record, residues before; else null
    ]
)

# Of a dataset of several files: the file of each record, as the config names it.
FILE = pa.field("file", pa.string())

SEQUENCES = pa.schema([("digest", pa.binary(24)), ("length", pa.int32()), ("sequence", pa.binary())])
ROWS_PER_GROUP, BYTES_PER_GROUP = 65_536, 1 << 26
# The accepted records that are embedded in windows: the whole sequence, and of each window its first residue and its digest.
WINDOWED = pa.schema(
    [*SEQUENCES, ("starts", pa.list_(pa.int32())), ("windows", pa.list_(pa.binary(24)))],
)
WINDOWS = "windows.parquet"
STATUS = ("accepted", "duplicate", "rejected")


def mostly_empty(values: dict[int, str], n: int) -> pa.Array:
    """A column of n strings: ``values`` at their indices, empty elsewhere."""
    numbers = np.zeros(n, np.int32)
    numbers[list(values)] = range(1, len(values) + 1)
    return pa.DictionaryArray.from_arrays(numbers, pa.array(["", *values.values()], pa.string())).cast(pa.string())


class TableWriter:
    """Writes batches to a Parquet file, many to a row group. Digests and sequences stay uncompressed: they hardly shrink."""

    REPETITIVE = ("length", "status", "reason", "changes", "file")
    COMPRESSED = ("id", "description", "reason")

    def __init__(self, path: Path, schema: pa.Schema):
        import pyarrow.parquet as pq  # takes 35 ms, and reading a dataset needs the names above alone

        self.writer = pq.ParquetWriter(
            path,
            schema,
            compression={name: "zstd" if name in self.COMPRESSED else "none" for name in schema.names},
            use_dictionary=[name for name in schema.names if name in self.REPETITIVE],
            column_encoding={"record_no": "DELTA_BINARY_PACKED"} if "record_no" in schema.names else None,
            write_statistics=False,
        )
        self.schema = schema
        self.batches: list[pa.RecordBatch] = []
        self.rows = self.bytes = 0  # of the batches: there may be one for each of thousands of files

    def append(self, batch: pa.RecordBatch) -> None:
        self.batches.append(batch)
        self.rows, self.bytes = self.rows + len(batch), self.bytes + batch.nbytes
        if self.rows >= ROWS_PER_GROUP or self.bytes >= BYTES_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        self.writer.write_table(pa.Table.from_batches(self.batches, self.schema))
        self.batches, self.rows, self.bytes = [], 0, 0

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
        self.writer.close()
