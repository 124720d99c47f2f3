"""A batch on its way through the engine: prepared, started as one forward pass or several, and its results on the host."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lengthwise.esm2.devices import is_out_of_memory
from lengthwise.esm2.meters import Peaks
from lengthwise.esm2.model import Packing

Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchResult:
    """A batch's embeddings on the host, with times and memory."""

    arrays: dict[str, np.ndarray]  # layer_<n> [R, D] in the storage type; mean_<n>, bos_<n> [N, D] float32
    status: np.ndarray  # [N] uint8, values of Status; rows of sequences that are not GOOD are NaN
    device_ms: float  # forward pass and pooling, by the device's own clock
    wait_launch_ms: float | None  # of these, the most that a GPU may have waited for the host's launches; None on a CPU
    wall_ms: float | None  # the batch's share of its wave's time; None where batches come one by one
    wait_read_ms: float  # the engine's wait until the batch was tokenised
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_rss_bytes: int | None
    oom_splits: int  # how often a part of the batch did not fit into memory


@dataclass(frozen=True)
class Batch:
    """A batch on the host, ready to be copied to the device."""

    sequences: list[bytes]
    tokens: Tensor  # [T] uint8
    packing: Packing


@dataclass(eq=False)
class Pass:
    """A forward pass in progress; its results are on the host after `settle`."""

    packing: Packing  # on the host
    arrays: dict[str, Tensor]
    status: Tensor  # [N] uint8
    timers: "list[Timer]"  # of its parts, one after another
    copied: torch.cuda.Event | None  # recorded after the copies to the host
    on_device: object  # keeps the copies' sources allocated until `settle`
    peaks: Peaks
    wall_ms: float | None = None  # its share of the time of a wave

    def settle(self) -> None:
        """Wait for the copies to the host, then release the device's memory."""
        if self.copied is not None:
            self.copied.synchronize()
        self.copied = self.on_device = None


@dataclass(frozen=True)
class StartedBatch:
    """The forward passes of a batch, in the order of its sequences: one, or several if memory did not hold the batch."""

    passes: list[Pass]
    oom_splits: int

    @property
    def wall_ms(self) -> float | None:
        """Its share of the time of a wave; None where batches come one by one."""
        shares = [one.wall_ms for one in self.passes if one.wall_ms is not None]
        return sum(shares) if shares else None


class Timer:
    """Times a pass between its creation and `stop`, by the device's own clock and by the host's."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = [time.perf_counter()]
        self.events = [_recorded_event()] if device.type == "cuda" else []

    def stop(self) -> None:
        if self.events:
            self.events.append(_recorded_event())
            self.began_meanwhile = self.events[0].query()
        self.seconds.append(time.perf_counter())

    def elapsed_ms(self, since: "Timer | None" = None) -> float:
        """Milliseconds from the creation of `since`, or its own, to `stop`."""
        first = since or self
        return first.events[0].elapsed_time(self.events[1]) if self.events else first._host_ms(self)

    def wait_launch_ms(self) -> float:
        """The most that the GPU may have waited for launches: none if it began after the last of them."""
        return min(self.elapsed_ms(), self._host_ms(self)) if self.began_meanwhile else 0.0

    def _host_ms(self, last: "Timer") -> float:
        return (last.seconds[1] - self.seconds[0]) * 1000


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def if_memory_holds(function: Callable[..., Result], *arguments: Any) -> Result | None:
    """The function's result; None where memory does not hold it."""
    try:
        return function(*arguments)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None  # outside of the handler, whose traceback keeps the tensors alive


def joined(parts: list[Tensor]) -> np.ndarray:
    return parts[0].numpy() if len(parts) == 1 else np.concatenate([part.numpy() for part in parts])


def largest(peaks: Iterable[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)
