"""Faults at any moment: the next run completes, finished shards are kept, and the end is the same."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter

import pytest
from project import ShardLock, wait_for
from safetensors.numpy import load_file

from lengthwise.jobs.embed_job import embed_job
from lengthwise.maintain.cleanup import leftovers

DONE = "results/tiny/datasets/a/manifest.json"  # the embeddings; the report has tests of its own
many = pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])


@pytest.fixture(scope="session")
def undisturbed(planned, made_once):
    def make(folder):
        project = planned.copy(folder / "project")
        run = project.snakemake(DONE)
        assert run.code == 0, run.output
        assert len(project.shards()) > 10
        return project.contents()

    return made_once("undisturbed", make)


@pytest.fixture
def project(planned, tmp_path):
    return planned.copy(tmp_path / "project")


def embed(project):
    """Embed the project's job in a process of its own, forked from one that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lengthwise.jobs.embed_job"])
    (work_order,) = project.store.glob("plan/jobs/*.parquet")
    os.chdir(project.folder)
    process = context.Process(
        target=embed_job,
        args=(project.store, work_order, project.store / "jobs" / f"{work_order.stem}.json"),
        kwargs={"batch_tokens": 512},
    )
    process.start()
    return process


@pytest.fixture
def seconds(planned, tmp_path):
    """How long the job takes when nobody disturbs it."""
    project = planned.copy(tmp_path / "timed")
    embed(project).join()  # the first one waits for the server's imports
    for path in [*project.store.glob("shards/*/*"), *project.store.glob("jobs/*")]:
        path.unlink()
    started = time.monotonic()
    process = embed(project)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


@many
def test_sigkills_of_the_embed_process(project, undisturbed, seconds, kills, monkeypatch):
    monkeypatch.chdir(project.folder)
    rng, landed = random.Random(kills), 0
    finished = {}
    while landed < kills:
        process = embed(project)
        # Early kills, mostly, so that there is something left for all of them; and a new start when it is done.
        process.join(rng.uniform(0, seconds * min(1.0, 4 / kills)))
        if process.exitcode is None:
            process.kill()
            landed += 1
        else:
            assert process.exitcode == 0
        process.join()
        after = project.shards()
        assert finished.items() <= after.items()  # finished shards are kept as they are
        finished = after
        made = {name: content for name, content in project.contents().items() if "/." not in name}
        assert made.items() <= undisturbed.items()  # and are what they are without a kill
        if list(project.store.glob("jobs/*.json")):
            assert len(finished) == sum(name.startswith("shards/") for name in undisturbed)
            for path in [*project.store.glob("shards/*/*"), *project.store.glob("jobs/*")]:
                path.unlink()
            finished = {}
    run = project.snakemake(DONE)
    assert run.code == 0, run.output
    assert finished.items() <= project.shards().items()
    assert project.contents() == undisturbed
    assert leftovers(project.store) == []


@pytest.mark.slow
def test_one_kill_costs_one_shard_at_most(project, monkeypatch):
    """What the next run says it made is what was not there, and that was not more than the rest of the job."""
    monkeypatch.chdir(project.folder)
    process = embed(project)
    while len(project.shards()) < 4:
        time.sleep(0.002)
        assert process.exitcode is None
    process.kill()
    process.join()
    kept = project.shards()
    assert project.snakemake(DONE).code == 0
    after = project.shards()
    job_record = json.loads(next(project.store.glob("jobs/*.json")).read_text())
    assert kept.items() <= after.items()
    assert set(job_record["made"]) == after.keys() - kept.keys()
    assert job_record["made_residues"] == job_record["residues"] - sum(residues(project, shard) for shard in kept)


def residues(project, shard):
    path = project.store / "shards" / shard[:2] / f"{shard}.safetensors"
    return int(load_file(path)["offsets"][-1])


def test_a_job_that_gets_a_sigterm_says_so_and_the_next_run_goes_on(project, undisturbed):
    (job,) = project.jobs
    lock = ShardLock(project, job)
    process = project.begin(DONE)
    wait_for(lambda: lock.has() or process.poll() is not None)
    lock.kill(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in output
    assert "lengthwise: error: ended by SIGTERM" in output
    lock.open()
    assert leftovers(project.store) == []
    kept = project.shards()
    assert 0 < len(kept) < sum(name.startswith("shards/") for name in undisturbed)
    run = project.snakemake(DONE)
    assert run.code == 0, run.output
    assert kept.items() <= project.shards().items()
    assert project.contents() == undisturbed


@pytest.mark.slow
def test_a_job_whose_time_is_known_to_end_begins_no_shard(project, undisturbed, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1))
    run = project.snakemake(DONE)
    assert run.code != 0
    (line,) = set(run.errors)
    assert "its time ends at" in line
    assert project.shards() == {}
    monkeypatch.undo()
    run = project.snakemake(DONE)
    assert run.code == 0, run.output
    assert project.contents() == undisturbed


def locks(project):
    return list((project.folder / ".snakemake" / "locks").glob("*"))


@pytest.mark.parametrize(
    ("how", "shards"),
    [
        (signal.SIGKILL, 4),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 9, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_snakemake_itself_is_killed(project, undisturbed, how, shards):
    """A SIGKILL leaves its lock and its jobs behind; Ctrl-C reaches the whole group, SIGTERM Snakemake alone."""
    process = project.begin(DONE)
    # Ctrl-C in the middle of the work: Python's own imports answer an interrupt with a traceback.
    while len(list(project.store.glob("shards/*/*.safetensors"))) < shards or not locks(project):
        time.sleep(0.02)
        assert process.poll() is None, process.stdout.read()
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    try:
        output, _ = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:  # Snakemake hangs on a SIGTERM at times
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        project.snakemake("--unlock")
    assert "Traceback" not in output
    run = project.snakemake(DONE)
    if how == signal.SIGKILL and run.code != 0:  # killed while it held the lock
        assert "--unlock" in run.output
        assert project.snakemake("--unlock").code == 0
        run = project.snakemake(DONE)
    assert run.code == 0, run.output
    assert project.contents() == undisturbed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_then_goes_on(project, undisturbed, small_disk, tmp_path):
    shards = project.store / "shards"
    shards.symlink_to(small_disk)
    run = project.snakemake(DONE)
    assert run.code != 0
    assert "Traceback" not in run.output
    (line,) = set(run.errors)
    assert "cannot reserve" in line
    assert "No space left on device" in line
    kept = project.shards()
    assert kept
    assert not list(shards.glob("*/.*.tmp"))
    elsewhere = tmp_path / "larger"
    subprocess.run(["cp", "-a", f"{small_disk}/.", elsewhere], check=True)
    shards.unlink()
    shards.symlink_to(elsewhere)
    run = project.snakemake(DONE)
    assert run.code == 0, run.output
    assert kept.items() <= project.shards().items()
    assert project.contents() == undisturbed


def test_every_name_is_given_to_bytes_that_are_on_disk(planned, tmp_path, monkeypatch):
    """A power cut keeps what was fsynced: each file before its rename, each folder after it."""
    project = planned.copy(tmp_path / "cut")
    monkeypatch.chdir(project.folder)
    events = []

    def record(name, function):
        def wrapper(*arguments, **keywords):
            first = arguments[0]
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.path.abspath(first)
            target = os.path.abspath(arguments[1]) if name == "rename" else ""
            result = function(*arguments, **keywords)
            events.append((name, path, target, threading.get_ident()))
            return result

        return wrapper

    monkeypatch.setattr(os, "fsync", record("fsync", os.fsync))
    monkeypatch.setattr(os, "rename", record("rename", os.rename))
    monkeypatch.setattr(os, "replace", record("rename", os.replace))
    monkeypatch.setattr(os, "pwrite", record("write", os.pwrite))
    (work_order,) = project.store.glob("plan/jobs/*.parquet")
    embed_job(project.store, work_order, project.store / "jobs" / f"{work_order.stem}.json")
    events = [event for event in events if "/running/" not in event[1] + event[2]]  # of no use after a power cut
    renames = [(i, *event[1:]) for i, event in enumerate(events) if event[0] == "rename"]
    kinds = Counter(os.path.relpath(target, project.store).partition("/")[0] for _, _, target, _ in renames)
    assert kinds["metrics"] == kinds["shards"] == len(project.shards())
    assert kinds["jobs"] == 1
    for i, part, target, thread in renames:
        history = [name for name, path, *_ in events[:i] if path == part]
        assert history[-1] == "fsync", target
        following = next(event for event in events[i + 1 :] if event[-1] == thread)
        assert following[:2] == ("fsync", os.path.dirname(target)), target
    order = [target.rpartition("/")[2].partition(".")[0] for _, _, target, _ in renames]
    for shard in project.shards():  # its metrics are in place just before it
        first = order.index(shard)
        assert "/metrics/" in renames[first][2]
        assert order[first + 1] == shard


@pytest.mark.slow
def test_garbage_under_a_temporary_name_does_no_harm(project, undisturbed):
    for name in undisturbed:
        if name.startswith("shards/"):
            folder, _, file = name.rpartition("/")
            (project.store / folder).mkdir(parents=True, exist_ok=True)
            (project.store / folder / f".{file}.0123abcd.tmp").write_bytes(b"garbage" * 100_000)
    unwanted = project.store / "shards" / "ab" / f".{'ab' * 16}.safetensors.0123abcd.tmp"
    unwanted.parent.mkdir(exist_ok=True)
    unwanted.write_bytes(b"garbage")
    run = project.snakemake("--dry-run", DONE)
    assert unwanted.exists()
    run = project.snakemake(DONE)
    assert run.code == 0, run.output
    assert project.contents() == undisturbed
    assert leftovers(project.store) == []


@pytest.mark.slow
def test_a_truncated_shard_is_made_again(project, undisturbed, monkeypatch):
    monkeypatch.chdir(project.folder)
    process = embed(project)
    process.join()
    shard = next(project.store.glob("shards/*/*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    next(project.store.glob("jobs/*.json")).unlink()
    run = project.snakemake(DONE)
    assert run.code == 0, run.output
    assert project.contents() == undisturbed
