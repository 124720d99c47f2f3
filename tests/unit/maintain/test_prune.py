"""`python -m lengthwise prune` deletes the unused files and no others, wherever it is stopped."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from lengthwise.__main__ import main
from lengthwise.maintain.cleanup import remove
from lengthwise.maintain.prune import prune
from lengthwise.maintain.verify import verify
from lengthwise.store.paths import job_record_path, work_order_path
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.system.locks import run_lock, shared_store_lock

NOBODY = 65534


@pytest.fixture(scope="module")
def finished(small_store, random_proteins):
    """Dataset a, and b which shares some sequences with it and has a job of its own for the rest."""
    store = small_store()
    proteins = random_proteins(30)
    store.ingest("a", dict(list(proteins.items())[:20]))
    store.run(shard_bytes=8_000)
    store.ingest("b", dict(list(proteins.items())[15:]))
    store.run(shard_bytes=8_000)
    assert len(store.jobs) == 2
    return store


@pytest.fixture
def store(finished, tmp_path):
    return finished.copy(tmp_path)


@pytest.fixture
def without(store):
    """Removes a dataset from the config and the plan, and its folder."""

    def remove(dataset: str) -> None:
        store.datasets.remove(dataset)
        store.plan()
        shutil.rmtree(store.path / "datasets" / dataset)

    return remove


def unused(store, **options) -> set[str]:
    return {str(path.relative_to(store.path)) for path in prune(store.path, **options)}


def is_good(store) -> bool:
    return not any(result.problems for result in verify(store.path))


def test_nothing_of_a_finished_store_is_unused(store, files_in):
    with run_lock(store.path, {"process": 1}):
        pass
    assert is_good(store)
    before = files_in(store.path)
    assert unused(store, delete=True) == set()
    assert files_in(store.path) == before


def test_files_that_only_a_removed_dataset_used_are_listed_and_then_deleted(store, without, files_in, capsys):
    (job,) = set(store.jobs_of("b")) - set(store.jobs_of("a"))
    shards = set(store.work_order(job)["shard"])
    without("b")
    expected = {
        f"jobs/{job}.json",
        f"plan/jobs/{job}.parquet",
        "inputs/b",
        *(f"shards/{shard[:2]}/{shard}.safetensors" for shard in shards),
        *(str(path.relative_to(store.path)) for path in store.path.glob("metrics/**/*.parquet") if path.stem in shards),
    }
    assert len(expected) == 3 + 2 * len(shards)
    before = {path: path.stat().st_size for path in files_in(store.path)}
    assert unused(store) == expected
    assert files_in(store.path) == list(before)
    pooled = store.open("a").pooled()
    assert main(["prune", str(store.path), "--delete"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    gone = before.keys() - set(files_in(store.path))
    assert {line.split()[1] for line in lines} == {str(store.path / path) for path in expected}
    assert total.split() == [f"{sum(before[path] for path in gone):,}", "bytes", "deleted"]
    assert all(any(path.is_relative_to(store.path / each) for each in expected) for path in gone)
    assert unused(store) == set()
    assert is_good(store)
    assert (store.open("a").pooled() == pooled).all()


def test_a_dataset_that_comes_back_later_is_embedded_again(store, without, random_proteins):
    rows = store.rows()
    without("b")
    unused(store, delete=True)
    assert store.rows().keys() < rows.keys()
    store.ingest("b", dict(list(random_proteins(30).items())[15:]))
    store.run(shard_bytes=8_000)
    assert store.rows() == rows
    assert is_good(store)


def test_a_dataset_is_used_until_its_folder_is_removed(store):
    store.datasets.remove("b")
    store.plan()  # the config has no b any more
    assert unused(store, delete=True) == set()
    assert is_good(store)


def test_a_planned_dataset_is_used_before_it_has_a_folder(store, random_proteins):
    store.ingest("c", random_proteins(20, seed=5))
    store.plan(shard_bytes=8_000)
    (job,) = set(store.jobs_of("c"))
    store.embed(job)
    job_record_path(store.path, job).unlink()  # as if the job was killed just before
    assert unused(store, delete=True) == set()
    store.embed_all()
    store.assemble("c")
    assert is_good(store)


def test_a_job_in_use_keeps_all_its_files(small_store, random_proteins):
    store = small_store()
    proteins = random_proteins(30)
    store.ingest("short", {name: sequence for name, sequence in proteins.items() if len(sequence) < 20})
    store.ingest("long", {name: sequence for name, sequence in proteins.items() if len(sequence) >= 20})
    store.run(shard_bytes=8_000)  # one job, with shards that only one of them uses
    (job,) = store.jobs["job"]
    store.datasets.remove("long")
    store.plan()
    shutil.rmtree(store.path / "datasets" / "long")
    manifest = store.open("short").manifest
    assert set(manifest["shards"]) < set(store.work_order(job)["shard"])
    assert unused(store, delete=True) == {"inputs/long"}


def test_finished_shards_of_a_job_that_no_plan_has_are_unused(store, random_proteins):
    store.ingest("c", random_proteins(20, seed=5))
    store.plan(shard_bytes=8_000)
    (job,) = set(store.jobs_of("c"))
    shards = store.embed(job)["shards"]
    job_record_path(store.path, job).unlink()  # killed before it
    store.datasets.remove("c")
    store.plan()
    assert not work_order_path(store.path, job).exists()
    names = {name.partition(".")[0].rpartition("/")[2] for name in unused(store, delete=True) - {"inputs/c"}}
    assert names == shards.keys()
    assert is_good(store)


def test_leftovers_are_unused_in_every_folder_and_other_hidden_files_stay(store):
    left = {"shards/ab/.abcd.safetensors.0123abcd.tmp", "datasets/a/.index.parquet.99.tmp", "plan/.spill"}
    for name in (*left, "inputs/a/.nfs0001"):
        path = store.path / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("spill") else path.write_bytes(b"12345")
    (store.path / "plan/.spill/duckdb_temp_storage.tmp").write_bytes(b"1234567")
    found = {str(path.relative_to(store.path)): size for path, size in prune(store.path).items()}
    assert found == dict.fromkeys(left, 5) | {"plan/.spill": 7}
    assert unused(store, delete=True) == left
    assert (store.path / "inputs/a/.nfs0001").exists()


def test_gpu_code_of_earlier_versions_is_unused(store):
    (store.path / "compiled" / "ab").mkdir(parents=True)
    (store.path / "compiled" / "ab" / ".x.tmp").write_bytes(b"12345")
    assert unused(store, delete=True) == {"compiled"}
    assert is_good(store)


def test_quarantined_files_are_unused(store):
    path = store.shard_files()[0]
    shutil.copy(path, path.with_name(f"{path.name}.damaged"))
    assert unused(store, delete=True) == {f"{path.relative_to(store.path)}.damaged"}
    assert is_good(store)


def test_nothing_is_deleted_or_listed_while_somebody_is_at_work(store, without, refused, files_in):
    without("b")
    before = files_in(store.path)
    with shared_store_lock(store.path), shared_store_lock(store.path), refused("at work", str(store.path)):
        unused(store, delete=True)
    assert files_in(store.path) == before
    assert unused(store, delete=True)


@contextmanager
def read_only(folder):
    """A folder that this process may only read; root becomes a user whom modes bind."""
    user = os.geteuid()
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222 | (0o555 if path.is_dir() else 0o444))
    os.seteuid(user or NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_store_that_may_only_be_read_is_listed_and_not_pruned(finished, refused, files_in):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        os.chmod(folder, 0o755)
        store = finished.copy(Path(folder))
        (store.path / "inputs/gone").mkdir()
        before = {path: path.stat().st_mtime_ns for path in files_in(store.path)}
        with read_only(store.path):
            with pytest.raises(PermissionError):
                (store.path / "new").touch()
            assert unused(store) == {"inputs/gone"}
            with refused("settings.json", "Permission denied"):
                unused(store, delete=True)
        with shared_store_lock(store.path), read_only(store.path), refused("at work"):
            unused(store)
        assert {path: path.stat().st_mtime_ns for path in files_in(store.path)} == before


def test_a_store_without_locks_is_listed_and_not_pruned(store, without, refused, monkeypatch):
    without("b")
    monkeypatch.setattr("lengthwise.system.locks.lock", lambda *_, **__: False)
    assert unused(store)
    with refused("has no locks"):
        unused(store, delete=True)


def test_a_job_is_at_work_while_it_makes_shards(store, random_proteins, monkeypatch, refused):
    store.ingest("c", random_proteins(20, seed=5))
    store.plan(shard_bytes=8_000)
    original, part_exists = ShardWriter.commit, []

    def commit(self):
        with refused("at work"):
            unused(store, delete=True)
        part_exists.append(self.part.exists())
        original(self)

    monkeypatch.setattr(ShardWriter, "commit", commit)
    store.embed_all()
    assert set(part_exists) == {True}
    assert unused(store) == set()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda store: (store.path / "plan/jobs.tsv").unlink(), "no plan here"),
        (lambda store: (store.path / "datasets/b/manifest.json").unlink(), "so what it uses is unknown"),
        (lambda store: (store.path / "datasets/b/manifest.json").write_text("{"), "damaged"),
        (lambda store: job_record_path(store.path, store.jobs_of("a")[0]).write_text("{"), "damaged"),
        (lambda store: (store.path / "settings.json").unlink(), "settings.json: No such file"),
    ],
)
def test_nothing_is_deleted_while_it_is_unknown_what_is_in_use(store, capsys, files_in, spoil, words):
    store.datasets.remove("b")
    store.plan()
    spoil(store)
    before = files_in(store.path)
    assert main(["prune", str(store.path), "--delete"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert files_in(store.path) == before


@contextmanager
def stop_after(n: int):
    """Stops a deletion after n removals."""
    remaining = [n]

    def limited(path):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise ZeroDivisionError
        remove(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lengthwise.maintain.prune.remove", limited)
        yield


def test_wherever_a_deletion_is_stopped_the_store_is_good_and_the_next_one_goes_on(store, without, files_in, tmp_path):
    without("b")
    everything = unused(store)
    complete = store.copy(tmp_path / "complete").path
    prune(complete, delete=True)
    expected = {path.relative_to(complete): path.read_bytes() for path in files_in(complete)}
    for n in range(1, len(everything)):
        stopped = store.copy(tmp_path / str(n)).path
        with stop_after(n), pytest.raises(ZeroDivisionError):
            prune(stopped, delete=True)
        assert not any(result.problems for result in verify(stopped, quick=True))
        prune(stopped, delete=True)
        assert {path.relative_to(stopped): path.read_bytes() for path in files_in(stopped)} == expected
