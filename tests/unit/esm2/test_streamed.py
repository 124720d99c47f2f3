"""Weights streamed layer by layer: the numbers of the resident order to the bit, in the memory of two layers."""

import itertools
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from control_group import memory_group
from lengthwise.esm2 import residency, streamed
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import MEMORY_MARGIN, MODELS, ModelConfig
from lengthwise.esm2.status import Status
from lengthwise.esm2.streamed import StreamedEngine, open_engine
from lengthwise.esm2.tokens import RESIDUES

CPU = torch.device("cpu")
SHAPE = ModelConfig(4, 64, 4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "four_layers.pt"
    write_random(path, SHAPE)
    return path


@pytest.fixture(scope="module")
def batches():
    """Unequal lengths, one residue, a batch that a core has for itself and one that takes all cores."""
    rng = random.Random(0)
    lengths = ([20, 25, 31], [1], [40] * 5, [130, 255], [300] * 6, [700] * 4)
    return [[bytes(rng.choices(RESIDUES, k=length)) for length in each] for each in lengths]


@pytest.fixture
def layers_read(monkeypatch):
    """The layers that are read, in order."""
    read, load = [], streamed.load_layer

    def noted(path, index, *rest, **options):
        read.append(index)
        return load(path, index, *rest, **options)

    monkeypatch.setattr(streamed, "load_layer", noted)
    return read


def embed(engine, batches):
    return list(engine.embed(batches))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.status == other.status).all()
        assert one.arrays.keys() == other.arrays.keys()
        for name, rows in one.arrays.items():
            assert rows.tobytes() == other.arrays[name].tobytes(), name


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layers", [(4,), (0,), (0, 2, 4), (3, 1)], ids=str)
def test_the_numbers_are_those_of_the_resident_order_to_the_bit(weights, batches, precision, layers):
    output = Output(layers, ("residue", "mean", "bos"), "float16")
    expected = embed(Engine(weights, CPU, precision, output), batches)
    assert_same(embed(StreamedEngine(weights, CPU, precision, output), batches), expected)


@pytest.mark.parametrize("outputs", [("residue", "mean", "bos"), ("mean", "max", "std"), ("residue",)], ids=str)
def test_the_bytes_of_results_are_what_is_stored(weights, batches, outputs):
    output = Output((0, 4), outputs, "float16")
    for batch, result in zip(batches, embed(Engine(weights, CPU, "float32", output), batches), strict=True):
        tokens = sum(len(sequence) + 2 for sequence in batch)
        stored = sum(array.nbytes for array in result.arrays.values())
        assert output.bytes_of(SHAPE.embed_dim, tokens, len(batch)) == stored


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("in_memory", [1, 500, 10**9])
@pytest.mark.parametrize("in_time", [1, 100, 500, 10**9])
def test_a_wave_ends_where_memory_or_time_does_and_order_and_numbers_stay(
    weights, batches, monkeypatch, in_time, in_memory, at_once
):
    output = Output((4,), ("residue",), "float32")
    expected = embed(Engine(weights, CPU, "float32", output), batches)
    engine, waves, start = StreamedEngine(weights, CPU, "float32", output), [], StreamedEngine._start_wave
    engine.at_once = at_once
    monkeypatch.setattr(streamed, "tokens_in_time", lambda *_: in_time)
    per_token = residency.sums_bytes(SHAPE) + 4 * SHAPE.embed_dim
    monkeypatch.setattr(streamed, "room_for_wave", lambda *_: in_memory * per_token)
    monkeypatch.setattr(StreamedEngine, "_start_wave", lambda self, wave: waves.append(wave) or start(self, wave))
    assert_same(embed(engine, batches), expected)
    tokens = [[len(batch.tokens) for batch in wave] for wave in waves]
    assert [n for wave in tokens for n in wave] == [sum(map(len, batch)) + 2 * len(batch) for batch in batches]

    def taken(wave):
        """Of the room: each token's sums, each residue's row."""
        residues = sum(len(batch.tokens) - 2 * len(batch.sequences) for batch in wave)
        return (
            sum(len(batch.tokens) for batch in wave) * residency.sums_bytes(SHAPE) + 4 * SHAPE.embed_dim * residues
        ) / per_token

    for wave, following in itertools.pairwise([*waves, waves[0]]):
        more, last = [*wave, following[0]], following is waves[0]
        assert len(wave) == 1 or taken(wave) <= in_memory
        assert len(wave) <= at_once or sum(len(batch.tokens) for batch in wave) <= in_time
        over_time = sum(len(batch.tokens) for batch in more) > in_time and len(wave) >= at_once
        assert last or taken(more) > in_memory or over_time


def test_a_batch_is_measured_once_however_many_a_wave_has(weights, batches, monkeypatch):
    engine, measured = StreamedEngine(weights, CPU, "float32", Output((4,), ("residue",), "float32")), []
    bytes_of = engine._bytes_of
    monkeypatch.setattr(engine, "_bytes_of", lambda some: measured.extend(some) or bytes_of(some))
    prepared = [(engine._prepare(batch), 0.0) for batch in batches]
    assert list(engine._cut_waves(prepared)) == [prepared]
    assert measured == [batch for batch, _ in prepared]


def test_waves_stay_as_large_as_the_first_whatever_the_allocator_keeps_of_it(weights, batches, monkeypatch):
    engine = StreamedEngine(weights, CPU, "float32", Output((4,), ("residue",), "float32"))
    monkeypatch.setattr(streamed, "free_bytes", lambda _: 1_000_000_000)
    first = engine._wave_limits()[1]
    embed(engine, batches)
    monkeypatch.setattr(streamed, "free_bytes", lambda _: 0)
    assert engine._wave_limits()[1] == first
    assert first[0] > 10_000


def test_slow_storage_makes_waves_longer_and_waiting_does_not_count_as_computing(weights, batches, monkeypatch):
    load = streamed.load_layer

    def slowly(*given, **options):
        time.sleep(0.2)
        return load(*given, **options)

    output = Output((4,), ("residue",), "float32")
    quick, slow = (StreamedEngine(weights, CPU, "float32", output) for _ in range(2))
    monkeypatch.setattr(residency, "WAVE_SECONDS", 0.0)
    embed(quick, batches)
    monkeypatch.setattr(streamed, "load_layer", slowly)
    embed(slow, batches)
    assert 0.8 <= slow.read_seconds < 2
    assert slow.flops_per_second > 0.2 * quick.flops_per_second
    assert slow._wave_limits()[0] > quick._wave_limits()[0]


@pytest.mark.parametrize(
    ("name", "cores", "gigabytes"),
    [("esm2_t48_15B_UR50D", 2, 32), ("esm2_t48_15B_UR50D", 16, 8), ("esm2_t33_650M_UR50D", 8, 2)],
)
def test_batches_are_small_where_a_wave_is_so_that_each_core_has_one(monkeypatch, name, cores, gigabytes):
    shape = MODELS[name]
    monkeypatch.setattr(streamed, "load_ends", lambda *_: type("", (), {"config": shape}))
    monkeypatch.setattr(streamed, "_free_beside", lambda *_: gigabytes * 1e9)
    engine = StreamedEngine(None, CPU, "bfloat16", Output((1,), ("mean",), "float16"))
    engine.at_once = cores
    tokens = engine.auto_batch_tokens()
    in_time, (room, _) = engine._wave_limits()
    assert tokens >= residency.MIN_BATCH_TOKENS
    assert tokens == residency.MIN_BATCH_TOKENS or cores * tokens <= in_time
    assert room >= cores * tokens * residency.sums_bytes(shape)


def test_a_batchs_time_is_its_share_of_the_wave(weights, batches):
    results = embed(StreamedEngine(weights, CPU, "float32", Output((4,), ("mean",), "float32")), batches)
    assert all(result.wall_ms > 0 for result in results)
    by_operations = [sum(SHAPE.flops(len(sequence)) for sequence in batch) for batch in batches]
    shares = np.array([result.wall_ms for result in results]) / by_operations
    np.testing.assert_allclose(shares, shares[0])


def test_a_layer_is_read_once_a_wave_and_no_further_than_the_last_that_is_stored(weights, batches, layers_read):
    engine = StreamedEngine(weights, CPU, "float32", Output((3, 1), ("mean",), "float32"))
    embed(engine, batches)
    assert layers_read == [0, 1, 2]


def test_two_layers_are_in_memory_at_a_time(weights, batches, monkeypatch):
    alive, most, load = [], [], streamed.load_layer

    class Watched:
        def __init__(self, index):
            alive.append(index)
            most.append(len(alive))
            self.index = index

        def __del__(self):
            alive.remove(self.index)

    def watched(path, index, *rest, **options):
        layer = load(path, index, *rest, **options)
        layer.__dict__["watched"] = Watched(index)
        return layer

    monkeypatch.setattr(streamed, "load_layer", watched)
    embed(StreamedEngine(weights, CPU, "float32", Output((4,), ("mean",), "float32")), batches)
    assert max(most) == 2


@pytest.mark.parametrize("layer", [0, 2])
def test_batches_that_memory_does_not_hold_beside_the_others_are_computed_after_them_together(
    weights, batches, monkeypatch, layers_read, layer
):
    output = Output((2, 4), ("residue", "mean"), "float32")
    expected = embed(Engine(weights, CPU, "float32", output), batches)
    advance, refused = StreamedEngine._advance, set()

    def lacking(self, index, loaded, one):
        number = len(one.batch.sequences)
        if index == layer + 1 and number in (5, 2, 6) and number not in refused:
            refused.add(number)
            raise MemoryError
        return advance(self, index, loaded, one)

    monkeypatch.setattr(StreamedEngine, "_advance", lacking)
    found = embed(StreamedEngine(weights, CPU, "float32", output), batches)
    assert_same(found, expected)
    assert refused == {5, 2, 6}
    assert layers_read == 2 * [0, 1, 2, 3]
    assert [result.oom_splits for result in found] == [0] * len(batches)


@pytest.fixture
def passes(monkeypatch):
    """The tokens of each pass through the layers; there is time for 1,000 in a wave."""
    found, through = [], StreamedEngine._through_layers
    monkeypatch.setattr(streamed, "tokens_in_time", lambda *_: 1_000)

    def noted(self, wave):
        found.append(sum(len(batch.tokens) for batch in wave))
        return through(self, wave)

    monkeypatch.setattr(StreamedEngine, "_through_layers", noted)
    return found


def test_what_a_wave_learns_of_memory_holds_for_the_following_waves(weights, monkeypatch, passes):
    begin, begun = StreamedEngine._begin, Counter()

    def lacking(self, batch):
        if begun[len(passes)] + len(batch.tokens) > 600:
            raise MemoryError
        begun[len(passes)] += len(batch.tokens)
        return begin(self, batch)

    monkeypatch.setattr(StreamedEngine, "_begin", lacking)
    engine = StreamedEngine(weights, CPU, "float32", Output((4,), ("mean",), "float32"))
    results = embed(engine, [[b"A" * 98] * 2] * 13)
    assert all((result.status == Status.GOOD).all() and result.oom_splits == 0 for result in results)
    assert passes == [1_000, 400, 600, 600, 400]


def test_batches_of_a_size_that_memory_did_not_hold_are_halved_in_the_following_waves(weights, monkeypatch, passes):
    advance = StreamedEngine._advance

    def lacking(self, index, layer, one):
        if len(one.batch.tokens) > 150:
            raise MemoryError
        return advance(self, index, layer, one)

    monkeypatch.setattr(StreamedEngine, "_advance", lacking)
    engine, tokens = StreamedEngine(weights, CPU, "float32", Output((4,), ("mean",), "float32")), []
    for result in engine.embed([[b"A" * 98] * 2] * 10):
        assert (result.status == Status.GOOD).all()
        assert result.oom_splits == 1
        tokens.append(list(passes))
    # Nothing was computed twice, the second time after all memory was released; then halves, and in the next wave at once.
    assert tokens == 5 * [[1_000, 1_000, 1_000]] + 5 * [[1_000] * 4]


def test_a_batch_that_memory_never_holds_is_halved_and_a_sequence_alone_is_named(weights, batches, monkeypatch):
    output = Output((4,), ("residue",), "float32")
    expected = embed(Engine(weights, CPU, "float32", output), batches)
    advance = StreamedEngine._advance

    def lacking(self, index, loaded, one):
        if len(one.batch.tokens) > 300:
            raise MemoryError
        return advance(self, index, loaded, one)

    monkeypatch.setattr(StreamedEngine, "_advance", lacking)
    found = embed(StreamedEngine(weights, CPU, "float32", output), batches)
    for one, other, batch in zip(found, expected, batches, strict=True):
        fits = np.array([len(sequence) + 2 <= 300 for sequence in batch])
        assert (one.status == np.where(fits, Status.GOOD, Status.DOES_NOT_FIT)).all()
        rows = np.repeat(fits, [len(sequence) for sequence in batch])
        np.testing.assert_allclose(one.arrays["layer_4"][rows], other.arrays["layer_4"][rows], rtol=0, atol=2e-5)
        assert np.isnan(one.arrays["layer_4"][~rows]).all()
    assert {result.oom_splits > 0 for result in found} == {True, False}


@pytest.mark.parametrize(
    ("name", "gigabytes", "kind"),
    [
        ("esm2_t33_650M_UR50D", 16, Engine),
        ("esm2_t33_650M_UR50D", 2, StreamedEngine),
        ("esm2_t48_15B_UR50D", 64, StreamedEngine),
        ("esm2_t48_15B_UR50D", 80, Engine),
    ],
)
def test_what_fits_is_resident(name, gigabytes, kind):
    fits = residency.fits_resident(MODELS[name], "cpu", 4, 2, gigabytes * 1e9)
    assert fits == (kind is Engine)


def test_auto_asks_what_is_free_and_says_why_it_streams(weights, monkeypatch, caplog):
    caplog.set_level("INFO")
    output = Output((4,), ("mean",), "float32")
    assert type(open_engine(weights, CPU, "float32", output)) is Engine
    assert caplog.text == ""
    monkeypatch.setattr(streamed, "free_bytes", lambda _: 100_000)
    assert type(open_engine(weights, CPU, "float32", output)) is StreamedEngine
    assert "weights are streamed: all of them take 0.0 GB in float32" in caplog.text
    assert type(open_engine(weights, CPU, "float32", output, residency="resident")) is Engine


def test_the_float32_twin_of_what_does_not_fit_streams_too(weights, batches, monkeypatch):
    monkeypatch.setattr(streamed, "free_bytes", lambda _: 100_000)
    output = Output((4,), ("residue",), "float32")
    twin = open_engine(weights, CPU, "bfloat16", output).in_float32()
    assert type(twin) is StreamedEngine
    assert_same(embed(twin, batches), embed(Engine(weights, CPU, "float32", output), batches))


def test_the_float32_twin_of_a_streamed_engine_streams_where_all_would_fit_too(weights):
    engine = open_engine(weights, CPU, "bfloat16", Output((4,), ("residue",), "float32"), residency="streamed")
    assert type(engine.in_float32()) is StreamedEngine


@pytest.mark.parametrize(("device", "gigabytes"), [("cpu", 8), ("cuda", 8), ("cuda", 24), ("cuda", 80)])
@pytest.mark.parametrize("name", MODELS)
def test_a_wave_of_any_model_hides_its_reading_and_fits(name, device, gigabytes):
    shape, itemsize = MODELS[name], 2
    beside = residency.computing_bytes(shape, device, itemsize, 2)
    room = residency.room_for_wave(shape, device, itemsize, gigabytes * 1e9, beside)
    in_memory = int(room / (residency.sums_bytes(shape) + 2 * shape.embed_dim))
    tokens = min(in_memory, residency.tokens_in_time(shape, device, itemsize))
    flops = tokens * shape.flops(300) / 302
    reading = itemsize * shape.parameters / residency.WEIGHTS_PER_SECOND[device]
    assert flops / residency.ASSUMED_FLOPS[device] >= 0.95 * reading
    held = residency.LAYERS_HELD[device] * residency.layer_bytes(shape, itemsize)
    assert held + beside + in_memory * 6 * shape.embed_dim <= MEMORY_MARGIN * gigabytes * 1e9


def test_reading_is_hidden_but_for_a_waves_first_layer_and_bounds_what_computes_less():
    shape = MODELS["esm2_t48_15B_UR50D"]
    assert residency.streamed_seconds(shape, 1.0, 48.0) == 48.0 + 1.0
    assert residency.streamed_seconds(shape, 3_600.0, 48.0) == 3_600.0 + 12 * 1.0  # waves of `WAVE_SECONDS`
    assert residency.streamed_seconds(shape, 500.0, 480.0) == 2 * 480.0 + 2 * 10.0  # a second wave reads as much


@pytest.fixture
def small_memory() -> Iterator[Path]:
    with memory_group(500_000_000) as processes:
        yield processes


def test_under_a_control_group_that_holds_less_than_the_weights_auto_streams_and_finishes(tmp_path, small_memory):
    """Not RLIMIT_DATA: torch maps a checkpoint privately, and all of it counts there."""
    path = tmp_path / "sixty_layers.pt"
    write_random(path, ModelConfig(60, 480, 20))  # 670 MB in float32
    code = f"""
import logging, os, sys, torch
from pathlib import Path
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.streamed import open_engine
Path({str(small_memory)!r}).write_text(str(os.getpid()))
torch.set_num_threads(1)
logging.basicConfig(level=logging.INFO)
engine = open_engine(
    Path({str(path)!r}), torch.device("cpu"), "float32", Output((60,), ("mean",), "float32"), residency=sys.argv[1]
)
for result in engine.embed([[b"MKTAYIAKQR" * 20] * 8] * 2):
    assert (result.status == 0).all()
print(type(engine).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code, "auto"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "StreamedEngine"
    assert "weights are streamed" in done.stderr
    killed = subprocess.run([sys.executable, "-c", code, "resident"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
