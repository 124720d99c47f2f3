"""The whole engine on a pretended device, held against the engine on the CPU."""

import numpy as np
import pytest
import torch
from order import CONTEXT_BYTES, SEGMENT_BYTES
from pretend import Card, Device
from rehearsal import (
    BATCHES,
    HOPPER,
    TURING,
    embed,
    load,
    pretended,
    random_sequences,
    rms,
    rows,
    the_host_waits_for_results_alone,
)

from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MEMORY_MARGIN, ModelConfig
from lengthwise.esm2.status import Status
from lengthwise.store.metrics import read_metrics
from lengthwise.store.paths import metrics_path

# Heads of 16 channels, as 8M's, and of 24, as 35M's.
SHAPES = {16: ModelConfig(3, 64, 4), 24: ModelConfig(3, 72, 3)}
CUBLAS = "CUDA error: CUBLAS_STATUS_{} when calling `cublasCreate(handle)`"
REFUSALS = {
    "torch": torch.OutOfMemoryError,
    "driver": lambda _: RuntimeError("CUDA error: out of memory"),
    "cuBLAS, alloc": lambda _: RuntimeError(CUBLAS.format("ALLOC_FAILED")),
    "cuBLAS, handle": lambda _: RuntimeError(CUBLAS.format("NOT_INITIALIZED")),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """{channels of a head: a random checkpoint}"""
    folder = tmp_path_factory.mktemp("weights")
    for channels, shape in SHAPES.items():
        write_random(folder / f"{channels}.pt", shape)
    return {channels: folder / f"{channels}.pt" for channels in SHAPES}


@pytest.fixture(scope="module")
def on_cpu(weights):
    """Rows of `BATCHES` from the engine on the CPU, by channels and precision."""
    found = {}

    def make(channels, precision):
        key = channels, precision
        if key not in found:
            found[key] = rows(list(load(weights[channels], "cpu", precision).embed(BATCHES)))
        return found[key]

    return make


@pytest.mark.parametrize("channels", SHAPES)
@pytest.mark.parametrize("capability", [TURING, HOPPER], ids=["padded", "varlen"])
@pytest.mark.parametrize("precision", DTYPES)
def test_every_type_and_path_gives_the_numbers_of_the_cpu(weights, on_cpu, precision, capability, channels):
    exact, expected = on_cpu(channels, "float32"), on_cpu(channels, precision)
    found = rows(embed(weights[channels], precision, Card(capability=capability)))
    assert found.keys() == expected.keys()
    for name, right in exact.items():
        if precision == "float32":  # another order of sums
            assert np.abs(found[name] - right).max() <= 2e-5 * rms(right), name
        else:  # rounding moves them as far as on the CPU
            assert 0.3 < rms(found[name] - right) / rms(expected[name] - right) < 1.5, name


def test_variable_length_attention_is_used_where_the_card_has_it(weights):
    for capability, precision, used in (
        (HOPPER, "float16", True),
        (HOPPER, "float32", False),
        (TURING, "float16", False),
    ):
        with pretended(Card(capability=capability)) as device:
            list(load(weights[16], "cuda", precision).embed(BATCHES[:1]))
            assert (device.counts["varlen_attn"] > 0) == used


def test_the_next_batch_is_started_before_the_results_of_one_are_awaited(weights):
    with pretended() as device:
        results = load(weights[16], "cuda", "float16").embed(BATCHES)
        next(results)
        copied_in, awaited = device.counts["copies in"], device.waits["Event.synchronize"]
        next(results)
        assert awaited == 1
        assert device.waits["Event.synchronize"] == 2
        assert device.counts["copies in"] > copied_in
        list(results)


def test_a_batch_costs_one_query_of_the_allocator(weights):
    with pretended() as device:
        engine = load(weights[16], "cuda", "float16")
        device.counts["memory_stats"] = 0
        list(engine.embed(BATCHES))
        assert device.counts["memory_stats"] == len(BATCHES)


def pass_bytes(engine, batch) -> int:
    """Peak memory of a batch beside the weights."""
    before = torch.cuda.memory_allocated()
    (result,) = engine.embed([batch])
    return result.peak_allocated_bytes - before


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("capability", [TURING, HOPPER], ids=["padded", "varlen"])
def test_a_batch_that_memory_does_not_hold_is_halved(weights, capability, refusal):
    batches = [random_sequences([60] * 16, seed) for seed in range(4)]
    expected = rows(list(load(weights[16], "cpu", "float32").embed(batches)))
    with pretended(Card(capability=capability)) as device:
        engine = load(weights[16], "cuda", "float32")
        before = device.live_bytes
        device.out_of_memory = REFUSALS[refusal]
        # Room for a quarter of a batch, while the quarter before it is copied out.
        device.limit_bytes = before + 0.4 * pass_bytes(engine, batches[0])
        results = list(engine.embed(batches))
        assert device.live_bytes == before
    assert [result.oom_splits for result in results] == [3] * 4
    found = rows(results)
    for name, right in expected.items():
        assert np.abs(found[name] - right).max() <= 2e-5 * rms(right)


def test_a_size_that_was_refused_is_not_tried_again(weights):
    batch = random_sequences([60] * 16)
    with pretended() as device:
        engine = load(weights[16], "cuda", "float32")
        device.limit_bytes = device.live_bytes + 0.95 * pass_bytes(engine, batch)
        list(engine.embed([batch]))
        refused = device.counts["refused"]
        assert refused > 0
        list(engine.embed([batch] * 3))
        assert device.counts["refused"] == refused


@pytest.mark.parametrize("refused", range(1, 120, 7))
def test_an_allocation_that_fails_once_anywhere_costs_nothing(weights, refused):
    """Memory that other processes held for a moment: the pass is tried again."""
    expected = rows(embed(weights[16], "float32"))
    with pretended() as device:
        engine = load(weights[16], "cuda", "float32")
        device.refuse_after(refused)
        results = list(engine.embed(BATCHES))
        assert device.counts["refused"] == 1
    found = rows(results)
    assert sum(result.oom_splits for result in results) == 0
    assert all(np.array_equal(found[name], right) for name, right in expected.items())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_sequence_that_does_not_fit_even_alone_is_nan_and_the_others_are_there(weights, caplog, precision):
    batches = [random_sequences([30, 40]), random_sequences([3_000]), random_sequences([50] * 4)]
    with pretended() as device:
        engine = load(weights[16], "cuda", precision)
        before = device.live_bytes
        device.limit_bytes = before + engine.bytes_per_token * 1_000
        results = list(engine.embed(batches))
        assert device.live_bytes == before
    assert [result.status.tolist() for result in results] == [
        [Status.GOOD] * 2,
        [Status.DOES_NOT_FIT],
        [Status.GOOD] * 4,
    ]
    assert {name: np.isnan(array).all() for name, array in results[1].arrays.items()} == dict.fromkeys(
        results[1].arrays, True
    )
    assert all(np.isfinite(array).all() for result in results[::2] for array in result.arrays.values())
    assert "a sequence of 3,000 residues does not fit into the memory of NVIDIA Pretended 100" in caplog.text


def auto_on(path, precision: str, tokens: float, capability=HOPPER, formula_factor: float = 1.0):
    """The automatic batch size where the formula lets so many tokens into the margin, with the engine and its device."""
    device = Device(Card(capability=capability))
    with device.installed():
        engine = load(path, "cuda", precision)
        device.empty_cache()
        device.limit_bytes = device.reserved_bytes + tokens * engine.bytes_per_token / MEMORY_MARGIN
        if formula_factor != 1.0:
            engine.__class__ = type("", (Engine,), {"bytes_per_token": int(formula_factor * engine.bytes_per_token)})
        return engine.auto_batch_tokens(), engine, device


def test_automatic_batches_keep_a_large_card_busy(weights):
    tokens, _, device = auto_on(weights[16], "float16", 1e6)
    assert tokens == AUTO_BATCH_TOKENS["cuda"]
    assert device.out_of_order == []


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_automatic_batches_of_any_lengths_fit_into_a_small_card(weights, precision):
    """The padded path takes most where one sequence of a batch is twice as long as the others."""
    tokens, engine, device = auto_on(weights[16], precision, 10_000, TURING)
    assert 6_000 < tokens < 11_500
    batches = [random_sequences([256] * ((tokens - 513) // 258) + [511]), random_sequences([300] * (tokens // 302))]
    with device.installed():
        list(engine.embed(batches * 2))
    assert device.counts["refused"] == 0


def test_automatic_batches_grow_where_a_pass_needs_less_than_the_formula(weights):
    """As compiled layers do."""
    tokens, engine, device = auto_on(weights[16], "float16", 8_000, formula_factor=2)
    assert 6_000 < tokens < 9_000
    with device.installed():
        (result,) = engine.embed([random_sequences([300] * (tokens // 302))])
    assert result.oom_splits == 0


def test_automatic_batches_shrink_where_a_pass_needs_more_than_the_formula(weights):
    tokens, engine, device = auto_on(weights[16], "float16", 8_000, formula_factor=0.4)
    assert 1_024 < tokens < 10_500
    with device.installed():
        results = list(engine.embed([random_sequences([300] * (tokens // 302))] * 3))
    assert [result.oom_splits for result in results] == [0] * 3


@pytest.fixture
def hot_checkpoint(tiny_checkpoint, tmp_path):
    """Tryptophan overflows float16 in the first layer's feed-forward part."""
    data = torch.load(tiny_checkpoint, weights_only=False)
    data["model"]["encoder.sentence_encoder.embed_tokens.weight"][22] = torch.eye(32)[0] * 1e3
    data["model"]["encoder.sentence_encoder.layers.0.fc1.weight"][0] = torch.eye(32)[0] * 1.5e4
    torch.save(data, tmp_path / "hot.pt")
    return tmp_path / "hot.pt"


def test_a_job_repairs_what_overflows_and_its_shards_are_those_of_a_cpu(
    small_store, random_proteins, hot_checkpoint, caplog
):
    proteins = random_proteins(40, shortest=30, longest=60)
    stores = {}
    for device in ("cpu", "cuda"):
        store = stores[device] = small_store(
            hot_checkpoint, device=device, precision="float16", storage_dtype="float32", layers=[1]
        )
        store.ingest("a", proteins)
        store.plan()
    (job,) = stores["cpu"].jobs["job"]
    stores["cpu"].embed(job, batch_tokens=500)
    (job,) = stores["cuda"].jobs["job"]
    caplog.clear()
    with pretended() as device:
        record = stores["cuda"].embed(job, batch_tokens=500)
        assert device.live_bytes == 0
    assert record["device"] == "NVIDIA Pretended 100"
    concerned = sum("W" in sequence for sequence in proteins.values())
    assert f"{concerned} sequences overflowed float16; computed again in float32" in caplog.text
    expected = stores["cpu"].rows()
    for key, values in stores["cuda"].rows().items():
        found, right = (np.frombuffer(each, np.float32) for each in (values, expected[key]))
        np.testing.assert_allclose(found, right, rtol=0, atol=0.02 * rms(right))
    metrics = read_metrics(metrics_path(stores["cuda"].path, shard) for shard in record["shards"])
    assert metrics["precision"].value_counts()["float32"] == concerned
    assert metrics["n_residues"].sum() >= sum(map(len, proteins.values()))
    assert (metrics["peak_allocated_bytes"] > 0).all()
    assert (metrics["peak_reserved_bytes"] >= metrics["peak_allocated_bytes"]).all()
    assert metrics["peak_rss_bytes"].isna().all()
    assert (metrics["device_ms"] > 0).all()


@pytest.mark.parametrize("precision", DTYPES)
def test_a_job_takes_its_parity_receipt_on_the_device(small_store, random_proteins, precision):
    store = small_store(device="cuda", precision=precision)
    store.ingest("a", random_proteins(30))
    (job,) = store.plan()["job"]
    with pretended() as device:
        record = store.embed(job)
        assert device.live_bytes == 0
    assert record["parity"]["truth"] == "float64"
    assert record["parity"]["engine"]["share_of_limit"] < 0.6
    assert record["parity"]["stored"]["share_of_limit"] < 0.6
    assert record["parity"]["not_compared"] == {}


def test_a_parity_receipt_that_memory_does_not_hold_is_skipped(small_store, random_proteins):
    store = small_store(device="cuda", precision="float16")
    store.ingest("a", random_proteins(30))
    (job,) = store.plan()["job"]
    with pretended(Card(total_bytes=CONTEXT_BYTES + SEGMENT_BYTES + 100_000)):
        record = store.embed(job, batch_tokens=200)
    assert "skipped" in record["parity"]
    assert record["made_residues"] == record["residues"]


def test_compiled_layers_are_used_where_there_is_a_compiler(weights, caplog):
    with pretended() as device:
        engine = load(weights[16], "cuda", "float16", compile=True)
        assert device.counts["compile"] > 0
        with the_host_waits_for_results_alone(device, len(BATCHES)):
            list(engine.embed(BATCHES))
    assert "uncompiled" not in caplog.text
