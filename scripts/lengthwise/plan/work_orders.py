"""Work orders: a job's input, an immutable Parquet file named by its content."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.digests import digest as sequence_digest
from lengthwise.plan.external_sort import digest_bytes
from lengthwise.store.layout import shard_name
from lengthwise.store.paths import shard_path, work_order_path
from lengthwise.store.shard import open_named
from lengthwise.system.files import atomic
from lengthwise.system.text import count

WORK_ORDER = pa.schema(
    [
        ("shard", pa.string()),
        ("row_start", pa.int64()),
        ("digest", pa.binary(24)),
        ("length", pa.int32()),
        ("sequence", pa.binary()),
    ]
)
_ALL_BUT_RESIDUES = pa.schema(list(WORK_ORDER)[:-1])


class DamagedError(Exception):
    """What is wrong with a work order, in a few words."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard as a work order has it: n sequences of ascending length."""

    name: str
    digests: list[bytes]
    lengths: np.ndarray  # [n] residues
    sequences: list[bytes]  # b"" where the work order lacks it, see `add_sequences`


def read_work_order(work_order: Path, fingerprint: str) -> Iterator[PlannedShard]:
    """The shards of a work order, in its order. A sequence that is not what its digest says is left out.

    Parameters
    ----------
    work_order
        The file.
    fingerprint
        That of the store's settings.

    Raises
    ------
    DamagedError
        It is missing or damaged, or was written for other settings.
    LengthwiseError
        The disk cannot read it.
    """
    for name, rows in _shard_rows(work_order, fingerprint, WORK_ORDER):
        digests, lengths = rows.column("digest").to_pylist(), rows.column("length").to_numpy()
        planned = zip(rows.column("sequence").to_pylist(), digests, lengths.tolist(), strict=True)
        sequences = [s if _matches(s, digest, length) else b"" for s, digest, length in planned]
        yield PlannedShard(name, digests, lengths, sequences)


def is_intact(work_order: Path, fingerprint: str) -> bool:
    """Whether a work order is whole and was written for these settings. Its residues are not read."""
    try:
        deque(_shard_rows(work_order, fingerprint, _ALL_BUT_RESIDUES), maxlen=0)
    except DamagedError:
        return False
    return True


def add_sequences(store: Path, shards: list[PlannedShard]) -> None:
    """Add the sequences that a work order lacks to its shards, from the tables of the store's inputs.

    Raises
    ------
    DamagedError
        No table has one of them.
    """
    places = {
        digest: (shard, i) for shard in shards for i, digest in enumerate(shard.digests) if not shard.sequences[i]
    }
    if not places:
        return
    digests = pa.array(list(places), pa.binary(24))
    for table in sorted(store.glob("inputs/*/sequences.parquet")):
        with suppress(OSError, pa.ArrowException):  # a damaged table adds nothing
            for batch in pq.ParquetFile(table).iter_batches(columns=["digest", "sequence"]):
                for row in batch.filter(pc.is_in(batch.column("digest"), digests)).to_pylist():
                    shard, i = places[row["digest"]]
                    if _matches(row["sequence"], row["digest"], shard.lengths[i]):
                        shard.sequences[i] = row["sequence"]
    if left := sum(not shard.sequences[i] for shard, i in places.values()):
        raise DamagedError(f"lacks {count(left, 'sequence')} that no input has")


def require_planned(work_order: Path) -> None:
    """Refuse to go on without the work order.

    Raises
    ------
    LengthwiseError
        It is gone: a plan that was made after this job began has removed it.
    """
    if not work_order.exists():
        raise LengthwiseError(
            f"{work_order}: is gone: a later plan has given its sequences to other jobs, and uses the shards that are finished"
        )


def _matches(sequence: bytes | None, digest: bytes, length: int) -> bool:
    return sequence is not None and len(sequence) == length and sequence_digest(sequence) == digest


def _shard_rows(work_order: Path, fingerprint: str, schema: pa.Schema) -> Iterator[tuple[str, pa.Table]]:
    """(name, rows) of each shard. Names, which are hashes of digests, and first rows, which lengths give, are checked."""
    try:
        with pq.ParquetFile(work_order) as file:
            table = file.read(schema.names).cast(schema)  # `cuts.MAX_WORK_ORDER_BYTES` bounds it
    except FileNotFoundError as error:
        raise DamagedError("missing") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        if getattr(error, "errno", None):
            raise LengthwiseError(f"{work_order}: cannot be read: {error}") from error
        raise DamagedError("damaged") from error
    if not len(table) or any(table.column(name).null_count for name in _ALL_BUT_RESIDUES.names):
        raise DamagedError("damaged")
    names, lengths, first_rows = (table.column(name).to_numpy() for name in ("shard", "length", "row_start"))
    digests = digest_bytes(table.column("digest").combine_chunks())  # [n, 24]
    bounds = np.flatnonzero(names[1:] != names[:-1]) + 1
    for start, stop in itertools.pairwise([0, *bounds.tolist(), len(names)]):
        is_named = names[start] == shard_name(fingerprint, [digests[start:stop].tobytes()])
        if not (is_named and np.array_equal(first_rows[start:stop], _first_rows(lengths[start:stop]))):
            raise DamagedError("damaged, or of other settings")
        yield names[start], table.slice(start, stop - start)


def _first_rows(lengths: np.ndarray) -> np.ndarray:
    """The first row of each sequence of a shard."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


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
        row_starts.append(_first_rows(lengths[start:stop]))
    shard_of_row = pa.array(np.repeat(np.arange(len(names)), np.diff(shard_bounds)))
    columns = [pa.array(names).take(shard_of_row), pa.array(np.concatenate(row_starts)), *sequences.columns]
    return pa.table(columns, schema=WORK_ORDER)


def finished_sequences(store: Path, shard: str, settings: dict) -> pa.Table:
    """The columns digest, length and sequence of a finished shard. It has no residues, so `sequence` is null.

    Raises
    ------
    LengthwiseError
        The shard is missing or damaged.
    """
    finished = open_named(shard_path(store, shard), settings["fingerprint"])
    n, digests = len(finished["status"]), pa.py_buffer(finished["digests"].tobytes())
    columns = {
        "digest": pa.FixedSizeBinaryArray.from_buffers(pa.binary(24), n, [None, digests]),
        "length": np.diff(finished["offsets"]).astype(np.int32),
        "sequence": pa.nulls(n, pa.binary()),
    }
    return pa.table(columns)


def write_work_order(store: Path, work_order: pa.Table, job: str = "") -> str:
    """Write a work order; returns the job's name, which for a new job is a hash over the names of its shards in order."""
    shards = pc.unique(work_order.column("shard")).to_pylist()
    job = job or hashlib.sha256("".join(shards).encode()).hexdigest()[:16]
    with atomic(work_order_path(store, job)) as part:
        pq.write_table(work_order, part, 65_536, compression="zstd", use_dictionary=["shard", "length"])
    return job


def write_work_order_of_shards(store: Path, shards: list[str], settings: dict, job: str = "") -> str:
    """Write the work order of finished shards, without residues: where embedding needs some, it takes them from the inputs.

    Raises
    ------
    LengthwiseError
        A shard is missing or damaged.
    """
    parts = [finished_sequences(store, shard, settings) for shard in shards]
    work_order = work_order_table(pa.concat_tables(parts), np.cumsum([0, *map(len, parts)]), settings)
    return write_work_order(store, work_order, job)
