"""Streams, copies and memory of a pretended device: what may run before what, and what is still in use.

Clocks keep the order (`Stream`). A kernel or a copy that no wait puts behind what it reads raises `OutOfOrder`. Memory that is
freed while another stream may use it is noted in `Work.out_of_order`. A copy between the device and pinned memory happens when a
stream or the host has waited for it. Until then its destination holds NaN, or `POISON` in integers. Nothing is ever done before
it is waited for: memory that is freed after `record_stream` stays occupied until then, as long as a GPU may take at most.
"""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# A token that no sequence has, in the vocabulary, and no status.
POISON = 31
BLOCK_BYTES, SEGMENT_BYTES, CONTEXT_BYTES = 512, 2 << 20, 400 << 20

Clock = dict["Stream", int]  # {stream: the number of its last piece of work that is known to be done before}


class OutOfOrder(AssertionError):  # noqa: N818
    """Work that may run before what it needs, or after what it needs is gone."""


@dataclass(eq=False)
class Allocation:
    """Device memory behind a tensor and its views."""

    nbytes: int
    stream: "Stream"  # it is given to this stream's work again once it is freed
    written: tuple["Stream", int]
    used: Clock = field(default_factory=dict)
    recorded: set["Stream"] = field(default_factory=set)
    freed_early: bool = False


@dataclass
class Copy:
    """A copy between the device and pinned memory that nobody has waited for."""

    stream: "Stream"
    number: int
    to: Callable[[], Tensor | None]
    of: Tensor
    was: Tensor  # its numbers when the copy was asked for
    source: Allocation | None  # on the device: a copy to the host
    done: bool = False


@dataclass(frozen=True)
class Retained:
    """Memory that is freed, and not given away before recorded streams have done what was launched until then."""

    nbytes: int
    before: Clock


class Stream:
    """Work in order, beside other streams."""

    def __init__(self, device: "Work", name: str):
        self.device, self.name, self.count = device, name, 0
        self.clock: Clock = {}

    def begin_work(self) -> int:
        """The number of the next piece of work, which is behind all that the host or this stream has waited for."""
        self.count += 1
        merge(self.clock, self.device.host)
        self.clock[self] = self.count
        return self.count

    def wait_stream(self, other: "Stream") -> None:
        merge(self.clock, other.clock)

    def wait_event(self, event: "Event") -> None:
        merge(self.clock, event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self.device)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.device.host_waits(self.clock, "Stream.synchronize")


class Event:
    """A place among a stream's work."""

    def __init__(self, device: "Work", enable_timing: bool = False):
        self.device, self.enable_timing = device, enable_timing
        self.clock: Clock = {}
        self.seconds: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.device.current_stream()
        stream.begin_work()
        self.clock, self.seconds = dict(stream.clock), time.perf_counter()

    def synchronize(self) -> None:
        self.device.host_waits(self.clock, "Event.synchronize")

    def query(self) -> bool:
        return covers(dict(self.device.host), self.clock)

    def elapsed_time(self, end: "Event") -> float:
        if not (self.enable_timing and end.enable_timing and self.seconds and end.seconds):
            raise ValueError("Both events must be created with argument 'enable_timing=True', and recorded.")
        if not (self.query() and end.query()):
            raise RuntimeError("CUDA error: device not ready")
        return (end.seconds - self.seconds) * 1000


class Work:
    """Work on a device in progress, and its memory."""

    def __init__(self, total_bytes: int):
        self.total_bytes = total_bytes
        self.lock = threading.RLock()
        self.local = threading.local()
        self.default = Stream(self, "default")
        self.host: Clock = {}  # what the host has waited for
        self.allocations: dict[int, Allocation] = {}  # by storage
        self.pinned: set[int] = set()  # storages
        self.copies: list[Copy] = []
        self.retained: list[Retained] = []
        self.live_bytes = self.peak_bytes = self.reserved_bytes = self.peak_reserved_bytes = 0
        self.peak_occupied_bytes = 0
        self.limit_bytes: float = total_bytes - CONTEXT_BYTES
        self.out_of_memory: Callable[[str], Exception] = torch.OutOfMemoryError
        self.refuses: int | None = None  # the allocations until one is refused
        self.counts: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()  # the host's, by what it waited in
        self.out_of_order: list[str] = []

    # --- order

    def current_stream(self, device: object = None) -> Stream:
        return getattr(self.local, "stream", self.default)

    @contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        before = self.current_stream()
        self.local.stream = stream or before
        try:
            yield
        finally:
            self.local.stream = before

    def host_waits(self, clock: Clock, what: str) -> None:
        with self.lock, unnoticed():
            self.waits[what] += 1
            merge(self.host, clock)
            self.retained = [each for each in self.retained if not covers(self.host, each.before)]
            self.copy_up_to(self.host)
            for copy in [copy for copy in self.copies if known(self.host, copy)]:
                self.copies.remove(copy)
                if copy.source is None:
                    if not torch.equal(copy.of.nan_to_num(), copy.was.nan_to_num()):
                        self.found("pinned memory changed before its copy was waited for", raises=True)
                elif not copy.source.freed_early:
                    copy.to().copy_(copy.was)

    def synchronize(self, device: object = None) -> None:
        with self.lock:
            everything: Clock = {}
            for stream in {copy.stream for copy in self.copies} | {self.default, self.current_stream()}:
                merge(everything, stream.clock)
            for allocation in list(self.allocations.values()):  # the garbage collector may free some meanwhile
                merge(everything, allocation.used)
            self.host_waits(everything, "cuda.synchronize")

    def copy_up_to(self, clock: Clock) -> None:
        """Do the copies to the device that are done before work with this clock."""
        with unnoticed():
            for copy in self.copies:
                if copy.source is None and not copy.done and known(clock, copy):
                    copy.done = True
                    if (to := copy.to()) is not None:
                        to.copy_(copy.of)

    def work(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> tuple[Stream, int]:
        """Begin a kernel or a copy on the current stream, behind what it needs."""
        with self.lock:
            stream = self.current_stream()
            number = stream.begin_work()
            self.counts["kernels"] += 1
            self.require_written(name, reads)
            for tensor in reads:
                self.allocations[key_of(tensor)].used[stream] = number
            for tensor in writes:
                allocation = self.allocations[key_of(tensor)]
                for user, used in allocation.used.items():
                    if user is not stream and stream.clock.get(user, 0) < used:
                        self.found(f"{name} on {stream.name} overwrites what {user.name} may still read", raises=True)
                allocation.written, allocation.used[stream] = (stream, number), number
            return stream, number

    def require_written(self, name: str, tensors: list[Tensor]) -> None:
        """Raise if the current stream reads one of these tensors before what writes it; do the copies that it has waited for."""
        with self.lock:
            stream = self.current_stream()
            merge(stream.clock, self.host)
            for tensor in tensors:
                writer, written = self.allocations[key_of(tensor)].written
                if stream.clock.get(writer, 0) < written:
                    self.found(
                        f"{name} on {stream.name} reads what {writer.name} may not have written yet", raises=True
                    )
            self.copy_up_to(stream.clock)

    def found(self, what: str, raises: bool) -> None:
        self.out_of_order.append(what)
        if raises:
            raise OutOfOrder(what)

    # --- memory

    def holds(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and not tensor.is_meta and key_of(tensor) in self.allocations

    def allocate(self, tensor: Tensor) -> None:
        """Count a new tensor's memory as the device's."""
        if tensor.is_meta or self.holds(tensor):
            return
        storage = tensor.untyped_storage()
        nbytes = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        with self.lock:
            self.counts["allocations"] += 1
            if self.refuses is not None:
                self.refuses -= 1
            if self.occupied_bytes + nbytes > self.limit_bytes:
                self.wait_for_retained()
            if self.occupied_bytes + nbytes > self.limit_bytes or self.refuses == 0:
                self.counts["refused"] += 1
                raise self.out_of_memory(f"CUDA out of memory. Tried to allocate {nbytes / (1 << 20):.2f} MiB.")
            stream = self.current_stream()
            allocation = Allocation(nbytes, stream, (stream, stream.count), {stream: stream.count})
            self.allocations[storage._cdata] = allocation
            weakref.finalize(storage, self._free, storage._cdata).atexit = False
            self.live_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self.peak_occupied_bytes = max(self.peak_occupied_bytes, self.occupied_bytes)
            self.reserved_bytes = max(self.reserved_bytes, -(-self.occupied_bytes // SEGMENT_BYTES) * SEGMENT_BYTES)
            self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _free(self, key: int) -> None:
        with self.lock:
            allocation = self.allocations.pop(key)
            self.live_bytes -= allocation.nbytes
            before = {stream: stream.count for stream in allocation.recorded}  # all that was launched, as torch has it
            if not covers(self.host, before):
                self.retained.append(Retained(allocation.nbytes, before))
            for user, used in allocation.used.items():
                safe = user is allocation.stream or user in allocation.recorded
                if not safe and max(self.host.get(user, 0), allocation.stream.clock.get(user, 0)) < used:
                    allocation.freed_early = True
                    self.found(
                        f"memory of {allocation.stream.name} is freed while {user.name} may use it", raises=False
                    )

    @property
    def occupied_bytes(self) -> int:
        return self.live_bytes + sum(each.nbytes for each in self.retained)

    def wait_for_retained(self) -> None:
        """As torch's allocator does before it refuses, and before it gives memory back."""
        if self.retained:
            clock: Clock = {}
            for each in self.retained:
                merge(clock, each.before)
            self.host_waits(clock, "the allocator")

    def refuse_after(self, allocations: int) -> None:
        """Refuse one allocation, after so many others."""
        self.refuses = allocations + 1

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        self.allocations[key_of(tensor)].recorded.add(stream)

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.pinned.add(storage._cdata)
        weakref.finalize(storage, self.pinned.discard, storage._cdata).atexit = False
        return tensor

    def empty_cache(self) -> None:
        with self.lock:
            self.wait_for_retained()
            self.reserved_bytes = -(-self.live_bytes // SEGMENT_BYTES) * SEGMENT_BYTES

    def free_bytes(self) -> int:
        return int(self.limit_bytes) - self.reserved_bytes

    def reset_peaks(self, device: object = None) -> None:
        self.peak_bytes, self.peak_occupied_bytes = self.live_bytes, self.occupied_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def statistics(self, device: object = None) -> dict[str, Any]:
        self.counts["memory_stats"] += 1
        of_allocated = {"current": self.live_bytes, "peak": self.peak_bytes}
        of_reserved = {"current": self.reserved_bytes, "peak": self.peak_reserved_bytes}
        return {"allocated_bytes": {"all": of_allocated}, "reserved_bytes": {"all": of_reserved}}

    def statistic(self, measure: str, moment: str) -> Callable[..., int]:
        return lambda device=None: self.statistics()[f"{measure}_bytes"]["all"][moment]

    def set_fraction(self, fraction: float, device: object = None) -> None:
        self.limit_bytes = fraction * self.total_bytes


@contextmanager
def unnoticed() -> Iterator[None]:
    """The device's own calls of torch; inference tensors are written only in this mode."""
    with torch._C.DisableTorchFunction(), torch.inference_mode():
        yield


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def view_of(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Makes the view again, while something else keeps its memory."""
    storage = weakref.ref(tensor.untyped_storage())
    dtype, place = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    def view() -> Tensor | None:
        there = storage()
        return None if there is None else torch.empty(0, dtype=dtype).set_(there, *place)

    return view


def poisoned(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan if tensor.is_floating_point() else POISON)


def merge(clock: Clock, other: Clock) -> None:
    for stream, number in dict(other).items():  # other threads may add to it
        clock[stream] = max(clock.get(stream, 0), number)


def covers(clock: Clock, other: Clock) -> bool:
    return all(clock.get(stream, 0) >= number for stream, number in other.items())


def known(clock: Clock, copy: Copy) -> bool:
    return clock.get(copy.stream, 0) >= copy.number
