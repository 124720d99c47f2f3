"""Locks (flock) on files and folders, the lock of a whole store, and the lock of the one run in a store."""

import errno
import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.system.descriptors import flush, lock, opened


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
                lock(stack.enter_context(opened(path, os.O_RDONLY)), shared=True)
        yield


@contextmanager
def exclusive_store_lock(store: Path, required: bool = True) -> Iterator[None]:
    """Hold the exclusive lock on a store, which no run, job or export may be using.

    Parameters
    ----------
    store
        The store; nothing is written into it.
    required
        Whether to refuse a store that this user may not write, or whose file system has no locks. Who only reads sees as far
        as locks go whether a run is at work.

    Raises
    ------
    LengthwiseError
        A run or a job is at work in the store, or the required lock cannot be had.
    """
    with ExitStack() as stack:
        try:
            supported = lock(stack.enter_context(opened(store, os.O_RDONLY)), wait=False)
            if (store / "settings.json").exists():  # NFS needs a file open for writing to lock it exclusively
                settings = stack.enter_context(_opened_for_locking(store / "settings.json", required))
                supported = lock(settings, wait=False)
            if required and not supported:
                raise LengthwiseError(f"{store}: its file system has no locks, so a job may be at work here unnoticed")
        except BlockingIOError as error:
            raise LengthwiseError(f"{store}: a run or a job is at work in this store; wait until it is done") from error
        except OSError as error:
            raise LengthwiseError(f"{error.filename or store}: {error.strerror}") from error
        yield


@contextmanager
def _opened_for_locking(path: Path, writing_required: bool) -> Iterator[int]:
    """Open a file for writing, or for reading where this user may not write it and need not."""
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(opened(path, os.O_RDWR))
        except OSError as error:
            if writing_required or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            descriptor = stack.enter_context(opened(path, os.O_RDONLY))
        yield descriptor


RUN_LOCK_NAME = "run.lock"
# What the holder of the run lock says of itself.
RUN_LOCK_KEYS = ("host", "process", "began", "folder")
# Readers hold the run lock for microseconds: only a suspended reader holds it longer than this.
READER_SECONDS = 10.0
# The holder writes its record right after it got the lock.
RECORD_SECONDS = 0.5


@contextmanager
def run_lock(store: Path, record: Mapping[str, object]) -> Iterator[bool]:
    """Hold the lock of the one run in a store; the kernel releases it when this process ends.

    It excludes other runs alone. Jobs, dry runs, forecasts and `progress` do not take it. The file ``run.lock`` stays
    after the release; its content means something only while it is locked.

    Parameters
    ----------
    store
        The store. It is made if it does not exist.
    record
        What other processes are told of this run, as JSON values: ``host``, ``process``, ``began`` and ``folder``.

    Yields
    ------
    bool
        False where the lock cannot be had: the file system has no locks, or the file cannot be written.

    Raises
    ------
    LengthwiseError
        Another run is at work in the store.
    """
    path = store / RUN_LOCK_NAME
    with ExitStack() as stack:
        descriptor = None
        with suppress(OSError):  # the first write reports a store that cannot be written
            store.mkdir(parents=True, exist_ok=True)
            # NFS needs a file open for writing to lock it exclusively.
            descriptor = stack.enter_context(opened(path, os.O_RDWR | os.O_CREAT))
        held = descriptor is not None and _lock_as_run(descriptor, store)
        if descriptor is not None and held:
            with suppress(OSError):  # the lock counts, also on a full disk
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(dict(record)).encode(), 0)
                flush(descriptor)
            with suppress(OSError):  # of another user
                os.fchmod(descriptor, store.stat().st_mode & 0o666)  # who may write the folder may run in it
        yield held


def run_lock_holder(store: Path) -> dict | None:
    """Return the record of the run that holds the store's run lock, or None where nothing tells that one does.

    The record has `RUN_LOCK_KEYS`; what the holder does not say is "unknown". It needs no right to write.
    """
    try:
        with opened(store / RUN_LOCK_NAME) as descriptor:
            try:
                lock(descriptor, shared=True, wait=False)
            except BlockingIOError:
                return _read_record(descriptor)
    except OSError:
        pass
    return None


def _lock_as_run(descriptor: int, store: Path) -> bool:
    """Lock run.lock exclusively; False if the file system has no locks. A reader's shared lock is waited for."""
    until = time.monotonic() + READER_SECONDS
    while True:
        try:
            return lock(descriptor, wait=False)
        except BlockingIOError:
            if run := run_lock_holder(store):
                raise LengthwiseError(
                    f"{store}: the run of {run['began']} on {run['host']} (process {run['process']}, folder {run['folder']}) "
                    "is at work in this store: let it finish, or end it there"
                ) from None
        except OSError as error:
            raise LengthwiseError(f"{store / RUN_LOCK_NAME}: {error.strerror}") from error
        if time.monotonic() > until:
            raise LengthwiseError(
                f"{store / RUN_LOCK_NAME}: a process that only reads it keeps it locked, such as a suspended `python -m "
                "lengthwise progress`: let it go on, or end it"
            )
        time.sleep(random.uniform(0.01, 0.05))  # two runs that start at once also meet each other as readers


def _read_record(descriptor: int) -> dict:
    """The record in a locked run.lock."""
    record, until = None, time.monotonic() + RECORD_SECONDS
    while not isinstance(record, dict) and time.monotonic() < until:
        with suppress(ValueError):
            record = json.loads(os.pread(descriptor, 1 << 16, 0))
        if not isinstance(record, dict):
            time.sleep(0.01)
    return dict.fromkeys(RUN_LOCK_KEYS, "unknown") | (record if isinstance(record, dict) else {})
