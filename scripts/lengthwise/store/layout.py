"""The layout of a shard: its tensors, their offsets in the file, and its header.

A shard is a safetensors file: 8 bytes with the length of the header, the header as JSON, the tensors one after the other. The
header is padded so that the tensors begin at a multiple of 4,096 bytes.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import tensors as names
from lengthwise.esm2.tokens import VOCABULARY_SIZE

_DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U32": np.uint32, "U8": np.uint8}
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
# Advice in the error of a damaged shard: the next run notices that the shard is missing.
REMAKE = "remove it and run snakemake: it will be made again"
_ALIGNMENT_BYTES = 4096
_MAX_HEADER_BYTES = 1 << 20
_LENGTH_BYTES = 8  # the length of the header, little-endian, before the header


def shard_name(fingerprint: str, digests: Iterable[bytes]) -> str:
    """The name of a shard: the first 32 hex digits of sha256(settings fingerprint + digests in order)."""
    return hashlib.sha256(fingerprint.encode() + b"".join(digests)).hexdigest()[:32]


@dataclass(frozen=True)
class Tensor:
    """Type, shape and position of one tensor of a shard."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # offset in the file, in bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def layout(lengths: np.ndarray, settings: dict) -> tuple[bytes, dict[str, Tensor]]:
    """Compute the header of a shard and the positions of its tensors.

    Parameters
    ----------
    lengths
        [n] residues of each sequence, in the shard's order.
    settings
        The store's settings.

    Returns
    -------
    The bytes before the first tensor, a multiple of 4,096; and the tensors by name, in the file's order.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "fingerprint": settings["fingerprint"]}}
    planned, data_bytes = _planned_tensors(lengths, settings), 0
    for name, (dtype, shape) in planned.items():
        tensor_bytes = math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [data_bytes, data_bytes + tensor_bytes],
        }
        data_bytes += tensor_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT_BYTES)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    tensors = {
        name: Tensor(dtype, shape, len(header) + entries[name]["data_offsets"][0])
        for name, (dtype, shape) in planned.items()
    }
    return header, tensors


def _planned_tensors(lengths: np.ndarray, settings: dict) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor of a shard of sequences of these lengths [n], in the file's order."""
    n, stored = len(lengths), np.dtype(settings["storage_dtype"])
    outputs = [output for output in names.OUTPUTS if output in settings["outputs"]]
    planned: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name in names.names(outputs, sorted(settings["layers"])):
        dtype = stored if names.by_residue(name) else np.dtype(np.float16 if name == "contacts" else np.float32)
        width = (settings["embed_dim"],) if names.is_vector(name) else (VOCABULARY_SIZE,) if name == "logits" else ()
        planned[name] = dtype, (int(names.entries(name, lengths, settings).sum()), *width)
    planned["offsets"] = np.dtype(np.int64), (n + 1,)
    if "contacts" in planned:
        planned["contact_offsets"] = np.dtype(np.int64), (n + 1,)
    planned["crc32c"] = np.dtype(np.uint32), (n,)
    planned["digests"] = np.dtype(np.uint8), (n, 24)
    planned["status"] = np.dtype(np.uint8), (n,)
    return planned


def is_laid_out(tensors: dict[str, Tensor], lengths: np.ndarray, settings: dict) -> bool:
    """Whether the tensors of a file, in its order, have the names, types and shapes that `layout` gives them."""
    planned = _planned_tensors(lengths, settings)
    found = [(name, (tensor.dtype, tensor.shape)) for name, tensor in tensors.items()]
    return found == list(planned.items())


def read_header(path: Path, file: BinaryIO, file_bytes: int) -> tuple[dict, dict[str, Tensor]]:
    """Read the header of a shard and check it against the file's size and the shard's own offsets.

    Parameters
    ----------
    path
        The file's name, for errors.
    file, file_bytes
        The file, open at its start, and its size.

    Returns
    -------
    The metadata, and the tensors by name in the file's order.

    Raises
    ------
    LengthwiseError
        The header is damaged, or does not fit the file.
    """
    try:
        metadata, tensors = _parse_header(file, file_bytes)
        offsets = _read_offsets(file, tensors)
        _check_shapes(tensors, offsets, _read_contact_offsets(file, tensors, offsets))
    except _DamagedError as error:
        raise LengthwiseError(f"{path}: damaged shard: {error}; {REMAKE}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise LengthwiseError(f"{path}: damaged shard: its header is unreadable ({error}); {REMAKE}") from error
    return metadata, tensors


class _DamagedError(Exception):
    """What is wrong with a shard, in a few words."""


def _parse_header(file: BinaryIO, file_bytes: int) -> tuple[dict, dict[str, Tensor]]:
    """The metadata and the tensors, which follow one another without a gap up to the end of the file."""
    header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
        raise _DamagedError(f"its header claims {header_bytes:,} bytes in a file of {file_bytes:,}")
    text = file.read(header_bytes)
    entries = json.loads(
        text, object_pairs_hook=_without_repeats, parse_float=_refuse_number, parse_constant=_refuse_number
    )
    metadata = dict(entries.pop("__metadata__", {}))
    tensors: dict[str, Tensor] = {}
    data_start, expected = _LENGTH_BYTES + header_bytes, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        tensor = Tensor(np.dtype(_DTYPES[entry["dtype"]]), tuple(map(index, entry["shape"])), data_start + start)
        if start != expected or stop - start != tensor.nbytes or min(tensor.shape, default=0) < 0:
            raise _DamagedError(f"the position of {name} is wrong")
        tensors[name], expected = tensor, stop
    if file_bytes != data_start + expected:
        raise _DamagedError(f"it has {file_bytes:,} bytes and should have {data_start + expected:,}")
    return metadata, tensors


def _read_offsets(file: BinaryIO, tensors: dict[str, Tensor]) -> np.ndarray:
    """The first row of each sequence and the number of rows [n + 1], which ascend from 0."""
    if missing := {"offsets", "crc32c", "digests", "status"} - tensors.keys():
        raise _DamagedError(f"it has no {sorted(missing)[0]}")
    tensor, n = tensors["offsets"], math.prod(tensors["status"].shape)
    if tensor.dtype != np.int64 or tensor.shape != (n + 1,):
        raise _DamagedError(f"offsets is not for {n} sequences")
    file.seek(tensor.start)
    offsets = np.frombuffer(file.read(tensor.nbytes), np.int64)
    if offsets[0] != 0 or (offsets[1:] <= offsets[:-1]).any():
        raise _DamagedError("its offsets do not ascend from 0")
    return offsets


def _read_contact_offsets(file: BinaryIO, tensors: dict[str, Tensor], offsets: np.ndarray) -> np.ndarray:
    """The first pair of each sequence and the number of pairs [n + 1]: of each sequence all pairs, or none."""
    if "contacts" not in tensors:
        return np.zeros(1, np.int64)
    tensor, lengths = tensors["contact_offsets"], np.diff(offsets)
    if tensor.dtype != np.int64 or tensor.shape != offsets.shape:
        raise _DamagedError("contact_offsets is not for its sequences")
    file.seek(tensor.start)
    pairs = np.frombuffer(file.read(tensor.nbytes), np.int64)
    counts = np.diff(pairs)
    if pairs[0] != 0 or ((counts != 0) & (counts != lengths * (lengths + 1) // 2)).any():
        raise _DamagedError("its contact_offsets are not those of its sequences")
    return pairs


def _check_shapes(tensors: dict[str, Tensor], offsets: np.ndarray, contact_offsets: np.ndarray) -> None:
    n, residues = len(offsets) - 1, int(offsets[-1])
    for name, tensor in tensors.items():
        if not _has_expected_shape(name, tensor, n, residues, int(contact_offsets[-1])):
            raise _DamagedError(f"{name} is not for {n} sequences of {residues:,} residues")
    if len({tensor.shape[1] for name, tensor in tensors.items() if names.is_vector(name)}) > 1:
        raise _DamagedError("its vectors have different widths")


def _has_expected_shape(name: str, tensor: Tensor, n: int, residues: int, pairs: int) -> bool:
    """Whether a tensor has the type and, apart from its width, the shape that its name stands for."""
    width = tensor.shape[1:2]
    rows, pooled = ({"F16", "F32"}, (residues, *width)), ({"F32"}, (n, *width))
    expected = {
        "layer": rows,
        **dict.fromkeys(names.POOLED, pooled),
        "logits": ({"F16", "F32"}, (residues, VOCABULARY_SIZE)),
        names.PERPLEXITY: ({"F32"}, (n,)),
        "contacts": ({"F16"}, (pairs,)),
        "crc32c": ({"U32"}, (n,)),
        "digests": ({"U8"}, (n, 24)),
        "status": ({"U8"}, (n,)),
    }
    dtype_name = _DTYPE_NAMES[tensor.dtype]
    kind = name.split("_")[0] if names.is_vector(name) else name
    dtypes, shape = expected.get(kind, ({dtype_name}, tensor.shape))
    if names.is_vector(name) and len(tensor.shape) != 2:
        return False
    return dtype_name in dtypes and tensor.shape == shape


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text} is not a whole number")
