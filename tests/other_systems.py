"""Environments of processes that lack what other systems lack: see bare/sitecustomize.py."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS.parent / "scripts"

# What the package uses and macOS, musl or another kernel may lack; each is taken away alone too, and what Windows lacks at once.
USED = (
    "os:posix_fadvise",
    "os:sched_getaffinity",
    "libc:fallocate",
    "libc:mincore",
    "libc:malloc_trim",
    "mmap:madvise",
    "module:fcntl",
    "open:/proc",
    "libc: module:fcntl module:resource open:folders",
)
# As far as torch for Linux works without.
ALL = (
    *dict.fromkeys(" ".join(USED).split()),
    *("os:posix_fallocate", "os:copy_file_range", "os:sched_setaffinity", "os:O_NOFOLLOW", "os:O_DIRECTORY"),
)
# Reading works without torch, and so without these.
OF_WRITERS = (
    *("os:register_at_fork", "os:fork", "os:getuid", "os:pread", "os:pwrite", "os:fchmod", "os:sendfile", "os:sync"),
    *("module:pwd", "module:grp", "module:termios", "module:syslog"),
)


def environment(*without: str) -> dict[str, str]:
    """This process's environment, for one that lacks these."""
    path = os.pathsep.join(map(str, (TESTS / "bare", SCRIPTS, TESTS)))
    return os.environ | {"PYTHONPATH": path, "LENGTHWISE_WITHOUT": " ".join(without), "SLURM_CONF": os.devnull}
