"""Atomic writes, temporary files and folders, JSON files, checksums."""

import errno
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
from lengthwise.system.descriptors import flush, flush_folder, lock, opened

# errno values that always mean 'cannot write'.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# The key of a JSON file's own checksum: SHA-256 of the object without this key, as compact JSON.
_OWN_CHECKSUM = "json_sha256"
_temporaries: set[Path] = set()
# `remove_temporaries` keeps this lock, so that no thread creates another file while the process ends.
_temporaries_lock = threading.Lock()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path; fsync and rename it to `path` on success, remove it on failure.

    Raises
    ------
    LengthwiseError
        The file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        with writing(path, _WRITE_ERRORS):
            yield part
        with writing(path):
            with open(part, "rb") as file:
                flush(file.fileno())
            os.replace(part, path)
            flush_folder(path.parent)
    finally:
        discard(part)


def temporary(path: Path) -> Path:
    """Return a unique temporary path beside `path`, registered for removal by `remove_temporaries`.

    Blocks for ever once `remove_temporaries` has begun.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _temporaries_lock:
        _temporaries.add(part)
    return part


@contextmanager
def removed_on_sigterm(path: Path) -> Iterator[None]:
    """Register `path` for removal by `remove_temporaries`, and delay that removal while the caller writes the file.

    Blocks for ever once `remove_temporaries` has begun.
    """
    with _temporaries_lock:
        _temporaries.add(path)
        yield


def remove_temporaries() -> None:
    """Remove all registered files. Call it only directly before the process ends: `temporary` blocks afterwards."""
    _temporaries_lock.acquire(timeout=1.0)  # never released; the time limit is for a writer on a disk that hangs
    for part in tuple(_temporaries):
        discard(part)


def discard(part: Path) -> None:
    """Remove a temporary file and ignore failure: the next run removes leftovers."""
    with suppress(OSError):
        part.unlink()


def create_locked(path: Path) -> tuple[Path, int]:
    """Create a temporary file for `path` with an exclusive lock, which the kernel releases when this process ends.

    Returns
    -------
    tuple[Path, int]
        The temporary file and its open descriptor.
    """
    while True:
        part = temporary(path)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        lock(descriptor)
        if part.exists():
            return part, descriptor
        os.close(descriptor)  # another process removed it as a leftover before it was locked


def wait_for_writers(path: Path, wait: bool, but: Path | None = None) -> None:
    """Wait until no process is writing `path`, and remove the temporary files of processes that died.

    Parameters
    ----------
    path
        The file.
    wait
        Whether to wait.
    but
        This process's own temporary file, which is left out.

    Raises
    ------
    BlockingIOError
        Another process is writing it, and `wait` is false.
    """
    for part in path.parent.glob(f".{path.stem}*.tmp"):
        if part == but:
            continue
        try:
            descriptor = os.open(part, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # renamed meanwhile, or owned by another user
            continue
        try:
            if lock(descriptor, wait=wait):
                discard(part)
        finally:
            os.close(descriptor)


@contextmanager
def writing(path: Path, refusals: set[int] | None = None) -> Iterator[None]:
    """Turn an OSError of the body into an error that says that `path` cannot be written, and why.

    Parameters
    ----------
    path
        The file or folder to name.
    refusals
        errno values to translate; None translates every OSError.

    Raises
    ------
    LengthwiseError
        The body raised such an OSError.
    """
    try:
        yield
    except OSError as error:
        if refusals is not None and error.errno not in refusals:
            raise
        why = os.strerror(error.errno) if error.errno else error
        raise LengthwiseError(f"{path}: cannot be written: {why}; mend that and run again") from error


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder` that only this process uses, and remove it afterwards.

    First removes the scratch folders of killed processes. A lock protects those of running processes, for example of a
    job that outlived its run.

    Raises
    ------
    LengthwiseError
        The folder cannot be created.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".*{folder.name}"):
        with suppress(OSError), opened(leftover) as descriptor:
            if lock(descriptor, wait=False):  # its process has ended
                shutil.rmtree(leftover, ignore_errors=True)
    while True:
        own = folder.with_name(f".{secrets.token_hex(4)}{folder.name}")
        with writing(own):
            own.mkdir()
        with opened(own) as descriptor:
            lock(descriptor)
            if not own.exists():  # another process removed it as a leftover before it was locked
                continue
            try:
                yield own
            finally:
                shutil.rmtree(own, ignore_errors=True)
            return


def ignores_case(folder: Path) -> bool:
    """Whether names that differ in case alone are one file in a folder, as macOS and Windows have it; it need not exist yet."""
    while not folder.is_dir():
        folder = folder.parent
    names = set(os.listdir(folder))
    swapped = next((name.swapcase() for name in names if name.swapcase() != name), None)
    return swapped is not None and swapped not in names and (folder / swapped).exists()


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically, with a checksum of its own that `read_json` compares."""
    with atomic(path) as part, writing(path):
        part.write_text(json.dumps({**value, _OWN_CHECKSUM: _json_checksum(value)}, indent=2) + "\n")


def read_json(path: Path, *keys: str) -> dict:
    """Read a JSON object that has these keys, without its own checksum.

    Raises
    ------
    LengthwiseError
        The file is no JSON object, lacks a key, or does not match its checksum. Files of earlier versions have none.
    """
    try:
        value = json.loads(Path(path).read_text())
    except ValueError as error:
        raise LengthwiseError(f"{path}: damaged ({error}); remove it and run snakemake again") from error
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise LengthwiseError(f"{path}: damaged (it lacks {keys or 'everything'}); remove it and run snakemake again")
    checksum = value.pop(_OWN_CHECKSUM, None)
    if checksum is None and value:  # of an earlier version, unless damage has renamed the key
        *names, last = value
        intact = value[last] != _json_checksum({name: value[name] for name in names})
    else:
        intact = checksum in (None, _json_checksum(value))
    if not intact:
        raise LengthwiseError(
            f"{path}: damaged, or edited by hand (another {_OWN_CHECKSUM}); remove it and run snakemake again"
        )
    return value


def _json_checksum(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def facts(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, as records keep them of the files that they vouch for."""
    return {"bytes": os.path.getsize(path), "sha256": sha256(path)}


def has_size(path: Path, expected: dict) -> bool:
    """Whether a file has the size that its `facts` say."""
    try:
        return os.path.getsize(path) == expected["bytes"]
    except OSError:
        return False


def damaged_files(folder: Path, files: dict[str, dict]) -> list[str]:
    """The files of a folder that are missing or have another size than a record of them, {name: `facts`}, says."""
    return [name for name, expected in files.items() if not has_size(folder / name, expected)]


def stamp(path: Path) -> dict[str, int]:
    """Return a file's size, mtime and ctime (nanoseconds): a change of the file changes at least one of them."""
    stat = os.stat(path)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_sha256(path: Path, record: dict) -> str:
    """The SHA-256 of a file, compared with the one in the "files" of a record, which an earlier version does not have.

    Raises
    ------
    LengthwiseError
        They differ.
    """
    found = sha256(path)
    if record.get("files", {}).get(path.name, {"sha256": found})["sha256"] != found:
        raise LengthwiseError(f"{path}: damaged (another checksum); remove it and run snakemake again")
    return found


def size_and_mtime(path: Path | str) -> str:
    """Return a file's size and mtime as text. The ingest rule stores it as a param, so its form must not change."""
    stat = os.stat(path)
    return f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"
