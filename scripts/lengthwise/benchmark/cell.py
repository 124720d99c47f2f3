"""A cell of the table: a loaded contender on one sample, and what its passes took."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lengthwise.benchmark.card import sampled
from lengthwise.benchmark.contenders import Loaded
from lengthwise.benchmark.matmul import synchronize
from lengthwise.benchmark.peers import EXTRACT_TOKENS, Embed
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.shapes import ModelConfig

Value = str | int | float | bool | None
Row = dict[str, Value]
# Before its timed passes a contender's rate is found by ever larger parts, up to this share of a pass.
TRIAL_SHARE = 0.125


@dataclass(eq=False)
class Cell:
    """One row of the table while it is measured. Of a contender that failed it has the `status` alone."""

    facts: Row  # of the contender: columns that are the same in each of its rows
    sample: str
    status: str = ""
    seconds: list[float] = field(default_factory=list)  # of each round, as the others
    residues: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    matmul_rates: list[float] = field(default_factory=list)  # FLOP/s
    clocks: list[dict[str, float]] = field(default_factory=list)
    batch_tokens: int | None = None  # of the largest batch of this package's engine
    peak_bytes: int | None = None  # of a GPU's allocator, beside the weights of all that is loaded

    @property
    def rates(self) -> list[float]:
        """Residues per second of each round."""
        return [residues / seconds for residues, seconds in zip(self.residues, self.seconds, strict=True)]

    def measure(self, embed: Embed, part: Sequence[bytes], config: ModelConfig, device: torch.device) -> None:
        """Time a pass over a part of the sample."""
        before_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        with sampled(device) as clocks:
            seconds, peak_bytes = timed(embed, part, device)
        self.seconds.append(seconds)
        self.residues.append(sum(map(len, part)))
        self.flops.append(sum(config.flops(len(sequence)) for sequence in part))
        self.clocks.append(clocks)
        if peak_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, peak_bytes - before_bytes)

    def row(self, extract_rates: Sequence[float]) -> Row:
        """The row, as far as it is measured; `extract_rates` are fair-esm's residues per second in each round."""
        if not self.seconds:
            names = "engine", "precision", "compiled"
            known = {name: self.facts[name] for name in names if name in self.facts}
            return known | {"sample": self.sample, "status": self.status}
        row = {**self.facts, "sample": self.sample, "status": self.status, "batch_tokens": self.batch_tokens}
        seconds = sum(self.seconds)
        ratios = [rate / other for rate, other in zip(self.rates, extract_rates, strict=False)]
        matmul = statistics.median(self.matmul_rates) if self.matmul_rates else None
        formula_bytes = (self.batch_tokens or 0) * float(row.pop("bytes_per_token", None) or 0)
        clocks = {
            name: statistics.median(clock[name] for clock in self.clocks)
            for name in ("clock_mhz", "watts")
            if all(name in clock for clock in self.clocks)
        }
        return row | {
            "residues": sum(self.residues),
            "seconds": seconds,
            "residues_per_second": sum(self.residues) / seconds,
            "times_extract": statistics.median(ratios) if ratios else None,
            "matmul_flops": matmul,
            "share_of_matmul": sum(self.flops) / seconds / matmul if matmul else None,
            "peak_bytes": self.peak_bytes,
            "share_of_formula": self.peak_bytes / formula_bytes if self.peak_bytes and formula_bytes else None,
            **clocks,
        }


def timed(embed: Embed, sequences: Sequence[bytes], device: torch.device) -> tuple[float, int | None]:
    """(seconds, peak bytes of a GPU's allocator) of a pass. Rows are dropped as they come."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parts = embed(list(sequences))
    synchronize(device)
    began = time.perf_counter()
    measured = [part.peak_bytes for part in parts]
    synchronize(device)
    seconds = time.perf_counter() - began
    if device.type == "cpu":
        return seconds, None
    # The engine resets the allocator's peaks with each batch, and notes them before.
    return seconds, max([torch.cuda.max_memory_allocated(device), *(peak for peak in measured if peak is not None)])


def stride_of(
    loaded: Loaded, embed: Embed, sequences: Sequence[bytes], device: torch.device, rounds: int, seconds: float
) -> int:
    """Each round embeds every so manieth sequence: all are embedded in the end, or as many as take the seconds.

    Trial passes over ever more sequences find the rate; they warm up libraries and buffers too. This package's engine gets a full
    batch at least; with streamed weights, what hides the reading of them.
    """
    if seconds == math.inf:
        return rounds
    length = sum(map(len, sequences)) / len(sequences)
    n = EXTRACT_TOKENS / (length + 2)
    while True:
        part = sequences[:: max(1, int(len(sequences) / n))]
        took, _ = timed(embed, part, device)
        if took >= TRIAL_SHARE * seconds / rounds or len(part) == len(sequences):
            break
        n *= 4
    fitting = max(len(part) * seconds / rounds / took, loaded.least_tokens / (length + 2))
    return max(rounds, int(len(sequences) / fitting))


def most_tokens(sequences: Sequence[bytes], batch_tokens: int) -> int:
    """Tokens of the largest batch."""
    lengths = np.array([len(sequence) for sequence in sequences])
    tokens = np.concatenate([[0], (lengths + 2).cumsum()])
    return max(int(tokens[stop] - tokens[start]) for start, stop in cut_batches(lengths, batch_tokens))


def errors_of(rows: list[np.ndarray], expected: list[np.ndarray]) -> Mapping[str, float]:
    """Errors against fair-esm's rows, as shares of their root mean square, and the smallest cosine of a row."""
    ours, theirs = (np.concatenate(part).astype(np.float64) for part in (rows, expected))
    if len(ours) == len(expected):  # means
        theirs = np.stack([each.mean(0) for each in expected]).astype(np.float64)
    rms = np.sqrt(np.mean(theirs**2))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return {
        "max_error": float(np.abs(ours - theirs).max() / rms),
        "rms_error": float(np.sqrt(np.mean((ours - theirs) ** 2)) / rms),
        "min_cosine": float(((ours * theirs).sum(1) / norms).min()),
    }
