"""Embedding a job: killed and resumed, out of memory, beyond the range of its types; the rows and the metrics of each."""

import os
import resource
import time

import duckdb
import numpy as np
import pytest
import torch

from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.status import Status
from lengthwise.jobs import embed_job, pipeline
from lengthwise.store.paths import job_record_path, metrics_path
from lengthwise.store.settings import load
from lengthwise.store.shard import Shard
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.system.files import facts, read_json

# Float32 sums in another order, relative to the RMS: see test_model.
FLOAT32_TOLERANCE = 2e-5
# DESIGN.md, summarize.
COLUMNS = """
    job shard batch n_sequences n_residues n_tokens min_length mean_length max_length wall_ms device_ms gpu_busy wait_launch_ms
    wait_read_ms wait_write_ms peak_allocated_bytes peak_reserved_bytes peak_rss_bytes oom_splits device precision
"""


@pytest.fixture
def new(small_store, random_proteins):
    """Makes a store of one planned job of several shards."""

    def make(proteins=None, shard_bytes: int = 8_000, job_seconds: float = 1200.0, **config):
        store = small_store(**config)
        store.ingest("a", proteins or random_proteins(60))
        (job,) = store.plan(shard_bytes=shard_bytes, job_seconds=job_seconds)["job"]
        return store, job

    return make


def metrics(store) -> list[dict]:
    files = str(store.path / "metrics" / "*" / "*.parquet")
    query = "SELECT * FROM read_parquet(?) ORDER BY shard, batch"
    return duckdb.sql(query, params=[files]).to_arrow_table().to_pylist()


def statuses(store) -> dict[bytes, int]:
    found = {}
    for path in store.shard_files():
        shard = Shard(path)
        found |= {digest.tobytes(): int(s) for digest, s in zip(shard["digests"], shard["status"], strict=True)}
    return found


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def kill_after(monkeypatch):
    """Lets so many batches through and then raises Killed."""

    def patch(batches: int) -> None:
        original, count = Engine._forward, 0

        def counted(self, batch):
            nonlocal count
            count += 1
            if count > batches:
                raise Killed
            return original(self, batch)

        monkeypatch.setattr(Engine, "_forward", counted)

    return patch


@pytest.fixture
def memory_for(monkeypatch):
    """A device that holds so many sequences of so many residues in one pass, and no more."""
    original = Engine._forward

    def patch(sequences: int = 1_000_000, residues: int = 1_000_000) -> None:
        def limited(self, batch):
            if len(batch.sequences) > sequences or max(map(len, batch.sequences)) > residues:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(self, batch)

        monkeypatch.setattr(Engine, "_forward", limited)

    return patch


def test_a_job_record_says_what_was_made(new):
    store, job = new()
    job_record = store.embed(job)
    work_order = store.work_order(job)
    assert read_json(job_record_path(store.path, job)) == job_record
    assert list(job_record["shards"]) == job_record["made"] == work_order["shard"].drop_duplicates().tolist()
    assert job_record["shards"] == {shard: store.shard_path(shard).stat().st_size for shard in job_record["made"]}
    assert job_record["metrics"] == {shard: facts(metrics_path(store.path, shard)) for shard in job_record["made"]}
    assert (job_record["job"], job_record["sequences"], job_record["residues"]) == (
        job,
        len(work_order),
        work_order["length"].sum(),
    )
    assert job_record["versions"]["torch"] == torch.__version__
    assert job_record["load_seconds"] > 0


def test_a_job_record_leaves_out_metrics_that_are_missing(new):
    store, job = new()
    first = store.embed(job)
    job_record_path(store.path, job).unlink()
    gone, *rest = first["shards"]
    metrics_path(store.path, gone).unlink()
    assert store.embed(job)["metrics"] == {shard: first["metrics"][shard] for shard in rest}


def test_metrics_have_the_columns_of_the_design_and_count_every_residue(new):
    store, job = new()
    store.embed(job, batch_tokens=128)
    rows, work_order = metrics(store), store.work_order(job)
    assert all(list(row) == COLUMNS.split() for row in rows)
    assert len(rows) > work_order["shard"].nunique()
    assert sum(row["n_sequences"] for row in rows) == len(work_order)
    assert sum(row["n_residues"] for row in rows) == work_order["length"].sum()
    for row in rows:
        assert row["n_tokens"] == row["n_residues"] + 2 * row["n_sequences"]
        assert row["min_length"] <= row["mean_length"] <= row["max_length"]
        assert row["mean_length"] == pytest.approx(row["n_residues"] / row["n_sequences"])
        assert row["n_tokens"] <= 128 or row["n_sequences"] == 1
        assert (row["job"], row["precision"], row["oom_splits"]) == (job, "float32", 0)
        assert row["device_ms"] > 0
        assert row["wall_ms"] > 0
    computed, elapsed = (sum(row[key] for row in rows) for key in ("device_ms", "wall_ms"))
    assert computed <= elapsed  # one thread, so one batch at a time


def test_what_the_cpu_does_not_have_is_null_and_never_zero(new):
    store, job = new()
    store.embed(job)
    for row in metrics(store):
        assert (
            row["peak_allocated_bytes"]
            is row["peak_reserved_bytes"]
            is row["gpu_busy"]
            is row["wait_launch_ms"]
            is None
        )
        assert row["wait_read_ms"] >= 0 <= row["wait_write_ms"]
        assert row["peak_rss_bytes"] is None or row["peak_rss_bytes"] > 1 << 20


def test_the_batches_of_a_job_add_up_to_its_time_without_the_models_load(new, monkeypatch):
    original = ShardWriter.write

    def slow(self, *arguments):
        time.sleep(0.06)  # writing, which counts too
        original(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write", slow)

    def is_the_rest_small() -> bool:
        store, job = new()
        began = time.perf_counter()
        job_record = store.embed(job, batch_tokens=256, parity="off")
        elapsed = time.perf_counter() - began - job_record["load_seconds"]
        summed = sum(row["wall_ms"] for row in metrics(store)) / 1000
        assert summed == pytest.approx(job_record["embed_seconds"], abs=0.002)  # rounded to milliseconds
        assert 0.6 < summed < elapsed
        # The rest is the last shard's commit, and opening the work order and the first shard.
        return elapsed - summed <= max(0.1 * elapsed, 0.05)

    assert any(is_the_rest_small() for _ in range(5))  # other work on the machine makes it larger at times


@pytest.mark.parametrize("batches", [0, 1, 5, 9])
def test_a_killed_job_resumes_to_the_same_rows(new, kill_after, monkeypatch, batches, files_in):
    undisturbed, job = new()
    undisturbed.embed(job, batch_tokens=128)
    store, same_job = new()
    assert same_job == job
    kill_after(batches)
    with pytest.raises(Killed):
        store.embed(job, batch_tokens=128)
    monkeypatch.undo()
    finished = {path: path.stat().st_mtime_ns for path in store.shard_files()}
    assert not job_record_path(store.path, job).exists()
    assert [path for path in files_in(store.path) if path.name.startswith(".")] == []
    job_record = store.embed(job, batch_tokens=128)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(job_record["made"]) == len(job_record["shards"]) - len(finished)
    assert store.rows() == undisturbed.rows()
    assert [path.read_bytes() for path in store.shard_files()] == [
        path.read_bytes() for path in undisturbed.shard_files()
    ]


def test_a_job_of_a_killed_run_adds_no_embedding_once_a_later_run_has_other_settings(new, monkeypatch, refused):
    store, job = new()
    original = ShardWriter.write

    def meanwhile(self, *arguments):
        original(self, *arguments)
        for name in ("settings.json", "plan/inputs.json"):  # as a run with other settings removes them
            (store.path / name).unlink(missing_ok=True)

    monkeypatch.setattr(ShardWriter, "write", meanwhile)
    with refused("other settings"):
        store.embed(job)
    assert store.shard_files() == []
    assert load(store.path) is None  # not "settings.json is gone"


def test_kills_fall_between_and_within_shards(new, kill_after):
    store, job = new()
    kill_after(5)
    with pytest.raises(Killed):
        store.embed(job, batch_tokens=128)
    assert 0 < len(store.shard_files()) < store.work_order(job)["shard"].nunique()


def test_embedding_a_finished_job_again_makes_nothing_and_loads_no_model(new, monkeypatch):
    store, job = new()
    store.embed(job)
    before = {path: path.stat().st_mtime_ns for path in store.shard_files()}
    monkeypatch.setattr(embed_job, "open_engine", lambda *_: pytest.fail("the model was loaded"))
    job_record = store.embed(job)
    assert (job_record["made"], job_record["load_seconds"], job_record["embed_seconds"]) == ([], 0, 0)
    assert {path: path.stat().st_mtime_ns for path in store.shard_files()} == before


def test_metrics_of_a_shard_are_there_before_the_shard(new, monkeypatch):
    store, job = new()
    original, seen = ShardWriter.commit, []

    def watched(self):
        seen.append(metrics_path(store.path, self.path.stem).exists() and not self.path.exists())
        original(self)

    monkeypatch.setattr(ShardWriter, "commit", watched)
    store.embed(job)
    assert seen == [True] * store.work_order(job)["shard"].nunique()


def test_a_damaged_shard_is_made_again(new):
    store, job = new()
    store.embed(job)
    rows = store.rows()
    path = store.shard_files()[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert store.embed(job)["made"] == [path.stem]
    assert store.rows() == rows


def test_making_a_damaged_shard_again_says_how_far_it_is(new, monkeypatch):
    monkeypatch.setattr(pipeline, "PROGRESS_SECONDS", 0)  # as if a batch took ten seconds
    store, job = new()
    store.embed(job)
    path = store.shard_files()[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert store.embed(job)["made"] == [path.stem]


@pytest.mark.parametrize("held", [1, 2, 3, 7])
def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_the_rows_stay(new, random_proteins, memory_for, held):
    proteins = random_proteins(32, shortest=32, longest=63)  # one batch: one bin of lengths, 8 tokens short of 2,048
    config = {"storage_dtype": "float32", "outputs": ["residue", "mean", "bos"]}
    whole, job = new(proteins, shard_bytes=1 << 30, **config)
    whole.embed(job)
    store, _ = new(proteins, shard_bytes=1 << 30, **config)
    memory_for(sequences=held)
    store.embed(job)
    (row,) = metrics(store)
    pieces = 32  # halves of 32 are powers of two
    while pieces > held:
        pieces //= 2
    assert row["oom_splits"] == 32 // pieces - 1
    assert set(statuses(store).values()) == {Status.GOOD}
    expected, found = whole.rows(), store.rows()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        ours, theirs = np.frombuffer(value, np.float32), np.frombuffer(expected[key], np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLOAT32_TOLERANCE * max(1.0, np.sqrt(np.mean(theirs**2))))


def test_a_sequence_that_does_not_fit_alone_is_rejected_with_the_reason_and_the_others_stay(
    new, random_proteins, memory_for, digest_of, refused
):
    proteins = random_proteins(20, shortest=33, longest=50) | {"huge": "MKVLA" * 12}
    proteins["twin"] = proteins["huge"]
    store, job = new(proteins, shard_bytes=1 << 30)
    memory_for(residues=50)
    store.embed(job)
    found = statuses(store)
    assert found.pop(digest_of(proteins["huge"])) == Status.DOES_NOT_FIT
    assert set(found.values()) == {Status.GOOD}
    with refused("dataset a: 2 records are rejected", "does_not_fit", "strict"):
        store.assemble("a", strict=True)
    manifest = store.assemble("a")
    assert [manifest[key] for key in ("records", "accepted", "duplicate", "rejected")] == [22, 20, 0, 2]
    assert manifest["reasons"] == {"does_not_fit": 2}
    rejected = duckdb.execute(
        "SELECT id, reason FROM read_csv(?, delim = '\t', header = true)", [str(store.path / "datasets/a/rejected.tsv")]
    ).fetchall()
    assert [name for name, _ in rejected] == ["huge", "twin"]
    # 62 tokens at 44 bytes of float32 a channel, 32 channels
    assert all(reason.startswith("does_not_fit: needs about 0.0 GB") for _, reason in rejected)
    ds = store.open("a")
    assert ds.verify() == len(ds.records)
    assert np.isfinite(ds.pooled()).all()
    for name in ("huge", "twin"):
        with pytest.raises(KeyError, match=f"{name}.*does_not_fit"):
            ds[name]


def test_a_shard_whose_last_write_failed_is_not_made(new, monkeypatch):
    store, job = new(shard_bytes=1 << 30)
    original = ShardWriter.write
    left = [len(list(cut_batches(store.work_order(job)["length"].to_numpy(), 1_024)))]

    def failing(self, *arguments):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, "Input/output error")
        original(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.embed(job, batch_tokens=1_024)
    assert store.shard_files() == []


def test_a_shard_of_a_sequence_that_did_not_fit_alone_is_tried_again_too(new, memory_for, monkeypatch, random_proteins):
    proteins = random_proteins(10, shortest=33, longest=50) | {"huge": "MKVLA" * 40}
    store, first = new(proteins, shard_bytes=14_000)  # the last shard holds the huge one alone
    assert store.work_order(first)["shard"].value_counts().min() == 1
    memory_for(residues=50)
    store.embed(first)
    for _ in range(2):
        store.plan(retry_rejected=True)
        store.embed_all()
        assert store.assemble("a")["reasons"] == {"does_not_fit": 1}
    monkeypatch.undo()
    store.plan(retry_rejected=True)
    store.embed_all()
    for _ in range(2):
        assert store.assemble("a")["accepted"] == 11
        store.plan(retry_rejected=True)


def test_what_did_not_fit_is_taken_up_on_a_larger_device_and_nothing_else_is(
    new, random_proteins, memory_for, monkeypatch, digest_of
):
    proteins = random_proteins(20, shortest=33, longest=50) | {"huge": "MKVLA" * 12, "large": "MKVLA" * 11}
    store, first = new(proteins, shard_bytes=1 << 30)
    memory_for(residues=50)
    store.embed(first)
    store.plan()
    assert store.jobs["job"].tolist() == [first]  # not asked for
    before = store.rows()
    memory_for(residues=55)  # on a device that holds one of them
    store.plan(retry_rejected=True)
    (again,) = set(store.jobs["job"]) - {first}
    assert set(store.work_order(again)["digest"]) == {digest_of(proteins[name]) for name in ("huge", "large")}
    store.embed(again)
    assert store.assemble("a")["reasons"] == {"does_not_fit": 1}
    monkeypatch.undo()  # a device that holds both
    store.plan(retry_rejected=True)
    (last,) = set(store.jobs["job"]) - {first, again}
    assert store.work_order(last)["digest"].tolist() == [digest_of(proteins["huge"])]
    store.embed(last)
    assert store.assemble("a")["reasons"] == {}
    assert store.open("a")["huge"].shape == (60, 32)
    finished = store.jobs
    for retry in (True, False):
        assert store.plan(retry_rejected=retry).equals(finished)
    kept = {
        key: value
        for key, value in store.rows().items()
        if key in before and key[0] not in set(store.work_order(again)["digest"])
    }
    assert kept == {key: value for key, value in before.items() if key in kept}
    assert len(kept) == 2 * 20


def test_a_retry_that_fails_again_is_no_loss_and_can_be_tried_again(new, random_proteins, memory_for, monkeypatch):
    proteins = random_proteins(20, shortest=33, longest=50) | {"huge": "MKVLA" * 12}
    store, first = new(proteins, shard_bytes=1 << 30)
    memory_for(residues=50)
    store.embed(first)
    for _ in range(2):
        store.plan(retry_rejected=True)
        (again,) = set(store.jobs["job"]) - {first}
        assert not job_record_path(store.path, again).exists()
        store.embed(again)
        assert store.assemble("a")["reasons"] == {"does_not_fit": 1}
    store.plan()
    assert store.assemble("a")["reasons"] == {"does_not_fit": 1}
    monkeypatch.undo()
    store.plan(retry_rejected=True)
    store.embed_all()
    assert store.assemble("a")["accepted"] == 21


@pytest.fixture
def spoiled_checkpoint(tiny_checkpoint, tmp_path):
    """The tiny checkpoint with one value for all of tryptophan's embedding."""

    def make(value: float):
        data = torch.load(tiny_checkpoint, weights_only=False)
        data["model"]["encoder.sentence_encoder.embed_tokens.weight"][22] = value  # W
        torch.save(data, tmp_path / "spoiled.pt")
        return tmp_path / "spoiled.pt"

    return make


@pytest.mark.parametrize(
    ("value", "config", "good"),
    [
        pytest.param(1e5, {"layers": [0]}, False, id="beyond-float16-storage"),
        pytest.param(1e5, {"layers": [0], "storage_dtype": "float32"}, True, id="within-float32-storage"),
        pytest.param(1e5, {"layers": [0], "outputs": ["mean"]}, True, id="means-are-float32"),
        pytest.param(
            1e5, {"layers": [0], "precision": "float16", "storage_dtype": "float32"}, True, id="sums-are-float32"
        ),
        pytest.param(3e38, {"storage_dtype": "float32"}, False, id="beyond-float32"),
        pytest.param(3e38, {"storage_dtype": "float32", "outputs": ["mean", "bos"]}, False, id="pooled-beyond-float32"),
    ],
)
def test_what_overflows_is_nan_in_the_sequences_concerned_alone(
    new, random_proteins, spoiled_checkpoint, digest_of, value, config, good
):
    proteins = random_proteins(40, shortest=30, longest=31)
    store, _ = new(proteins, shard_bytes=1 << 30, checkpoint=spoiled_checkpoint(value), **config)
    clean, _ = new(proteins, shard_bytes=1 << 30, **config)
    for each in (store, clean):
        each.embed(each.jobs["job"].iloc[0])
    concerned = {digest_of(sequence) for sequence in proteins.values() if "W" in sequence}
    assert 0 < len(concerned) < len(proteins)
    expected = Status.NON_FINITE if not good else Status.GOOD
    assert statuses(store) == {
        digest_of(s): expected if digest_of(s) in concerned else Status.GOOD for s in proteins.values()
    }
    rows, untouched = store.rows(), clean.rows()
    for (digest, name), value_bytes in rows.items():
        dtype = np.dtype(config.get("storage_dtype", "float16") if name.startswith("layer_") else np.float32)
        values = np.frombuffer(value_bytes, dtype)
        if digest not in concerned:
            np.testing.assert_array_equal(values, np.frombuffer(untouched[digest, name], dtype))
        elif good:
            assert np.isfinite(values).all()
        else:
            assert np.isnan(values).all()
    assert [Shard(path).damaged() for path in store.shard_files()] == [[]]
    manifest = store.assemble("a")
    assert manifest["reasons"] == ({} if good else {"non_finite": len(concerned)})
    assert manifest["accepted"] == len(proteins) - (0 if good else len(concerned))
    if not good:
        (reason,) = set(store.open("a").records["reason"].dropna()) - {""}
        assert ("set storage_dtype to float32" in reason) == (store.settings["storage_dtype"] == "float16")
        assert "set precision" not in reason
        assert "weights make numbers beyond float32" in reason


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_what_overflows_float16_is_computed_again_in_float32(
    new, random_proteins, tiny_checkpoint, tmp_path, digest_of, caplog, precision
):
    """Tryptophan's embedding has one large channel, which a product of the feed-forward part takes beyond 65,504."""
    data = torch.load(tiny_checkpoint, weights_only=False)
    encoder = "encoder.sentence_encoder."
    data["model"][f"{encoder}embed_tokens.weight"][22] = torch.eye(32)[0] * 1e3  # W
    data["model"][f"{encoder}layers.0.fc1.weight"][0] = torch.eye(32)[0] * 1.5e4
    torch.save(data, tmp_path / "hot.pt")
    proteins = random_proteins(40, shortest=30, longest=31)
    config = {"checkpoint": tmp_path / "hot.pt", "storage_dtype": "float32", "layers": [1]}
    store, job = new(proteins, shard_bytes=1 << 30, precision=precision, **config)
    store.embed(job)
    exact, _ = new(proteins, shard_bytes=1 << 30, precision="float32", **config)
    exact.embed(job := exact.jobs["job"].iloc[0], batch_tokens=16)  # each sequence alone
    assert set(statuses(store).values()) == {Status.GOOD}
    concerned = {digest_of(sequence) for sequence in proteins.values() if "W" in sequence}
    again = [row for row in metrics(store) if row["precision"] != precision]
    if precision == "float32":
        assert again == []
        return
    assert f"{len(concerned)} sequences overflowed float16; computed again in float32" in caplog.text
    assert [row["n_sequences"] for row in again] == [1] * len(concerned)
    rows, expected = store.rows(), exact.rows()
    same = {digest for digest, name in rows if name == "layer_1" and rows[digest, name] == expected[digest, name]}
    assert same == concerned
    assert [Shard(path).damaged() for path in store.shard_files()] == [[]]


def test_a_cpu_without_the_memory_rejects_the_sequence_and_goes_on(new, random_proteins, digest_of):
    """A real refusal: this process may not take more address space."""
    warm, job = new()
    warm.embed(job)  # so that all libraries have their memory
    store, job = new({"huge": "MKVLA" * 80_000, **random_proteins(5)}, shard_bytes=1 << 30, job_seconds=1e9)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20), limits[1]))
    try:
        store.embed(job)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    found = statuses(store)
    assert found.pop(digest_of("MKVLA" * 80_000)) == Status.DOES_NOT_FIT
    assert set(found.values()) == {Status.GOOD}


def test_a_streamed_job_may_have_more_shards_than_a_process_may_open_files(new, random_proteins):
    """A wave has the batches of many shards, as far as they can be open at once."""
    warm, job = new()
    warm.embed(job, residency="streamed")  # so that files that stay open are
    store, job = new(random_proteins(200), shard_bytes=5_000)
    shards = store.work_order(job)["shard"].nunique()
    n_open = len(os.listdir("/proc/self/fd"))
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert shards > 2 * (n_open + 20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * (n_open + 20), hard))
    try:
        store.embed(job, residency="streamed")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    assert len(store.shard_files()) == shards


def test_a_dataset_misses_no_record_silently(new, refused):
    store, job = new()
    store.embed(job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "jobs_of", lambda *_: [])
        with refused("dataset a", "60 records have no embedding", "'p0'"):
            store.assemble("a")
    assert not (store.path / "datasets" / "a" / "manifest.json").exists()


def test_a_shard_of_other_sequences_than_its_name_says_is_refused(new, refused):
    store, job = new()
    store.embed(job)
    one, other = store.shard_files()[:2]
    one.write_bytes(other.read_bytes())
    with refused(one.name, "other sequences"):
        store.assemble("a")


def test_weights_that_are_gone_are_one_line(new, refused, tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy.pt"
    copy.write_bytes(tiny_checkpoint.read_bytes())
    store, job = new(checkpoint=copy)
    copy.unlink()
    with refused("copy.pt", "is gone"):
        store.embed(job)
    assert store.shard_files() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line_and_nothing_falls_back(new, refused):
    store, job = new()
    with refused("device: cuda"):
        store.embed(job, device="cuda")
    assert store.shard_files() == []


@pytest.mark.parametrize("seed", range(10))
def test_batches_cover_every_sequence_once_within_the_budget_and_one_bin(seed):
    rng = np.random.default_rng(seed)
    lengths, budget = np.sort(rng.integers(1, 2000, size=200)), int(rng.integers(16, 4096))
    bounds = list(cut_batches(lengths, budget))
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == len(lengths)
    for start, stop in bounds:
        batch = lengths[start:stop]
        assert (batch + 2).sum() <= budget or len(batch) == 1
        assert np.floor(np.log2(batch[0])) == np.floor(np.log2(batch[-1]))
        longer = lengths[start : stop + 1]  # with the next sequence, if there is one
        is_full = (longer + 2).sum() > budget or np.floor(np.log2(batch[0])) != np.floor(np.log2(longer[-1]))
        assert is_full or stop == len(lengths)


def test_no_sequences_make_no_batch():
    assert list(cut_batches(np.array([], int), 100)) == []


def test_weights_that_changed_since_the_store_was_made_are_refused(new, refused, tiny_checkpoint, tmp_path):
    """The Snakefile was parsed with the right checkpoint; each job looks again."""
    copy = tmp_path / "copy.pt"
    copy.write_bytes(tiny_checkpoint.read_bytes())
    store, job = new(checkpoint=copy)
    copy.write_bytes(tiny_checkpoint.read_bytes() + b"0")
    with refused("copy.pt", "is not the checkpoint that this store was made with"):
        store.embed(job)
    assert store.shard_files() == []
