"""Exports: a finished dataset in the layouts of other tools, each a folder that is there whole or not at all."""

import fcntl
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
from lengthwise.store.sizes import tensors_of
from lengthwise.system.files import fsync_folder, scratch_folder, writing
from lengthwise.system.locks import at_work, lock


def export(dataset: Path, kind: str, memory_bytes: int = 1 << 30) -> int:
    """Write a finished dataset's folder ``exports/<kind>``, in place of one that is there.

    Rejected records are left out; duplicates are there under their own ids.

    Parameters
    ----------
    dataset
        The folder ``results/<model>/datasets/<dataset>``.
    kind
        ``h5``: UniProt's layout, ``per-residue.h5`` and ``per-protein.h5``, a float16 array for each accession.
        ``pt``: what fair-esm's ``extract.py`` writes, a file for each protein; ``files.tsv`` says which is whose.
        ``biotrainer``: ``embeddings_file_<model>.h5``, and ``reduced_embeddings_file_<model>.h5`` of means.
        ``parquet``: ``pooled.parquet``, a row with all pooled vectors for each record.
    memory_bytes
        What sorting the records may take before it spills to disk.

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
            at_work(dataset.resolve().parent.parent),
            _replacing(folder) as part,
            Source(dataset, part.with_name("spill"), memory_bytes) as source,
        ):
            source.require_space(part, kind)
            return _WRITERS[kind](source, part, tensors_of(kind, source.settings))
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        what = " ".join(str(error).split())[:300]
        raise LengthwiseError(f"{folder}: cannot be made: {what}; mend that and run again") from error


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes this one's place on success, synced; what a killed attempt left goes first."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        _alone(folder.with_name(f".{folder.name}.lock.tmp")),
        scratch_folder(folder.with_name(f".{folder.name}.tmp")) as scratch,
    ):
        part = scratch / "whole"
        part.mkdir()
        yield part
        os.sync()  # all files at once: one after the other would take minutes for thousands
        for path in part.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # nothing is left to write, but an error is told
        with suppress(FileNotFoundError):
            os.rename(folder, scratch / "old")  # never half of it under its name
        os.rename(part, folder)
        fsync_folder(folder.parent)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process has locked this file, which is gone afterwards."""
    while True:
        with open(path, "w") as file:
            lock(file.fileno(), fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # else whoever had it removed it
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


_WRITERS = {"h5": write_h5, "pt": write_pt, "biotrainer": write_biotrainer, "parquet": write_parquet}
