"""Cleanup before a run, and the locks that tell whether a run or a job works in the store."""

import fcntl
import os
import subprocess
import sys
import textwrap

import pytest

from lengthwise.maintain.cleanup import broken_job_records, leftovers, remove_leftovers
from lengthwise.system.locks import exclusive_store_lock, shared_store_lock


@pytest.fixture
def store(tmp_path):
    """A store with leftovers of killed processes."""
    (tmp_path / "shards/ab").mkdir(parents=True)
    (tmp_path / "shards/ab/.x.safetensors.0123abcd.tmp").write_bytes(b"x")
    (tmp_path / "plan/.spill/deep").mkdir(parents=True)
    (tmp_path / "running").mkdir()
    (tmp_path / "running/job.json").write_text("{}")  # the heartbeat of a killed job
    (tmp_path / "logs/embed").mkdir(parents=True)
    (tmp_path / "logs/embed/.job.log.running").write_text("{}")
    (tmp_path / "settings.json").write_text("{}")
    return tmp_path


def test_leftovers_are_removed_when_nobody_is_at_work(store):
    assert len(leftovers(store)) == 4
    remove_leftovers(store)
    assert leftovers(store) == []
    assert (store / "shards/ab").is_dir()


def test_leftovers_stay_while_somebody_is_at_work(store, refused):
    with shared_store_lock(store), shared_store_lock(store):
        remove_leftovers(store)
        assert len(leftovers(store)) == 4
        with refused("at work", str(store)), exclusive_store_lock(store):
            pass
    with exclusive_store_lock(store), refused("at work"), exclusive_store_lock(store):
        pass


def test_leftovers_of_a_first_run_without_settings_are_removed_too(store):
    (store / "settings.json").unlink()
    with shared_store_lock(store):
        (store / "settings.json").write_text("{}")  # by the first run: the lock taken before still counts
        remove_leftovers(store)
        (store / "settings.json").unlink()
        remove_leftovers(store)
        assert len(leftovers(store)) == 4
    remove_leftovers(store)
    assert leftovers(store) == []


def test_the_first_run_of_a_store_is_at_work_before_its_folder_exists(tmp_path, refused):
    with (
        shared_store_lock(tmp_path / "results/new"),
        refused("at work"),
        exclusive_store_lock(tmp_path / "results/new"),
    ):
        pass


def test_where_a_folder_cannot_be_locked_the_settings_file_is(store, monkeypatch, refused):
    def flock_of_nfs(descriptor, how):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") and how & fcntl.LOCK_EX:
            raise OSError(9, "Bad file descriptor")
        flock(descriptor, how)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    with shared_store_lock(store), refused("at work"), exclusive_store_lock(store):
        pass
    with exclusive_store_lock(store):
        pass
    (store / "settings.json").unlink()
    with refused("has no locks"), exclusive_store_lock(store):
        pass


@pytest.mark.parametrize("ending", ["kill", "terminate"])
def test_an_ended_process_is_not_at_work(store, refused, ending):
    program = """
        import sys, time
        from pathlib import Path
        from lengthwise.system.locks import shared_store_lock
        with shared_store_lock(Path(sys.argv[1])):
            print("here", flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(store)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ) as other:
        assert other.stdout.readline() == b"here\n"
        with refused("at work"), exclusive_store_lock(store):
            pass
        getattr(other, ending)()
        other.wait()
    with exclusive_store_lock(store):
        pass


def test_a_new_job_waits_until_a_deletion_is_done(store):
    """A thread will do: locks belong to descriptors."""
    import threading

    arrived = threading.Event()

    def start_work():
        with shared_store_lock(store):
            arrived.set()

    with exclusive_store_lock(store):
        thread = threading.Thread(target=start_work)
        thread.start()
        assert not arrived.wait(0.2)
    assert arrived.wait(10)
    thread.join()


def test_a_store_that_does_not_exist_yet_has_no_leftovers(tmp_path):
    remove_leftovers(tmp_path / "none")
    with shared_store_lock(tmp_path / "none"):
        pass


def test_without_locks_nothing_is_removed_and_work_goes_on(store, monkeypatch, refused):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with shared_store_lock(store):
        remove_leftovers(store)
    assert len(leftovers(store)) == 4
    with refused("has no locks", str(store)), exclusive_store_lock(store):
        pass


def test_a_leftover_that_cannot_be_removed_is_ignored(store, monkeypatch):
    monkeypatch.setattr("lengthwise.maintain.cleanup.remove", lambda path: os.unlink("/proc/self/none"))
    remove_leftovers(store)
    assert len(leftovers(store)) == 4


def test_a_temporary_file_that_is_renamed_meanwhile_does_no_harm(store):
    (store / "jobs").mkdir()
    (store / "shards/ab/.y.safetensors.0123abcd.tmp").symlink_to("gone")  # listed, and gone when it is looked at
    assert broken_job_records(store) == {}
