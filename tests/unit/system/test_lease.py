"""Leases of GPUs, with device names that stand for GPUs and with a CUDA driver built for the test."""

import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from itertools import combinations
from pathlib import Path

import pytest

import driver
from driver import UUIDS
from lengthwise.system import gpus as gpus_module
from lengthwise.system.gpus import lease, leased

DEVICES = ["GPU-a", "GPU-b"]


@pytest.fixture
def python(tmp_path):
    """Start a process that runs code which may use `lease`, `DEVICES` and `folder`."""
    started = []

    def start(code):
        header = f"""
            import os, sys, time
            from pathlib import Path
            from lengthwise.system.gpus import lease
            DEVICES, folder = {DEVICES}, Path({str(tmp_path)!r})
        """
        text = textwrap.dedent(header) + textwrap.dedent(code)
        process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


HOLD = """
with lease(DEVICES, folder) as device:
    print(device, flush=True)
    time.sleep(600)
"""


def test_many_processes_share_two_devices_and_never_lease_one_twice(python):
    workers = [
        python("""
            for _ in range(4):
                with lease(DEVICES, folder) as device:
                    print(device, time.monotonic(), end=" ")
                    time.sleep(0.05)
                    print(time.monotonic())
        """)
        for _ in range(5)
    ]
    uses = [line.split() for worker in workers for line in worker.communicate()[0].splitlines()]
    assert len(uses) == 20
    assert {device for device, *_ in uses} == set(DEVICES)
    for (device, *mine), (other, *theirs) in combinations(uses, 2):
        if device == other:
            assert float(mine[1]) <= float(theirs[0]) or float(theirs[1]) <= float(mine[0])


def test_a_waiting_process_gets_the_device_of_a_killed_one(python):
    first, second = python(HOLD), python(HOLD)
    given = [process.stdout.readline().strip() for process in (first, second)]
    assert set(given) == set(DEVICES)
    third = python(HOLD)
    assert not select.select([third.stdout], [], [], 1.5)[0]  # the third process waits
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert third.stdout.readline().strip() == given[0]
    assert second.poll() is None


def test_a_child_of_a_killed_process_does_not_keep_its_device(python, tmp_path):
    parent = python("""
        with lease(["GPU-a"], folder):
            child = os.fork()
            if child:
                print(child, flush=True)
            time.sleep(600)
    """)
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        os.kill(child, 0)
        with lease(["GPU-a"], tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_waiting_is_logged_once(python, tmp_path, caplog):
    holders = [python(HOLD), python(HOLD)]
    for holder in holders:
        holder.stdout.readline()
    caplog.set_level("INFO", "lengthwise")
    subprocess.Popen(["sh", "-c", f"sleep 1.5; kill -9 {holders[0].pid}"])
    with lease(DEVICES, tmp_path):
        pass
    assert [record.getMessage() for record in caplog.records] == ["waiting for a GPU: all 2 are in use"]


def test_every_user_can_read_the_lock_file_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        with lease(["GPU-a"], tmp_path):
            pass
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.fixture
def sticky():
    """A folder like /tmp, where the kernel may refuse to open another user's file for writing."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
def test_users_share_the_devices_of_a_machine(sticky):
    for user in (12345, 23456):
        child = os.fork()
        if not child:
            os.setgid(user)
            os.setuid(user)
            with lease(["GPU-a"], sticky):
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    """A folder with a libcuda that reports three GPUs."""
    return driver.build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def gpus(libcuda, tmp_path, monkeypatch):
    """The test driver, no scheduler, and lock files in the test's own folder."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libcuda))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(gpus_module, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1, 2]), ("1,2", [1, 2]), ("2,0", [2, 0]), (f"{UUIDS[2]},{UUIDS[1]}", [2, 1])],
)
def test_only_visible_devices_are_leased(gpus, monkeypatch, visible, expected):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    held = []
    for _ in expected:
        with pytest.MonkeyPatch.context() as patch:
            if visible:
                patch.setenv("CUDA_VISIBLE_DEVICES", visible)
            else:
                patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            manager = leased("cuda")
            manager.__enter__()
            held.append((manager, os.environ["CUDA_VISIBLE_DEVICES"]))
    for manager, _ in held:
        manager.__exit__(None, None, None)
    assert [device for _, device in held] == [UUIDS[i] for i in expected]


def test_a_device_named_by_index_and_by_uuid_has_one_lease(gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with leased("cuda"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"  # one visible GPU: its name stays
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{UUIDS[1]},{UUIDS[2]}")
        with leased("cuda"):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == UUIDS[2]


def test_a_slurm_job_with_one_gpu_leases_nothing(gpus, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with leased("cuda"):
        assert not list(gpus.iterdir())
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_jobs_inside_one_allocation_of_several_gpus_share_them(gpus, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with leased("cuda"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == UUIDS[0]


def test_device_cpu_leases_nothing(gpus):
    with leased("cpu"):
        assert not list(gpus.iterdir())


def test_a_machine_without_a_driver_leases_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus_module, "visible_uuids", lambda: [])
    monkeypatch.setattr(gpus_module, "FOLDER", tmp_path)
    with leased("cuda"):
        assert not list(tmp_path.iterdir())
