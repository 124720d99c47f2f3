"""Parity: an engine or a writer that is wrong fails the job; one that is right leaves a receipt, once for a device."""

import json
import re

import numpy as np
import pytest
import torch

from lengthwise.esm2 import engine
from lengthwise.esm2.checkpoint import reference_model
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.status import Status
from lengthwise.ingest.digests import digest_name
from lengthwise.jobs import embed_job, parity
from lengthwise.store.paths import job_record_path
from lengthwise.store.shard import Shard
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.system.files import read_json


@pytest.fixture
def new(small_store, random_proteins):
    """Makes a store of one planned job of several shards."""

    def make(proteins=None, job_seconds: float = 1200.0, **config):
        store = small_store(**config)
        store.ingest("a", proteins or random_proteins(30))
        return store, store.plan(shard_bytes=8_000, job_seconds=job_seconds)["job"].tolist()

    return make


@pytest.fixture
def references(monkeypatch):
    """Counts how often fair-esm is asked."""
    asked = []
    monkeypatch.setattr(parity, "reference_model", lambda *given: asked.append(given) or reference_model(*given))
    return asked


@pytest.mark.parametrize(
    ("config", "error", "cosine"),
    [
        ({"storage_dtype": "float32"}, (1e-9, 2e-5), 1 - 1e-9),
        ({"storage_dtype": "float16"}, (1e-5, 2e-3), 1 - 1e-6),
        ({"precision": "bfloat16"}, (1e-4, 1e-1), 0.999),
        ({"precision": "float16"}, (1e-5, 1e-2), 0.9999),
        ({"layers": [0, 1, 2], "outputs": ["residue", "mean", "bos"]}, (1e-5, 2e-3), 1 - 1e-6),
        ({"outputs": ["mean"]}, (1e-9, 2e-5), 1 - 1e-9),
    ],
    ids=str,
)
def test_a_receipt_says_how_far_stored_rows_are_from_fair_esms(new, config, error, cosine):
    store, (job,) = new(**config)
    receipt = store.embed(job)["parity"]
    assert error[0] < receipt["max_error_over_rms"] < error[1]
    assert cosine < receipt["min_cosine"] <= 1 + 1e-9
    lengths = store.work_order(job)["length"].sort_values().tolist()
    assert [each["residues"] for each in receipt["compared"]] == [lengths[0], lengths[len(lengths) // 2], lengths[-1]]
    assert "cosine" in receipt["bound"] if "precision" in config else "RMS" in receipt["bound"]


def test_the_error_in_a_receipt_is_the_largest_of_what_is_stored(new):
    """Against an own computation over the sequences that it names."""
    store, (job,) = new(layers=[1], outputs=["residue"], storage_dtype="float32")
    receipt = store.embed(job)["parity"]
    stored = {digest_name(digest): rows for (digest, name), rows in store.rows().items() if name == "layer_1"}
    sequences = {digest_name(row.digest): row.sequence.decode() for row in store.work_order(job).itertuples()}
    model = reference_model(store.config["model"])
    errors, shares = [], []
    for each in receipt["compared"]:
        _, _, tokens = model.alphabet.get_batch_converter()([("", sequences[each["digest"]])])
        with torch.inference_mode():
            right = model(tokens, repr_layers=[1])["representations"][1][0, 1:-1].numpy()
        ours = np.frombuffer(stored[each["digest"]], np.float32).reshape(right.shape)
        rms = np.sqrt(np.mean(right**2))
        errors.append(np.abs(ours - right).max() / rms)
        shares.append((np.abs(ours - right) / (2e-5 * np.maximum(max(1, rms), np.abs(right)))).max())
        assert errors[-1] == pytest.approx(each["max_error_over_rms"], rel=1e-2)
    assert max(errors) == pytest.approx(receipt["max_error_over_rms"], rel=1e-2)
    assert max(shares) == pytest.approx(receipt["share_of_bound"], rel=1e-2)
    assert 0 < receipt["share_of_bound"] < 1


def test_a_device_is_compared_once_and_again_with_other_versions(new, references, monkeypatch):
    store, jobs = new(job_seconds=1e-9)
    first, second, third = (store.embed(job) for job in jobs[:3])
    assert len(references) == 1
    assert first["parity"] == second["parity"] == third["parity"]
    monkeypatch.setattr(embed_job, "versions", lambda: {"torch": "9.9"})
    store.embed(jobs[3])
    assert len(references) == 2
    files = [json.loads(path.read_text()) for path in (store.path / "parity").iterdir()]
    assert sorted(file["versions"]["torch"] for file in files) == sorted([torch.__version__, "9.9"])
    assert all(file["device"] == first["device"] for file in files)


@pytest.mark.parametrize("text", ["", "{}"])
def test_a_damaged_receipt_is_made_again(new, references, text):
    store, jobs = new(job_seconds=1e-9)
    first = store.embed(jobs[0])
    (path,) = (store.path / "parity").iterdir()
    path.write_text(text)
    store.embed(jobs[1])
    assert len(references) == 2
    assert read_json(path)["device"] == first["device"]


def assert_it_fails(store, job, refused, *words):
    with refused("not what fair-esm computes", ".safetensors", "removed", *words):
        store.embed(job)
    assert not job_record_path(store.path, job).exists()
    assert store.shard_files() == []
    assert not (store.path / "parity").exists()


def test_a_wrong_rotary_frequency_fails_the_job_and_removes_its_shards(new, refused, monkeypatch):
    """A tenth of a percent: what recomputing the rounded frequencies of a checkpoint comes to."""
    store, (job,) = new()

    def wrong(*arguments):
        model = load(*arguments)
        model.inv_freq.mul_(1.001)
        return model

    load = engine.load_model
    with monkeypatch.context() as patch:
        patch.setattr(engine, "load_model", wrong)
        assert_it_fails(store, job, refused, "layer_2", "RMS")
    assert store.embed(job)["parity"]["compared"]


@pytest.mark.parametrize("name", ["layer_0", "layer_2", "mean_0", "mean_2", "bos_0", "bos_2"])
def test_whichever_tensor_is_wrong_is_found(new, refused, monkeypatch, name):
    store, (job,) = new(layers=[0, -1], outputs=["residue", "mean", "bos"])
    pool = Output.pool

    def wrong(self, hidden, packing):
        results = pool(self, hidden, packing)
        results[name] += 0.01
        return results

    monkeypatch.setattr(Output, "pool", wrong)
    assert_it_fails(store, job, refused, name)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_that_is_wrong_fails_the_job(new, refused, monkeypatch, precision):
    store, (job,) = new(precision=precision)
    pool = Output.pool

    def wrong(self, hidden, packing):
        return pool(self, {layer: rows.roll(1, 0) for layer, rows in hidden.items()}, packing)

    monkeypatch.setattr(Output, "pool", wrong)
    assert_it_fails(store, job, refused, "cosine")


def test_what_is_compared_is_what_is_stored(new, refused, monkeypatch):
    """Rows of another residue, right in memory and wrong in the file."""
    store, (job,) = new()
    write = ShardWriter.write

    def wrong(self, first, arrays, lengths, status):
        write(self, first, {n: np.roll(a, 1, 0) if n == "layer_2" else a for n, a in arrays.items()}, lengths, status)

    monkeypatch.setattr(ShardWriter, "write", wrong)
    assert_it_fails(store, job, refused, "layer_2")


def test_shards_that_were_there_before_are_left_in_place(new, refused, monkeypatch):
    store, (job,) = new()
    monkeypatch.setattr(embed_job, "receipt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.embed(job)
    monkeypatch.undo()
    before = store.rows()
    monkeypatch.setattr(parity, "FLOAT32_TOLERANCE", 0.0)
    monkeypatch.setattr(parity, "FLOAT16_ROUNDING", 0.0)
    with refused("not what fair-esm computes", "remove that file"):
        store.embed(job)
    assert store.rows() == before
    assert not job_record_path(store.path, job).exists()


def test_long_sequences_are_not_compared(new, random_proteins):
    proteins = random_proteins(3, 1_200, 1_300) | random_proteins(3, 20, 30, prefix="short")
    store, (job,) = new(proteins, outputs=["mean"])
    assert max(each["residues"] for each in store.embed(job)["parity"]["compared"]) <= 30
    store, (job,) = new(random_proteins(3, 1_200, 1_300), outputs=["mean"])
    assert "no sequence that is short enough" in store.embed(job)["parity"]["skipped"]
    assert not (store.path / "parity").exists()


def test_what_would_take_long_is_not_compared(new, monkeypatch):
    monkeypatch.setattr(parity, "MAX_SECONDS", 1e-9)
    store, (job,) = new()
    assert "skipped" in store.embed(job)["parity"]


def test_a_reference_that_does_not_fit_is_skipped_with_the_reason(new, monkeypatch, references):
    store, (job,) = new()
    monkeypatch.setattr(parity, "host_available", lambda: 1_000)
    assert re.fullmatch(r"fair-esm needs \S+ GB in float32, and 0\.0 GB .*", store.embed(job)["parity"]["skipped"])
    assert references == []
    assert job_record_path(store.path, job).exists()


def test_sequences_that_overflowed_are_not_compared(new, monkeypatch):
    store, (job,) = new()
    status = engine.finite_status
    monkeypatch.setattr(engine, "finite_status", lambda *a: torch.full_like(status(*a), Status.NON_FINITE))
    assert "skipped" in store.embed(job)["parity"]
    assert all((Shard(path)["status"] == Status.NON_FINITE).all() for path in store.shard_files())
