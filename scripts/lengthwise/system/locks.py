"""Locks (flock) on files and folders, and the lock of a whole store."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError


@contextmanager
def shared_store_lock(store: Path) -> Iterator[None]:
    """Hold a shared lock on a store; the kernel releases it when this process ends.

    Any number of runs, jobs and exports hold it at once. It excludes `exclusive_store_lock`.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # the first write reports a store that cannot be written
            store.mkdir(parents=True, exist_ok=True)
        for path in (store, store / "settings.json"):
            with suppress(FileNotFoundError):
                lock(stack.enter_context(opened(path, os.O_RDONLY)), fcntl.LOCK_SH)
        yield


@contextmanager
def exclusive_store_lock(store: Path) -> Iterator[None]:
    """Hold the exclusive lock on a store, which no run, job or export may be using.

    Raises
    ------
    LengthwiseError
        A run or a job is at work in the store, or its file system has no locks.
    """
    with ExitStack() as stack:
        try:
            supported = lock(stack.enter_context(opened(store, os.O_RDONLY)), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (store / "settings.json").exists():  # NFS needs a file open for writing to lock it exclusively
                settings = stack.enter_context(opened(store / "settings.json", os.O_RDWR))
                supported = lock(settings, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not supported:
                raise LengthwiseError(f"{store}: its file system has no locks, so a job may be at work here unnoticed")
        except BlockingIOError as error:
            raise LengthwiseError(f"{store}: a run or a job is at work in this store; wait until it is done") from error
        except OSError as error:
            raise LengthwiseError(f"{error.filename or store}: {error.strerror}") from error
        yield


# errno values of a file system that supports no locks or no preallocation. NFS: EBADF for an exclusive lock on a folder.
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF}


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Yield the descriptor of an open file or folder, to lock it."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int, how: int) -> bool:
    """Lock an open file.

    Parameters
    ----------
    descriptor
        The open file or folder.
    how
        `fcntl.LOCK_SH` or `fcntl.LOCK_EX`; with `fcntl.LOCK_NB` it does not wait.

    Returns
    -------
    bool
        False if the file system supports no locks.

    Raises
    ------
    BlockingIOError
        Another process holds the lock, and `how` says not to wait.
    """
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True
