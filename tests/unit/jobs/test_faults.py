"""A fault at the Nth write, fsync, rename or preallocation of a job, for every N until there is none: all leave the old state
or the new, and the next run completes."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lengthwise.errors import LengthwiseError
from lengthwise.jobs.embed_job import embed_job
from lengthwise.maintain import cleanup
from lengthwise.store import shard_writer
from lengthwise.store.paths import job_record_path, metrics_path, work_order_path
from lengthwise.store.shard import Shard

# The writer's calls to the disk. Rows and headers go through pwrite, metrics and the job record through the others.
CALLS = [
    (shard_writer, "reserve"),
    (os, "pwrite"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (pq, "write_table"),
    (Path, "write_text"),
]


class Faults:
    """Counts these calls, and lets the `at`th fail: before it does anything, or with half of the bytes written."""

    def __init__(self, at: int, fail, torn: bool = False):
        self.calls: list[str] = []
        self.at, self.fail, self.torn = at, fail, torn

    def install(self, patch: pytest.MonkeyPatch) -> "Faults":
        for owner, name in CALLS:
            patch.setattr(owner, name, self._counted(name, getattr(owner, name)))
        return self

    def _counted(self, name: str, original):
        def call(*arguments, **keywords):
            if any(isinstance(argument, Path) and argument.parent.name == "running" for argument in arguments):
                return original(*arguments, **keywords)  # heartbeats: a job does without them
            self.calls.append(name)
            if len(self.calls) == self.at:
                if self.torn and name == "pwrite":
                    descriptor, view, place = arguments
                    original(descriptor, view[: len(view) // 2], place)
                self.fail()
            return original(*arguments, **keywords)

        return call


def refuse(number: int):
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def planned(small_store, random_proteins):
    """A job of two small shards, planned and not begun."""
    store = small_store()
    store.ingest("a", random_proteins(4, shortest=40, longest=50))
    (store.job,) = store.plan(shard_bytes=12_000)["job"]
    return store


@pytest.fixture(scope="module")
def undisturbed(planned) -> tuple[dict[str, bytes], list[str]]:
    """The shards of a run without faults, and the calls that it made."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Faults(0, None).install(patch)
        planned.embed(planned.job)
    shards = shards_of(planned)
    assert len(shards) == 2
    begin_again(planned)
    return shards, counted.calls


def begin_again(store) -> None:
    for folder in ("shards", "metrics", "jobs", "parity"):
        shutil.rmtree(store.path / folder, ignore_errors=True)


def shards_of(store) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in store.shard_files()}


def require_old_or_new(store, expected: dict[str, bytes]) -> None:
    """Every file with a final name is complete: metrics before their shard, shards before the job record."""
    made = shards_of(store)
    assert made.items() <= expected.items()
    for shard in made:
        assert pq.read_table(metrics_path(store.path, shard)).num_rows
    if job_record_path(store.path, store.job).exists():
        assert json.loads(job_record_path(store.path, store.job).read_text())["shards"].keys() == expected.keys()
        assert made == expected


def require_completion(store, expected: dict[str, bytes]) -> None:
    """The next run's beginning, and its job."""
    cleanup.remove_leftovers(store.path)
    kept = shards_of(store)
    job_record = store.embed(store.job)
    assert set(job_record["made"]) == expected.keys() - kept.keys()
    assert shards_of(store) == expected
    assert cleanup.leftovers(store.path) == []


def test_every_kind_of_call_is_made(undisturbed):
    assert set(undisturbed[1]) == {name for _, name in CALLS}


# Every third call, from one that differs from test to test; each in the slow tests.
some_or_all = pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])


@some_or_all
@pytest.mark.parametrize(("number", "torn", "first"), [(errno.ENOSPC, True, 1), (errno.EIO, False, 2)])
def test_an_error_of_any_call_is_one_line_and_leaves_the_old_state_or_the_new(
    planned, undisturbed, number, torn, first, step
):
    expected, calls = undisturbed
    for n in range(min(first, step), len(calls) + 1, step):
        with pytest.MonkeyPatch.context() as patch:
            Faults(n, refuse(number), torn).install(patch)
            with pytest.raises(LengthwiseError) as caught:
                planned.embed(planned.job)
        assert "\n" not in str(caught.value)
        assert os.strerror(number) in str(caught.value)
        assert str(planned.path) in str(caught.value)
        require_old_or_new(planned, expected)
        assert cleanup.leftovers(planned.path) == []
        require_completion(planned, expected)
        begin_again(planned)


def faulty_job(n: int, torn: bool, store: Path, job: str) -> None:
    """In a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        Faults(n, kill, torn).install(patch)
        embed_job(store, work_order_path(store, job), job_record_path(store, job))


@pytest.fixture(scope="module")
def processes():
    """Forks processes from one that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lengthwise.jobs.embed_job"])
    return context


@some_or_all
def test_a_kill_at_any_call_leaves_the_old_state_or_the_new(planned, undisturbed, processes, step):
    expected, calls = undisturbed
    for n in range(step, len(calls) + 1, step):
        name = calls[n - 1]
        process = processes.Process(
            target=faulty_job, args=(n, name == "pwrite" and n % 2 == 0, planned.path, planned.job)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        require_old_or_new(planned, expected)
        require_completion(planned, expected)
        begin_again(planned)


def job_to(job_record: Path, store: Path, job: str) -> None:
    embed_job(store, work_order_path(store, job), job_record)


def test_processes_with_the_same_job_share_it_and_end_with_one_result(planned, undisturbed, processes):
    expected, _ = undisturbed
    job_records = [planned.path / "jobs" / f"{n}.json" for n in range(4)]
    started = [
        processes.Process(target=job_to, args=(job_record, planned.path, planned.job)) for job_record in job_records
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 4
    assert shards_of(planned) == expected
    assert cleanup.leftovers(planned.path) == []
    assert all(Shard(path).damaged() == [] for path in planned.shard_files())
    made = [json.loads(job_record.read_text())["made"] for job_record in job_records]
    assert set().union(*made) == expected.keys()
    begin_again(planned)
