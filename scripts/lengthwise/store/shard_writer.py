"""Writing a shard under a temporary name; the rename at the end is its commit."""

import itertools
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
from crc32c import crc32c

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import tensors as names
from lengthwise.store.layout import layout
from lengthwise.store.paths import shard_path
from lengthwise.store.shard import is_complete
from lengthwise.system.descriptors import drop_cached_pages, flush, flush_folder, reserve
from lengthwise.system.files import create_locked, discard, wait_for_writers, writing

# After so many bytes the kernel begins to write them to the disk, so that the fsync in `commit` is short.
FLUSH_BYTES = 16 << 20
# Two writers that begin at the same moment wait at random up to so long.
BACK_OFF_SECONDS = 0.1


class ShardWriter:
    """Writes one shard, rows as batches finish, and commits it by a rename.

    Use as a context manager. `commit` makes the shard; leaving the block without it removes the temporary file.
    A second writer of the same shard waits for the first and then finds `already_there`.

    Parameters
    ----------
    store, shard
        The store's folder and the shard's name.
    digests, lengths
        The [n] digests and residues of the sequences, in the shard's order.
    settings
        The store's settings.
    wait
        Whether to wait for another writer of this shard.

    Attributes
    ----------
    already_there
        A complete shard exists. There is nothing to write.

    Raises
    ------
    BlockingIOError
        Another process writes this shard, and `wait` is false.
    LengthwiseError
        The disk has no room for the shard, or a write fails.
    """

    def __init__(
        self, store: Path, shard: str, digests: list[bytes], lengths: np.ndarray, settings: dict, wait: bool = True
    ):
        self.path = shard_path(store, shard)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.digests, self._is_open = digests, False
        try:
            self._become_only_writer(settings["fingerprint"], wait)
            if self.already_there:
                return
            header, self.tensors = layout(lengths, settings)
            self.offsets = _bounds(lengths)
            if "contacts" in self.tensors:
                self.contact_offsets = _bounds(names.entries("contacts", lengths, settings))
            self.crc32c = np.zeros(len(lengths), np.uint32)
            self.status = np.zeros(len(lengths), np.uint8)
            self.file_bytes = max(tensor.start + tensor.nbytes for tensor in self.tensors.values())
            self._unflushed_bytes = 0
            self._reserve_space()
            with writing(self.path):
                _write_at(self._descriptor, np.frombuffer(header, np.uint8), 0)
        except BaseException:
            self.abandon()
            raise

    def _become_only_writer(self, fingerprint: str, wait: bool) -> None:
        """Create the temporary file while no other process has one, unless the shard is already there.

        Of two processes that create theirs at the same moment, at least one sees the other's; each that does begins again.
        """
        while True:
            wait_for_writers(self.path, wait)
            self.already_there = is_complete(self.path, self.digests, fingerprint)
            if self.already_there:
                return
            with writing(self.path):
                self.part, self._descriptor = create_locked(self.path)
            self._is_open = True
            try:
                wait_for_writers(self.path, wait=False, but=self.part)
                self.already_there = is_complete(self.path, self.digests, fingerprint)  # made meanwhile
                if self.already_there:
                    self.abandon()
                return
            except BlockingIOError:
                self.abandon()
                if not wait:
                    raise
                time.sleep(random.uniform(0, BACK_OFF_SECONDS))

    def _reserve_space(self) -> None:
        """Reserve the file's bytes now: a full disk fails here, before any computing."""
        free_bytes = shutil.disk_usage(self.path.parent).free
        try:
            reserve(self._descriptor, self.file_bytes, free_bytes)
        except OSError as error:
            raise LengthwiseError(
                f"{self.path.parent}: cannot reserve {self.file_bytes:,} bytes for a shard, {free_bytes:,} are free: "
                f"{error.strerror}; free some space and run again"
            ) from error

    def write(self, first: int, arrays: dict[str, np.ndarray], status: np.ndarray) -> None:
        """Write the sequences `first`, `first` + 1, ... of one batch.

        Parameters
        ----------
        first
            Number of the batch's first sequence in the shard.
        arrays
            The results of the batch (`lengthwise.esm2.tensors`), in the shard's types.
        status
            [n] uint8 of its sequences, see `lengthwise.esm2.status`.

        Raises
        ------
        LengthwiseError
            A write fails.
        """
        digests = self.digests[first : first + len(status)]
        crc = [crc32c(digest + bytes([each])) for digest, each in zip(digests, status.tolist(), strict=True)]
        for name in self.tensors:  # in the order that defines crc32c
            if name not in arrays:
                continue
            array, tensor = np.ascontiguousarray(arrays[name]), self.tensors[name]
            starts = self._starts(name, first, len(status))
            with writing(self.path):
                _write_at(self._descriptor, array, tensor.start + starts[0] * tensor.entry_bytes)
            self._unflushed_bytes += array.nbytes
            for i, (start, stop) in enumerate(itertools.pairwise(starts)):
                rows = array[start - starts[0] : stop - starts[0]]
                # Without the interpreter's lock, or the thread that launches the GPU's work gets it 5 ms late.
                crc[i] = crc32c(rows.data, crc[i], gil_release_mode=1)
        batch = slice(first, first + len(status))
        self.crc32c[batch] = crc
        self.status[batch] = status
        if self._unflushed_bytes >= FLUSH_BYTES:
            drop_cached_pages(self._descriptor)  # starts the write-back, does not wait
            self._unflushed_bytes = 0

    def _starts(self, name: str, first: int, n: int) -> list[int]:
        """Where the entries of n sequences begin in a tensor, and where the last ones' end."""
        last = first + n + 1
        if names.by_residue(name):
            return self.offsets[first:last].tolist()
        return self.contact_offsets[first:last].tolist() if name == "contacts" else list(range(first, last))

    def commit(self) -> None:
        """Write the remaining tensors, fsync, and rename the temporary file to the shard's name.

        Raises
        ------
        LengthwiseError
            A write or the rename fails.
        """
        digests = np.frombuffer(b"".join(self.digests), np.uint8)
        tables = {"offsets": self.offsets, "crc32c": self.crc32c, "digests": digests, "status": self.status}
        if "contacts" in self.tensors:
            tables["contact_offsets"] = self.contact_offsets
        with writing(self.path):
            for name, array in tables.items():
                _write_at(self._descriptor, array, self.tensors[name].start)
            self._fsync_and_rename()
        self._close()

    def _fsync_and_rename(self) -> None:
        """The commit itself: before the rename no reader sees the shard, after it the shard is complete."""
        flush(self._descriptor)
        os.rename(self.part, self.path)
        flush_folder(self.path.parent)

    def abandon(self) -> None:
        """Remove the temporary file, unless the shard was committed."""
        if self._is_open:
            discard(self.part)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._is_open = False

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


def _bounds(counts: np.ndarray) -> np.ndarray:
    """[n] entries of each sequence -> [n + 1] where they begin and end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _write_at(descriptor: int, array: np.ndarray, offset_bytes: int) -> None:
    """Write all bytes of an array at an offset of the file; `os.pwrite` may write fewer."""
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while len(view):
        written = os.pwrite(descriptor, view, offset_bytes)
        view, offset_bytes = view[written:], offset_bytes + written
