"""A pretended CUDA device: real numbers from the CPU, and CUDA's rules of placement, order and memory.

Kernels run at once; `order` knows what a GPU would have done by then.

What it does not know: speed, the kernels' own temporary memory, and rounding in a GPU's order.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from order import Copy, Event, Stream, Work, key_of, poisoned, view_of
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
# Calls whose result the host waits for.
HOST_READS = {
    *("item", "tolist", "nonzero", "argwhere", "is_nonzero", "equal", "allclose", "masked_select", "unique", "bincount"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__", "__repr__", "__format__"),
}  # fmt: skip
READ_NOTHING = {"size", "dim", "numel", "stride", "is_floating_point", "untyped_storage"}
IN_PLACE = {"__setitem__"} | {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "and", "or", "xor")}
# Their names end in "_", and they write nothing.
WRITE_NOTHING = {"requires_grad_", "squeeze_", "unsqueeze_", "transpose_", "t_"}
WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")  # of torch 2.13 for CUDA 13


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


class Device(Work):
    """The device's state. `with device.installed():` puts it in the place of CUDA, on all threads that are started meanwhile."""

    def __init__(self, card: Card | None = None):
        self.card = card or Card()
        super().__init__(self.card.total_bytes)

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of torch as CUDA would take it; `_call_<name>` where the CPU's own call would not do."""
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
        in_place = name in IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in WRITE_NOTHING)
        written = leaves(kwargs["out"]) if "out" in kwargs else tensors[:1] if in_place else []
        keys = {key_of(tensor) for tensor in on_device}
        if name not in READ_NOTHING:
            self.require_written(name, on_device)
        if written:
            self.work(name, on_device, [tensor for tensor in written if self.holds(tensor)])
        out = func(*args, **kwargs)
        made = [
            leaf for leaf in leaves(out) if isinstance(leaf, Tensor) and not leaf.is_meta and key_of(leaf) not in keys
        ]
        if here and made:
            if on_device and not written:
                self.work(name, on_device, [])
            for tensor in made:
                self.allocate(tensor)
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
        if any(tensor.dim() > 0 and not tensor.is_meta and not self.holds(tensor) for tensor in tensors):
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
                self.work(name, [tensor], [])
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

    def _call__has_compatible_shallow_copy_type(
        self, func: Callable, on_device: list[Tensor], tensor: Tensor, other: Tensor
    ) -> bool:
        return self.holds(tensor) == self.holds(other) and func(tensor, other)

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
                self.work("to", [tensor], [])
                self.allocate(out)
            return out
        out = torch.empty_like(tensor, dtype=dtype, device="cpu")
        if to_cuda:
            self.allocate(out)
        self._copy(out, tensor, non_blocking)
        return out

    def _call_copy_(
        self, func: Callable, on_device: list[Tensor], to: Tensor, of: Tensor, non_blocking: bool = False
    ) -> Tensor:
        if self.holds(to) == self.holds(of):
            if on_device:
                self.work("copy_", [of], [to])
            return to.copy_(of)
        self._copy(to, of, non_blocking)
        return to

    def _copy(self, to: Tensor, of: Tensor, non_blocking: bool) -> None:
        """A copy between the host and the device on the current stream."""
        inwards = self.holds(to)
        host, here = (of, to) if inwards else (to, of)
        stream, number = self.work("a copy", [] if inwards else [here], [here] if inwards else [])
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
        self.work("varlen_attn", on_device, [])
        out = torch.empty_like(q)
        for start, stop in zip(q_bounds[:-1].tolist(), q_bounds[1:].tolist(), strict=True):
            one = (part[start:stop].float().transpose(0, 1) for part in (q, k, v))  # [H, L, C] each
            attended = torch.nn.functional.scaled_dot_product_attention(*one)
            out[start:stop] = attended.transpose(0, 1).to(q.dtype)
        self.counts["varlen_attn"] += 1
        made = out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)
        for tensor in made:
            self.allocate(tensor)
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
            "mem_get_info": lambda device=None: (self.free_bytes(), self.total_bytes),
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


def leaves(nested: Any) -> list[Any]:
    """What tuples, lists and dicts hold."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [leaf for each in nested for leaf in leaves(each)] if isinstance(nested, list | tuple) else [nested]
