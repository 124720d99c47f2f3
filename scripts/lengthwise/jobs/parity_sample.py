"""The sequences that a parity receipt compares: short and middle ones, as many as time and memory allow."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lengthwise.esm2.shapes import TRAINED_RESIDUES, ModelConfig
from lengthwise.esm2.status import Status
from lengthwise.store.paths import shard_path
from lengthwise.store.settings import shape_of
from lengthwise.store.shard import Shard
from lengthwise.system.text import count

if TYPE_CHECKING:
    from lengthwise.plan.work_orders import PlannedShard

# Of the padded batch.
MAX_TOKENS = 1_000
# Their places among the job's sequences, which are sorted by length, in the order in which they are taken.
QUANTILES = (0, 0.5, 0.25, 0.75, 1)
# With fewer residues a channel's spread says little: on sharp attention the right engine missed its limit in 9 of 60 peptides of
# 10 residues, and in none of 15.
MIN_RESIDUES = 15
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# Operations per second by type, and bytes of weights loaded per second, on the slow side. CPU: half of what two cores of an AMD
# EPYC server reach. CUDA: half of a GeForce RTX 3090's peak (NVIDIA Ampere GA102 whitepaper, table 2).
_FLOPS = {
    "cpu": {"float64": 30e9, "float32": 60e9, "float16": 15e9, "bfloat16": 15e9},
    "cuda": {"float64": 0.28e12, "float32": 17e12, "float16": 35e12, "bfloat16": 35e12},
}
_LOADED_PER_SECOND = {"cpu": 1.2e9, "cuda": 4e9}


@dataclass(frozen=True)
class Sample:
    """What is compared."""

    shards: list[Path]  # of each sequence
    numbers: list[int]  # of each sequence in its shard
    sequences: list[bytes]
    truth: str  # float64, or float32 where that takes too long or too much memory


def choose_sample(
    store: Path, settings: dict, device: str, shards: "list[PlannedShard]", seconds: float, free_bytes: int
) -> Sample | str:
    """The sample of finished shards, or why there is none.

    Parameters
    ----------
    store, settings
        The store and its settings.
    device
        cpu or cuda.
    shards
        Finished shards, of ascending lengths.
    seconds, free_bytes
        What the comparison may take of time, and of the device's memory.
    """
    opened = [Shard(shard_path(store, shard.name)) for shard in shards]
    status = np.concatenate([shard["status"] for shard in opened])
    lengths = np.concatenate([shard.lengths for shard in shards])
    starts = np.cumsum([0, *(len(shard.lengths) for shard in shards)])
    known = np.array([sequence != b"" for shard in shards for sequence in shard.sequences])
    fit = np.flatnonzero((status == Status.GOOD) & (lengths <= TRAINED_RESIDUES) & known)
    if not len(fit):
        return f"the job has no sequence of at most {TRAINED_RESIDUES:,} residues with finite rows"
    candidates = dict.fromkeys(fit[int(quantile * (len(fit) - 1))] for quantile in QUANTILES)
    lack = None
    for truth in ("float64", "float32"):
        chosen: list[int] = []
        for place in candidates:
            if not (lack := _lack(settings, device, truth, lengths[[*chosen, place]], seconds, free_bytes)):
                chosen.append(int(place))
        if lengths[chosen].sum() >= MIN_RESIDUES:
            owners = (np.searchsorted(starts, chosen, side="right") - 1).tolist()
            numbers = [place - int(starts[i]) for place, i in zip(chosen, owners, strict=True)]
            sequences = [shards[i].sequences[number] for i, number in zip(owners, numbers, strict=True)]
            return Sample([opened[i].path for i in owners], numbers, sequences, truth)
    return lack or f"its sequences have fewer than {MIN_RESIDUES} residues"


def comparison_seconds(shape: ModelConfig, device: str, precision: str, truth: str, lengths: np.ndarray) -> float:
    """Seconds that a comparison takes, on the slow side: fair-esm in each type, and this engine's passes.

    Parameters
    ----------
    shape, device, precision
        The model's shape; cpu or cuda; the run's type.
    truth
        float64 or float32.
    lengths
        [N] residues of the sequences.
    """
    rates, types = _FLOPS[device], {truth, "float32", precision}
    loaded = sum(ITEMSIZE[kind] for kind in types) + (4 if precision != "float32" else 0)  # and the engine in float32
    padded = len(lengths) * shape.flops(int(lengths.max()))
    passes = sum(padded / rates[kind] for kind in types) + sum(padded / rates[kind] for kind in {"float32", precision})
    return passes + shape.parameters * loaded / _LOADED_PER_SECOND[device]


def _lack(settings: dict, device: str, truth: str, lengths: np.ndarray, seconds: float, free_bytes: int) -> str | None:
    """Why sequences of these lengths cannot be compared; None if they can."""
    shape, longest, n = shape_of(settings), int(lengths.max()), len(lengths)
    if n * (longest + 2) > max(MAX_TOKENS, longest + 2):
        return f"more than {MAX_TOKENS:,} tokens"
    needed_bytes = shape.reference_bytes(ITEMSIZE[truth], n, longest)
    if needed_bytes > free_bytes:
        return f"fair-esm needs {needed_bytes / 1e9:.1f} GB in {truth}, and {free_bytes / 1e9:.1f} GB were free on the device"
    needed = comparison_seconds(shape, device, settings["precision"], truth, lengths)
    if needed > seconds:
        return (
            f"fair-esm would take {needed:,.0f} s for {count(n, 'sequence')} of at most {longest:,} residues, and "
            f"this job has {seconds:,.0f} s for it"
        )
    return None
