"""Memory: the peak of a piece of work, by the device's own measures, and what the host has."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CONTROL_GROUPS = Path("/sys/fs/cgroup")


@dataclass(eq=False)
class Peaks:
    """The most bytes while something went on; None where a device has no such thing."""

    allocated: int | None = None
    reserved: int | None = None
    resident: int | None = None  # of the whole process, whatever else it did meanwhile


class MemoryMeter:
    """Measures peaks: of the allocator on CUDA, of resident memory on the CPU, where several pieces may overlap."""

    def __init__(self, device: torch.device):
        self.device = device
        self.resident = device.type == "cpu" and _reset_resident_peak()
        self.lock = threading.Lock()
        self.running: list[Peaks] = []

    @contextmanager
    def measure(self) -> Iterator[Peaks]:
        """The peaks of what is done inside, known on leaving."""
        peaks = Peaks()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._note(lambda: self.running.append(peaks))
        try:
            yield peaks
        finally:
            self._note(lambda: self.running.remove(peaks))
            if self.device.type == "cuda":
                peaks.allocated = torch.cuda.max_memory_allocated(self.device)
                peaks.reserved = torch.cuda.max_memory_reserved(self.device)

    def used(self) -> int | None:
        """Bytes in use now, by the measure that peaks have on this device."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss if self.resident else None

    def _note(self, change: Callable[[], object]) -> None:
        """Credit the peak so far to all that is running, then begin or end one and measure afresh."""
        if not self.resident:
            return
        with self.lock:
            peak = _resident_peak()
            for peaks in self.running:
                peaks.resident = max(peaks.resident or 0, peak)
            change()
            _reset_resident_peak()


def _reset_resident_peak() -> bool:
    """Linux: set VmHWM back to the resident size of now (proc(5), clear_refs). Whether that worked."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def host_total() -> int:
    """Bytes of memory that the machine has, or fewer where this process's control group has a limit."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def host_available() -> int:
    """Bytes of memory that this process may still take without swapping."""
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of this process's control group and of those around it, where they have a limit.

    SLURM sets a job's limit some groups above the one that the process is in. Cached files are not in use: the kernel drops
    them before it refuses memory.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for folder in (_CONTROL_GROUPS / group, *(_CONTROL_GROUPS / group).parents):
            try:
                limit = (folder / "memory.max").read_text().strip()
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text())
            except OSError:
                continue
            if limit != "max":
                yield int(limit), used - int(stat["inactive_file"]) - int(stat["active_file"])
