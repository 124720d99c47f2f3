"""Locks on files and folders, and who is at work in a store."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError


@contextmanager
def at_work(store: Path) -> Iterator[None]:
    """Keep others from having the store alone; the kernel ends it when this process ends, however it does."""
    with ExitStack() as stack:
        with suppress(OSError):  # whoever cannot write there says so when there is something to write
            store.mkdir(parents=True, exist_ok=True)
        for path in (store, store / "settings.json"):
            with suppress(FileNotFoundError):
                lock(stack.enter_context(opened(path, os.O_RDONLY)), fcntl.LOCK_SH)
        yield


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """Have the store for oneself.

    Raises
    ------
    LengthwiseError
        A run or a job is at work in it, or there is no way to know.
    """
    with ExitStack() as stack:
        try:
            known = lock(stack.enter_context(opened(store, os.O_RDONLY)), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (store / "settings.json").exists():  # on NFS such a lock needs a file that is open for writing
                settings = stack.enter_context(opened(store / "settings.json", os.O_RDWR))
                known = lock(settings, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not known:
                raise LengthwiseError(f"{store}: its file system has no locks that would tell whether a job is at work")
        except BlockingIOError as error:
            raise LengthwiseError(f"{store}: a run or a job is at work in this store; wait until it is done") from error
        except OSError as error:
            raise LengthwiseError(f"{error.filename or store}: {error.strerror}") from error
        yield


# What a file system says that has no locks, or cannot reserve bytes; NFS the last, where a folder is to be locked for oneself.
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF}


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A file's or a folder's descriptor, to be locked."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int, how: int) -> bool:
    """Lock an open file; false where the file system has no locks, so that nobody knows who else is there.

    Raises
    ------
    BlockingIOError
        Another holds it, and `how` says not to wait.
    """
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True
