"""Runs of the engine on a pretended device, and what must hold in each of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from pretend import Card, Device

from lengthwise.esm2 import checkpoint
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.passes import BatchResult
from lengthwise.esm2.status import Status

VOLTA, TURING, HOPPER = (7, 0), (7, 5), (9, 0)
OUTPUTS = ("residue", "mean", "bos")


def random_sequences(lengths: list[int], seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.choice(np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8), length).tobytes() for length in lengths]


# Unequal and equal lengths, the shortest protein, and enough batches that several are in flight.
BATCHES = [
    random_sequences(lengths)
    for lengths in ([20, 25, 31], [40] * 5, [1], [130, 140, 140, 255], [64, 65], [33] * 3, [700, 900])
]


def load(path: Path, device: str, precision: str, compile: bool = False) -> Engine:
    """An engine for the last two layers and all outputs."""
    layers = checkpoint.read(path)[0].num_layers
    return Engine(path, torch.device(device), precision, Output((layers - 1, layers), OUTPUTS, "float32"), compile)


@contextmanager
def pretended(card: Card | None = None) -> Iterator[Device]:
    """A device, and at the end: nothing ran or was freed out of order."""
    device = Device(card)
    with device.installed():
        yield device
    assert device.out_of_order == [], device.out_of_order


@contextmanager
def the_host_waits_for_results_alone(device: Device, passes: int) -> Iterator[None]:
    """No synchronisation but one for each forward pass, whose copies end in an event."""
    before = device.waits.copy()
    yield
    waits = dict(device.waits - before)
    assert waits == {"Event.synchronize": passes}, waits


def embed(path: Path, precision: str, card: Card | None = None, compile: bool = False) -> list[BatchResult]:
    """The results of `BATCHES` on a pretended card."""
    with pretended(card) as device:
        engine = load(path, "cuda", precision, compile)
        before = device.live_bytes
        with the_host_waits_for_results_alone(device, len(BATCHES)):
            results = list(engine.embed(BATCHES))
        assert device.live_bytes == before
    assert all((result.status == Status.GOOD).all() for result in results)
    return results


def rows(results: list[BatchResult]) -> dict[str, np.ndarray]:
    """{tensor: its rows in all batches}"""
    return {name: np.concatenate([result.arrays[name] for result in results]) for name in results[0].arrays}


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.square(array, dtype=np.float64).mean()))
