"""The memory control groups around this process: limits, use, and how many processes the kernel killed for memory."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_PROCESS = Path("/proc/self")
_MACHINE_COUNTERS = Path("/proc/vmstat")


def memory_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use) of this process's control group and of those around it, where they have a limit.

    SLURM sets a job's limit some groups above the one that the process is in. Cached files are not in use: the kernel drops
    them before it refuses memory.
    """
    for folder in (folder for folders in _hierarchies() for folder in folders):
        with suppress(OSError, ValueError):  # version 2; the limit "max" is none
            limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
            yield limit, used - _cached_bytes(folder, "inactive_file", "active_file")
        with suppress(OSError):  # version 1; a limit that nobody set is about 2**63
            limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
            yield limit, used - _cached_bytes(folder, "total_inactive_file", "total_active_file")


def count_oom_kills() -> dict[Path, int]:
    """Return how many processes the kernel has killed for memory, by the file that counts them.

    In each hierarchy it is the file of the nearest group that has a counter: the groups above also count other programs. A
    process in no such group gets the machine's counter. The result is empty where the system has none.
    """
    found: dict[Path, int] = {}
    for folders in _hierarchies():
        for file in (folder / name for folder in folders for name in ("memory.events", "memory.oom_control")):
            if (kills := _read_oom_kills(file)) is not None:
                found[file] = kills
                break
    if not found and (kills := _read_oom_kills(_MACHINE_COUNTERS)) is not None:
        found[_MACHINE_COUNTERS] = kills
    return found


def _hierarchies() -> Iterator[list[Path]]:
    """The folders of this process's group and of those around it, its own first: of version 2, and of version 1's memory."""
    try:
        groups = [line.split(":", 2)[1:] for line in (_PROCESS / "cgroup").read_text().splitlines()]
        mounts = [line.partition(" - ")[::2] for line in (_PROCESS / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for controllers, group in groups:
        for place, kind in mounts:
            root, folder = place.split()[3:5]
            file_system, _, options = kind.split(" ", 2)
            version_2 = controllers == "" and file_system == "cgroup2"
            version_1 = (
                "memory" in controllers.split(",") and file_system == "cgroup" and "memory" in options.split(",")
            )
            if version_1 or version_2:
                yield _folders(Path(folder), root, group)
                break


def _folders(mounted: Path, root: str, group: str) -> list[Path]:
    """The group's folder and those above it. `mounted` shows the hierarchy from the group `root` on."""
    inside = PurePosixPath(group)
    if ".." in inside.parts or not inside.is_relative_to(
        root
    ):  # in a container the group may lie outside of what is mounted
        return [mounted]
    inside = inside.relative_to(root)
    return [mounted / part for part in (inside, *inside.parents)]


def _number(file: Path) -> int:
    return int(file.read_text())


def _cached_bytes(folder: Path, *names: str) -> int:
    """What the group's statistics say of these; 0 for one that they lack."""
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(stat.get(name, 0)) for name in names)
    return 0


def _read_oom_kills(file: Path) -> int | None:
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None
