"""Is there a GPU? Asked without torch, whose import takes seconds."""

import ctypes
from importlib.metadata import version
from uuid import UUID

from lengthwise.errors import LengthwiseError


def visible_gpus() -> int:
    """CUDA devices that this process may use, by the driver's own count (so CUDA_VISIBLE_DEVICES holds)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def visible_uuids() -> list[str]:
    """The identifiers of those devices, `GPU-...`; afterwards this process has started the driver."""
    found = []
    for ordinal in range(visible_gpus()):
        driver, uuid = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(16)
        if driver.cuDeviceGetUuid_v2(uuid, ordinal) == 0:
            found.append(f"GPU-{UUID(bytes=uuid.raw)}")
    return found


def auto_device(on_cluster: bool) -> str:
    """What `device: auto` means when a store is made: cuda where a GPU can be used or jobs go to a cluster, else cpu."""
    return "cuda" if on_cluster or (visible_gpus() and not _cpu_build()) else "cpu"


def refuse_missing_gpu() -> None:
    """Raise if the device is cuda and this machine cannot serve it.

    Raises
    ------
    LengthwiseError
        No GPU is visible, or torch is a CPU build.
    """
    if not visible_gpus():
        raise LengthwiseError(
            "device: cuda, but no GPU is visible on this machine; nothing falls back to the CPU by itself: "
            "set device: cpu (in a new 'results'), or run where a GPU is"
        )
    if build := _cpu_build():
        raise LengthwiseError(f"device: cuda, but torch {build} is a CPU build; the README says how to install another")


def _cpu_build() -> str | None:
    """The installed torch's version if it is a CPU build."""
    installed = version("torch")
    return installed if installed.endswith("+cpu") else None


if __name__ == "__main__":
    print(*visible_uuids(), sep="\n")
