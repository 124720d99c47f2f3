"""The machine's GPUs, and a lease on one of them where no scheduler assigns GPUs."""

import ctypes
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from uuid import UUID

from lengthwise.errors import LengthwiseError
from lengthwise.system.descriptors import lock

log = logging.getLogger("lengthwise")
# Leases are shared by all users, so the folder must not depend on TMPDIR.
FOLDER = Path("/tmp")
SECONDS_BETWEEN_TRIES = 0.5
# Torch reads the second where the first is not set.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@contextmanager
def leased(device: str) -> Iterator[None]:
    """Lease one visible GPU and hide the others from this process; wait while all are leased.

    CUDA reads CUDA_VISIBLE_DEVICES once, and torch its allocator's settings: enter this before anything in this process uses a
    GPU. A SLURM job with one GPU
    leases nothing. The processes of a SLURM job with several GPUs share them by leases, as on a workstation.

    Parameters
    ----------
    device
        ``cuda`` or ``cpu``; ``cpu`` leases nothing.

    Raises
    ------
    LengthwiseError
        A lock file cannot be created or opened.
    """
    if device == "cuda" and not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"  # batches of many sizes leave no unusable gaps
    uuids = [] if device != "cuda" or _slurm_gave_one_gpu() else visible_uuids()
    if not uuids:
        yield  # a missing GPU is reported where the model is loaded
        return
    with lease(uuids) as uuid:
        if len(uuids) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = uuid
        yield


def _slurm_gave_one_gpu() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return "SLURM_JOB_ID" in os.environ and bool(visible) and "," not in visible


def visible_uuids() -> list[str]:
    """Return the UUIDs of the visible GPUs. A child process asks, so that the driver does not start in this one."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, "-m", "lengthwise.system.gpus"],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return child.stdout.split()


@contextmanager
def lease(devices: list[str], folder: Path = FOLDER) -> Iterator[str]:
    """Lease the first free device and yield its name; wait while all are leased.

    Parameters
    ----------
    devices
        UUIDs of GPUs.
    folder
        Folder of the lock files, one per device.

    Raises
    ------
    LengthwiseError
        A lock file cannot be created or opened.
    """
    if not (held := _lock_first_free(devices, folder)):
        log.info("waiting for a GPU: all %d are in use", len(devices))
    while not held:
        time.sleep(SECONDS_BETWEEN_TRIES)
        held = _lock_first_free(devices, folder)
    device, descriptor = held
    _held.add(descriptor)
    try:
        yield device
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock_first_free(devices: list[str], folder: Path) -> tuple[str, int] | None:
    """The device and the descriptor of its locked file; None while all are leased."""
    for device in devices:
        path = folder / f"lengthwise-{device}.lock"
        try:
            descriptor = _open_lock_file(path)
        except OSError as error:
            raise LengthwiseError(f"{path}: {error.strerror}; ask its owner to remove it") from error
        try:
            if not lock(descriptor, wait=False):
                log.warning("%s: its file system has no locks; jobs that run at once may share a GPU", path)
            if os.fstat(descriptor).st_nlink:  # the lock of a file that was deleted meanwhile excludes nobody
                return device, descriptor
        except BlockingIOError:
            pass
        os.close(descriptor)
    return None


def _open_lock_file(path: Path) -> int:
    """Open or create a lock file. In /tmp the kernel refuses O_CREAT on another user's file, so open first."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag
    for _ in range(2):
        with suppress(FileNotFoundError):
            return os.open(path, flags)
        with suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL)
            os.fchmod(descriptor, 0o644)  # other users must be able to open it, whatever the umask
            return descriptor
    return os.open(path, flags)


# A lock belongs to the open file: close it in forked children, which may outlive this process.
_held: set[int] = set()


def _close_held() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # Windows never forks
    os.register_at_fork(after_in_child=_close_held)


def visible_gpus() -> int:
    """Return the driver's count of CUDA devices, which respects CUDA_VISIBLE_DEVICES."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def driver_uuids() -> list[str]:
    """Return the UUIDs of those devices, `GPU-...`. This starts the driver in this process."""
    uuids = []
    for ordinal in range(visible_gpus()):
        driver, uuid = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(16)
        if driver.cuDeviceGetUuid_v2(uuid, ordinal) == 0:
            uuids.append(f"GPU-{UUID(bytes=uuid.raw)}")
    return uuids


def auto_device(on_cluster: bool) -> str:
    """Return the device of a new store with `device: auto`: cuda with a usable GPU or on a cluster, else cpu."""
    return "cuda" if on_cluster or (visible_gpus() and not _cpu_build()) else "cpu"


def refuse_missing_gpu() -> None:
    """Raise if this machine cannot run CUDA.

    Raises
    ------
    LengthwiseError
        No GPU is visible, or torch is a CPU build.
    """
    if not visible_gpus():
        raise LengthwiseError(
            "device: cuda, but no GPU is visible on this machine, and Lengthwise never falls back to the CPU by itself: "
            "set device: cpu (in a new 'results'), or run on a machine with a GPU"
        )
    if build := _cpu_build():
        raise LengthwiseError(
            f"device: cuda, but torch {build} is a CPU build; docs/install.md says how to install another"
        )


def _cpu_build() -> str | None:
    """Version of the installed torch if it is a CPU build, else None. Not every CPU build has +cpu in its version.

    Torch's own file says so; torch itself takes seconds to import.
    """
    torch = find_spec("torch")
    spec = torch and PathFinder.find_spec("version", torch.submodule_search_locations)
    assert spec
    assert spec.loader
    torch_version = module_from_spec(spec)
    spec.loader.exec_module(torch_version)
    return None if torch_version.cuda else torch_version.__version__


if __name__ == "__main__":
    print(*driver_uuids(), sep="\n")
