"""Accuracy: how far rows are from the truth, channel by channel, and whether fair-esm's own rounding explains it.

A channel's error is the root mean square over rows of (row - truth); as a share, it is over the channel's spread: the standard
deviation of the truth over residues. A cosine or a norm of whole rows would be decided by the few channels that are thousands of
times the rest.

Shapes: T tokens (specials included) and R residues of the compared sequences, D width, n rows.
"""

from dataclasses import dataclass
from math import log, sqrt

import numpy as np

# Limits, as multiples of fair-esm's own error: of the typical (median) channel, and of the worst, where sharp attention has heavy
# tails. In half precision our sums and angles in float32 keep closer to the truth than fair-esm does (docs/accuracy.md).
TYPICAL = {"float32": 4.0, "float16": 1.5, "bfloat16": 1.5}
WORST = 6.0
# Where float64 cannot be had, fair-esm in float32 is the truth, and its own error is taken for this share of a channel's spread:
# thirty layers of sharp attention have 0.04 (docs/accuracy.md), others a thousandth of it.
FLOAT32_SHARE = 0.025
# Whatever the type, a row that is further from the truth than a spread says nothing of its residue.
MOST = 1.0
# Where fair-esm itself is so far off, right and wrong rows cannot be told apart.
SATURATED = 0.5
# Unit roundoff (half of the distance from 1 to the next number), and half of the smallest distance between two numbers.
ROUNDING = {"float32": (2.0**-24, 2.0**-150), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-9, 2.0**-134)}


@dataclass(frozen=True)
class Reference:
    """A layer of the compared sequences: the truth, and how far fair-esm is from it in one type."""

    truth: list[np.ndarray]  # of each sequence [L + 2, D] float64
    spread: np.ndarray  # [D]
    error: (
        np.ndarray
    )  # [D] of fair-esm over all tokens; at least what the typical channel has, and a rounding to float32

    @classmethod
    def of(cls, truth: list[np.ndarray], fair_esm: list[np.ndarray] | None, lacking_share: float) -> "Reference":
        """Measure fair-esm's error; where there are no (finite) rows of it, it is taken for a share of the spread."""
        tokens = np.concatenate(truth)  # [T, D]
        spread = np.concatenate([rows[1:-1] for rows in truth]).std(0)  # [D]
        spread[spread <= ROUNDING["float32"][0] * rms(tokens)] = 0  # equal residues at layer 0
        error = lacking_share * spread
        if fair_esm is not None and np.isfinite(rows := np.concatenate(fair_esm)).all():
            error = rms(rows - tokens)
            error = np.maximum(error, _typical(error, spread) * spread)
        return cls(truth, spread, np.maximum(error, ROUNDING["float32"][0] * rms(tokens)))

    def right(self, output: str) -> np.ndarray:
        """[n, D]: the rows that an output should have, n residues or sequences."""
        if output == "bos":
            return np.stack([rows[0] for rows in self.truth])
        if output in ("mean", "max", "std"):
            return np.stack([getattr(rows[1:-1], output)(0) for rows in self.truth])
        return np.concatenate([rows[1:-1] for rows in self.truth])

    def share(self, error: np.ndarray) -> float:
        """The typical channel's error [D] as a share of its spread."""
        return _typical(error, self.spread)


@dataclass(frozen=True)
class Verdict:
    """How near a tensor is to a limit."""

    share_of_limit: float  # above 1 it misses
    channel: int | None  # the channel that decides; None: the typical one
    error: float  # of that channel, as a share of its spread
    limit: float  # likewise


def judge(rows: np.ndarray, right: np.ndarray, reference: Reference, computed: str, stored: str) -> Verdict:
    """Hold rows against the truth.

    Over n rows the worst of D channels is up to 1 + sqrt(2 ln D / n) times the typical one by chance, if errors are normally
    distributed: the concentration of a Gaussian vector's norm, and a union over the channels. The typical one varies by two
    standard errors, 2 / sqrt(n), because a row's channels err together.

    Parameters
    ----------
    rows, right
        [n, D]: what is judged, and the truth.
    reference
        Of the layer, with fair-esm's error in the type `computed`.
    computed, stored
        The types that the rows were computed and stored in.
    """
    n, width = rows.shape
    error = np.nan_to_num(rms(rows.astype(np.float64) - right), nan=np.inf)  # [D]
    relative, smallest = ROUNDING[stored]
    rounding = rms(np.maximum(relative * np.abs(right), smallest))  # [D] at most
    typical = reference.share(error)
    typical_limit = TYPICAL[computed] * (1 + 2 / sqrt(n)) * reference.share(reference.error)
    typical_limit = min(typical_limit, MOST) + reference.share(rounding)
    limits = WORST * (1 + sqrt(2 * log(width) / n)) * reference.error + rounding  # [D]
    channel = int(np.argmax(error / limits))
    typical_share = typical / typical_limit if typical_limit else 0.0
    if typical_share >= error[channel] / limits[channel]:
        return Verdict(typical_share, None, typical, typical_limit)
    spread = max(float(reference.spread[channel]), np.finfo(float).tiny)
    share = float(error[channel] / limits[channel])
    return Verdict(share, channel, float(error[channel]) / spread, float(limits[channel]) / spread)


def rms(values: np.ndarray) -> np.ndarray:
    """[D] root mean square over rows [n, D]."""
    return np.sqrt(np.mean(np.square(values), axis=0))


def _typical(error: np.ndarray, spread: np.ndarray) -> float:
    """The median over channels of error over spread; a channel without spread has no share."""
    varies = spread > 0
    return float(np.median(error[varies] / spread[varies])) if varies.any() else 0.0
