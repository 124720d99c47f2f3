"""Reading a shard: memory-mapped arrays, and checksums."""

import ctypes
import itertools
import math
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.status import Status
from lengthwise.store.layout import DATA_PREFIXES, REMAKE, read_header

# A map without a file descriptor of its own, so that a process can hold more of them than it may open files.
_NO_DESCRIPTOR = {"trackfd": False} if sys.version_info >= (3, 13) else {}

_mincore = ctypes.CDLL(None).mincore

_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

_READ_BYTES = 16 << 20


class Shard:
    """One shard, opened for reading; arrays are memory-mapped copy-on-write.

    Raises
    ------
    LengthwiseError
        The file is missing, truncated or no shard.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.metadata, self.tensors = read_header(self.path, file, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY, **_NO_DESCRIPTOR)
        except FileNotFoundError as error:
            raise LengthwiseError(
                f"{self.path}: the shard is missing; restore it, or run snakemake: it will be made again"
            ) from error
        except OSError as error:
            raise LengthwiseError(f"{self.path}: cannot be read: {error.strerror}") from error
        self._arrays: dict[str, np.ndarray] = {}
        self._address: int = np.frombuffer(self._map, np.uint8).ctypes.data
        tail = self.tensors["offsets"].start
        self._will_need(tail, size - tail)

    def unmap(self) -> None:
        """Let go of the file, of which a process may have but so many: `read` and `damaged` open it themselves."""
        self._map.close()

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor as an array over the file, without a copy; writing to it does not reach the file."""
        if name not in self._arrays:
            tensor = self.tensors[name]
            self._arrays[name] = np.ndarray(tensor.shape, tensor.dtype, self._map, tensor.start)
        return self._arrays[name]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Some rows of a tensor, and the device begins to read just these.

        A page fault alone reads as far around its page as the device's readahead goes, which may be megabytes.
        """
        array = self[name]
        row_bytes = array.strides[0]
        self._will_need(self.tensors[name].start + start * row_bytes, (stop - start) * row_bytes)
        return array[start:stop]

    def _will_need(self, start: int, size: int) -> None:
        """Begin to read these bytes of the file, if the last of them is not in memory yet.

        To advise of the 900 kB of a protein takes 10 to 20 microseconds even where they are; to ask for one page, one.
        """
        before = start % mmap.PAGESIZE
        last = (before + size - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        found = ctypes.c_ubyte()
        if _mincore(self._address + start - before + last, 1, ctypes.byref(found)) or not found.value & 1:
            self._map.madvise(mmap.MADV_WILLNEED, start - before, before + size)

    def holds(self, number: int, digest: bytes, start: int, length: int) -> bool:
        """Whether the sequence of this number is the one of this digest, good, and has these rows."""
        offsets = self["offsets"]
        return (
            0 <= number < len(offsets) - 1
            and offsets.item(number) == start
            and offsets.item(number + 1) == start + length
            and self["digests"][number].tobytes() == digest
            and self["status"].item(number) == Status.GOOD
        )

    def holds_all(self, numbers: np.ndarray, digests: np.ndarray) -> bool:
        """Whether the sequences of these numbers are those of these digests [n, 24], and good."""
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(self["status"]):
            return not len(numbers)
        return np.array_equal(self["digests"][numbers], digests) and (self["status"][numbers] == Status.GOOD).all()

    def is_intact(self, number: int) -> bool:
        """Whether all that is stored of a sequence, as the map has it, has its checksum."""
        crc = google_crc32c.value(self["digests"][number].tobytes() + self["status"][number].tobytes())
        start, stop = self["offsets"][number : number + 2].tolist()
        for name in self.data_names:
            rows = self[name][start:stop] if name.startswith("layer_") else self[name][number : number + 1]
            crc = google_crc32c.extend(crc, rows)
        return crc == self["crc32c"].item(number)

    @property
    def data_names(self) -> list[str]:
        """The tensors that crc32c covers, in its order."""
        return [name for name in self.tensors if name.startswith(DATA_PREFIXES)]

    def read(self, name: str) -> np.ndarray:
        """A tensor read into memory.

        Raises
        ------
        LengthwiseError
            The disk does not give it; through a map that would be the end of the process.
        """
        (tensor,) = self._read(name, [(0, self.tensors[name].shape[0])])
        return tensor

    def damaged(self) -> list[int]:
        """Numbers of the sequences whose bytes, as the disk has them, do not have their checksum.

        Raises
        ------
        LengthwiseError
            The disk does not give them.
        """
        with open(self.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what memory remembers of it proves nothing
        offsets, digests, status = self.read("offsets"), self.read("digests"), self.read("status")
        crc = [google_crc32c.value(digests[i].tobytes() + status[i].tobytes()) for i in range(len(status))]
        for name in self.data_names:
            bounds = offsets if name.startswith("layer_") else np.arange(len(offsets))
            row_bytes = self.tensors[name].nbytes // self.tensors[name].shape[0]
            cuts = _cuts(bounds, _READ_BYTES // max(row_bytes, 1))
            parts = [(bounds[start], bounds[stop]) for start, stop in itertools.pairwise(cuts)]
            for (start, stop), rows in zip(itertools.pairwise(cuts), self._read(name, parts), strict=True):
                for i in range(start, stop):
                    crc[i] = google_crc32c.extend(
                        crc[i], rows[bounds[i] - bounds[start] : bounds[i + 1] - bounds[start]]
                    )
        return np.flatnonzero(np.array(crc, np.uint32) != self.read("crc32c")).tolist()

    def _read(self, name: str, parts: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        """The rows of a tensor from `first` to `last`, for each of these."""
        tensor = self.tensors[name]
        width = tensor.shape[1:]
        per_row = math.prod(width)
        try:
            with open(self.path, "rb") as file:
                for first, last in parts:
                    file.seek(tensor.start + int(first) * per_row * tensor.dtype.itemsize)
                    yield np.fromfile(file, tensor.dtype, int(last - first) * per_row).reshape(
                        int(last - first), *width
                    )
        except (OSError, ValueError) as error:
            raise LengthwiseError(f"{self.path}: cannot be read: {error}; {REMAKE}") from error


def _cuts(bounds: np.ndarray, rows: int) -> list[int]:
    """Where to cut consecutive sequences into runs of about so many rows, or of one sequence that has more."""
    cuts = [0]
    while cuts[-1] < len(bounds) - 1:
        stop = int(np.searchsorted(bounds, bounds[cuts[-1]] + rows, side="right")) - 1
        cuts.append(max(stop, cuts[-1] + 1))
    return cuts


def is_made(path: Path, digests: list[bytes], fingerprint: str) -> bool:
    """Whether a whole shard of these sequences and settings is there.

    What is there but damaged is made again, and so is a shard of nothing but sequences that no device's memory held.
    """
    if not path.exists():
        return False
    try:
        shard = Shard(path)
        same = shard.metadata["fingerprint"] == fingerprint and shard["digests"].tobytes() == b"".join(digests)
        return same and not (shard["status"] == Status.DOES_NOT_FIT).all()
    except (LengthwiseError, KeyError):
        return False
