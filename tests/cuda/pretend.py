"""A pretended CUDA device: real numbers from the CPU, and CUDA's rules of placement, order and memory.

Kernels run at once. What a GPU would do later is kept in order by clocks (`Stream`): a kernel or a copy that no wait puts behind
what it reads raises `OutOfOrder`. Memory that is freed while another stream may use it is noted in `Device.out_of_order`. A copy
between the device and pinned memory happens when a stream or the host has waited for it. Until then its destination holds NaN, or
`POISON` in integers.

What it does not know: speed, the kernels' own temporary memory, and rounding in a GPU's order.
"""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
# A token that no sequence has, in the vocabulary, and no status.
POISON = 31
BLOCK_BYTES, SEGMENT_BYTES, CONTEXT_BYTES = 512, 2 << 20, 400 << 20
# Calls whose result the host waits for.
HOST_READS = {
    *(
        "item",
        "tolist",
        "nonzero",
        "is_nonzero",
        "equal",
        "allclose",
        "masked_select",
        "unique",
        "bincount",
        "argwhere",
    ),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__", "__repr__", "__format__"),
}
# Their names end in "_", and they write nothing.
WRITE_NOTHING = {"requires_grad_", "squeeze_", "unsqueeze_", "transpose_", "t_"}
WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")  # of torch 2.13 for CUDA 13

Clock = dict["Stream", int]  # {stream: the number of its last piece of work that is known to be done before}


class OutOfOrder(AssertionError):  # noqa: N818
    """Work that may run before what it needs, or after what it needs is gone."""


@dataclass(frozen=True)
class Card:
    """A card, its driver's and torch's build."""

    name: str = "NVIDIA Pretended 100"
    capability: tuple[int, int] = (9, 0)
    total_bytes: int = 80 << 30
    arch_list: tuple[str, ...] = WHEEL
    flash: bool = True
    cuda: str | None = "13.0"  # None: a CPU build
    compiler: bool = True


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


class Stream:
    """Work in order, beside other streams."""

    def __init__(self, device: "Device", name: str):
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

    def __init__(self, device: "Device", enable_timing: bool = False):
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
        return covers(self.device.host, self.clock)

    def elapsed_time(self, end: "Event") -> float:
        if not (self.enable_timing and end.enable_timing and self.seconds and end.seconds):
            raise ValueError("Both events must be created with argument 'enable_timing=True', and recorded.")
        if not (self.query() and end.query()):
            raise RuntimeError("CUDA error: device not ready")
        return (end.seconds - self.seconds) * 1000


class Device:
    """The device's state. `with device.installed():` puts it in the place of CUDA, on all threads that are started meanwhile."""

    def __init__(self, card: Card | None = None):
        self.card = card or Card()
        self.lock = threading.RLock()
        self.local = threading.local()
        self.default = Stream(self, "default")
        self.host: Clock = {}  # what the host has waited for
        self.allocations: dict[int, Allocation] = {}  # by storage
        self.pinned: set[int] = set()  # storages
        self.copies: list[Copy] = []
        self.live_bytes = self.peak_bytes = self.reserved_bytes = self.peak_reserved_bytes = 0
        self.limit_bytes: float = self.card.total_bytes - CONTEXT_BYTES
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
        with self.lock, _unnoticed():
            self.waits[what] += 1
            merge(self.host, clock)
            self._copy_up_to(self.host)
            for copy in [copy for copy in self.copies if known(self.host, copy)]:
                self.copies.remove(copy)
                if copy.source is None:
                    if not torch.equal(copy.of.nan_to_num(), copy.was.nan_to_num()):
                        self._found("pinned memory changed before its copy was waited for", raises=True)
                elif not copy.source.freed_early:
                    copy.to().copy_(copy.was)

    def synchronize(self, device: object = None) -> None:
        with self.lock:
            everything: Clock = {}
            for stream in {copy.stream for copy in self.copies} | {self.default, self.current_stream()}:
                merge(everything, stream.clock)
            for allocation in self.allocations.values():
                merge(everything, allocation.used)
            self.host_waits(everything, "cuda.synchronize")

    def _copy_up_to(self, clock: Clock) -> None:
        """Do the copies to the device that are done before work with this clock."""
        with _unnoticed():
            for copy in self.copies:
                if copy.source is None and not copy.done and known(clock, copy):
                    copy.done = True
                    if (to := copy.to()) is not None:
                        to.copy_(copy.of)

    def _work(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> tuple[Stream, int]:
        """Begin a kernel or a copy on the current stream, behind what it needs."""
        with self.lock:
            stream = self.current_stream()
            number = stream.begin_work()
            self.counts["kernels"] += 1
            for tensor in reads:
                allocation = self.allocations[key_of(tensor)]
                writer, written = allocation.written
                if stream.clock.get(writer, 0) < written:
                    self._found(
                        f"{name} on {stream.name} reads what {writer.name} may not have written yet", raises=True
                    )
                allocation.used[stream] = number
            for tensor in writes:
                allocation = self.allocations[key_of(tensor)]
                for user, used in allocation.used.items():
                    if user is not stream and stream.clock.get(user, 0) < used:
                        self._found(f"{name} on {stream.name} overwrites what {user.name} may still read", raises=True)
                allocation.written = (stream, number)
            self._copy_up_to(stream.clock)
            return stream, number

    def _found(self, what: str, raises: bool) -> None:
        self.out_of_order.append(what)
        if raises:
            raise OutOfOrder(what)

    # --- memory

    def holds(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and not tensor.is_meta and key_of(tensor) in self.allocations

    def _allocate(self, tensor: Tensor) -> None:
        """Count a new tensor's memory as the device's."""
        if tensor.is_meta or self.holds(tensor):
            return
        storage = tensor.untyped_storage()
        nbytes = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        with self.lock:
            self.counts["allocations"] += 1
            if self.refuses is not None:
                self.refuses -= 1
            if self.live_bytes + nbytes > self.limit_bytes or self.refuses == 0:
                self.counts["refused"] += 1
                raise self.out_of_memory(f"CUDA out of memory. Tried to allocate {nbytes / (1 << 20):.2f} MiB.")
            stream = self.current_stream()
            allocation = Allocation(nbytes, stream, (stream, stream.count), {stream: stream.count})
            self.allocations[storage._cdata] = allocation
            weakref.finalize(storage, self._free, storage._cdata).atexit = False
            self.live_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self.reserved_bytes = max(self.reserved_bytes, -(-self.live_bytes // SEGMENT_BYTES) * SEGMENT_BYTES)
            self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _free(self, key: int) -> None:
        with self.lock:
            allocation = self.allocations.pop(key)
            self.live_bytes -= allocation.nbytes
            for user, used in allocation.used.items():
                safe = user is allocation.stream or user in allocation.recorded
                if not safe and max(self.host.get(user, 0), allocation.stream.clock.get(user, 0)) < used:
                    allocation.freed_early = True
                    self._found(
                        f"memory of {allocation.stream.name} is freed while {user.name} may use it", raises=False
                    )

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
        self.reserved_bytes = -(-self.live_bytes // SEGMENT_BYTES) * SEGMENT_BYTES

    def free_bytes(self) -> int:
        return int(self.limit_bytes) - self.reserved_bytes

    def reset_peaks(self, device: object = None) -> None:
        self.peak_bytes, self.peak_reserved_bytes = self.live_bytes, self.reserved_bytes

    def statistics(self, device: object = None) -> dict[str, Any]:
        self.counts["memory_stats"] += 1
        of_allocated = {"current": self.live_bytes, "peak": self.peak_bytes}
        of_reserved = {"current": self.reserved_bytes, "peak": self.peak_reserved_bytes}
        return {"allocated_bytes": {"all": of_allocated}, "reserved_bytes": {"all": of_reserved}}

    def statistic(self, measure: str, moment: str) -> Callable[..., int]:
        return lambda device=None: self.statistics()[f"{measure}_bytes"]["all"][moment]

    def set_fraction(self, fraction: float, device: object = None) -> None:
        self.limit_bytes = fraction * self.card.total_bytes

    # --- calls

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._property(func, args, kwargs)
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if self.holds(tensor)]
        if special := getattr(self, f"_call_{name}", None):
            return special(func, on_device, *args, **kwargs)
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        here = device.type == "cuda" if device else bool(on_device)
        if device and device.type == "cuda":
            kwargs = kwargs | {"device": "cpu"}
        if kwargs.get("pin_memory"):
            return self.pin(poisoned(func(*args, **kwargs | {"pin_memory": False})))
        if not here and not on_device:
            return func(*args, **kwargs)
        self._require_one_device(name, tensors, on_device)
        self._note_host_reads(name, func, args, kwargs, on_device)
        in_place = name.endswith("_") and not name.endswith("__") and name not in WRITE_NOTHING
        in_place = in_place or name == "__setitem__" or name.startswith("__i") or "out" in kwargs
        written = leaves(kwargs["out"]) if "out" in kwargs else tensors[:1] if in_place else []
        keys = {key_of(tensor) for tensor in on_device}
        if in_place:
            self._work(name, on_device, [tensor for tensor in written if self.holds(tensor)])
        elif on_device and name not in ("size", "dim", "numel", "stride", "is_floating_point", "detach"):
            self._copy_up_to(self.current_stream().clock)
        out = func(*args, **kwargs)
        made = [
            leaf for leaf in leaves(out) if isinstance(leaf, Tensor) and not leaf.is_meta and key_of(leaf) not in keys
        ]
        if here and made:
            if on_device:
                self._work(name, on_device, [])
            for tensor in made:
                self._allocate(tensor)
        return out

    def _property(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func == torch.Tensor.device.__get__ and self.holds(args[0]):
            return CUDA
        if func == torch.Tensor.is_cuda.__get__:
            return self.holds(args[0])
        if func == torch.Tensor.is_cpu.__get__ and self.holds(args[0]):
            return False
        return func(*args, **kwargs)

    def _require_one_device(self, name: str, tensors: list[Tensor], on_device: list[Tensor]) -> None:
        if name in ("__getitem__", "__setitem__", "__set__", "_make_subclass"):  # indices and values may be on the host
            return
        if len(on_device) < sum(tensor.dim() > 0 and not tensor.is_meta for tensor in tensors):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
            )

    def _note_host_reads(self, name: str, func: Callable, args: tuple, kwargs: dict, on_device: list[Tensor]) -> None:
        """Count the calls for which the host waits for the device."""
        found = name in HOST_READS and bool(on_device)
        found |= name in ("tensor", "as_tensor")  # from pageable memory
        found |= name == "where" and len(args) == 1
        found |= name == "repeat_interleave" and not kwargs.get("output_size") and len(args) < 3
        found |= name == "segment_reduce" and not kwargs.get("unsafe")
        if name in ("__getitem__", "__setitem__"):
            values = leaves(args[1:])
            found |= any(
                isinstance(each, Tensor) and (each.dtype == torch.bool or not self.holds(each)) for each in values
            )
        if found:
            for tensor in on_device:
                self._work(name, [tensor], [])
            self.host_waits(self.current_stream().clock, name)

    def _call_numpy(self, func: Callable, on_device: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        if on_device:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first."
            )
        return func(*args, **kwargs)

    _call___array__ = _call_numpy

    def _call_pin_memory(
        self, func: Callable, on_device: list[Tensor], tensor: Tensor, device: object = None
    ) -> Tensor:
        if on_device:
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        return self.pin(tensor.clone())

    def _call_is_pinned(self, func: Callable, on_device: list[Tensor], tensor: Tensor, device: object = None) -> bool:
        return key_of(tensor) in self.pinned

    def _call_cpu(self, func: Callable, on_device: list[Tensor], tensor: Tensor, **kwargs: Any) -> Tensor:
        return self._call_to(func, on_device, tensor, "cpu")

    def _call_cuda(self, func: Callable, on_device: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._call_to(func, on_device, tensor, "cuda", **kwargs)

    def _call_to(self, func: Callable, on_device: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            there = CUDA if self.holds(args[0]) else args[0].device
            args = (there, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        here, dtype = self.holds(tensor), dtype or tensor.dtype
        to_cuda = device.type == "cuda" if device else here
        if tensor.is_meta or (device and device.type not in ("cuda", "cpu")):
            return tensor.to(device, dtype, copy=copy)
        if here == to_cuda:
            out = tensor.to(dtype, copy=copy)
            if here and out is not tensor:
                self._work("to", [tensor], [])
                self._allocate(out)
            return out
        out = torch.empty_like(tensor, dtype=dtype, device="cpu")
        if to_cuda:
            self._allocate(out)
        self._copy(out, tensor, non_blocking)
        return out

    def _call_copy_(
        self, func: Callable, on_device: list[Tensor], to: Tensor, of: Tensor, non_blocking: bool = False
    ) -> Tensor:
        if self.holds(to) == self.holds(of):
            if on_device:
                self._work("copy_", [of], [to])
            return to.copy_(of)
        self._copy(to, of, non_blocking)
        return to

    def _copy(self, to: Tensor, of: Tensor, non_blocking: bool) -> None:
        """A copy between the host and the device on the current stream."""
        inwards = self.holds(to)
        host, here = (of, to) if inwards else (to, of)
        stream, number = self._work("a copy", [] if inwards else [here], [here] if inwards else [])
        self.counts["copies in" if inwards else "copies out"] += 1
        if not non_blocking or key_of(host) not in self.pinned:
            to.copy_(of)
            self.host_waits(stream.clock, "a blocking copy")
            return
        make_to = view_of(to) if inwards else lambda: to
        source = None if inwards else self.allocations[key_of(of)]
        self.copies.append(Copy(stream, number, make_to, host, of.clone(), source))
        poisoned(to)

    def _call__varlen_attn(self, func: Callable, on_device: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Flash attention of packed sequences, with the checks of the kernel and of torch's binding to it."""
        q, k, v, q_bounds, k_bounds, q_length, k_length = args[:7]
        if not self.card.flash:
            raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")
        if self.card.capability < (8, 0):
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        assert len(on_device) == 5, "all five tensors are on the device"
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.dtype == k.dtype == v.dtype
        assert q.shape == k.shape == v.shape
        assert q.dim() == 3
        assert q.shape[-1] % 8 == 0
        assert q.shape[-1] <= 256
        for part in (q, k, v):  # rows are read 16 bytes at a time
            assert part.stride(-1) == 1
            assert all(step % 8 == 0 for step in (*part.stride()[:2], part.storage_offset()))
        for bounds, length in ((q_bounds, q_length), (k_bounds, k_length)):
            assert bounds.dtype == torch.int32
            assert bounds.is_contiguous()
            assert type(length) is int
            assert bounds[0] == 0
            assert bounds[-1] == len(q)
            assert bounds.diff().max() == length
            assert bounds.diff().min() > 0
        self._work("varlen_attn", on_device, [])
        out = torch.empty_like(q)
        for start, stop in zip(q_bounds[:-1].tolist(), q_bounds[1:].tolist(), strict=True):
            one = (part[start:stop].float().transpose(0, 1) for part in (q, k, v))  # [H, L, C] each
            attended = torch.nn.functional.scaled_dot_product_attention(*one)
            out[start:stop] = attended.transpose(0, 1).to(q.dtype)
        self.counts["varlen_attn"] += 1
        made = out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)
        for tensor in made:
            self._allocate(tensor)
        return made

    def compile(self, function: Callable | None = None, **options: Any) -> Callable:
        """In the place of torch.compile: the function itself, or without a compiler Triton's error at the first call."""
        if function is None:
            return lambda function: self.compile(function, **options)

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

        self.counts["compile"] += 1
        return function if self.card.compiler else fail

    # --- in the place of CUDA

    def _stream_class(self) -> type[Stream]:
        pretended = self

        class StreamOfDevice(Stream):
            def __init__(self, device: object = None, priority: int = 0):
                super().__init__(pretended, "a side stream")

        return StreamOfDevice

    def _event_class(self) -> type[Event]:
        pretended = self

        class EventOfDevice(Event):
            def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
                super().__init__(pretended, enable_timing)

        return EventOfDevice

    @contextmanager
    def installed(self) -> Iterator["Device"]:
        card, major, minor = self.card, *self.card.capability
        is_there = card.cuda is not None
        properties = SimpleNamespace(
            name=card.name,
            total_memory=card.total_bytes,
            major=major,
            minor=minor,
            multi_processor_count=80,
            uuid="00000000-0000-0000-0000-000000000001",
        )
        of_cuda = {
            "is_available": lambda: is_there,
            "device_count": lambda: int(is_there),
            "current_device": lambda: 0,
            "is_initialized": lambda: is_there,
            "init": lambda: None,
            "Stream": self._stream_class(),
            "Event": self._event_class(),
            "current_stream": self.current_stream,
            "default_stream": lambda device=None: self.default,
            "stream": self.on_stream,
            "synchronize": self.synchronize,
            "empty_cache": self.empty_cache,
            "mem_get_info": lambda device=None: (self.free_bytes(), card.total_bytes),
            "memory_stats_as_nested_dict": self.statistics,
            "memory_allocated": self.statistic("allocated", "current"),
            "max_memory_allocated": self.statistic("allocated", "peak"),
            "memory_reserved": self.statistic("reserved", "current"),
            "max_memory_reserved": self.statistic("reserved", "peak"),
            "reset_peak_memory_stats": self.reset_peaks,
            "set_per_process_memory_fraction": self.set_fraction,
            "get_device_capability": lambda device=None: card.capability,
            "get_device_name": lambda device=None: card.name,
            "get_device_properties": lambda device=None: properties,
            "get_arch_list": lambda: list(card.arch_list),
            "is_bf16_supported": lambda including_emulation=True: including_emulation or major >= 8,
        }
        run = threading.Thread.run

        def run_with_mode(thread: threading.Thread) -> None:
            with _Mode(self):
                run(thread)

        with ExitStack() as stack:
            for name, stand_in in of_cuda.items():
                stack.enter_context(patch.object(torch.cuda, name, stand_in))
            stack.enter_context(patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: card.flash))
            stack.enter_context(patch.object(torch.version, "cuda", card.cuda))
            stack.enter_context(patch.object(torch, "compile", self.compile))
            # Torch reads the type of its argument before any mode.
            stack.enter_context(patch.object(Tensor, "record_stream", lambda *given: self.record_stream(*given)))
            stack.enter_context(patch.object(threading.Thread, "run", run_with_mode))
            stack.enter_context(_Mode(self))
            yield self


class _Mode(TorchFunctionMode):
    """Gives every call of torch on this thread to a device."""

    def __init__(self, device: Device):
        super().__init__()
        self.pretended = device

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.pretended.call(func, args, kwargs or {})


@contextmanager
def _unnoticed() -> Iterator[None]:
    """The device's own calls of torch; inference tensors are written only in this mode."""
    with torch._C.DisableTorchFunction(), torch.inference_mode():
        yield


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def leaves(nested: Any) -> list[Any]:
    """What tuples, lists and dicts hold."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [leaf for each in nested for leaf in leaves(each)] if isinstance(nested, list | tuple) else [nested]


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
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def covers(clock: Clock, other: Clock) -> bool:
    return all(clock.get(stream, 0) >= number for stream, number in other.items())


def known(clock: Clock, copy: Copy) -> bool:
    return clock.get(copy.stream, 0) >= copy.number
