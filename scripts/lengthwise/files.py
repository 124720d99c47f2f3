"""Files that are there whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lengthwise.errors import LengthwiseError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the temporary path that this yields; it becomes `path` on success, fsynced, and vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        fsync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A scratch folder, gone afterwards; what a killed run left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path, *keys: str) -> dict:
    """Read a JSON object that has these keys.

    Raises
    ------
    LengthwiseError
        It is damaged.
    """
    try:
        value = json.loads(Path(path).read_text())
    except ValueError as error:
        raise LengthwiseError(f"{path}: damaged ({error}); remove it and run snakemake again") from error
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise LengthwiseError(f"{path}: damaged (it lacks {keys or 'everything'}); remove it and run snakemake again")
    return value


def stamp(path: Path) -> dict[str, int]:
    """What changes when a file does: its size, and the times of its content and of its name, in nanoseconds."""
    state = os.stat(path)
    return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "ctime_ns": state.st_ctime_ns}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
