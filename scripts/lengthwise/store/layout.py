"""The layout of a shard: its tensors, their places in the file, its header."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from pathlib import Path

import numpy as np

from lengthwise.errors import LengthwiseError

_DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U32": np.uint32, "U8": np.uint8}

_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}

# What to do about a shard that is not what it should be: a run notices that it is gone.
REMAKE = "remove it and run snakemake: it will be made again"

DATA_PREFIXES = ("layer_", "mean_", "bos_")

_ALIGNMENT = 4096

_MAX_HEADER = 1 << 20


def shard_name(fingerprint: str, digests: Iterable[bytes]) -> str:
    """32 hex digits of sha256(settings fingerprint + digests in order)."""
    return hashlib.sha256(fingerprint.encode() + b"".join(digests)).hexdigest()[:32]


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


def read_header(path: Path, file, size: int) -> tuple[dict, dict[str, Tensor]]:
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
    if len({tensor.shape[1] for name, tensor in tensors.items() if name.startswith(DATA_PREFIXES)}) > 1:
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
