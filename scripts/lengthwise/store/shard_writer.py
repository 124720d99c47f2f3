"""Writing a shard in place; the rename at its end is its commit."""

import os
import shutil
from pathlib import Path

import google_crc32c
import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.store.layout import layout
from lengthwise.store.paths import shard_path
from lengthwise.store.shard import is_made
from lengthwise.system.files import claim, discard, fsync_folder, outlive_others, reserve, writing

# What is written goes to the disk behind the work, so that the commit has little left to wait for.
FLUSH_BYTES = 16 << 20


class ShardWriter:
    """Writes one shard in place, rows as batches finish, and commits it by a rename.

    Use as a context manager; `commit` makes the shard, leaving without it makes nothing. A second writer of the same shard
    waits for the first, and then finds `already_there`; with `wait` false it raises BlockingIOError.

    Raises
    ------
    LengthwiseError
        The disk has no room for the shard, or refuses a write.
    """

    def __init__(
        self, store: Path, shard: str, digests: list[bytes], lengths: np.ndarray, settings: dict, wait: bool = True
    ):
        self.path = shard_path(store, shard)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = None
        outlive_others(self.path, wait)
        self.already_there = is_made(self.path, digests, settings["fingerprint"])
        if self.already_there:
            return
        header, self.tensors = layout(lengths, settings)
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.crc32c = np.zeros(len(lengths), np.uint32)
        self.status = np.zeros(len(lengths), np.uint8)
        self.digests = digests
        self.size = max(tensor.start + tensor.nbytes for tensor in self.tensors.values())
        self.unflushed = 0
        with writing(self.path):
            self.part, self.descriptor = claim(self.path)
        try:
            self._reserve()
            with writing(self.path):
                _pwrite_all(self.descriptor, np.frombuffer(header, np.uint8), 0)
        except BaseException:
            self.abandon()
            raise

    def _reserve(self) -> None:
        """A full disk shows now, not after an hour of work."""
        free = shutil.disk_usage(self.path.parent).free
        try:
            reserve(self.descriptor, self.size, free)
        except OSError as error:
            raise LengthwiseError(
                f"{self.path.parent}: cannot reserve {self.size:,} bytes for a shard, {free:,} are free: {error.strerror}; "
                "free some space and run again"
            ) from error

    def write(self, first: int, arrays: dict[str, np.ndarray], lengths: list[int], status: np.ndarray) -> None:
        """Write the sequences `first`, `first` + 1, ... of one batch.

        Parameters
        ----------
        first
            Number of the batch's first sequence in the shard.
        arrays
            ``layer_<n>`` [rows, D], ``mean_<n>`` and ``bos_<n>`` [n, D], in the shard's types.
        lengths
            Residues of each sequence of the batch.
        status
            [n] uint8, see `lengthwise.esm2.status`.
        """
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        crc = [google_crc32c.value(self.digests[first + i] + bytes([status[i]])) for i in range(len(lengths))]
        for name in self.tensors:  # in the order that crc32c is defined by
            if name not in arrays:
                continue
            array, tensor = np.ascontiguousarray(arrays[name]), self.tensors[name]
            by_residue = name.startswith("layer_")
            row = self.offsets[first] if by_residue else first
            with writing(self.path):
                _pwrite_all(self.descriptor, array, tensor.start + row * array.strides[0])
            self.unflushed += array.nbytes
            for i in range(len(crc)):
                rows = array[bounds[i] : bounds[i + 1]] if by_residue else array[i : i + 1]
                crc[i] = google_crc32c.extend(crc[i], rows)
        here = slice(first, first + len(lengths))
        self.crc32c[here] = crc
        self.status[here] = status
        if self.unflushed >= FLUSH_BYTES:
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # begins to write, and does not wait
            self.unflushed = 0

    def commit(self) -> None:
        """Make the shard: fsync, then the rename."""
        digests = np.frombuffer(b"".join(self.digests), np.uint8)
        tails = {"offsets": self.offsets, "crc32c": self.crc32c, "digests": digests, "status": self.status}
        with writing(self.path):
            for name, array in tails.items():
                _pwrite_all(self.descriptor, array, self.tensors[name].start)
            os.fsync(self.descriptor)
            os.rename(self.part, self.path)
            fsync_folder(self.path.parent)
        self._close()

    def abandon(self) -> None:
        """Leave without a shard, and without a trace."""
        if self.descriptor is not None:
            discard(self.part)
            self._close()

    def _close(self) -> None:
        os.close(self.descriptor)
        self.descriptor = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_):
        self.abandon()


def _pwrite_all(descriptor: int, array: np.ndarray, place: int) -> None:
    view = memoryview(np.ascontiguousarray(array)).cast("B") if array.nbytes else memoryview(b"")
    while len(view):
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written
