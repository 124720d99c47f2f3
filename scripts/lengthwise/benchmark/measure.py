"""Benchmark: this engine beside others, on the same sequences in one run, interleaved.

It needs torch, numpy, safetensors and fair-esm only; peers take part where they are installed, and so does the figure.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lengthwise.benchmark.contenders import Contender, Rows, contenders_of, reference
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.config import ModelConfig
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.engine import AUTO_BATCH_TOKENS

PRODUCT_SECONDS = 0.3  # of matrix products in each round

SAMPLE = 24  # sequences whose rows are compared with fair-esm's, spread over the lengths


def benchmark(
    weights: Path, sequences: list[bytes], device: torch.device, rounds: int = 5, say: Callable[[str], None] = print
) -> list[dict]:
    """Time every engine on the same sequences.

    The sequences are dealt into `rounds` hands of the same distribution of lengths; in each round every engine runs one
    hand, one engine after the other, beside a measurement of the device's matrix products in the model's own shapes.

    Parameters
    ----------
    weights
        A fair-esm checkpoint.
    sequences
        Normalised residues.
    device
        Where to run.
    rounds
        Number of hands.
    say
        Takes a line of progress.

    Returns
    -------
    A row for each engine and precision with `COLUMNS`: throughput without warm-up; the same with the model's load and
    warm-up; floating-point operations per second as a share of the matrix products' in that precision; peak allocated
    memory (CUDA); and, against fair-esm in float32 one sequence at a time, the largest and the root mean square error,
    both over the RMS of the layer, and the smallest cosine of a residue.
    """
    config = checkpoint.read(weights)[0]
    sequences = sorted(sequences, key=len)
    hands = [sequences[i::rounds] for i in range(rounds)]
    residues = sum(map(len, sequences))
    flops = sum(config.flops(len(sequence)) for sequence in sequences)
    sample = sequences[:: max(1, len(sequences) // SAMPLE)]
    expected = reference(weights, sample, device)
    contenders = list(contenders_of(weights, config, device, say))
    errors = {}
    for number, contender in enumerate(contenders):
        before = _allocated(device)
        began = time.perf_counter()
        contender.run = contender.load()
        rows = contender.run(sample)  # and the warm-up
        _synchronize(device)
        contender.load_seconds = time.perf_counter() - began
        contender.own_bytes = _allocated(device) - before
        errors[number] = _errors(rows, expected)
    products: dict[str, list[float]] = {contender.precision: [] for contender in contenders}
    for number, hand in enumerate(hands, start=1):
        for precision, rates in products.items():
            rates.append(_product_rate(config, device, DTYPES[precision]))
        for contender in contenders:
            contender.seconds.append(_timed(contender, hand, device))
        say(
            f"round {number} of {rounds}: "
            + ", ".join(f"{c.engine} {c.precision} {c.seconds[-1]:.2f} s" for c in contenders)
        )
    first = next(c for c in contenders if c.engine == "fair-esm extract.py")
    return [
        {
            "engine": c.engine,
            "precision": c.precision,
            "residues_per_second": residues / sum(c.seconds),
            "times_extract": statistics.median(a / b for a, b in zip(first.seconds, c.seconds, strict=True)),
            "end_to_end_residues_per_second": residues / (sum(c.seconds) + c.load_seconds),
            "share_of_matmul": flops / sum(c.seconds) / statistics.median(products[c.precision]),
            "peak_bytes": c.peak_bytes,
            **errors[number],
        }
        for number, c in enumerate(contenders)
    ]


def _timed(contender: Contender, hand: list[bytes], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _synchronize(device)
    before = _allocated(device)  # the other engines' weights among it
    began = time.perf_counter()
    contender.run(hand)
    _synchronize(device)
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before + contender.own_bytes
        contender.peak_bytes = max(contender.peak_bytes or 0, peak)
    return seconds


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def _product_rate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of plain matrix products in the shapes of one layer."""
    d, tokens = config.embed_dim, AUTO_BATCH_TOKENS[device.type]
    shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    pairs = [
        (torch.randn(tokens, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype))
        for k, n in shapes
    ]
    operations = sum(2 * tokens * k * n for k, n in shapes)
    done, began = -1, 0.0
    while done < 1 or time.perf_counter() - began < PRODUCT_SECONDS:
        for x, weight in pairs:
            x @ weight.T
        _synchronize(device)
        done += 1
        if done == 0:  # the first is the warm-up
            began = time.perf_counter()
    return done * operations / (time.perf_counter() - began)


def _errors(rows: Rows, expected: Rows) -> dict[str, float]:
    if any(len(row) != len(other) for row, other in zip(rows, expected, strict=True)):  # means
        expected = [other.mean(0, keepdims=True) for other in expected]
    ours, theirs = (np.concatenate(part).astype(np.float64) for part in (rows, expected))
    rms = np.sqrt(np.mean(theirs**2))
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return {
        "max_error": float(np.abs(ours - theirs).max() / rms),
        "rms_error": float(np.sqrt(np.mean((ours - theirs) ** 2)) / rms),
        "min_cosine": float(((ours * theirs).sum(1) / lengths).min()),
    }
