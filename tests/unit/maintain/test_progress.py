"""Progress over all jobs of a run, from the plan, the job records and the heartbeats of running jobs."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from lengthwise.__main__ import main
from lengthwise.jobs import embed_job
from lengthwise.jobs import heartbeat as heartbeat_module
from lengthwise.jobs.heartbeat import HEARTBEAT_KEYS, Heartbeat
from lengthwise.maintain import progress_command
from lengthwise.maintain.progress import STALE_SECONDS, NoPlanError, read_progress
from lengthwise.maintain.progress_command import block_text, line_text
from lengthwise.store.paths import job_record_path
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.system.locks import RUN_LOCK_NAME, run_lock

NOW = 1_800_000_000.0


class Plan:
    """A store of jobs of 1,000 residues and 100 forecast seconds each, and their job records and heartbeats."""

    def __init__(self, folder, jobs: int):
        self.path = folder
        (folder / "plan").mkdir(exist_ok=True)
        rows = [f"job{i}\ta\t1\t10\t1000\t5000\t100.0" for i in range(jobs)]
        header = "job\tdatasets\tshards\tsequences\tresidues\tforecast_bytes\tforecast_seconds"
        (folder / "plan" / "jobs.tsv").write_text("\n".join([header, *rows, ""]))

    def finish(self, *jobs: int) -> None:
        for job in jobs:
            path = job_record_path(self.path, f"job{job}")
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")

    def beat(self, job: int, done: int, seconds: float, age: float = 1.0, residues: int = 1000, **where) -> None:
        path = self.path / "running" / f"job{job}.json"
        path.parent.mkdir(exist_ok=True)
        beat = {"job": f"job{job}", "host": "here", "gpu": None, "device": "Abacus", "process": 1, **where}
        beat |= {"time": NOW - age, "done": done, "residues": residues, "seconds": seconds}
        path.write_text(json.dumps(beat))


@pytest.fixture
def plan(tmp_path):
    return lambda jobs: Plan(tmp_path, jobs)


def test_job_records_and_heartbeats_add_up(plan):
    store = plan(10)
    store.finish(0, 1, 2)
    store.beat(3, done=500, seconds=50)
    store.beat(4, done=250, seconds=50, host="there", gpu="1")
    state = read_progress(store.path, NOW)
    assert (state.done_residues, state.total_residues, state.jobs_done, state.jobs) == (3750, 10_000, 3, 10)
    assert state.residues_per_second == 10 + 5
    assert state.seconds_left == pytest.approx((10_000 - 3750) / 15)
    assert [r.place for r in state.running] == ["here Abacus", "there GPU 1 Abacus"]
    assert [r.seconds_left for r in state.running] == [50, 150]


def test_time_left_counts_forecast_seconds_and_not_residues(plan):
    store = plan(2)
    table = store.path / "plan" / "jobs.tsv"
    table.write_text(
        table.read_text().replace("job1\ta\t1\t10\t1000\t5000\t100.0", "job1\ta\t1\t10\t1000\t5000\t900.0")
    )
    store.beat(0, done=500, seconds=50)
    assert read_progress(store.path, NOW).seconds_left == pytest.approx(950)


def test_the_time_left_is_never_less_than_that_of_the_slowest_job(plan):
    store = plan(2)
    store.beat(0, done=990, seconds=1)
    store.beat(1, done=10, seconds=10)
    assert read_progress(store.path, NOW).seconds_left == pytest.approx(990)


def test_a_job_that_goes_on_after_a_kill_counts_the_residues_finished_before(plan):
    store = plan(1)
    store.beat(0, done=100, seconds=10, residues=400)
    state = read_progress(store.path, NOW)
    assert (state.done_residues, state.seconds_left) == (700, 30)


def test_a_job_with_a_stale_heartbeat_counts_as_stopped_and_has_no_residues(plan):
    store = plan(3)
    store.beat(0, done=500, seconds=50, age=STALE_SECONDS + 1)
    store.beat(1, done=100, seconds=50)
    state = read_progress(store.path, NOW)
    assert ([r.job for r in state.running], [r.job for r in state.stopped]) == (["job1"], ["job0"])
    assert state.done_residues == 100
    assert any("job0" in line and "stopped without an end" in line for line in block_text("x", state, 100, 20))
    assert "1 stopped without an end" in line_text("x", state)


OF_ANOTHER_JOB = dict.fromkeys(HEARTBEAT_KEYS, 1) | {"job": "job77"}


@pytest.mark.parametrize("odd", ["", "[]", '{"job": "job1"}', json.dumps(OF_ANOTHER_JOB)])
def test_heartbeats_of_finished_and_of_foreign_jobs_are_ignored(plan, odd):
    store = plan(2)
    store.finish(0)
    store.beat(0, done=500, seconds=50)
    store.beat(77, done=500, seconds=50)
    (store.path / "running" / "job1.json").write_text(odd)  # by another program
    state = read_progress(store.path, NOW)
    assert (state.running, state.stopped, state.done_residues) == ([], [], 1000)
    assert state.seconds_left is None
    assert "no job is running" in block_text("x", state, 100, 20)


def test_a_starting_job_has_no_rate_yet(plan):
    store = plan(1)
    store.beat(0, done=0, seconds=0.0)
    state = read_progress(store.path, NOW)
    assert (state.residues_per_second, state.seconds_left, state.running[0].seconds_left) == (0, None, None)
    lines = block_text("x", state, 100, 20)
    assert "starting" in lines[-1]
    assert lines[2] == "on 1 device"  # and no rate


def test_starting_jobs_are_assumed_to_be_as_fast_as_finished_ones(plan):
    store = plan(4)
    job_record = {"made_residues": 1000, "residues": 1000, "load_seconds": 5.0, "embed_seconds": 20.0}
    job_record_path(store.path, "job0").parent.mkdir()
    job_record_path(store.path, "job0").write_text(json.dumps(job_record))  # 100 forecast seconds took 25
    state = read_progress(store.path, NOW)
    assert state.seconds_left == 75
    assert "no job is running, 1 min 15 s left on one device" in block_text("x", state, 100, 20)
    assert line_text("x", state).endswith("1 of 4 jobs done, no job is running, 1 min 15 s left on one device")
    store.beat(1, done=0, seconds=0.0)
    assert read_progress(store.path, NOW).seconds_left == 75
    store.beat(2, done=500, seconds=25.0)  # at half that speed
    assert read_progress(store.path, NOW).seconds_left == pytest.approx(250 / 6)


@pytest.mark.parametrize("rows", [10, 30, 200])
def test_the_block_is_no_higher_than_the_terminal(plan, rows):
    store = plan(100)
    for job in range(60):
        store.beat(job, done=100, seconds=10, gpu=str(job), age=1 if job < 55 else 1000)
    lines = block_text("x", read_progress(store.path, NOW), 80, rows)
    assert len(lines) <= rows
    named = sum(bool(re.search(r"\bjob\d+  ", line)) for line in lines)
    more = [int(match[1]) for line in lines if (match := re.search(r"and (\d+) more", line))]
    assert named + sum(more) == 55


@pytest.mark.parametrize("arguments", [[], ["--once"]])
def test_where_no_run_has_begun_it_fails_and_does_not_wait(tmp_path, capsys, arguments):
    for folder in (tmp_path, tmp_path / "not there"):
        assert main(["progress", str(folder), *arguments]) == 1
        assert f"{folder}: no run has begun here" in capsys.readouterr().err


def test_without_a_plan_once_fails_in_one_line(tmp_path, capsys):
    (tmp_path / "plan").mkdir()
    assert main(["progress", str(tmp_path), "--once"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no plan here" in printed.err
    assert len(printed.err.splitlines()) == 1


def test_it_waits_for_the_plan(tmp_path, monkeypatch, capsys):
    (tmp_path / "plan").mkdir()
    monkeypatch.setattr(
        progress_command.time,
        "sleep",
        lambda _: (tmp_path / "plan" / "jobs.tsv").exists() or Plan(tmp_path, 2).finish(0, 1),
    )
    assert main(["progress", str(tmp_path)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("no plan yet; waiting for it")
    assert "2 of 2 jobs done" in last


def test_in_a_log_it_prints_a_line_a_minute_until_the_run_is_complete(plan, monkeypatch, capsys):
    store, slept = plan(2), []
    store.finish(0)
    monkeypatch.setattr(
        progress_command.time, "sleep", lambda seconds: (slept.append(seconds), store.finish(len(slept) - 1))
    )
    assert main(["progress", str(store.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert slept == [60, 60]
    assert ["(50.0 %)" in line for line in lines] == [True, True, False]
    assert "2,000 of 2,000 residues (100.0 %), 2 of 2 jobs done" in lines[-1]


def test_once_prints_one_line(plan, capsys):
    store = plan(2)
    assert main(["progress", str(store.path), "--once"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_in_a_terminal_the_block_is_drawn_over_itself(plan, monkeypatch, capsys):
    store = plan(2)
    store.finish(0)
    monkeypatch.setattr(progress_command.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(progress_command.time, "sleep", lambda _: store.finish(1))
    progress_command.watch(store.path)
    first, second = re.split(r"\x1b\[3F\x1b\[J", capsys.readouterr().out)
    assert len(first.splitlines()) == 3
    assert all(len(line) < 60 for line in (first + second).splitlines())
    assert second.splitlines()[-1] == "complete"


RUN = {"host": "n1", "process": 11, "began": "2030-01-02 03:04:05", "folder": "/second"}
AT_WORK = "the run of 2030-01-02 03:04:05 on n1 is at work"


def test_a_finished_plan_is_not_complete_while_a_run_is_at_work(plan):
    store = plan(2)
    store.finish(0, 1)
    with run_lock(store.path, RUN):
        state = read_progress(store.path)
        assert (state.all_jobs_done, state.complete) == (True, False)
        assert line_text("x", state).endswith(f", 2 of 2 jobs done, {AT_WORK} and may change the plan")
        assert block_text("x", state, 100, 20)[-1] == f"{AT_WORK} and may change the plan"
    assert read_progress(store.path).complete


class Sleeps:
    """Stands in for `time.sleep`: at each call the next of some functions; `seconds` are the pauses asked for."""

    def __init__(self, monkeypatch, *steps):
        self.steps, self.seconds = list(steps), []
        monkeypatch.setattr(progress_command.time, "sleep", self)

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.steps.pop(0)()


def test_it_follows_a_second_run_from_the_old_plan_over_none_to_the_new_one(plan, monkeypatch, capsys):
    store = plan(1)
    store.finish(0)
    second_run = run_lock(store.path, RUN)
    second_run.__enter__()
    sleeps = Sleeps(
        monkeypatch,
        (store.path / "plan" / "jobs.tsv").unlink,  # Snakemake, before the rule runs again
        lambda: None,
        lambda: plan(2),
        lambda: store.finish(1),
        lambda: second_run.__exit__(None, None, None),
    )
    assert main(["progress", str(store.path)]) == 0
    old, none, new, summarizing, last = capsys.readouterr().out.splitlines()
    assert f"1 of 1 job done, {AT_WORK} and may change the plan" in old
    assert none.endswith(f": no plan now: {AT_WORK} and makes one; waiting for it")
    assert "1 of 2 jobs done, no job is running" in new
    assert f"2 of 2 jobs done, {AT_WORK} and may change the plan" in summarizing
    assert last.endswith("2 of 2 jobs done")
    assert sleeps.seconds == [60, 2, 2, 60, 60]


def test_once_beside_a_second_run_shows_one_state_and_returns(plan, monkeypatch, capsys):
    store = plan(1)
    store.finish(0)
    Sleeps(monkeypatch)
    with run_lock(store.path, RUN):
        assert main(["progress", str(store.path), "--once"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert f"1 of 1 job done, {AT_WORK}" in line
        shutil.rmtree(store.path / "plan")
        assert main(["progress", str(store.path), "--once"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith(f": no plan now: {AT_WORK} and makes one\n")
    assert printed.err == ""


def test_a_run_that_has_made_nothing_but_its_lock_has_begun(tmp_path, capsys):
    with run_lock(tmp_path / "store", RUN):
        assert main(["progress", str(tmp_path / "store"), "--once"]) == 0
    assert AT_WORK in capsys.readouterr().out
    assert main(["progress", str(tmp_path / "store"), "--once"]) == 1


def without_locks(monkeypatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))


def test_without_locks_it_still_waits_for_a_plan_that_vanished(plan, monkeypatch, capsys):
    store = plan(2)
    store.finish(0)
    (store.path / "plan" / "jobs").mkdir()  # work orders
    without_locks(monkeypatch)
    Sleeps(monkeypatch, (store.path / "plan" / "jobs.tsv").unlink, lambda: plan(1))
    with run_lock(store.path, RUN) as held:
        assert not held
        assert main(["progress", str(store.path)]) == 0
    _, none, last = capsys.readouterr().out.splitlines()
    assert "a run makes it, or was ended while it did; waiting for it" in none
    assert last.endswith("1 of 1 job done")  # as where no run is at work
    (store.path / "plan" / "jobs.tsv").unlink()
    assert main(["progress", str(store.path), "--once"]) == 0
    assert "a run makes it, or was ended while it did" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.6, 0.85])
def test_a_plan_cut_short_is_waited_for_and_never_complete(plan, capsys, monkeypatch, share):
    store = plan(1)
    store.finish(0)
    table = store.path / "plan" / "jobs.tsv"
    text = table.read_text()
    table.write_text(text[: int(share * len(text))])
    assert main(["progress", str(store.path), "--once"]) == 0
    assert "missing or incomplete" in capsys.readouterr().out
    Sleeps(monkeypatch, lambda: table.write_text(text))
    assert main(["progress", str(store.path)]) == 0
    assert [line.endswith("1 of 1 job done") for line in capsys.readouterr().out.splitlines()] == [False, True]


def test_a_plan_without_jobs_is_complete(plan):
    assert read_progress(plan(0).path).complete


@pytest.mark.parametrize("key", ["job", "host", "device", "time", "done", "residues", "seconds", "gpu"])
@pytest.mark.parametrize("value", [None, [], {}, 7, "x"])
def test_a_heartbeat_with_odd_values_is_no_error(plan, key, value):
    store = plan(1)
    store.beat(0, done=500, seconds=50)
    path = store.path / "running" / "job0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    block_text("x", read_progress(store.path, NOW), 100, 20)


def test_files_that_come_and_go_are_no_error(plan):
    """Plan, job records and heartbeats are replaced and removed while they are read."""
    store, ended = plan(20), threading.Event()

    def churn():
        while not ended.is_set():
            for number in range(20):
                store.beat(number, done=500, seconds=50)
                store.finish(number)
            for folder in ("jobs", "running", "plan"):
                shutil.rmtree(store.path / folder)
            plan(20)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        with run_lock(store.path, RUN):
            until, read, unexpected = time.monotonic() + 2, 0, []
            while time.monotonic() < until or not read:
                try:
                    unexpected += [state] if (state := read_progress(store.path)).complete else []
                    read += 1
                except NoPlanError as error:
                    unexpected += [] if error.being_made else [error]
        assert thread.is_alive()
        assert unexpected == []
    finally:
        ended.set()
        thread.join()


def test_it_ends_after_a_run_that_was_killed(plan):
    """With a real second run and a real `progress`."""
    store = plan(1)
    store.finish(0)
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom lengthwise.system.locks import run_lock\n"
        f"with run_lock(Path(sys.argv[1]), {RUN}): print(1, flush=True); time.sleep(600)"
    )
    # As in a terminal, where it looks every two seconds.
    watch = (
        "import sys\nfrom lengthwise.__main__ import main\nfrom lengthwise.maintain import progress_command\n"
        "progress_command.LINE_SECONDS = 0.1\nsys.exit(main(['progress', sys.argv[1]]))"
    )
    start = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, str(store.path)], **start) as run:
        run.stdout.readline()
        with subprocess.Popen([sys.executable, "-c", watch, str(store.path)], **start) as progress:
            try:
                lines = [progress.stdout.readline() for _ in range(3)]
                assert all(AT_WORK in line for line in lines)
                run.send_signal(signal.SIGKILL)
                last = progress.stdout.readlines()[-1]
                assert progress.wait() == 0
            finally:
                run.kill()
                progress.kill()
    assert last.endswith("1 of 1 job done\n")
    assert (store.path / RUN_LOCK_NAME).exists()


def test_a_heartbeat_exists_while_a_job_runs_and_is_removed_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "BEAT_SECONDS", 0.01)
    state = [0, 1000, 0.0]
    with Heartbeat(tmp_path, "job0", "Abacus", lambda: tuple(state)) as heartbeat:
        for done in (100, 900):
            state[0], state[2] = done, done / 10
            until = time.monotonic() + 10
            while not heartbeat.path.exists() or json.loads(heartbeat.path.read_text())["done"] != done:
                assert time.monotonic() < until
                time.sleep(0.005)
        assert [path.name for path in heartbeat.path.parent.iterdir() if path.suffix == ".json"] == ["job0.json"]
    assert list((tmp_path / "running").iterdir()) == []


def test_a_real_job_is_seen_running_and_then_finished(small_store, random_proteins, monkeypatch):
    store, seen = small_store(), []
    store.ingest("a", random_proteins(60))
    (job,) = store.plan(shard_bytes=8_000)["job"]
    commit = ShardWriter.commit

    def read_progress_and_commit(self):
        until = time.monotonic() + 10
        while not (store.path / "running" / f"{job}.json").exists() and time.monotonic() < until:
            time.sleep(0.005)
        seen.append(read_progress(store.path))
        commit(self)

    monkeypatch.setattr(heartbeat_module, "BEAT_SECONDS", 0.001)
    monkeypatch.setattr(ShardWriter, "commit", read_progress_and_commit)
    store.embed(job)
    assert [[r.job for r in state.running] for state in seen] == [[job]] * len(seen)
    assert 0 < seen[-1].done_residues <= seen[-1].total_residues == store.jobs["residues"].sum()
    after = read_progress(store.path)
    assert (after.complete, after.done_residues, after.running) == (True, after.total_residues, [])
    assert list((store.path / "running").iterdir()) == []


def test_a_job_is_running_until_its_job_record_is_written(small_store, random_proteins, monkeypatch):
    store, seen = small_store(), []
    store.ingest("a", random_proteins(5))
    (job,) = store.plan()["job"]
    write = embed_job.write_json

    def read_progress_and_write(*arguments):
        until = time.monotonic() + 10
        while read_progress(store.path).done_residues == 0 and time.monotonic() < until:
            time.sleep(0.005)
        seen.append(read_progress(store.path))
        write(*arguments)

    monkeypatch.setattr(heartbeat_module, "BEAT_SECONDS", 0.001)
    monkeypatch.setattr(embed_job, "write_json", read_progress_and_write)
    store.embed(job)
    (state,) = seen
    assert (state.done_residues, state.jobs_done, [r.job for r in state.running]) == (state.total_residues, 0, [job])
    assert "finishing" in block_text("x", state, 100, 20)[-1]


def test_a_job_that_fails_leaves_no_heartbeat(small_store, random_proteins, monkeypatch):
    store = small_store()
    store.ingest("a", random_proteins(5))
    (job,) = store.plan()["job"]
    monkeypatch.setattr(ShardWriter, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.embed(job)
    assert list((store.path / "running").iterdir()) == []
