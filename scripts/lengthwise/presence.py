"""Who is at work in a store: runs and jobs share a lock on its settings, and who removes files must have it alone."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.files import lock


@contextmanager
def at_work(store: Path) -> Iterator[None]:
    """Keep others from having the store alone; the kernel ends it when this process ends, however it does."""
    with ExitStack() as stack:
        with suppress(FileNotFoundError):  # a store without settings has nothing to remove yet
            lock(stack.enter_context(_settings(store, os.O_RDONLY)), fcntl.LOCK_SH)
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
            descriptor = stack.enter_context(_settings(store, os.O_RDWR))  # on NFS it is needed for such a lock
            if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise LengthwiseError(f"{store}: its file system has no locks that would tell whether a job is at work")
        except BlockingIOError as error:
            raise LengthwiseError(f"{store}: a run or a job is at work in this store; wait until it is done") from error
        except OSError as error:
            raise LengthwiseError(f"{store}/settings.json: {error.strerror}") from error
        yield


@contextmanager
def _settings(store: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(store / "settings.json", flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
