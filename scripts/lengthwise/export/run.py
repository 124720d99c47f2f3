"""Exports: write a finished dataset in another tool's layout. A folder of an export is always complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb
import pyarrow as pa

from lengthwise.errors import LengthwiseError
from lengthwise.export.biotrainer import write_biotrainer
from lengthwise.export.h5 import write_h5
from lengthwise.export.parquet import write_parquet
from lengthwise.export.pt import write_pt
from lengthwise.export.source import Source
from lengthwise.store.receipts import protein_files, write_receipt
from lengthwise.store.sizes import tensors_of
from lengthwise.system.descriptors import flush_folder, lock
from lengthwise.system.files import scratch_folder, writing
from lengthwise.system.locks import shared_store_lock


def export(dataset: Path, kind: str, memory_bytes: int = 1 << 30) -> int:
    """Write a finished dataset's folder ``exports/<kind>``, and replace an earlier one.

    Rejected records are left out. Duplicates have entries under their own ids.

    Parameters
    ----------
    dataset
        The folder ``results/<model>/datasets/<dataset>``.
    kind
        ``h5``: UniProt's layout, ``per-residue.h5`` and ``per-protein.h5``, a float16 array for each accession.
        ``pt``: what fair-esm's ``extract.py`` writes, a file for each protein; ``files.tsv`` lists ids and files.
        ``biotrainer``: ``embeddings_file_<model>.h5``, and ``reduced_embeddings_file_<model>.h5`` of means.
        ``parquet``: ``pooled.parquet``, a row with all pooled vectors for each record.
    memory_bytes
        The memory for sorting the records; beyond it sorting spills to the disk.

    Returns
    -------
    The number of entries written.

    Raises
    ------
    LengthwiseError
        The disk is full, a shard is gone, or a number is too large for the layout's type.
    """
    folder = dataset / "exports" / kind
    try:
        with (
            shared_store_lock(dataset.resolve().parent.parent),
            _replace_folder(folder) as part,
            Source(dataset, part.with_name("spill"), memory_bytes) as source,
        ):
            source.require_space(part, kind)
            n = _WRITERS[kind](source, part, tensors_of(kind, source.settings))
            _write_receipt(part, kind, n, source.index_sha256)
            return n
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        reason = " ".join(str(error).split())[:300]
        raise LengthwiseError(f"{folder}: cannot be made: {reason}; mend that and run again") from error


def _write_receipt(folder: Path, kind: str, entries: int, index_sha256: str) -> None:
    """Write the receipt of a finished export."""
    proteins = protein_files(folder) if kind == "pt" else []
    counted = {"files": len(proteins), "bytes": sum(entry.stat().st_size for entry in proteins)}
    origin = {"kind": kind, "index_sha256": index_sha256, "entries": entries}
    names = {*os.listdir(folder)} - {entry.name for entry in proteins}
    write_receipt(folder, names, **origin, **({"proteins": counted} if kind == "pt" else {}))


@contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; on success, sync it and rename it to `folder`. Removes leftovers of killed exports."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        _lock_file(folder.with_name(f".{folder.name}.lock.tmp")),
        scratch_folder(folder.with_name(f".{folder.name}.tmp")) as scratch,
    ):
        part = scratch / "new"
        part.mkdir()
        yield part
        os.sync()  # one call for all files: thousands of fsyncs take minutes
        for path in part.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # nothing is left to write; it reports a write error
        with suppress(FileNotFoundError):
            os.rename(folder, scratch / "old")  # removed later: `folder` is never partly there
        os.rename(part, folder)
        flush_folder(folder.parent)


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    """Hold a lock by a file, which is removed afterwards. Waits for other processes."""
    while True:
        with open(path, "w") as file:
            lock(file.fileno())
            if os.fstat(file.fileno()).st_nlink:  # else the last holder removed the file: lock a new one
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


_WRITERS = {"h5": write_h5, "pt": write_pt, "biotrainer": write_biotrainer, "parquet": write_parquet}
