"""Batch metrics: a Parquet file per shard with a row for each forward pass."""

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import ParquetFileFormat, dataset

from lengthwise.store.lookup import read_pages
from lengthwise.store.paths import find_metrics
from lengthwise.system.files import atomic, sha256, writing

log = logging.getLogger("lengthwise")

# wall_ms: host time since the job's previous batch finished. On a CPU, where several batches run at once, the batch's share of
#   it. The rows of a job add up to its time without the model's load.
# device_ms: time of the forward pass and pooling by the device's clock; on a CPU by the core's.
# wait_launch_ms: the part of device_ms in which a GPU may have waited for the host to launch its work, at the most: 0 where all
#   was launched before the GPU began. Earlier versions did not measure it.
# gpu_busy: (device_ms - wait_launch_ms) / wall_ms, at most 1: what the GPU surely computed; of earlier versions with those waits.
# wait_read_ms, wait_write_ms: waiting for the batch's tokens; waiting for earlier batches to be written.
# A value that a device does not have is null.
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
        ("wait_launch_ms", pa.float64()),
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

# The columns of text, dictionary-encoded in memory: millions of rows have few distinct values.
TEXTS = ("job", "shard", "device", "precision")

_ENCODED = pa.schema(
    [(field.name, pa.dictionary(pa.int32(), pa.string()) if field.name in TEXTS else field.type) for field in METRICS]
)


def write_metrics(path: Path, rows: list[dict], maker: str = "") -> None:
    """Write the rows of one shard's batches atomically; the file's metadata say who made the shard."""
    table = pa.Table.from_pylist(rows, METRICS.with_metadata({"maker": maker}))
    with atomic(path) as part, writing(path):
        pq.write_table(table, part, write_page_checksum=True)


def maker_of(store: Path, shard: str) -> str:
    """Who made a shard, as `write_metrics` was told; empty where nothing says it."""
    path = find_metrics(store, shard)
    with suppress(OSError, pa.ArrowException):
        if path:
            return (pq.read_schema(path).metadata or {}).get(b"maker", b"").decode()
    return ""


def find_undamaged(store: Path, shards: Iterable[str], job_records: list[dict]) -> list[Path]:
    """The files with the metrics of these shards. A damaged one is left out and named in the log: it cannot be made again.

    Parameters
    ----------
    store, shards
        The store and the names of its shards.
    job_records
        The records of their jobs, which have the checksums of the files. Those of earlier versions have none.
    """
    expected = {shard: each for record in job_records for shard, each in record.get("metrics", {}).items()}
    found = []
    for shard in shards:
        if path := find_metrics(store, shard):
            try:
                if shard not in expected:
                    read_pages(path)
                elif sha256(path) != expected[shard]["sha256"]:
                    raise ValueError("another checksum")
                found.append(path)
            except (OSError, ValueError, pa.ArrowException) as error:
                log.warning("%s: damaged (%s); these metrics are left out", path, str(error).partition("\n")[0])
    return found


def read_metrics(paths: Iterable[Path]) -> pd.DataFrame:
    """The rows of many shards as a frame. Missing values stay null, also in integer columns."""
    return read_encoded(paths).cast(METRICS).to_pandas(types_mapper=pd.ArrowDtype)


def read_encoded(paths: Iterable[Path]) -> pa.Table:
    """The rows of many shards as an Arrow table, with the columns `TEXTS` dictionary-encoded."""
    files = [str(path) for path in paths]
    file_format = ParquetFileFormat(dictionary_columns=set(TEXTS))
    table = dataset(files, _ENCODED, format=file_format).to_table() if files else _ENCODED.empty_table()
    return table.unify_dictionaries()
