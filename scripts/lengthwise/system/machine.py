"""What this process may expect of its machine. psutil is imported where it is used: the benchmark on a GPU works without."""

import os
import platform

from lengthwise.system.control_groups import memory_limits
from lengthwise.system.limits import process_memory_limits

# Assumed rate of a shared file system that other jobs read from too.
READ_BYTES_PER_SECOND = 200e6


def processor_name() -> str:
    """Return the processor's product name where /proc/cpuinfo has one (Linux on x86), else its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use: all of them where processes have no affinity (macOS)."""
    return len(_affinity() or range(os.cpu_count() or 1))


def idle_cores(seconds: float = 0.5) -> float:
    """Return how many of the cores that this process may use were idle while this call waited; parts of a core count."""
    import psutil

    shares = psutil.cpu_percent(seconds, percpu=True)
    cores = _affinity() or range(len(shares))
    return sum(1 - shares[core] / 100 for core in cores if core < len(shares))


def _affinity() -> set[int]:
    """The cores to which this process is bound; empty where the system binds none."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def host_total() -> int:
    """Return the bytes of the machine's memory, or the limit of a control group around this process if that is lower."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in memory_limits())])


def host_available() -> int:
    """Return the bytes of memory that this process may still take without swapping.

    The least that the machine, each control group around this process and the process's own limits leave.
    """
    import psutil

    of_groups = (limit - used for limit, used in memory_limits())
    of_process = (limit - used for _, limit, used in process_memory_limits())
    return max(0, min([psutil.virtual_memory().available, *of_groups, *of_process]))
