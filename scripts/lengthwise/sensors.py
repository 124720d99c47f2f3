"""What a device and its driver say of themselves; None where they do not say."""

from collections.abc import Callable

import psutil
import torch

# What Linux calls the sensors of processors: Intel's, AMD's, those of other makers.
_PROCESSORS = ("coretemp", "k10temp", "cpu_thermal", "cpu-thermal", "x86_pkg_temp")


def clock_and_temperature(device: torch.device) -> tuple[float | None, float | None]:
    """MHz and degrees Celsius now."""
    return _of_gpu(device) if device.type == "cuda" else (_cpu_clock(), _cpu_temperature())


def driver_version() -> str | None:
    """The NVIDIA driver's version."""
    return _ask(lambda nvml: nvml.nvmlSystemGetDriverVersion())


def _of_gpu(device: torch.device) -> tuple[float | None, float | None]:
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # its number would not do: NVML ignores CUDA_VISIBLE_DEVICES
    clock = _ask(lambda nvml: nvml.nvmlDeviceGetClockInfo(nvml.nvmlDeviceGetHandleByUUID(uuid), nvml.NVML_CLOCK_SM))
    temperature = _ask(
        lambda nvml: nvml.nvmlDeviceGetTemperature(nvml.nvmlDeviceGetHandleByUUID(uuid), nvml.NVML_TEMPERATURE_GPU)
    )
    return clock, temperature


def _ask(question: Callable):
    """NVML's answer; None without its module, without a driver, and of a card that does not have the number."""
    try:
        import pynvml  # optional: only GPUs need it
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return question(pynvml)
    except pynvml.NVMLError:
        return None


def _cpu_clock() -> float | None:
    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError):  # psutil's word for a machine that hides it
        return None
    return (round(clock.current, 1) or None) if clock else None


def _cpu_temperature() -> float | None:
    found = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return next((found[name][0].current for name in _PROCESSORS if name in found), None)
