"""Reading a shard: memory-mapped arrays and checksums."""

import itertools
import math
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from crc32c import crc32c

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import tensors as names
from lengthwise.esm2.status import Status
from lengthwise.store.layout import REMAKE, read_header, shard_name
from lengthwise.system.descriptors import drop_cached_pages, read_ahead

# From Python 3.13 on a map needs no file descriptor, so a process can hold more maps than open files. (Not on Windows.)
_NO_DESCRIPTOR = {"trackfd": False} if sys.version_info >= (3, 13) and sys.platform != "win32" else {}
_READ_BYTES = 16 << 20


class Shard:
    """One shard, opened for reading. Its arrays are memory-mapped copy-on-write.

    Parameters
    ----------
    path
        The shard's file.

    Attributes
    ----------
    metadata
        The header's metadata; `fingerprint` is that of the store's settings.
    tensors
        Type, shape and position of each tensor, in the file's order.

    Raises
    ------
    LengthwiseError
        The file is missing, truncated or not a shard.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                file_bytes = os.fstat(file.fileno()).st_size
                self.metadata, self.tensors = read_header(self.path, file, file_bytes)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY, **_NO_DESCRIPTOR)
        except FileNotFoundError as error:
            raise LengthwiseError(
                f"{self.path}: the shard is missing; restore it, or run snakemake: it will be made again"
            ) from error
        except OSError as error:
            raise LengthwiseError(f"{self.path}: cannot be read: {error.strerror}") from error
        self._arrays: dict[str, np.ndarray] = {}
        self._address: int = np.frombuffer(self._map, np.uint8).ctypes.data
        tables_start = self.tensors["offsets"].start
        self._read_ahead(tables_start, file_bytes - tables_start)

    def unmap(self) -> None:
        """Close the map, to free its file descriptor. `read` and `damaged` still work: they open the file themselves."""
        self._map.close()

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor as an array over the map, without a copy. Writing to it does not change the file."""
        if name not in self._arrays:
            tensor = self.tensors[name]
            self._arrays[name] = np.ndarray(tensor.shape, tensor.dtype, self._map, tensor.start)
        return self._arrays[name]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor. The disk begins to read exactly these rows.

        Without this call a page fault reads the device's whole readahead window, which can be megabytes.
        """
        array = self[name]
        row_bytes = array.strides[0]
        self._read_ahead(self.tensors[name].start + start * row_bytes, (stop - start) * row_bytes)
        return array[start:stop]

    def _read_ahead(self, start: int, n_bytes: int) -> None:
        read_ahead(self._map, self._address, start, n_bytes)

    def holds(self, number: int, digest: bytes, start: int, length: int) -> bool:
        """Whether sequence `number` has this digest, status good, and the `length` rows from `start`."""
        offsets = self["offsets"]
        return (
            0 <= number < len(offsets) - 1
            and offsets.item(number) == start
            and offsets.item(number + 1) == start + length
            and self["digests"][number].tobytes() == digest
            and self["status"].item(number) == Status.GOOD
        )

    def holds_all(self, numbers: np.ndarray, digests: np.ndarray) -> bool:
        """Whether the sequences `numbers` [n] have these digests [n, 24] and status good."""
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(self["status"]):
            return not len(numbers)
        return np.array_equal(self["digests"][numbers], digests) and (self["status"][numbers] == Status.GOOD).all()

    def is_intact(self, number: int) -> bool:
        """Whether everything stored of a sequence, as the map shows it, matches its checksum."""
        crc = crc32c(self["digests"][number].tobytes() + self["status"][number].tobytes())
        for name in self.data_names:
            crc = crc32c(self[name][self.entries(name, number)].data, crc)
        return crc == self["crc32c"].item(number)

    @property
    def data_names(self) -> list[str]:
        """Names of the tensors that `crc32c` covers, in its order."""
        return [name for name in self.tensors if names.is_result(name)]

    def entries(self, name: str, number: int) -> slice:
        """The entries of a tensor's first dimension that sequence `number` has."""
        if table := _table_of(name):
            start, stop = self[table][number : number + 2].tolist()
            return slice(start, stop)
        return slice(number, number + 1)

    def read(self, name: str) -> np.ndarray:
        """A copy of a tensor in memory. Unlike the map, it reports a disk error as an exception.

        Raises
        ------
        LengthwiseError
            The disk cannot read it.
        """
        (tensor,) = self._read_parts(name, [(0, self.tensors[name].shape[0])])
        return tensor

    def damaged(self) -> list[int]:
        """Numbers of the sequences whose bytes on the disk do not match their checksum.

        Raises
        ------
        LengthwiseError
            The disk cannot read them.
        """
        with open(self.path, "rb") as file:
            drop_cached_pages(file.fileno())  # so that the check reads the disk
        digests, status = self.read("digests"), self.read("status")
        crc = [crc32c(digests[i].tobytes() + status[i].tobytes()) for i in range(len(status))]
        for name in self.data_names:
            table = _table_of(name)
            bounds = self.read(table) if table else np.arange(len(digests) + 1)
            row_bytes = self.tensors[name].nbytes // max(self.tensors[name].shape[0], 1)
            cuts = _cut_sequences(bounds, _READ_BYTES // max(row_bytes, 1))
            parts = [(bounds[start], bounds[stop]) for start, stop in itertools.pairwise(cuts)]
            for (start, stop), rows in zip(itertools.pairwise(cuts), self._read_parts(name, parts), strict=True):
                for i in range(start, stop):
                    own = rows[bounds[i] - bounds[start] : bounds[i + 1] - bounds[start]]
                    crc[i] = crc32c(own.data, crc[i])
        return np.flatnonzero(np.array(crc, np.uint32) != self.read("crc32c")).tolist()

    def _read_parts(self, name: str, parts: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        """Rows `start` to `stop` of a tensor, for each pair of `parts`."""
        tensor = self.tensors[name]
        width = tensor.shape[1:]
        per_row = math.prod(width)
        try:
            with open(self.path, "rb") as file:
                for start, stop in parts:
                    file.seek(tensor.start + int(start) * per_row * tensor.dtype.itemsize)
                    n_rows = int(stop - start)
                    yield np.fromfile(file, tensor.dtype, n_rows * per_row).reshape(n_rows, *width)
        except (OSError, ValueError) as error:
            raise LengthwiseError(f"{self.path}: cannot be read: {error}; {REMAKE}") from error


def _table_of(name: str) -> str:
    """The table of a shard that says where a sequence's entries of a tensor begin; none where each sequence has one."""
    return "offsets" if names.by_residue(name) else "contact_offsets" if name == "contacts" else ""


def _cut_sequences(bounds: np.ndarray, max_rows: int) -> list[int]:
    """Cut consecutive sequences into runs of at most `max_rows` rows; a longer sequence is a run of its own."""
    cuts = [0]
    while cuts[-1] < len(bounds) - 1:
        stop = int(np.searchsorted(bounds, bounds[cuts[-1]] + max_rows, side="right")) - 1
        cuts.append(max(stop, cuts[-1] + 1))
    return cuts


def open_named(path: Path, fingerprint: str) -> Shard:
    """Open a shard and compare its name with its settings and sequences.

    Raises
    ------
    LengthwiseError
        The shard is missing or damaged, or its name is another one's.
    """
    shard = Shard(path)
    name = shard_name(fingerprint, [shard["digests"].tobytes()])
    if shard.metadata.get("fingerprint") != fingerprint or name != path.stem:
        raise LengthwiseError(f"{path}: has other sequences or settings than its name says; {REMAKE}")
    return shard


def is_complete(path: Path, digests: list[bytes], fingerprint: str) -> bool:
    """Whether an undamaged shard of these sequences and settings is at `path`.

    Also False if every sequence is DOES_NOT_FIT: another device may have room: another device may have more.
    """
    if not path.exists():
        return False
    try:
        shard = Shard(path)
        same = shard.metadata["fingerprint"] == fingerprint and shard["digests"].tobytes() == b"".join(digests)
        return same and not (shard["status"] == Status.DOES_NOT_FIT).all()
    except (LengthwiseError, KeyError):
        return False
