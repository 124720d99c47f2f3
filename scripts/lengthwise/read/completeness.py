"""Is a dataset complete? Its manifest says so; without one, an error says why the folder cannot be opened.

A run that makes a dataset again removes its files and writes the manifest last. A reader can meet any state in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lengthwise.errors import LengthwiseError
from lengthwise.store.manifest import read_manifest
from lengthwise.system.files import stamp

Stamp = dict[str, int]


def read_complete(folder: Path) -> tuple[dict[str, Any], Stamp | None]:
    """Read a dataset's manifest, and the stamp of its file for `unless_replaced`.

    Raises
    ------
    LengthwiseError
        The dataset is not complete, or the manifest is damaged or of a newer version.
    """
    path = folder / "manifest.json"
    try:
        manifest_stamp = _stamp(path)
        return read_manifest(path), manifest_stamp
    except FileNotFoundError:
        raise LengthwiseError(_why_not_complete(folder)) from None


@contextmanager
def unless_replaced(folder: Path, manifest_stamp: Stamp | None) -> Iterator[None]:
    """Read a dataset's files in this block. If it fails because a run replaces them, the error says that."""
    try:
        yield
    except LengthwiseError as error:
        if manifest_stamp == _stamp(folder / "manifest.json"):
            raise
        raise LengthwiseError(_in_progress(folder)) from error


def is_store(folder: Path) -> bool:
    """Whether a folder is a store: no dataset's folder has settings.json, or datasets."""
    return (folder / "settings.json").exists() or (folder / "datasets").is_dir()


def _stamp(path: Path) -> Stamp | None:
    """Size and times of a file, None if there is none."""
    try:
        return stamp(path)
    except OSError:
        return None


def _why_not_complete(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    if any((folder / name).exists() for name in ("index.parquet", "README.md")):
        return _in_progress(folder)
    return f"{folder}: no finished dataset here (no manifest.json); run snakemake to make it"


def _in_progress(folder: Path) -> str:
    return f"{folder}: is being made again, or was not finished: wait for the current run, or run snakemake"
