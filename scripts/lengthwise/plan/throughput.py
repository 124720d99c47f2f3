"""Throughput: how fast a device embeds, from this store's own jobs, from other machines, or assumed."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lengthwise.esm2.costs import ASSUMED_FLOPS, forecast_seconds
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.store.metrics import find_undamaged, read_metrics
from lengthwise.store.settings import shape_of
from lengthwise.system.files import read_json
from lengthwise.system.machine import READ_BYTES_PER_SECOND
from lengthwise.system.text import count

HERE, ELSEWHERE, ASSUMED = "measured in this store", "measured on another machine", "assumed"
# Floating-point operations per second of two threads of an AMD EPYC, from whole jobs of 105,388 residues of Swiss-Prot on a quiet
# machine: 154 to 190e9 in float32 (8M to 150M), 207 and 300e9 in bfloat16 (8M, 150M).
CPU_FLOPS = {"float32": 170e9, "bfloat16": 250e9}
MEASURED_THREADS = 2

# {card: (bytes of memory, dense float16 operations per second with float32 sums)}, from NVIDIA's data sheets: what `device_like`
# may name. A card is assumed to reach a third of its peak, within a factor of three.
CARDS = {
    "T4-16GB": (16e9, 65e12),
    "V100-32GB": (32e9, 125e12),
    "A10-24GB": (24e9, 125e12),
    "L4-24GB": (24e9, 121e12),
    "RTX4090-24GB": (24e9, 165e12),
    "A40-48GB": (48e9, 150e12),
    "L40S-48GB": (48e9, 362e12),
    "A100-40GB": (40e9, 312e12),
    "A100-80GB": (80e9, 312e12),
    "H100-80GB": (80e9, 989e12),
    "H200-141GB": (141e9, 989e12),
}

SHARE_OF_PEAK = 1 / 3
# How far a rate that this store did not measure may be off, as a factor.
FACTOR_ELSEWHERE, FACTOR_CARD, FACTOR_ASSUMED = 3.0, 3.0, 5.0
# Jobs that are read for a rate; thousands would take a minute and change nothing.
MAX_JOBS = 100
# Seconds of measured batches after which the measured rate replaces the assumed one, compared at a typical length.
ENOUGH_SECONDS, TYPICAL_RESIDUES = 60.0, 300
# The spread over jobs is used from so many jobs on.
ENOUGH_JOBS = 5
# Bounds of the fit: an operation of attention takes 1 to 20 times as long as one of the matrix products.
MAX_ATTENTION_RATIO = 20.0


@dataclass(frozen=True)
class Rate:
    """How long a device takes for a floating-point operation, and for loading the weights."""

    device: str
    precision: str
    source: str  # HERE, ELSEWHERE or ASSUMED
    product_seconds: float  # for an operation of the matrix products
    attention_seconds: float  # for one of attention
    load_seconds: float  # for each job
    low: float  # the range goes from `low` to `high` times the forecast
    high: float
    basis: str  # where rate and range come from
    measured_seconds: float = 0.0  # total time of the batches behind the rate
    loaded_bytes: int | None = None  # memory in use after loading the weights; None where it was not measured

    def seconds(self, shape: ModelConfig, lengths: np.ndarray) -> np.ndarray:
        """What sequences of these lengths are expected to take, without loading the weights."""
        lengths = lengths.astype(np.float64)
        attention = shape.attention_flops(lengths)
        return (shape.flops(lengths) - attention) * self.product_seconds + attention * self.attention_seconds


def rates(store: Path, settings: dict, shape: ModelConfig, threads: int, device_like: str = "") -> list[Rate]:
    """The rates of the devices that did this store's work, most batches first; before any work, an expected rate.

    Parameters
    ----------
    store
        The store; it need not exist yet.
    settings
        Its settings, or those that it will have.
    shape
        The model's.
    threads
        CPU threads of a job.
    device_like
        A name in `CARDS`: its rate is added at the end. Empty: none.
    """
    found = measured_here(store, settings, shape) or [
        _expected(settings["device"], settings["precision"], shape, threads)
    ]
    if device_like:
        found.append(_of_card(device_like, settings, shape))
    return found


def card_precision(settings: dict) -> str:
    """The compute type on a card: the store's own if it is a half precision."""
    return settings["precision"] if settings["precision"] != "float32" else "float16"


def slowdown(store: Path, settings: dict) -> float:
    """How many times slower than `esm2.costs.forecast_seconds` this store's device is; 1 until `ENOUGH_SECONDS` were measured."""
    shape = shape_of(settings)
    measured = measured_here(store, settings, shape)
    if not measured or measured[0].measured_seconds < ENOUGH_SECONDS:
        return 1.0
    typical = np.array([TYPICAL_RESIDUES])
    return float((measured[0].seconds(shape, typical) / forecast_seconds(typical, shape, settings["device"]))[0])


def measured_here(store: Path, settings: dict, shape: ModelConfig) -> list[Rate]:
    """One rate for each device that finished shards of this store, most batches first."""
    paths = sorted(store.glob("jobs/*.json"))
    if len(paths) > MAX_JOBS:
        paths = [paths[i] for i in np.linspace(0, len(paths) - 1, MAX_JOBS).astype(int)]
    job_records = [job_record for path in paths if (job_record := read_json(path))["made"]]
    shards = [shard for job_record in job_records for shard in job_record["made"]]
    rows = read_metrics(find_undamaged(store, shards, job_records))
    if not len(rows):
        return []
    mean = (rows["n_tokens"] / rows["n_sequences"]).astype(
        float
    )  # lengths within a batch differ by less than a factor of two
    batches = pd.DataFrame({"job": rows["job"].astype(object), "device": rows["device"].astype(object)})
    batches["attention"] = rows["n_sequences"].astype(float) * shape.attention_flops(mean - 2)
    batches["products"] = rows["n_sequences"].astype(float) * shape.flops(mean - 2) - batches["attention"]
    batches["seconds"] = rows["wall_ms"].astype(float) / 1000
    found = []
    for device, here in batches.groupby("device"):
        jobs = [job_record for job_record in job_records if job_record["device"] == device]
        loads = [job_record["load_seconds"] for job_record in jobs]
        loaded = [n for job_record in jobs if (n := job_record.get("loaded_bytes"))]  # earlier versions did not note it
        rate = replace(
            _fit(here, device, settings["precision"]),
            load_seconds=float(np.median(loads or [0.0])),
            measured_seconds=float(here["seconds"].sum()),
            loaded_bytes=int(np.median(loaded)) if loaded else None,
        )
        found.append((len(here), rate))
    return [rate for _, rate in sorted(found, key=lambda item: -item[0])]


def _fit(batches: pd.DataFrame, device: str, precision: str) -> Rate:
    """Fit the two times per operation by least squares, then scale them so that the sum over batches is exact."""
    seconds = np.maximum(batches["seconds"].to_numpy(), 1e-6)
    flops = batches[["products", "attention"]].to_numpy()
    weights = 1 / np.sqrt(seconds)  # the error of a batch grows with the square root of its time
    scale = flops.sum(axis=0)
    product, attention = np.linalg.lstsq(flops / scale * weights[:, None], seconds * weights, rcond=None)[0] / scale
    ratio = np.clip(attention / product, 1.0, MAX_ATTENTION_RATIO) if product > 0 else MAX_ATTENTION_RATIO
    product = seconds.sum() / (flops @ [1.0, ratio]).sum()
    batches = batches.assign(forecast=product * (flops @ [1.0, ratio]))
    jobs = batches.groupby("job")[["seconds", "forecast"]].sum()
    basis = f"fitted to the forward passes of {count(len(jobs), 'job')}; "
    if len(jobs) >= ENOUGH_JOBS:
        low, high = np.quantile(jobs["seconds"] / jobs["forecast"], [0.1, 0.9])
        low, high = min(low, 0.9), max(high, 1.1)
        basis += "the range covers 80 % of them, and at least 10 % either way"
    else:
        low, high = 1 / 1.5, 1.5
        basis += "too few for a measured spread: the range is assumed, 1.5 times either way"
    return Rate(device, precision, HERE, product, product * ratio, 0.0, float(low), float(high), basis)


def _expected(device: str, precision: str, shape: ModelConfig, threads: int) -> Rate:
    """The rate of a device before this store has measured it: from a measured CPU, or assumed."""
    if device == "cuda":
        basis = "a third of an A100's dense float16 peak; nothing was measured on a GPU yet"
        return _unmeasured("GPU", precision, ASSUMED, ASSUMED_FLOPS["cuda"], FACTOR_ASSUMED, shape, basis)
    name, share = f"CPU, {count(threads, 'thread')}", threads / MEASURED_THREADS
    if precision in CPU_FLOPS:
        basis = f"an AMD EPYC, {MEASURED_THREADS} threads; scaled to {threads} here"
        return _unmeasured(name, precision, ELSEWHERE, share * CPU_FLOPS[precision], FACTOR_ELSEWHERE, shape, basis)
    basis = f"nothing was measured; assumed for {threads} threads of a server"
    return _unmeasured(name, precision, ASSUMED, share * ASSUMED_FLOPS["cpu"], FACTOR_ASSUMED, shape, basis)


def _of_card(card: str, settings: dict, shape: ModelConfig) -> Rate:
    """The assumed rate of one of `CARDS`."""
    basis = "a third of the card's dense float16 peak; nothing was measured on a GPU yet"
    flops = SHARE_OF_PEAK * CARDS[card][1]
    return _unmeasured(card, card_precision(settings), ASSUMED, flops, FACTOR_CARD, shape, basis)


def _unmeasured(
    device: str, precision: str, source: str, flops: float, factor: float, shape: ModelConfig, basis: str
) -> Rate:
    """A rate whose range is `factor` times either way; weights are read at an ordinary disk's rate."""
    load = 4 * shape.parameters / READ_BYTES_PER_SECOND
    basis += f"; a range of {factor:.0f} times either way"
    return Rate(device, precision, source, 1 / flops, 1 / flops, load, 1 / factor, factor, basis)
