"""Weights streamed to a pretended card: its order, its memory, and the numbers of the resident engine."""

import itertools

import numpy as np
import pytest
import torch
from order import Event, OutOfOrder, Stream
from pretend import Card, Device
from rehearsal import BATCHES, HOPPER, OUTPUTS, TURING, load, pretended, random_sequences, rows

from lengthwise.esm2 import streamed
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.residency import LAYERS_ON_HOST, PINNED_SHARE, layer_bytes
from lengthwise.esm2.shapes import MEMORY_MARGIN, ModelConfig
from lengthwise.esm2.status import Status
from lengthwise.esm2.streamed import StreamedEngine, open_engine

SHAPE = ModelConfig(6, 64, 4)
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "six_layers.pt"
    write_random(path, SHAPE)
    return path


def stream(weights, precision="float16", compile=False) -> StreamedEngine:
    return StreamedEngine(weights, CUDA, precision, Output((5, 6), OUTPUTS, "float32"), compile)


@pytest.mark.parametrize("capability", [TURING, HOPPER], ids=["padded", "varlen"])
@pytest.mark.parametrize("precision", DTYPES)
def test_the_numbers_are_those_of_the_resident_engine(weights, precision, capability):
    with pretended(Card(capability=capability)):
        expected = rows(list(load(weights, "cuda", precision).embed(BATCHES)))
        results = list(stream(weights, precision).embed(BATCHES))
    assert all((result.status == Status.GOOD).all() for result in results)
    found = rows(results)
    assert all(np.array_equal(found[name], right) for name, right in expected.items())


def test_compiled_layers_stream_too(weights):
    with pretended() as device:
        engine = stream(weights, compile=True)
        assert engine.model.compiled
        (result,) = engine.embed(BATCHES[:1])
        assert (result.status == Status.GOOD).all()
        assert device.counts["compile"] > 0


def test_compiling_reads_two_layers_once_and_its_time_is_no_waves(weights, monkeypatch):
    read, load_layer = [], streamed.load_layer
    monkeypatch.setattr(
        streamed,
        "load_layer",
        lambda path, index, *rest, **more: read.append(index) or load_layer(path, index, *rest, **more),
    )
    with pretended():
        engine = StreamedEngine(weights, CUDA, "float16", Output((5, 6), (*OUTPUTS, "logits"), "float32"), compile=True)
    assert engine.model.compiled
    assert read == [0, 1]
    assert engine.output.layers == (5, 6)
    assert engine.flops_per_second is None


def test_results_of_a_wave_are_no_more_than_the_host_holds_in_pinned_memory(weights, monkeypatch):
    output = Output((5, 6), OUTPUTS, "float32")

    def pinned(wave):
        # In two layers: a row of float32 for each residue, and two for each sequence, its mean and BOS.
        return 2 * 4 * SHAPE.embed_dim * sum(len(batch.tokens) for batch in wave)

    room = 2 * 4 * SHAPE.embed_dim * 500
    free = (room / PINNED_SHARE + LAYERS_ON_HOST * layer_bytes(SHAPE, 4)) / MEMORY_MARGIN
    monkeypatch.setattr(streamed, "host_available", lambda: free + 1)
    waves, through = [], StreamedEngine._through_layers
    monkeypatch.setattr(StreamedEngine, "_through_layers", lambda self, wave: waves.append(wave) or through(self, wave))
    with pretended():
        engine = StreamedEngine(weights, CUDA, "float16", output)
        (*_, last) = engine.embed(BATCHES)
    assert sum(array.nbytes for array in last.arrays.values()) == pinned(waves[-1][-1:])
    assert all(pinned(wave) <= room or len(wave) == 1 for wave in waves)
    assert all(pinned([*wave, following[0]]) > room for wave, following in itertools.pairwise(waves))


def test_the_speed_of_a_wave_is_measured_so_that_the_next_lasts_no_longer_than_it_should(weights):
    with pretended():
        engine = stream(weights)
        assumed = engine._wave_limits()[0]
        results = list(engine.embed(BATCHES[:2]))
    assert engine.flops_per_second > 0
    assert engine._wave_limits()[0] != assumed
    assert all(result.wall_ms > 0 for result in results)


def test_within_a_wave_the_host_waits_for_nothing_but_the_loading_thread_for_room(weights):
    with pretended() as device:
        engine, before = stream(weights), device.waits.copy()
        list(engine.embed(BATCHES))
    # Each batch's results, and the loading thread from the third layer on.
    assert dict(device.waits - before) == {"Event.synchronize": len(BATCHES) + SHAPE.num_layers - 2}


@pytest.mark.parametrize("compile", [False, True])
def test_no_more_than_two_layers_are_on_the_card(tmp_path, compile):
    batch, peaks = [random_sequences([20])], {}
    for layers in (1, 2, 6):
        path = tmp_path / f"{layers}.pt"
        write_random(path, ModelConfig(layers, 256, 4))
        with pretended() as device:
            engine = StreamedEngine(path, CUDA, "float16", Output((layers,), ("mean",), "float32"), compile)
            device.reset_peaks()
            list(engine.embed(batch))
            peaks[layers] = device.peak_bytes
    one = layer_bytes(ModelConfig(1, 256, 4), 2)
    # Whether a copy falls together with a pass's own tensors is chance; a third layer would be all of one.
    assert peaks[2] - peaks[1] > 0.5 * one
    assert peaks[6] - peaks[2] < 0.5 * one


def test_a_refused_allocation_anywhere_in_a_wave_costs_no_batch(weights):
    with pretended():
        expected = rows(list(stream(weights).embed(BATCHES)))
    for allocation in range(0, 200, 9):
        with pretended() as device:
            engine = stream(weights)
            device.refuse_after(allocation)
            results = list(engine.embed(BATCHES))
        assert all((result.status == Status.GOOD).all() for result in results), allocation
        found = rows(results)
        assert all(np.allclose(found[name], right, atol=1e-2) for name, right in expected.items())


def forget_the_copies(monkeypatch):
    """A layer computes with weights that are still on their way."""
    wait_event = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: self.name != "default" and wait_event(self, event))


def forget_the_use(monkeypatch):
    """The next layer but one is copied over weights that are still read."""
    monkeypatch.setattr(Device, "record_stream", lambda *_: None)


@pytest.mark.parametrize("plant", [forget_the_copies, forget_the_use])
def test_a_planted_bug_of_order_is_caught(weights, monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises((OutOfOrder, AssertionError)), pretended():
        list(stream(weights).embed(BATCHES))


def test_without_the_wait_for_room_more_layers_would_be_on_the_card(weights, monkeypatch):
    """The host launches far ahead of a GPU; the loading thread is what holds it back."""
    asked, synchronize = [], Event.synchronize
    monkeypatch.setattr(Event, "synchronize", lambda self: asked.append(self) or synchronize(self))
    with pretended():
        list(stream(weights).embed(BATCHES[:1]))
    assert len(asked) == 1 + SHAPE.num_layers - 2


def test_a_card_that_holds_no_whole_model_gets_it_streamed(weights, caplog):
    caplog.set_level("INFO")
    output = Output((6,), ("mean",), "float32")
    with pretended() as device:
        list(load(weights, "cuda", "float32").embed(BATCHES))
        device.limit_bytes = device.live_bytes + 4 * SHAPE.parameters
        engine = open_engine(weights, CUDA, "float32", output)
        assert type(engine) is StreamedEngine
        assert "weights are streamed" in caplog.text
