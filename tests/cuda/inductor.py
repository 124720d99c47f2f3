"""Inductor's code for a GPU that is not there: its kernels, what they move, and the memory of the host code that calls them.

Torch compiles a part of a layer for fake CUDA inputs. The host code that inductor writes is then run on the meta device, with its
Triton kernels replaced by a record of their calls. Needs a CUDA build of torch, and triton.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import torch._inductor.config
from fake import GPU, Memory
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import unset_fake_temporarily

META = torch.device("meta")
MULTIPROCESSORS = {(7, 5): 40, (8, 0): 108, (9, 0): 132, (12, 0): 170}


@dataclass(frozen=True)
class Launch:
    """A call of one of inductor's kernels."""

    name: str
    sizes: tuple[int, ...]  # of its iteration: elements, or rows and columns
    bytes: int  # each tensor once, at most one element for each step; twice where it is read and written

    @classmethod
    def of(cls, name: str, source: str, arguments: tuple) -> "Launch":
        parameters = source[source.index(f"def {name}(") :].split("(", 1)[1].split(")", 1)[0].split(", ")
        sizes = tuple(value for value in arguments if isinstance(value, int))
        steps, moved = 1, 0
        for size in sizes:
            steps *= size
        for parameter, value in zip(parameters, arguments, strict=False):
            if isinstance(value, Tensor):
                moved += (1 + parameter.startswith("in_out")) * min(value.numel(), steps) * value.itemsize
        return cls(name, sizes, moved)


@dataclass
class Compiled:
    """What inductor makes of a function, and one call of it."""

    sources: dict[str, str] = field(default_factory=dict)  # of the kernels
    launches: list[Launch] = field(default_factory=list)
    products: int = 0
    peak_bytes: int = 0  # without what the caller holds


class _StopError(Exception):
    pass


@contextlib.contextmanager
def pretended(capability: tuple[int, int]) -> Iterator[None]:
    """Torch's compiler takes a GPU of this capability to be there; no driver is asked."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    major, minor = capability
    number = 10 * major + minor
    properties = SimpleNamespace(
        name="pretended",
        major=major,
        minor=minor,
        multi_processor_count=MULTIPROCESSORS[capability],
        warp_size=32,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor={7: 1_024, 8: 2_048, 9: 2_048, 12: 1_536}[major],
        max_threads_per_block=1_024,
        shared_memory_per_block_optin=101_376,
        total_memory=80 << 30,
    )
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", number, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: GPU,
    )

    def answer(value: object) -> Callable:
        return lambda *_, **__: value

    patches = [
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", capability),
        (torch.cuda, "current_device", 0),
        (torch.cuda, "device_count", 1),
        (torch.cuda, "_lazy_init", None),
        (torch.cuda, "synchronize", None),
        (torch.cuda, "set_device", None),
        (torch.cuda, "_DeviceGuard", contextlib.nullcontext()),
        (torch.accelerator, "is_available", False),
        (triton_helpers, "set_driver_to_gpu", None),
        (torch._C, "_cuda_getCurrentRawStream", 0),
        (CudaInterface, "is_available", True),
        (CudaInterface, "get_device_properties", properties),
        (CudaInterface.Worker, "get_device_properties", properties),
        (CudaInterface, "get_compute_capability", number),
        (CudaInterface, "is_bf16_supported", capability >= (8, 0)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            replaced = staticmethod(answer(value)) if isinstance(owner, type) else answer(value)
            stack.enter_context(mock.patch.object(owner, name, replaced))
        stack.enter_context(mock.patch.object(driver, "_active", target))
        settings = {"fx_graph_cache": False, "compile_threads": 1, "use_static_triton_launcher": False}
        stack.enter_context(torch._inductor.config.patch(settings))
        DeviceProperties.create.cache_clear()
        torch._dynamo.reset()
        try:
            yield
        finally:
            DeviceProperties.create.cache_clear()
            torch._dynamo.reset()


def compile_for_gpu(function: Callable, *arguments: object) -> Compiled:
    """Compile a function of fake CUDA tensors, with sizes that may change, and call its host code once."""
    found: list[tuple[str, list]] = []

    def capture(graph: GraphLowering) -> None:
        code, _ = graph.codegen()
        with unset_fake_temporarily():
            found.append((code.value, [_meta(value) for value in V.graph.example_inputs]))
        raise _StopError

    with mock.patch.object(GraphLowering, "compile_to_module", capture), contextlib.suppress(InductorError):
        torch.compile(function, dynamic=True, fullgraph=True)(*arguments)
    (host, inputs), result = found[0], Compiled()
    with unset_fake_temporarily():
        _run(host, inputs, result)
    return result


def _meta(value: object) -> object:
    """An input of the host code, with the sizes that it was compiled at."""
    if not isinstance(value, Tensor):
        return value.node.hint if isinstance(value, torch.SymInt) else value
    shape, strides = ([int(_meta(size)) for size in sizes] for sizes in (value.shape, value.stride()))
    return torch.empty_strided(shape, strides, dtype=value.dtype, device=META)


def _run(host: str, inputs: list, result: Compiled) -> None:
    def kernel(_: AsyncCompile, name: str, source: str, **__: object) -> SimpleNamespace:
        result.sources[name] = source

        def run(*arguments: object, stream: int) -> None:
            result.launches.append(Launch.of(name, source, arguments))

        return SimpleNamespace(run=run)

    def empty(shape: tuple, strides: tuple, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=META)

    guards = torch._C._dynamo.guards
    with (
        mock.patch.object(AsyncCompile, "triton", kernel),
        mock.patch.object(AsyncCompile, "wait"),
        mock.patch.object(guards, "_empty_strided_cuda", empty),
    ):
        module = ModuleType("host_code")
        exec(compile(host, "host_code", "exec"), vars(module))
        with Memory(META) as memory:
            held = module.call(inputs)
    del held
    result.products = sum(operator.startswith(("aten.addmm", "aten.mm")) for operator in memory.operators)
    result.peak_bytes = memory.peak


def configurations(name: str, source: str) -> list[dict]:
    """The launch configurations of a kernel among which inductor chooses by time, in its first call."""
    return [{**config.kwargs, "warps": config.num_warps} for config in _tuner(name, source).configs]


def cubins(name: str, source: str) -> list[bytes]:
    """A kernel's machine code in each of its configurations, built by ptxas."""
    tuner = _tuner(name, source)
    tuner.precompile(warm_cache_only=True)
    return [result.kernel.asm["cubin"] for result in tuner.compile_results]


def _tuner(name: str, source: str) -> CachingAutotuner:
    return getattr(PyCodeCache.load(source), name)
