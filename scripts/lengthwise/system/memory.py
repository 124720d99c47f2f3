"""The resident memory of this process: its peak, as Linux counts it, and giving back what was freed."""

from lengthwise.system.libc import libc_function


def reset_resident_peak() -> bool:
    """Reset VmHWM to the current resident size (Linux, proc(5), clear_refs); False where the system has no such peak."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def resident_peak() -> int:
    """The most bytes that were resident since `reset_resident_peak`; call it only where that worked."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def return_freed_memory() -> bool:
    """Return memory to the system that the C library keeps after it was freed; False where only glibc could."""
    if trim := libc_function("malloc_trim"):
        trim(0)
    return trim is not None
