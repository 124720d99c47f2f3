"""The measurement: contenders take turns on parts of the same sequences, and their rows are compared with fair-esm's."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lengthwise.benchmark.contenders import Contender, contenders_of
from lengthwise.benchmark.peers import Embed, Rows, reference
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, ModelConfig

MATMUL_SECONDS = 0.3  # of matrix products in each round
COMPARED_SEQUENCES = 24  # spread over the lengths


@dataclass
class _Run:
    """A contender whose model is loaded, and its measurements so far."""

    engine: str
    precision: str
    embed: Embed
    load_seconds: float  # with the warm-up
    loaded_bytes: int  # that it keeps on a GPU between its turns
    errors: dict[str, float]
    seconds: list[float] = field(default_factory=list)  # of each round
    peak_bytes: int | None = None


def benchmark(
    weights: Path, sequences: list[bytes], device: torch.device, rounds: int = 5, log: Callable[[str], None] = print
) -> list[dict]:
    """Time every engine on the same sequences.

    The sequences are dealt into `rounds` parts with the same distribution of lengths. In each round every engine embeds one
    part, one engine after the other, so that a slow moment of the machine does not fall on one engine alone. Each round also
    times plain matrix products in the shapes of the model's layers.

    Parameters
    ----------
    weights
        A fair-esm checkpoint.
    sequences
        Normalised residues.
    device
        Where to run.
    rounds
        Number of rounds.
    log
        Takes lines of progress.

    Returns
    -------
    A row for each engine and precision with the columns `lengthwise.benchmark.tables.COLUMNS`.

    Raises
    ------
    LengthwiseError
        The checkpoint cannot be read, or an installed engine does not take its weights.
    """
    config = checkpoint.read(weights)[0]
    sequences = sorted(sequences, key=len)
    compared = sequences[:: max(1, len(sequences) // COMPARED_SEQUENCES)]
    expected = reference(weights, compared, device)
    runs = [_load(contender, compared, expected, device) for contender in contenders_of(weights, config, device, log)]
    matmul_rates: dict[str, list[float]] = {run.precision: [] for run in runs}  # FLOP/s
    for number in range(rounds):
        for precision, rates in matmul_rates.items():
            rates.append(_matmul_rate(config, device, DTYPES[precision]))
        for run in runs:
            _time_round(run, sequences[number::rounds], device)
        times = ", ".join(f"{run.engine} {run.precision} {run.seconds[-1]:.2f} s" for run in runs)
        log(f"round {number + 1} of {rounds}: {times}")
    residues = sum(map(len, sequences))
    flops = sum(config.flops(len(sequence)) for sequence in sequences)
    extract = next(run for run in runs if run.engine == "fair-esm extract.py")
    return [
        {
            "engine": run.engine,
            "precision": run.precision,
            "residues_per_second": residues / sum(run.seconds),
            "times_extract": statistics.median(a / b for a, b in zip(extract.seconds, run.seconds, strict=True)),
            "end_to_end_residues_per_second": residues / (sum(run.seconds) + run.load_seconds),
            "share_of_matmul": flops / sum(run.seconds) / statistics.median(matmul_rates[run.precision]),
            "peak_bytes": run.peak_bytes,
            **run.errors,
        }
        for run in runs
    ]


def _load(contender: Contender, compared: list[bytes], expected: Rows, device: torch.device) -> _Run:
    before_bytes = _allocated_bytes(device)
    began = time.perf_counter()
    embed = contender.load()
    rows = embed(compared)  # also the warm-up
    _synchronize(device)
    seconds, loaded_bytes = time.perf_counter() - began, _allocated_bytes(device) - before_bytes
    return _Run(contender.engine, contender.precision, embed, seconds, loaded_bytes, _errors(rows, expected))


def _time_round(run: _Run, sequences: list[bytes], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _synchronize(device)
    before_bytes = _allocated_bytes(device)  # includes the weights of the other engines
    began = time.perf_counter()
    run.embed(sequences)
    _synchronize(device)
    run.seconds.append(time.perf_counter() - began)
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes + run.loaded_bytes
        run.peak_bytes = max(run.peak_bytes or 0, peak_bytes)


def _allocated_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def _matmul_rate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of plain matrix products in the shapes of one layer."""
    d, tokens = config.embed_dim, AUTO_BATCH_TOKENS[device.type]
    shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    pairs = [
        (torch.randn(tokens, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype))
        for k, n in shapes
    ]
    flops = sum(2 * tokens * k * n for k, n in shapes)
    passes, began = -1, 0.0  # pass 0 is the warm-up
    while passes < 1 or time.perf_counter() - began < MATMUL_SECONDS:
        for x, weight in pairs:
            x @ weight.T
        _synchronize(device)
        passes += 1
        if passes == 0:
            began = time.perf_counter()
    return passes * flops / (time.perf_counter() - began)


def _errors(rows: Rows, expected: Rows) -> dict[str, float]:
    """Errors against fair-esm's rows, as shares of their root mean square, and the smallest cosine of a row."""
    if any(len(row) != len(other) for row, other in zip(rows, expected, strict=True)):  # means, [1, D]
        expected = [other.mean(0, keepdims=True) for other in expected]
    ours, theirs = (np.concatenate(part).astype(np.float64) for part in (rows, expected))
    rms = np.sqrt(np.mean(theirs**2))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return {
        "max_error": float(np.abs(ours - theirs).max() / rms),
        "rms_error": float(np.sqrt(np.mean((ours - theirs) ** 2)) / rms),
        "min_cosine": float(((ours * theirs).sum(1) / norms).min()),
    }
