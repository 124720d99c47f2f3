"""Peak memory of a piece of work, by the device's own measures."""

import torch


class MemoryMeter:
    """Peaks since the last `reset`: of the allocator on CUDA, of resident memory on the CPU. What is not measured is None."""

    def __init__(self, device: torch.device):
        self.device = device
        self.resident = device.type == "cpu" and _reset_resident_peak()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.resident:
            _reset_resident_peak()

    def peaks(self) -> tuple[int | None, int | None, int | None]:
        """(allocated, reserved, resident) bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device), None
        return None, None, _resident_peak() if self.resident else None


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
