"""Work orders: a job's input, an immutable Parquet file named by its content."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise.plan.external_sort import digest_bytes
from lengthwise.store.layout import shard_name
from lengthwise.store.paths import work_order_path
from lengthwise.system.files import atomic

WORK_ORDER = pa.schema(
    [
        ("shard", pa.string()),
        ("row_start", pa.int64()),
        ("digest", pa.binary(24)),
        ("length", pa.int32()),
        ("sequence", pa.binary()),
    ]
)


@dataclass(frozen=True)
class PlannedShard:
    """A shard as a work order has it: n sequences of ascending length."""

    name: str
    digests: list[bytes]
    lengths: np.ndarray  # [n] residues
    sequences: list[bytes]


def read_work_order(work_order: Path) -> Iterator[PlannedShard]:
    """The shards of a work order, in its order."""
    table = pq.read_table(work_order)  # `cuts.MAX_WORK_ORDER_BYTES` bounds it
    names = table.column("shard").to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1]]))
    for start, stop in itertools.pairwise([*starts.tolist(), len(names)]):
        rows = table.slice(start, stop - start)
        digests, lengths, sequences = (rows.column(name) for name in ("digest", "length", "sequence"))
        yield PlannedShard(names[start], digests.to_pylist(), lengths.to_numpy(), sequences.to_pylist())


def work_order_table(sequences: pa.Table, shard_bounds: np.ndarray, settings: dict) -> pa.Table:
    """The work order of one job.

    Parameters
    ----------
    sequences
        The columns digest, length and sequence, sorted by length.
    shard_bounds
        [shards + 1] rows of `sequences` where shards begin and end.
    settings
        The store's settings.
    """
    digests = digest_bytes(sequences.column("digest").combine_chunks())  # [n, 24]
    lengths = sequences.column("length").to_numpy()
    names, row_starts = [], []
    for start, stop in itertools.pairwise(shard_bounds.tolist()):
        names.append(shard_name(settings["fingerprint"], [digests[start:stop].tobytes()]))
        row_starts.append(np.concatenate([[0], np.cumsum(lengths[start : stop - 1], dtype=np.int64)]))
    shard_of_row = pa.array(np.repeat(np.arange(len(names)), np.diff(shard_bounds)))
    columns = [pa.array(names).take(shard_of_row), pa.array(np.concatenate(row_starts)), *sequences.columns]
    return pa.table(columns, schema=WORK_ORDER)


def write_work_order(store: Path, shards: list[str], work_order: pa.Table) -> str:
    """Write a work order unless it exists; returns the job's name, a hash over the names of its shards in order."""
    job = hashlib.sha256("".join(shards).encode()).hexdigest()[:16]
    if not work_order_path(store, job).exists():
        replace_work_order(work_order_path(store, job), work_order)
    return job


def replace_work_order(path: Path, work_order: pa.Table) -> None:
    """Write a work order atomically, whether it exists or not."""
    with atomic(path) as part:
        pq.write_table(work_order, part, 65_536, compression="zstd", use_dictionary=["shard", "length"])
