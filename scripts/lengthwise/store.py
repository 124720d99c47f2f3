"""Shards: immutable safetensors files of many sequences' embeddings, whose rename is their commit.

Tensors, in this order: `layer_<n>` [R, D] in the storage type (when residues are an output), `mean_<n>` and `bos_<n>`
float32 [n, D] (when they are outputs), `offsets` int64 [n + 1], `crc32c` uint32 [n], `digests` uint8 [n, 24],
`status` uint8 [n]. R counts the residues of all sequences, end to end, without BOS and EOS. `crc32c` covers a sequence's
digest and status, then its rows of every `layer_<n>` in ascending order, then its `mean_<n>`, then its `bos_<n>`.
"""

import ctypes
import hashlib
import itertools
import json
import math
import mmap
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import index
from pathlib import Path

import google_crc32c
import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.files import claim, discard, fsync_folder, outlive_others, reserve, writing
from lengthwise.status import DOES_NOT_FIT, GOOD

_DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U32": np.uint32, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
# What to do about a shard that is not what it should be: a run notices that it is gone.
REMAKE = "remove it and run snakemake: it will be made again"
# A map without a file descriptor of its own, so that a process can hold more of them than it may open files.
_NO_DESCRIPTOR = {"trackfd": False} if sys.version_info >= (3, 13) else {}
_mincore = ctypes.CDLL(None).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_DATA = ("layer_", "mean_", "bos_")
_ALIGNMENT = 4096
_MAX_HEADER = 1 << 20
# What is written goes to the disk behind the work, so that the commit has little left to wait for.
FLUSH_BYTES = 16 << 20
_READ_BYTES = 16 << 20


def shard_name(fingerprint: str, digests: Iterable[bytes]) -> str:
    """32 hex digits of sha256(settings fingerprint + digests in order)."""
    return hashlib.sha256(fingerprint.encode() + b"".join(digests)).hexdigest()[:32]


def shard_path(store: Path, shard: str) -> Path:
    return Path(store) / "shards" / shard[:2] / f"{shard}.safetensors"


def metrics_path(store: Path, shard: str) -> Path:
    return Path(store) / "metrics" / shard[:2] / f"{shard}.parquet"


def find_metrics(store: Path, shard: str) -> Path | None:
    """A shard's metrics, if there are any; earlier versions had all of them in one folder."""
    path = metrics_path(store, shard)
    return next((found for found in (path, path.parent.parent / path.name) if found.exists()), None)


def spec_path(store: Path, job: str) -> Path:
    return store / "plan" / "jobs" / f"{job}.parquet"


def commit_path(store: Path, job: str) -> Path:
    return store / "jobs" / f"{job}.json"


def bytes_per_sequence(lengths: np.ndarray, settings: dict) -> np.ndarray:
    """Bytes that sequences of these lengths take in a shard, its header aside."""
    layers, d = len(settings["layers"]), settings["embed_dim"]
    itemsize = np.dtype(settings["storage_dtype"]).itemsize
    per_residue = layers * d * itemsize if "residue" in settings["outputs"] else 0
    pooled = sum(4 * d * layers for output in settings["outputs"] if output != "residue")
    return lengths.astype(np.int64) * per_residue + pooled + 8 + 4 + 24 + 1


@dataclass(frozen=True)
class Tensor:
    """A tensor's place in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(lengths: np.ndarray, settings: dict) -> tuple[bytes, dict[str, Tensor]]:
    """The header of a shard, padded so that the data begin at a multiple of 4,096, and the places of its tensors."""
    n, rows, d = len(lengths), int(lengths.sum()), settings["embed_dim"]
    planned: list[tuple[str, np.dtype, tuple[int, ...]]] = []
    for output in ("residue", "mean", "bos"):
        if output in settings["outputs"]:
            for layer in sorted(settings["layers"]):
                if output == "residue":
                    planned.append((f"layer_{layer}", np.dtype(settings["storage_dtype"]), (rows, d)))
                else:
                    planned.append((f"{output}_{layer}", np.dtype(np.float32), (n, d)))
    planned += [
        ("offsets", np.dtype(np.int64), (n + 1,)),
        ("crc32c", np.dtype(np.uint32), (n,)),
        ("digests", np.dtype(np.uint8), (n, 24)),
        ("status", np.dtype(np.uint8), (n,)),
    ]
    entries, place = {"__metadata__": {"format": "pt", "fingerprint": settings["fingerprint"]}}, 0
    for name, dtype, shape in planned:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    tensors = {
        name: Tensor(dtype, shape, 8 + len(text) + entries[name]["data_offsets"][0]) for name, dtype, shape in planned
    }
    return len(text).to_bytes(8, "little") + text, tensors


def is_laid_out(tensors: dict[str, Tensor], lengths: np.ndarray, settings: dict) -> bool:
    """Whether tensors, in the order of a file, are those of `layout`: where each of them begins follows from that."""
    expected = layout(lengths, settings)[1]
    return [*map(_kind, tensors.items())] == [*map(_kind, expected.items())]


def _kind(named: tuple[str, Tensor]) -> tuple:
    name, tensor = named
    return name, tensor.dtype, tensor.shape


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
            [n] uint8, see `lengthwise.status`.
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
                self.metadata, self.tensors = _read_header(self.path, file, size)
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
            and self["status"].item(number) == GOOD
        )

    def holds_all(self, numbers: np.ndarray, digests: np.ndarray) -> bool:
        """Whether the sequences of these numbers are those of these digests [n, 24], and good."""
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(self["status"]):
            return not len(numbers)
        return np.array_equal(self["digests"][numbers], digests) and (self["status"][numbers] == GOOD).all()

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
        return [name for name in self.tensors if name.startswith(_DATA)]

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


def _read_header(path: Path, file, size: int) -> tuple[dict, dict[str, Tensor]]:
    """The metadata and the places of the tensors, if they are what `layout` might have made, and so are the offsets."""

    def refuse(what: str) -> LengthwiseError:
        return LengthwiseError(f"{path}: damaged shard: {what}; {REMAKE}")

    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(_MAX_HEADER, size - 8):
        raise refuse(f"its header claims {length:,} bytes in a file of {size:,}")
    try:
        text = file.read(length)
        entries = json.loads(text, object_pairs_hook=_unique, parse_float=_no_number, parse_constant=_no_number)
        metadata = dict(entries.pop("__metadata__", {}))
        tensors, expected = {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            tensor = Tensor(np.dtype(_DTYPES[entry["dtype"]]), tuple(map(index, entry["shape"])), 8 + length + start)
            if start != expected or stop - start != tensor.nbytes or min(tensor.shape, default=0) < 0:
                raise refuse(f"the place of {name} in it is wrong")
            tensors[name], expected = tensor, stop
        if size != 8 + length + expected:
            raise refuse(f"it has {size:,} bytes and should have {8 + length + expected:,}")
        if missing := {"offsets", "crc32c", "digests", "status"} - tensors.keys():
            raise refuse(f"it has no {sorted(missing)[0]}")
        n = math.prod(tensors["status"].shape)
        if tensors["offsets"].dtype != np.int64 or tensors["offsets"].shape != (n + 1,):
            raise refuse(f"offsets is not for {n} sequences")
        file.seek(tensors["offsets"].start)
        offsets = np.frombuffer(file.read(tensors["offsets"].nbytes), np.int64)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise refuse(f"its header is unreadable ({error})") from error
    if offsets[0] != 0 or (offsets[1:] <= offsets[:-1]).any():
        raise refuse("its offsets do not ascend from 0")
    if wrong := [name for name, tensor in tensors.items() if not _fits(name, tensor, n, int(offsets[-1]))]:
        raise refuse(f"{wrong[0]} is not for {n} sequences of {offsets[-1]:,} residues")
    if len({tensor.shape[1] for name, tensor in tensors.items() if name.startswith(_DATA)}) > 1:
        raise refuse("its vectors are not of one width")
    return metadata, tensors


def _fits(name: str, tensor: Tensor, n: int, residues: int) -> bool:
    """Whether a tensor has the type and, but for its width, the shape that its name asks for."""
    width = tensor.shape[-1:]
    kinds = {
        "layer": ({"F16", "F32"}, (residues, *width)),
        "mean": ({"F32"}, (n, *width)),
        "bos": ({"F32"}, (n, *width)),
        "crc32c": ({"U32"}, (n,)),
        "digests": ({"U8"}, (n, 24)),
        "status": ({"U8"}, (n,)),
    }
    dtypes, shape = kinds.get(name.split("_")[0], ({_NAMES[tensor.dtype]}, tensor.shape))
    return _NAMES[tensor.dtype] in dtypes and tensor.shape == shape


def _unique(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _no_number(text: str):
    raise ValueError(f"{text} is no whole number")


def is_made(path: Path, digests: list[bytes], fingerprint: str) -> bool:
    """Whether a whole shard of these sequences and settings is there.

    What is there but damaged is made again, and so is a shard of nothing but sequences that no device's memory held.
    """
    if not path.exists():
        return False
    try:
        shard = Shard(path)
        same = shard.metadata["fingerprint"] == fingerprint and shard["digests"].tobytes() == b"".join(digests)
        return same and not (shard["status"] == DOES_NOT_FIT).all()
    except (LengthwiseError, KeyError):
        return False


def _pwrite_all(descriptor: int, array: np.ndarray, place: int) -> None:
    view = memoryview(np.ascontiguousarray(array)).cast("B") if array.nbytes else memoryview(b"")
    while len(view):
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written
