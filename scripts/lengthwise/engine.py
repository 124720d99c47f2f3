"""The engine: sequences in, embeddings out, one batch at a time.

It needs torch, numpy, safetensors and fair-esm only, and knows nothing of files but the checkpoint.
"""

import logging
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lengthwise import alphabet
from lengthwise.checkpoint import load_model
from lengthwise.errors import LengthwiseError
from lengthwise.memory import MemoryMeter
from lengthwise.model import Packing, onednn_serves
from lengthwise.status import DOES_NOT_FIT, GOOD, NON_FINITE

log = logging.getLogger("lengthwise")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Tokens per batch where `batch_tokens` is auto. On the CPU more gain nothing (8M and 150M, measured), and cost memory.
AUTO_BATCH_TOKENS = {"cpu": 4_096, "cuda": 32_768}


@dataclass(frozen=True)
class Output:
    """What is computed and in which types."""

    layers: tuple[int, ...]
    outputs: tuple[str, ...]  # of residue, mean, bos
    storage_dtype: str


@dataclass(frozen=True)
class BatchResult:
    """Embeddings of a batch's sequences, on the host, and what it took."""

    arrays: dict[str, np.ndarray]  # layer_<n> [R, D] in the storage type; mean_<n>, bos_<n> [N, D] float32
    status: np.ndarray  # [N] uint8: GOOD, NON_FINITE or DOES_NOT_FIT; rows that are not good are NaN
    device_ms: float
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_rss_bytes: int | None
    oom_splits: int


def resolve_device(device: str) -> torch.device:
    """The torch device of a store's `device`; never another one.

    Raises
    ------
    LengthwiseError
        cuda, and this machine has no GPU that torch can use.
    """
    if device == "cuda" and not torch.cuda.is_available():
        build = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
        raise LengthwiseError(f"device: cuda, but {build}; see the README on CUDA builds, or use device: cpu")
    return torch.device(device)


def set_threads(threads: int) -> None:
    """CPU threads for torch, at most as many as this process has cores: more only wait for each other."""
    torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))


def device_name(device: torch.device) -> str:
    """What people call the device: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cut_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Bounds (start, stop) of consecutive sequences that go through one forward pass.

    A batch has at most `batch_tokens` tokens, specials included, unless it is one long sequence; and all its lengths lie in
    one bin between two powers of two, so that kernels see few shapes.
    """
    start, tokens, current = 0, 0, None
    for i, length in enumerate(lengths):
        length_bin = int(length).bit_length()
        size = int(length) + 2
        if i > start and (tokens + size > batch_tokens or length_bin != current):
            yield start, i
            start, tokens = i, 0
        tokens, current = tokens + size, length_bin
    if len(lengths):
        yield start, len(lengths)


class Engine:
    """A model on a device, ready to embed batches."""

    def __init__(self, checkpoint: Path, device: torch.device, precision: str, output: Output):
        self.device = device
        self.precision = precision
        self.output = output
        if device.type == "cpu" and not onednn_serves(DTYPES[precision]):
            log.warning("this CPU has no instructions for %s: it is emulated, slower than float32", precision)
        self.model = load_model(checkpoint, device, DTYPES[precision])
        self.memory = MemoryMeter(device)

    @torch.inference_mode()
    def embed(self, sequences: list[bytes]) -> BatchResult:
        """Embed one batch; where the device's memory does not hold it, in halves.

        Parameters
        ----------
        sequences
            Normalised residues of each sequence.
        """
        self.memory.reset()
        started = time.perf_counter()
        arrays, status, splits = self._embed_or_halve(sequences)
        device_ms = (time.perf_counter() - started) * 1000
        allocated, reserved, resident = self.memory.peaks()
        return BatchResult(arrays, status, device_ms, allocated, reserved, resident, splits)

    def _embed_or_halve(self, sequences: list[bytes]) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
        try:
            return (*self._embed(sequences), 0)
        except torch.OutOfMemoryError:
            pass  # outside of the handler, whose traceback keeps the tensors alive
        torch.cuda.empty_cache()
        if len(sequences) == 1:
            return self._nothing(sequences), np.full(1, DOES_NOT_FIT, np.uint8), 1
        middle = len(sequences) // 2
        halves = [self._embed_or_halve(half) for half in (sequences[:middle], sequences[middle:])]
        arrays = {name: np.concatenate([half[0][name] for half in halves]) for name in halves[0][0]}
        return arrays, np.concatenate([half[1] for half in halves]), 1 + sum(half[2] for half in halves)

    def _embed(self, sequences: list[bytes]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        tokens = np.concatenate([alphabet.tokenize(sequence) for sequence in sequences])  # [T]
        packing = Packing.of((len(sequence) + 2 for sequence in sequences), self.device)
        hidden = self.model(torch.from_numpy(tokens).to(self.device).long(), packing, self.output.layers)
        results = self._pool(hidden, packing)
        finite = torch.stack([_finite_sequences(name, value, packing) for name, value in results.items()]).all(0)  # [N]
        for name, value in results.items():
            rows = finite.repeat_interleave(_residues(packing)) if name.startswith("layer_") else finite
            value[~rows] = torch.nan
        status = torch.where(finite, GOOD, NON_FINITE).to(torch.uint8)
        return {name: value.cpu().numpy() for name, value in results.items()}, status.cpu().numpy()

    def _pool(self, hidden: dict[int, Tensor], packing: Packing) -> dict[str, Tensor]:
        """What is stored: residue rows in the storage type; means (over residues alone) and BOS rows in float32."""
        bounds = packing.bounds.long()  # [N + 1]
        first, last = bounds[:-1], bounds[1:] - 1  # [N] each: BOS and EOS
        inner = torch.ones(int(bounds[-1]), dtype=torch.bool, device=self.device)
        inner[first] = inner[last] = False
        results = {}
        for layer in self.output.layers:
            value = hidden[layer]  # [T, D]
            residues = value[inner]  # [R, D]
            if "residue" in self.output.outputs:
                results[f"layer_{layer}"] = residues.to(DTYPES[self.output.storage_dtype], copy=True)
            if "mean" in self.output.outputs:
                counts = _residues(packing)
                results[f"mean_{layer}"] = torch.segment_reduce(residues.float(), "mean", lengths=counts, unsafe=True)
            if "bos" in self.output.outputs:
                results[f"bos_{layer}"] = value[first].float()
        return results

    def _nothing(self, sequences: list[bytes]) -> dict[str, np.ndarray]:
        """NaN rows for a sequence that cannot be embedded."""
        width, (sequence,) = self.model.config.embed_dim, sequences
        arrays = {}
        for layer in self.output.layers:
            for output in self.output.outputs:
                if output == "residue":
                    dtype = np.dtype(self.output.storage_dtype)
                    arrays[f"layer_{layer}"] = np.full((len(sequence), width), np.nan, dtype)
                else:
                    arrays[f"{output}_{layer}"] = np.full((1, width), np.nan, np.float32)
        return arrays


def _residues(packing: Packing) -> Tensor:
    """[N] residues of each sequence, on the device."""
    return packing.bounds.long().diff() - 2


def _finite_sequences(name: str, value: Tensor, packing: Packing) -> Tensor:
    """[N] bool: whether all of a sequence's rows are finite."""
    rows = value.isfinite().all(dim=1)  # [R] or [N]
    if not name.startswith("layer_"):
        return rows
    return torch.segment_reduce(rows.float(), "min", lengths=_residues(packing), unsafe=True) > 0
