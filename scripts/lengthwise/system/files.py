"""Files that are there whole or not at all."""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.system.locks import UNSUPPORTED, lock, opened

# What only writing is refused for, whatever else a rule does meanwhile.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

_temporaries: set[Path] = set()

_removal = threading.Lock()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the temporary path that this yields; it becomes `path` on success, fsynced, and vanishes on failure."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        with writing(path, _NO_SPACE):
            yield part
        with writing(path):
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            fsync_folder(path.parent)
    finally:
        discard(part)


def temporary(path: Path) -> Path:
    """A name beside `path` for what is not finished; no other process, on whatever machine, gets the same.

    Nobody gets one after `remove_temporaries`.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _removal:
        _temporaries.add(part)
    return part


@contextmanager
def going_with_this_process(path: Path) -> Iterator[None]:
    """Write `path` in here, and `remove_temporaries` removes it too, after which nobody gets in here."""
    with _removal:
        _temporaries.add(path)
        yield


def remove_temporaries() -> None:
    """Remove what is of use to this process alone, because it ends at once."""
    _removal.acquire(timeout=1.0)  # for good; a disk that hangs is not waited for
    for part in tuple(_temporaries):
        discard(part)


def discard(part: Path) -> None:
    """Remove a temporary file, if it is there and if that is possible: a later run removes what is left."""
    with suppress(OSError):
        part.unlink()


def claim(path: Path) -> tuple[Path, int]:
    """Make a temporary file for `path` and lock it: the kernel lets go of the lock when this process ends, however it does."""
    while True:
        part = temporary(path)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        lock(descriptor, fcntl.LOCK_EX)
        if part.exists():
            return part, descriptor
        os.close(descriptor)  # between the two calls another process took it for a leftover


def outlive_others(path: Path, wait: bool) -> None:
    """Wait until nobody else is making `path`, and remove what those who died left of it.

    Raises
    ------
    BlockingIOError
        Somebody is, and `wait` is false.
    """
    for part in path.parent.glob(f".{path.stem}*.tmp"):
        try:
            descriptor = os.open(part, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # renamed by now, or of another user
            continue
        try:
            if lock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB):
                discard(part)
        finally:
            os.close(descriptor)


def reserve(descriptor: int, size: int, free: int) -> None:
    """Give a file its bytes on the disk; where the file system cannot reserve any, at least ask whether so many are free.

    `os.posix_fallocate` would write zeros there: every byte twice.

    Raises
    ------
    OSError
        There are not enough.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    refused = ctypes.get_errno()
    if refused in UNSUPPORTED and size <= free:
        os.ftruncate(descriptor, size)
    else:
        number = errno.ENOSPC if refused in UNSUPPORTED else refused
        raise OSError(number, os.strerror(number))


@contextmanager
def writing(path: Path, refusals: set[int] | None = None) -> Iterator[None]:
    """Say of an error in here that `path` cannot be written, and why: of any, or of these error numbers alone."""
    try:
        yield
    except OSError as error:
        if refusals is not None and error.errno not in refusals:
            raise
        why = os.strerror(error.errno) if error.errno else error
        raise LengthwiseError(f"{path}: cannot be written: {why}; mend that and run again") from error


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder of this process's own, named after this one, and gone afterwards; what killed ones left beside it goes first.

    Another process may be at the same work: a job of a dead run, say.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".*{folder.name}"):
        with suppress(OSError), opened(left) as descriptor:
            if lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):  # its owner is dead
                shutil.rmtree(left, ignore_errors=True)
    while True:
        own = folder.with_name(f".{secrets.token_hex(4)}{folder.name}")
        with writing(own):
            own.mkdir()
        with opened(own) as descriptor:
            lock(descriptor, fcntl.LOCK_EX)
            if not own.exists():  # between the two calls another process took it for a leftover
                continue
            try:
                yield own
            finally:
                shutil.rmtree(own, ignore_errors=True)
            return


def fsync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as part, writing(path):
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


def state(fasta: Path) -> str:
    """A file's size and time in one line: another one means that it changed."""
    found = os.stat(fasta)
    return f"{found.st_size} bytes, {found.st_mtime_ns} ns"
