"""The user's cache folder; and one that only this user can write to: what is in it is code, and runs."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def user_cache() -> Path:
    """The folder of this user's cache, made where it can be, for this user alone: in XDG_CACHE_HOME, else in ~/.cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lengthwise")
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def private_cache(name: str) -> Path | None:
    """The folder of a cache, made where it is missing: in XDG_CACHE_HOME, else in TMPDIR; None where neither can be had.

    XDG_CACHE_HOME is ~/.cache where it is not set (XDG Base Directory Specification). A folder that belongs to another user, or
    that others may write to, is not taken.
    """
    for folder in _candidates():
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
            if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
                if os.access(folder / name, os.W_OK):  # homes are read-only on some clusters' nodes
                    return folder / name
    return None


def _candidates() -> Iterator[Path]:
    yield user_cache()
    if folder := os.environ.get("TMPDIR"):
        yield Path(folder, f"lengthwise-{os.getuid()}")  # TMPDIR may be one for all users
