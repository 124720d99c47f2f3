"""The parquet export: one table with the pooled vectors of every record."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise.export.source import Source
from lengthwise.ingest.digests import digest_name


def write_parquet(source: Source, folder: Path, names: list[str]) -> int:
    """Write `pooled.parquet` into `folder`, in the input's order. Returns the number of records."""
    width = source.settings["embed_dim"]
    vector = pa.list_(pa.float32(), width)
    schema = pa.schema(
        [("id", pa.string()), ("digest", pa.string()), ("length", pa.int32()), *((name, vector) for name in names)],
        metadata={key: str(value) for key, value in source.origin.items()},
    )
    n = 0
    with pq.ParquetWriter(folder / "pooled.parquet", schema, compression="zstd", use_dictionary=False) as writer:
        for batch, gathered in source.pooled(names):
            n += len(batch)
            digests = pa.array(map(digest_name, batch.column("digest").to_pylist()), pa.string())
            vectors = [pa.FixedSizeListArray.from_arrays(gathered[name].ravel(), width) for name in names]
            columns = [batch.column("id"), digests, batch.column("length"), *vectors]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return n
