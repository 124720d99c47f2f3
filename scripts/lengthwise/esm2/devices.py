"""Compute devices as torch knows them."""

from pathlib import Path

import torch

from lengthwise.errors import LengthwiseError
from lengthwise.system.limits import process_memory_limits
from lengthwise.system.machine import processor_name, usable_cores
from lengthwise.system.text import size

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str) -> torch.device:
    """The torch device of a store's `device`, with no fallback to another one.

    Raises
    ------
    LengthwiseError
        `device` is cuda, and torch finds no GPU, or was built without kernels for it.
    """
    if device == "cuda":
        _require_gpu()
    return torch.device(device)


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        build = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
        raise LengthwiseError(f"device: cuda, but {build}; see docs/install.md on CUDA builds, or use device: cpu")
    capability, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not any(_runs_on(capability, architecture) for architecture in built_for):
        raise LengthwiseError(
            f"device: cuda, but torch {torch.__version__} has no kernels for {torch.cuda.get_device_name()} "
            f"(sm_{capability[0]}{capability[1]}), only for {', '.join(built_for)}; see docs/install.md on CUDA builds"
        )


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Whether code for an architecture runs on a GPU: sm_86 on 8.6 and 8.9, compute_86 (compiled at load) on all from 8.6 on."""
    kind, _, number = architecture.partition("_")
    major, minor = number.rstrip("af")[:-1], number.rstrip("af")[-1]  # sm_90a
    least = int(major), int(minor)
    return least <= capability and (kind == "compute" or least[0] == capability[0])


def set_threads(threads: int) -> None:
    """CPU threads for torch, at most as many as this process has cores."""
    torch.set_num_threads(min(threads, usable_cores()))


def device_name(device: torch.device) -> str:
    """The product name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def cannot_map(path: Path) -> LengthwiseError:
    """What to say where the system refuses memory for a checkpoint's map: torch's is private, so all of it is asked for."""
    file_bytes = path.stat().st_size
    limits = [limit for limit in process_memory_limits() if limit[1] - limit[2] < file_bytes]
    found = [f"{option} allows {size(limit)}, and {size(used)} are in use" for option, limit, used in limits]
    advice = f"raise the limit ({', '.join(f'{option} unlimited' for option, *_ in limits)})"
    return LengthwiseError(
        f"{path}: no memory to map its {size(file_bytes)} ({'; '.join(found) or 'the system refuses it'}); "
        f"{advice if limits else 'embed on a machine with more memory'}"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out; torch raises plain RuntimeErrors for some of them."""
    words = (
        "can't allocate memory",
        "Cannot allocate memory",  # of a map
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED",  # no memory for its workspace
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
