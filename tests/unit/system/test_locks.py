"""The lock of the one run in a store, with real second processes."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from lengthwise.errors import LengthwiseError
from lengthwise.maintain.cleanup import leftovers
from lengthwise.system import locks
from lengthwise.system.locks import RUN_LOCK_NAME, exclusive_store_lock, run_lock, run_lock_holder, shared_store_lock

FIRST = {"host": "n1", "process": 11, "began": "2030-01-02 03:04:05", "folder": "/first"}
SECOND = {"host": "n2", "process": 22, "began": "2030-01-02 03:04:06", "folder": "/second"}

HOLD = """
import subprocess, sys
from pathlib import Path
from lengthwise.system.locks import run_lock
with run_lock(Path(sys.argv[1]), {record}) as held:
    child = subprocess.Popen(["sleep", "60"])
    print(held, child.pid, flush=True)
    sys.stdin.read()
child.kill()
"""


@contextmanager
def run_of_another_process(store, record=FIRST):
    """Yield a process that holds the run lock, and the id of its child process."""
    command = [sys.executable, "-c", HOLD.replace("{record}", repr(record)), str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        held, child = process.stdout.readline().split()
        assert held == "True"
        try:
            yield process, int(child)
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


def test_a_second_run_is_refused_and_told_who_holds_the_store(tmp_path):
    assert run_lock_holder(tmp_path) is None
    with run_of_another_process(tmp_path) as (process, _):
        assert run_lock_holder(tmp_path) == FIRST
        with pytest.raises(LengthwiseError, match="is at work in this store") as caught, run_lock(tmp_path, SECOND):
            pass
        assert all(str(value) in str(caught.value) for value in (tmp_path, *FIRST.values()))
        assert len(str(caught.value).splitlines()) == 1
        assert run_lock_holder(tmp_path) == FIRST
        process.communicate("")
        assert process.returncode == 0
    assert (tmp_path / RUN_LOCK_NAME).exists()
    assert run_lock_holder(tmp_path) is None
    with run_lock(tmp_path, SECOND) as held:
        assert held
        assert run_lock_holder(tmp_path) == SECOND


def test_the_lock_dies_with_its_process_even_if_its_jobs_live_on(tmp_path):
    with run_of_another_process(tmp_path) as (process, child):
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # it lives
        assert run_lock_holder(tmp_path) is None
        with run_lock(tmp_path, SECOND) as held:
            assert held


def test_it_makes_the_store_and_excludes_neither_jobs_nor_prune(tmp_path):
    store = tmp_path / "results" / "model"
    with run_lock(store, FIRST) as held:
        assert held
        with shared_store_lock(store):
            pass
        with exclusive_store_lock(store):
            pass
    assert leftovers(store) == []


def test_a_reader_is_waited_for_and_never_refuses_a_run(tmp_path):
    with run_lock(tmp_path, FIRST):
        pass
    reader = os.open(tmp_path / RUN_LOCK_NAME, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    assert run_lock_holder(tmp_path) is None  # readers do not see each other as runs
    timer = threading.Timer(0.3, os.close, [reader])
    timer.start()
    began = time.monotonic()
    with run_lock(tmp_path, SECOND) as held:
        assert held
        assert time.monotonic() - began > 0.2


def test_runs_start_beside_busy_readers(tmp_path):
    read = (
        "import sys\nfrom pathlib import Path\nfrom lengthwise.system.locks import run_lock_holder\nprint(1, flush=True)\n"
        "while True: run_lock_holder(Path(sys.argv[1]))"
    )
    readers = [subprocess.Popen([sys.executable, "-c", read, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for reader in readers:
            reader.stdout.readline()
        for _ in range(50):
            with run_lock(tmp_path, FIRST) as held:
                assert held
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()


def test_of_runs_that_start_at_once_exactly_one_gets_the_lock(tmp_path):
    start = (
        "import sys, time\nfrom pathlib import Path\nfrom lengthwise.errors import LengthwiseError\n"
        "from lengthwise.system.locks import run_lock\nprint(1, flush=True)\nsys.stdin.readline()\n"
        "try:\n  with run_lock(Path(sys.argv[1]), {'process': sys.argv[2]}): print('held', flush=True); time.sleep(60)\n"
        "except LengthwiseError as error: print(error, flush=True)\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", start, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    try:
        for run in runs:
            run.stdout.readline()
        for run in runs:
            run.stdin.write("\n")
            run.stdin.flush()
        said = [run.stdout.readline().strip() for run in runs]
        (holder,) = [number for number, line in enumerate(said) if line == "held"]
        assert sum(f"(process {holder}, folder unknown) is at work in this store" in line for line in said) == 3
    finally:
        for run in runs:
            run.kill()
            run.communicate()


def test_a_suspended_reader_is_named_as_that(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "READER_SECONDS", 0.1)
    with run_lock(tmp_path, FIRST):
        pass
    with locks.opened(tmp_path / RUN_LOCK_NAME) as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        with pytest.raises(LengthwiseError, match="suspended"), run_lock(tmp_path, SECOND):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_it_says_so(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path, FIRST) as held:
        assert not held
        assert run_lock_holder(tmp_path) is None
    assert (tmp_path / RUN_LOCK_NAME).read_text() == ""


def test_a_store_that_cannot_be_made_has_no_lock(tmp_path):
    (tmp_path / "file").write_text("")
    with run_lock(tmp_path / "file" / "store", FIRST) as held:
        assert not held


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\udcff"])
def test_a_holder_whose_record_is_unreadable_is_still_a_holder(tmp_path, monkeypatch, text):
    monkeypatch.setattr(locks, "RECORD_SECONDS", 0.05)
    with run_lock(tmp_path, FIRST):
        (tmp_path / RUN_LOCK_NAME).write_text(text, errors="surrogateescape")
        assert run_lock_holder(tmp_path) == dict.fromkeys(FIRST, "unknown")


def test_the_record_of_a_longer_one_leaves_nothing(tmp_path):
    (tmp_path / RUN_LOCK_NAME).write_text(json.dumps(FIRST) * 9)
    with run_lock(tmp_path, SECOND):
        assert json.loads((tmp_path / RUN_LOCK_NAME).read_text()) == SECOND


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o700])
def test_whoever_may_write_in_the_store_may_hold_its_lock(tmp_path, mode):
    tmp_path.chmod(mode)
    with run_lock(tmp_path, FIRST):
        assert stat.S_IMODE((tmp_path / RUN_LOCK_NAME).stat().st_mode) == mode & 0o666
