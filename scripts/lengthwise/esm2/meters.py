"""Meters of a device: peak memory, clock, temperature. psutil is imported where a CPU is asked: a GPU machine may lack it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lengthwise.system.memory import reset_resident_peak, resident_peak

# Names of processor temperature sensors on Linux: Intel, AMD, others.
_CPU_SENSORS = ("coretemp", "k10temp", "cpu_thermal", "cpu-thermal", "x86_pkg_temp")


def clock_and_temperature(device: torch.device) -> tuple[float | None, float | None]:
    """The device's current clock in MHz and temperature in degrees Celsius; None where it reports none."""
    return _gpu_clock_and_temperature(device) if device.type == "cuda" else (_cpu_clock(), _cpu_temperature())


def driver_version() -> str | None:
    """The NVIDIA driver's version; None without a driver."""
    return _query_nvml(lambda nvml: nvml.nvmlSystemGetDriverVersion())


def _gpu_clock_and_temperature(device: torch.device) -> tuple[float | None, float | None]:
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # not an index: NVML ignores CUDA_VISIBLE_DEVICES
    clock = _query_nvml(
        lambda nvml: nvml.nvmlDeviceGetClockInfo(nvml.nvmlDeviceGetHandleByUUID(uuid), nvml.NVML_CLOCK_SM)
    )
    temperature = _query_nvml(
        lambda nvml: nvml.nvmlDeviceGetTemperature(nvml.nvmlDeviceGetHandleByUUID(uuid), nvml.NVML_TEMPERATURE_GPU)
    )
    return clock, temperature


def _query_nvml(query: Callable[[Any], Any]) -> Any:
    """NVML's answer; None without its module or a driver, or if the card does not report the number."""
    try:
        import pynvml  # optional: only GPUs need it
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return query(pynvml)
    except pynvml.NVMLError:
        return None


def _cpu_clock() -> float | None:
    import psutil

    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError):  # this machine reports no clock
        return None
    return (round(clock.current, 1) or None) if clock else None


def _cpu_temperature() -> float | None:
    import psutil

    found = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return next((found[name][0].current for name in _CPU_SENSORS if name in found), None)


@dataclass(eq=False)
class Peaks:
    """Peak bytes during a measurement; None where the device has no such number."""

    allocated: int | None = None
    reserved: int | None = None
    resident: int | None = None  # of the whole process


class MemoryMeter:
    """Measures peak memory: of the allocator on CUDA, of the process on a CPU, where measurements may overlap."""

    def __init__(self, device: torch.device):
        self.device = device
        self.resident = device.type == "cpu" and reset_resident_peak()
        self.lock = threading.Lock()
        self.running: list[Peaks] = []

    @contextmanager
    def measure(self) -> Iterator[Peaks]:
        """Measure the peaks of the block; they are set when it ends."""
        peaks = Peaks()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._update_running(lambda: self.running.append(peaks))
        try:
            yield peaks
        finally:
            self._update_running(lambda: self.running.remove(peaks))
            if self.device.type == "cuda":
                peaks.allocated, peaks.reserved = self._cuda_peaks()

    def _cuda_peaks(self) -> tuple[int, int]:
        """Peak bytes allocated and reserved, from one query: each takes a tenth of a millisecond."""
        statistics = torch.cuda.memory_stats_as_nested_dict(self.device)
        allocated, reserved = (statistics[f"{kind}_bytes"]["all"]["peak"] for kind in ("allocated", "reserved"))
        return allocated, reserved

    def used(self) -> int | None:
        """Bytes in use now, by the same measure as the peaks."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if not self.resident:
            return None
        import psutil

        return psutil.Process().memory_info().rss

    def _update_running(self, change: Callable[[], object]) -> None:
        """Record the peak for all running measurements, change their list, and reset the peak."""
        if not self.resident:
            return
        with self.lock:
            peak = resident_peak()
            for peaks in self.running:
                peaks.resident = max(peaks.resident or 0, peak)
            change()
            reset_resident_peak()
