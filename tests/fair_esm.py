"""This engine's arrays against fair-esm in float64, by the limits of the parity receipt."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

import checkpoints
from lengthwise.esm2 import tensors, tokens
from lengthwise.esm2.accuracy import Reference, Verdict, judge
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.reference import reference_rows

CPU = torch.device("cpu")
# Float32 sums in another order, relative to the RMS, on flat attention: measured errors are about 4e-6.
FLOAT32_TOLERANCE = 2e-5


def random_sequences(lengths: Iterable[int], seed: int = 0) -> list[bytes]:
    """A sequence of each length, of all letters that ESM-2 has."""
    rng = random.Random(seed)
    return [bytes(rng.choices(tokens.RESIDUES, k=length)) for length in lengths]


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = FLOAT32_TOLERANCE) -> None:
    """The largest error is within the tolerance of the RMS."""
    rms = float(np.sqrt(np.mean(np.square(theirs, dtype=np.float64))))
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * rms)


def references(
    path: Path, sequences: Sequence[bytes], layers: Sequence[int], precisions: Iterable[str] = DTYPES
) -> dict[str, dict[int, Reference]]:
    """{precision: {layer: the truth, and fair-esm's own error in that type}}"""
    truth = reference_rows(path, CPU, torch.float64, sequences, layers)
    found = {}
    for precision in precisions:
        rows = reference_rows(path, CPU, DTYPES[precision], sequences, layers)
        found[precision] = {layer: Reference.of(truth[layer], rows[layer], 1.0) for layer in layers}
    return found


def verdicts(
    arrays: dict[str, np.ndarray], reference: dict[int, Reference], precision: str, stored: str = "float32"
) -> dict[str, Verdict]:
    """{tensor: verdict}"""
    found = {}
    for name, rows in arrays.items():
        output, layer = tensors.split(name)
        own = reference[layer]
        found[name] = judge(rows, own.right(output), own, precision, stored)
    return found


def share_of_limit(*given, **options) -> float:
    """Of the tensor that is nearest to its limit, or furthest beyond."""
    return max(verdict.share_of_limit for verdict in verdicts(*given, **options).values())


def assert_right(
    arrays: dict[str, np.ndarray], reference: dict[int, Reference], precision: str, kind: str = "flat"
) -> None:
    """The receipt passes, with a margin that a whole distribution of checkpoints needs.

    Errors on sharp attention are heavy-tailed: a token whose attention flips decides a channel, or the few rows of `bos`.
    """
    margin = 1.0 if kind in checkpoints.CHAOTIC else 0.6
    for name, verdict in verdicts(arrays, reference, precision).items():
        assert verdict.share_of_limit <= margin, f"{name} in {precision}: {verdict}"
