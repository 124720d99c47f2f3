"""SIGTERM ends a job at once, whatever it is in the middle of; a time limit known in advance ends it between shards."""

import ctypes
import json
import multiprocessing
import os
import platform
import signal
import time
from pathlib import Path

import pytest

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.engine import Engine
from lengthwise.jobs import embed_job as embed_job_module
from lengthwise.jobs import heartbeat, pipeline
from lengthwise.jobs.embed_job import embed_job
from lengthwise.maintain import cleanup
from lengthwise.store.paths import job_record_path, work_order_path
from lengthwise.system import logging as logging_module
from lengthwise.system.files import atomic
from lengthwise.system.logging import reporting

SECONDS = 5.0  # at once, on a machine that is busy


def hang(reached: Path) -> None:
    """A call into C that never comes back and that no signal interrupts, as a long kernel or a long read."""
    reached.touch()
    mutex = ctypes.create_string_buffer(64)  # zeros are a pthread mutex; to lock it twice is to wait for ever
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def hang_in(owner, name: str, reached: Path, patch: pytest.MonkeyPatch) -> None:
    original, calls = getattr(owner, name), []

    def call(*arguments, **keywords):
        calls.append(name)
        if len(calls) == 2 or name == "load_model":  # something is written by the second
            hang(reached)
        return original(*arguments, **keywords)

    patch.setattr(owner, name, call)


PLACES = {
    "while the checkpoint is read": ("lengthwise.esm2.engine", "load_model"),
    "while a batch is computed": ("lengthwise.esm2.engine.Engine", "_forward"),
    "while rows are written": ("os", "pwrite"),
    "while a shard is flushed to the disk": ("os", "fsync"),
    "while another process makes the shard": ("fcntl", "flock"),
}


def job_that_hangs(place: str, store: Path, job: str, log: Path) -> None:
    """What the rule's script does, in a process of its own."""
    import pkgutil

    owner, name = PLACES[place]
    with pytest.MonkeyPatch.context() as patch:
        hang_in(pkgutil.resolve_name(owner), name, log.with_name("reached"), patch)
        patch.setattr(heartbeat, "BEAT_SECONDS", 0.0001)
        with reporting(str(log)):
            embed_job(store, work_order_path(store, job), job_record_path(store, job), batch_tokens=128)


@pytest.fixture(scope="module")
def processes():
    """Forks processes from one that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lengthwise.jobs.embed_job"])
    return context


@pytest.fixture
def store(small_store, random_proteins):
    store = small_store()
    store.ingest("a", random_proteins(40))
    (store.job,) = store.plan(shard_bytes=8_000)["job"]
    return store


@pytest.mark.parametrize("place", PLACES)
def test_a_sigterm_ends_a_job_at_once(store, processes, tmp_path, place):
    log = tmp_path / "job.log"
    process = processes.Process(target=job_that_hangs, args=(place, store.path, store.job, log))
    process.start()
    while not log.with_name("reached").exists():
        time.sleep(0.01)
        assert process.exitcode is None
    time.sleep(0.1)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(SECONDS)
    assert process.exitcode == 128 + signal.SIGTERM
    assert time.monotonic() - began < SECONDS
    (line,) = [line for line in log.read_text().splitlines() if "error" in line]
    assert line.startswith("lengthwise: error: ended by SIGTERM")
    assert not logging_module.running_mark(log).exists()
    assert cleanup.leftovers(store.path) == []
    assert not job_record_path(store.path, store.job).exists()
    kept = {path: path.read_bytes() for path in store.shard_files()}
    made = store.embed(store.job, batch_tokens=128)["made"]
    assert len(made) == store.work_order(store.job)["shard"].nunique() - len(kept)
    assert {path: path.read_bytes() for path in kept} == kept


def test_only_a_process_that_is_killed_leaves_its_mark(store, processes, tmp_path):
    log = tmp_path / "job.log"
    process = processes.Process(target=slow_job, args=(store.path, store.job, log))
    process.start()
    while not store.shard_files():
        time.sleep(0.005)
        assert process.exitcode is None
    mark = logging_module.running_mark(log)
    assert json.loads(mark.read_text()) == {"host": platform.node(), "slurm_job": None}
    process.kill()
    process.join(SECONDS)
    assert mark.exists()
    process = processes.Process(target=slow_job, args=(store.path, store.job, log))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not mark.exists()


@pytest.mark.parametrize("error", [LengthwiseError("no room"), ZeroDivisionError("odd"), KeyboardInterrupt()])
def test_a_process_that_says_why_it_ends_leaves_no_mark(tmp_path, monkeypatch, error):
    monkeypatch.setattr(logging_module, "_exit_on_sigterm", lambda log_file: None)
    log = tmp_path / "job.log"

    def work():
        with reporting(str(log)):
            assert logging_module.running_mark(log).exists()
            raise error

    with pytest.raises(SystemExit):
        work()
    assert list(tmp_path.iterdir()) == [log]


def test_a_crash_of_native_code_is_written_into_the_log(processes, tmp_path):
    log = tmp_path / "job.log"
    process = processes.Process(target=crashing_job, args=(log,))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in log.read_text()
    assert "crashing_job" in log.read_text()


def crashing_job(log: Path) -> None:
    with reporting(str(log)):
        os.kill(os.getpid(), signal.SIGSEGV)


FULL = Path("/dev/full")  # opens, and has no room


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "error", [LengthwiseError("shard: no room"), ZeroDivisionError("odd")], ids=["ours", "unexpected"]
)
def test_a_full_disk_does_not_hide_what_failed(capfd, tmp_path, monkeypatch, error):
    monkeypatch.setattr(logging_module, "_exit_on_sigterm", lambda log_file: None)  # this process goes on
    (tmp_path / "job.log").symlink_to(FULL)

    def work():
        with reporting(str(tmp_path / "job.log")):
            logging_module.log.info("begun")
            raise error

    with pytest.raises(SystemExit, match="1"):
        work()
    begun, why = capfd.readouterr().err.splitlines()
    assert begun.endswith("begun")
    assert why.startswith("lengthwise: error: ")
    assert str(error) in why


def test_a_log_whose_folder_cannot_be_made_stops_no_work(tmp_path, monkeypatch):
    monkeypatch.setattr(logging_module, "_exit_on_sigterm", lambda log_file: None)
    (tmp_path / "logs").write_text("")
    done = []
    with reporting(str(tmp_path / "logs" / "job.log")):
        done.append(True)
    assert done


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_sigterm_on_a_full_disk_says_so_and_leaves_nothing_temporary(store, processes, tmp_path):
    reached = tmp_path / "reached"
    process = processes.Process(target=job_on_a_full_disk, args=(store.path, reached))
    process.start()
    while not reached.exists():
        time.sleep(0.01)
        assert process.exitcode is None
    assert list(store.path.glob(".x.*.tmp"))
    os.kill(process.pid, signal.SIGTERM)
    process.join(SECONDS)
    assert process.exitcode == 128 + signal.SIGTERM
    assert list(store.path.glob(".x.*.tmp")) == []


def job_on_a_full_disk(store: Path, reached: Path) -> None:
    (store / "job.log").symlink_to(FULL)
    with reporting(str(store / "job.log")), atomic(store / "x") as part:
        part.write_text("half")
        hang(reached)


def test_a_sigterm_in_the_middle_of_a_real_job_keeps_its_finished_shards(store, processes, tmp_path):
    undisturbed = store.embed(store.job)["made"]
    rows = store.rows()
    for path in [*store.shard_files(), job_record_path(store.path, store.job)]:
        path.unlink()
    process = processes.Process(target=slow_job, args=(store.path, store.job, tmp_path / "job.log"))
    process.start()
    while len(store.shard_files()) < 3:
        time.sleep(0.005)
        assert process.exitcode is None
    os.kill(process.pid, signal.SIGTERM)
    process.join(SECONDS)
    assert process.exitcode == 128 + signal.SIGTERM
    assert cleanup.leftovers(store.path) == []
    kept = {path.stem for path in store.shard_files()}
    assert 3 <= len(kept) < len(undisturbed)
    assert set(store.embed(store.job)["made"]) == set(undisturbed) - kept
    assert store.rows() == rows


def slow_job(store: Path, job: str, log: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_forward", slowed(0.05))
        with reporting(str(log)):
            embed_job(store, work_order_path(store, job), job_record_path(store, job))


def slowed(seconds: float):
    original = Engine._forward

    def forward(self, batch):
        time.sleep(seconds)
        return original(self, batch)

    return forward


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on by one second for each batch, and a job of a batch a shard."""

    class Clock:
        now = 1_000_000.0

    def forward(self, batch, original=Engine._forward):
        Clock.now += 1.0
        return original(self, batch)

    monkeypatch.setattr(Engine, "_forward", forward)
    monkeypatch.setattr(embed_job_module.time, "time", lambda: Clock.now)
    monkeypatch.setattr(embed_job_module.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(pipeline, "END_OF_JOB_SECONDS", 0.5)
    return Clock


@pytest.mark.parametrize("seconds", [0, 5, 9, 10**9])
def test_a_job_stops_before_the_shard_that_there_is_no_time_for(store, clock, refused, seconds):
    total = store.work_order(store.job)["shard"].nunique()
    assert total > 10
    began = clock.now
    if seconds < total:
        with refused(store.job, "its time ends at", "left", "run again"):
            store.embed(store.job, deadline=began + seconds, parity="off")
        assert not job_record_path(store.path, store.job).exists()
        assert cleanup.leftovers(store.path) == []
        kept = len(store.shard_files())
        assert kept == clock.now - began
        assert seconds - 2 <= kept <= seconds  # rates differ a little with the lengths
    else:
        kept = 0
    job_record = store.embed(store.job, deadline=clock.now + 10**9)
    assert len(job_record["made"]) == total - kept
    assert len(store.shard_files()) == total


def test_a_limit_that_suffices_changes_nothing(store):
    assert (
        len(store.embed(store.job, deadline=time.time() + 600)["made"])
        == store.work_order(store.job)["shard"].nunique()
    )


def test_of_a_job_that_is_done_no_time_is_asked(store):
    store.embed(store.job)
    assert store.embed(store.job, deadline=0.0)["made"] == []
