"""What this process may expect of its machine. psutil is imported where it is used: the benchmark on a GPU works without."""

import os

from lengthwise.system.control_groups import memory_limits

# Assumed rate of a shared file system that other jobs read from too.
READ_BYTES_PER_SECOND = 200e6


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def idle_cores(seconds: float = 0.5) -> float:
    """Return how many of the cores that this process may use were idle while this call waited; parts of a core count."""
    import psutil

    shares = psutil.cpu_percent(seconds, percpu=True)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(shares))
    return sum(1 - shares[core] / 100 for core in cores if core < len(shares))


def host_total() -> int:
    """Return the bytes of the machine's memory, or the limit of a control group around this process if that is lower."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in memory_limits())])


def host_available() -> int:
    """Return the bytes of memory that this process may still take without swapping.

    The least that the machine and each control group around this process leave.
    """
    import psutil

    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in memory_limits())]))
