"""Batch metrics: one row for each forward pass of production, and what is read back from them."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import ParquetFileFormat, dataset

from lengthwise.system.files import atomic, writing

# wall_ms is the host's time since the job's previous batch was finished, so that a job's rows add up to its time without
# the model's load; on a CPU, which computes several batches at once, a batch's share of it. device_ms is the time of the
# forward pass and pooling by the device's own clock (on a CPU by its core's), gpu_busy its share of wall_ms, wait_read_ms the
# wait for the batch to be tokenised, wait_write_ms the wait for earlier batches to be written. What a device does not have is
# null.
METRICS = pa.schema(
    [
        ("job", pa.string()),
        ("shard", pa.string()),
        ("batch", pa.int32()),
        ("n_sequences", pa.int32()),
        ("n_residues", pa.int64()),
        ("n_tokens", pa.int64()),
        ("min_length", pa.int32()),
        ("mean_length", pa.float64()),
        ("max_length", pa.int32()),
        ("wall_ms", pa.float64()),
        ("device_ms", pa.float64()),
        ("gpu_busy", pa.float64()),
        ("wait_read_ms", pa.float64()),
        ("wait_write_ms", pa.float64()),
        ("peak_allocated_bytes", pa.int64()),
        ("peak_reserved_bytes", pa.int64()),
        ("peak_rss_bytes", pa.int64()),
        ("oom_splits", pa.int32()),
        ("device", pa.string()),
        ("precision", pa.string()),
    ]
)

TEXTS = ("job", "shard", "device", "precision")

# As METRICS with texts once each: millions of rows name few jobs and fewer devices.
_ENCODED = pa.schema(
    [(field.name, pa.dictionary(pa.int32(), pa.string()) if field.name in TEXTS else field.type) for field in METRICS]
)


def write_metrics(path: Path, rows: list[dict]) -> None:
    """Write the rows of one shard's batches atomically."""
    with atomic(path) as part, writing(path):
        pq.write_table(pa.Table.from_pylist(rows, METRICS), part, write_page_checksum=True)


def read_metrics(paths: Iterable[Path]) -> pd.DataFrame:
    """The rows of many shards, in one frame with nullable integers."""
    return read_encoded(paths).cast(METRICS).to_pandas(types_mapper=pd.ArrowDtype)


def read_encoded(paths: Iterable[Path]) -> pa.Table:
    """The rows of many shards, `TEXTS` as dictionaries."""
    paths = [str(path) for path in paths]
    form = ParquetFileFormat(dictionary_columns=set(TEXTS))
    table = dataset(paths, _ENCODED, format=form).to_table() if paths else _ENCODED.empty_table()
    return table.unify_dictionaries()
