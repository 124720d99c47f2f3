"""What the system lets this process take (getrlimit(2)): open files, and memory. Windows has no `resource`."""

from collections.abc import Iterator

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Where the system says no number: what Linux gives a process, as a rule.
_USUAL_OPEN_FILES = 1_024


def open_files() -> int:
    """Return how many files this process may have open at once."""
    limit = _soft_limit("RLIMIT_NOFILE")
    return _USUAL_OPEN_FILES if limit is None else limit


def process_memory_limits() -> Iterator[tuple[str, int, int]]:
    """Yield (what ulimit calls it, limit, bytes in use) of this process's memory, where it is limited.

    On Linux alone: psutil tells no other system's use. Virtual memory counts maps of files too; data counts those that are
    private and may be written, as torch maps a checkpoint.
    """
    import psutil

    used = psutil.Process().memory_info()
    for name, option, field in (("RLIMIT_AS", "ulimit -v", "vms"), ("RLIMIT_DATA", "ulimit -d", "data")):
        limit = _soft_limit(name)
        if limit is not None and hasattr(used, "data"):
            yield option, limit, getattr(used, field)


def _soft_limit(name: str) -> int | None:
    """The limit that the kernel enforces; None where there is none."""
    if resource is None:
        return None
    limit, _ = resource.getrlimit(getattr(resource, name))
    return None if limit == resource.RLIM_INFINITY else limit
