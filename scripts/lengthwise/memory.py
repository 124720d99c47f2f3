"""Peak memory of a piece of work, by the device's own measures."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


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
        return _resident("VmRSS") if self.resident else None

    def _note(self, change: Callable[[], object]) -> None:
        """Credit the peak so far to all that is running, then begin or end one and measure afresh."""
        if not self.resident:
            return
        with self.lock:
            peak = _resident("VmHWM")
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


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
