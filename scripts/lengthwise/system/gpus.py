"""The machine's GPUs: which there are, and a lease on one, where no scheduler gives them out."""

import ctypes
import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from uuid import UUID

from lengthwise.errors import LengthwiseError

log = logging.getLogger("lengthwise")

# For all users alike, whatever their TMPDIR.
FOLDER = Path("/tmp")

SECONDS_BETWEEN_TRIES = 0.5


@contextmanager
def leased(kind: str) -> Iterator[None]:
    """Where the kind of device is cuda, make one of the visible GPUs the only one, and hold it; with all of them held, wait.

    CUDA reads CUDA_VISIBLE_DEVICES once: enter this before anything in this process asks for a GPU. In a SLURM job that was
    given one GPU nothing is leased; where it was given several, the processes in it share them as on a workstation.

    Raises
    ------
    LengthwiseError
        The lease's file cannot be used.
    """
    devices = [] if kind != "cuda" or _given_one() else visible_uuids()
    if not devices:
        yield  # where there should be one, whoever needs it says so
        return
    with lease(devices) as device:
        if len(devices) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        yield


def _given_one() -> bool:
    """Whether SLURM gave this process one GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return "SLURM_JOB_ID" in os.environ and bool(given) and "," not in given


def visible_uuids() -> list[str]:
    """The identifiers of the GPUs that CUDA_VISIBLE_DEVICES leaves, asked for by a child: the driver must not start here."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = subprocess.run(
        [sys.executable, "-m", "lengthwise.system.gpus"],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return asked.stdout.split()


@contextmanager
def lease(devices: list[str], folder: Path = FOLDER) -> Iterator[str]:
    """Hold one of these devices, the first that nobody holds; yields it.

    Raises
    ------
    LengthwiseError
        A file in `folder` cannot be made or opened.
    """
    if not (held := _take(devices, folder)):
        log.info("waiting for a GPU: all %d are in use", len(devices))
    while not held:
        time.sleep(SECONDS_BETWEEN_TRIES)
        held = _take(devices, folder)
    device, descriptor = held
    _held.add(descriptor)
    try:
        yield device
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _take(devices: list[str], folder: Path) -> tuple[str, int] | None:
    """A device that nobody held until now, and the descriptor that holds it."""
    for device in devices:
        path = folder / f"lengthwise-{device}.lock"
        try:
            descriptor = _open(path)
        except OSError as error:
            raise LengthwiseError(f"{path}: {error.strerror}; ask its owner to remove it") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # not one that was removed meanwhile
                return device, descriptor
        except BlockingIOError:
            pass
        os.close(descriptor)
    return None


def _open(path: Path) -> int:
    """Open a file for locking, made if it is not there; in /tmp the kernel refuses O_CREAT on another user's file."""
    flags = os.O_RDONLY | os.O_NOFOLLOW
    for _ in range(2):
        with suppress(FileNotFoundError):
            return os.open(path, flags)
        with suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL)
            os.fchmod(descriptor, 0o644)  # others open it too, whatever the umask
            return descriptor
    return os.open(path, flags)


# A lock belongs to the open file: a forked child that outlives this process must not keep it.
_held: set[int] = set()

os.register_at_fork(after_in_child=lambda: [os.close(_held.pop()) for _ in range(len(_held))])


def visible_gpus() -> int:
    """CUDA devices that this process may use, by the driver's own count (so CUDA_VISIBLE_DEVICES holds)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def driver_uuids() -> list[str]:
    """The identifiers of those devices, `GPU-...`; afterwards this process has started the driver."""
    found = []
    for ordinal in range(visible_gpus()):
        driver, uuid = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(16)
        if driver.cuDeviceGetUuid_v2(uuid, ordinal) == 0:
            found.append(f"GPU-{UUID(bytes=uuid.raw)}")
    return found


def auto_device(on_cluster: bool) -> str:
    """What `device: auto` means when a store is made: cuda where a GPU can be used or jobs go to a cluster, else cpu."""
    return "cuda" if on_cluster or (visible_gpus() and not _cpu_build()) else "cpu"


def refuse_missing_gpu() -> None:
    """Raise if the device is cuda and this machine cannot serve it.

    Raises
    ------
    LengthwiseError
        No GPU is visible, or torch is a CPU build.
    """
    if not visible_gpus():
        raise LengthwiseError(
            "device: cuda, but no GPU is visible on this machine; nothing falls back to the CPU by itself: "
            "set device: cpu (in a new 'results'), or run where a GPU is"
        )
    if build := _cpu_build():
        raise LengthwiseError(f"device: cuda, but torch {build} is a CPU build; the README says how to install another")


def _cpu_build() -> str | None:
    """The installed torch's version if it is a CPU build."""
    installed = version("torch")
    return installed if installed.endswith("+cpu") else None


if __name__ == "__main__":
    print(*driver_uuids(), sep="\n")
