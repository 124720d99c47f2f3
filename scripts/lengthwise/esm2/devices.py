"""Compute devices as torch knows them."""

import platform

import torch

from lengthwise.errors import LengthwiseError
from lengthwise.system.machine import usable_cores

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str) -> torch.device:
    """The torch device of a store's `device`, with no fallback to another one.

    Raises
    ------
    LengthwiseError
        `device` is cuda, and torch finds no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        build = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
        raise LengthwiseError(f"device: cuda, but {build}; see the README on CUDA builds, or use device: cpu")
    return torch.device(device)


def set_threads(threads: int) -> None:
    """CPU threads for torch, at most as many as this process has cores."""
    torch.set_num_threads(min(threads, usable_cores()))


def device_name(device: torch.device) -> str:
    """The product name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out; torch raises plain RuntimeErrors for some of them."""
    words = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
