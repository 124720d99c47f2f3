"""What this process may expect of its machine."""

import os

# Assumed rate of a shared file system that other jobs read from too.
READ_BYTES_PER_SECOND = 200e6


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
