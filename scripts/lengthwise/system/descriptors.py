"""What only some systems can do with an open file: locks, preallocation, flushing, the page cache.

Each function also says what happens where the system cannot. Windows has no `fcntl` and opens no folders; macOS has no
`fallocate` and no `posix_fadvise`.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lengthwise.system.libc import libc_function

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# errno values of a file system that supports no locks or no preallocation. NFS: EBADF for an exclusive lock on a folder.
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF}

_mincore = libc_function("mincore")
if _mincore:
    _mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Yield the descriptor of an open file or folder, to lock it; -1 of a folder on Windows, where `lock` takes none."""
    if fcntl is None and path.is_dir():
        yield -1
        return
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file or folder; the kernel releases the lock when the file is closed or the process ends.

    Parameters
    ----------
    descriptor
        The open file or folder.
    shared
        Whether other processes may hold a shared lock at the same time.
    wait
        Whether to wait for processes whose lock excludes this one.

    Returns
    -------
    bool
        False if the file system or the system supports no locks.

    Raises
    ------
    BlockingIOError
        Another process holds such a lock, and `wait` is false.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def flush(descriptor: int) -> None:
    """Flush a file or folder to the disk, so that it survives a power cut.

    On macOS fsync leaves it in the disk's own cache; F_FULLFSYNC empties that, where the file system knows it (fsync(2)).
    """
    if full_sync := getattr(fcntl, "F_FULLFSYNC", None):
        with suppress(OSError):
            fcntl.fcntl(descriptor, full_sync)
            return
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename in it survives a power cut. Windows has no such call."""
    with opened(folder) as descriptor:
        if descriptor != -1:
            flush(descriptor)


def reserve(descriptor: int, size: int, free: int) -> None:
    """Preallocate a file's bytes on the disk.

    A system or a file system without preallocation gets a check of the free bytes and a sparse file. There
    `os.posix_fallocate` would write zeros, so that every byte is written twice.

    Parameters
    ----------
    descriptor
        The open file.
    size
        Bytes to preallocate.
    free
        Bytes that are free on the file system.

    Raises
    ------
    OSError
        The disk has too little space.
    """
    fallocate = libc_function("fallocate")
    if fallocate and fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    refused = ctypes.get_errno() if fallocate else errno.ENOSYS
    if refused in UNSUPPORTED and size <= free:
        os.ftruncate(descriptor, size)
    else:
        number = errno.ENOSPC if refused in UNSUPPORTED else refused
        raise OSError(number, os.strerror(number))


def drop_cached_pages(descriptor: int) -> None:
    """Let the kernel write a file's changed pages to the disk, without waiting, and drop the others from memory.

    Without `posix_fadvise` it does both when it sees fit.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_ahead(mapped: mmap.mmap, address: int, start: int, n_bytes: int) -> None:
    """Let the kernel begin to read these bytes of a mapped file, unless the last of them is in memory.

    Asking for one page (`mincore`) takes 1 us, the advice (`madvise`) 10 to 20 us. Without `mincore` it always advises, without
    `madvise` never: then a page is read when it is touched.

    Parameters
    ----------
    mapped, address
        The map, and where in memory it begins.
    start, n_bytes
        Bytes of the file.
    """
    if not hasattr(mapped, "madvise"):
        return
    before = start % mmap.PAGESIZE
    last_page = (before + n_bytes - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    in_memory = ctypes.c_ubyte()
    if (
        _mincore
        and _mincore(address + start - before + last_page, 1, ctypes.byref(in_memory)) == 0
        and in_memory.value & 1
    ):
        return
    mapped.madvise(mmap.MADV_WILLNEED, start - before, before + n_bytes)
