"""A real memory control group, where one can be made."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PLACES = ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max"))


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A group of version 1 or 2: the file that takes in processes. Without one the test is skipped."""
    for parent, limit in PLACES:
        group = parent / f"lengthwise-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(limit_bytes))  # exists where the controller is there
            yield group / "cgroup.procs"
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("NO CONTROL GROUP WAS TESTED: none can be made here (it needs root and a writable /sys/fs/cgroup)")
