"""What only a GPU can show. One command runs it all: `pytest -n 0 tests/gpu`; without a GPU it is skipped, and says so."""

import numpy as np
import pytest
import torch

from lengthwise.benchmark.peers import reference
from lengthwise.benchmark.sequences import random_sequences
from lengthwise.esm2 import checkpoint, model
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import MODELS
from lengthwise.ingest import digests
from lengthwise.jobs.pipeline import Progress, ShardPipeline
from lengthwise.plan.work_orders import PlannedShard
from lengthwise.store.metrics import read_metrics
from lengthwise.store.paths import metrics_path, shard_path
from lengthwise.store.shard import Shard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: nothing of CUDA was tested")
CUDA = torch.device("cuda")
SMALLEST = "esm2_t6_8M_UR50D"
# Of the RMS, and of a residue's cosine: rounding of float32 in another order, and of each half precision.
BOUNDS = {"float32": (2e-5, 0.999999), "float16": (None, 0.9999), "bfloat16": (None, 0.999)}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Makes the random checkpoint of a model, once."""
    made = {}

    def make(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("weights") / f"{name}.pt"
            checkpoint.write_random(made[name], MODELS[name])
        return made[name]

    return make


def mixed(residues: int, longest: int = 1_000) -> list[bytes]:
    rng = np.random.default_rng(0)
    lengths = []
    while sum(lengths) < residues:
        lengths.append(int(rng.integers(20, longest)))
    return [random_sequences(length, length, seed=length)[0] for length in sorted(lengths)]


def batches(sequences: list[bytes], tokens: int = 32_768) -> list[list[bytes]]:
    return [sequences[a:b] for a, b in cut_batches(np.array([len(s) for s in sequences]), tokens)]


def engine(path, precision="float16", storage="float32", outputs=("residue",), compile=False) -> Engine:
    layers = checkpoint.read(path)[0].num_layers
    return Engine(path, CUDA, precision, Output((layers,), outputs, storage), compile)


def rows(made: Engine, sequences: list[bytes], tokens: int = 32_768) -> list[np.ndarray]:
    found = []
    for batch, result in zip(batches(sequences, tokens), made.embed(batches(sequences, tokens)), strict=True):
        (array,) = result.arrays.values()
        found += np.split(array, np.cumsum([len(sequence) for sequence in batch])[:-1])
    return found


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", list(MODELS)[:5])  # fair-esm's own 15B in float32 takes 60 GB
def test_every_model_equals_fair_esm(weights, name, precision):
    sequences = mixed(6_000)
    error, cosine = BOUNDS[precision]
    ours = np.concatenate(rows(engine(weights(name), precision), sequences)).astype(np.float64)
    theirs = np.concatenate(reference(weights(name), sequences, CUDA)).astype(np.float64)
    rms = np.sqrt(np.mean(theirs**2))
    if error is not None:
        assert np.abs(ours - theirs).max() <= error * max(1.0, rms)
    assert ((ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)).min() >= cosine


@pytest.mark.parametrize("length", [8_000, 35_000])
def test_long_sequences_run_and_match_fair_esm_where_it_can_run(weights, length):
    (sequence,) = random_sequences(length, length)
    (ours,) = rows(engine(weights(SMALLEST)), [sequence])
    assert np.isfinite(ours).all()
    try:
        (theirs,) = reference(weights(SMALLEST), [sequence], CUDA)
    except torch.OutOfMemoryError:
        pytest.skip(f"fair-esm's pass of {length:,} residues does not fit into this GPU's memory")
    similarity = torch.nn.functional.cosine_similarity(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert float(similarity.min()) >= 0.9999


def test_batches_in_flight_give_what_each_gives_alone(weights):
    """Nothing is read before it was copied, and no buffer is reused too early."""
    made = engine(weights(SMALLEST), storage="float16")
    sequences = mixed(400_000)
    together = rows(made, sequences, 8_192)
    for batch, expected in list(zip(batches(sequences, 8_192), made.embed(batches(sequences, 8_192)), strict=True))[
        ::7
    ]:
        (alone,) = made.embed([batch])
        (name,) = alone.arrays
        np.testing.assert_array_equal(alone.arrays[name], expected.arrays[name])
    again = rows(made, sequences, 8_192)
    assert all(np.array_equal(a, b) for a, b in zip(together, again, strict=True))


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_the_same_protein_in_other_batches_differs_by_rounding(weights, precision):
    sequences = mixed(60_000)
    made = engine(weights(SMALLEST), precision)
    for a, b in zip(rows(made, sequences), rows(made, sequences, 1_024), strict=True):
        # Two roundings of the compute type, carried through six layers.
        assert np.abs(a - b).max() <= 64 * torch.finfo(DTYPES[precision]).eps * np.abs(a).max()


def test_compiled_layers_give_the_same(weights):
    sequences = mixed(60_000)
    plain, compiled = (engine(weights(SMALLEST), compile=c) for c in (False, True))
    assert "project" in vars(compiled.model.layers[0])  # an engine that cannot compile runs on without
    for a, b in zip(rows(plain, sequences), rows(compiled, sequences), strict=True):
        assert np.abs(a - b).max() <= 64 * torch.finfo(torch.float16).eps * np.abs(a).max()


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_peak_memory_is_linear_in_tokens_independent_of_length_and_as_the_formula_says(weights, precision):
    made = engine(weights("esm2_t30_150M_UR50D"), precision, storage="float16")
    list(made.embed([random_sequences(300, 3_000)]))  # libraries take their workspaces
    torch.cuda.synchronize()
    for tokens in (8_192, 16_384, 32_768):
        for length in (50, 100, 300, 1_000, 3_000, 8_000):
            batch = random_sequences(length, tokens // (length + 2) * length)
            before = torch.cuda.memory_allocated()
            *_, result = made.embed([batch] * 3)
            used = (result.peak_allocated_bytes - before) / sum(len(sequence) + 2 for sequence in batch)
            assert used == pytest.approx(made.bytes_per_token, rel=0.1), (tokens, length)


def test_auto_batches_fit_and_a_batch_that_does_not_is_halved(weights):
    made = engine(weights(SMALLEST), storage="float16")
    tokens = made.auto_batch_tokens()
    sequences = mixed(300_000)
    expected = rows(made, sequences, tokens)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 6_000 * made.bytes_per_token
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        results = list(made.embed(batches(sequences, tokens)))
        assert sum(result.oom_splits for result in results) > 0
        assert made.token_limit < tokens
        assert all((result.status == 0).all() for result in results)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = np.concatenate([next(iter(result.arrays.values())) for result in results])
    scale = np.abs(np.concatenate(expected)).max()
    assert np.abs(found - np.concatenate(expected)).max() <= 64 * torch.finfo(torch.float16).eps * scale


def test_cards_without_the_varlen_kernel_get_the_same(weights, monkeypatch):
    sequences = mixed(60_000)
    expected = rows(engine(weights(SMALLEST)), sequences)
    monkeypatch.setattr(model, "uses_varlen", lambda *_: False)
    for a, b in zip(expected, rows(engine(weights(SMALLEST)), sequences), strict=True):
        assert np.abs(a - b).max() <= 64 * torch.finfo(torch.float16).eps * np.abs(a).max()


def test_shards_are_written_while_the_gpu_computes_and_the_metrics_say_so(weights, tmp_path):
    made = engine(weights("esm2_t33_650M_UR50D"), storage="float16", compile=True)
    sequences = mixed(600_000)
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    settings = {
        "layers": [33],
        "outputs": ["residue"],
        "embed_dim": 1280,
        "storage_dtype": "float16",
        "fingerprint": "",
    }
    half = len(sequences) // 2
    shards = [
        PlannedShard(name, [digests.digest(s) for s in sequences[part]], lengths[part], sequences[part])
        for name, part in (("0" * 32, slice(0, half)), ("1" * 32, slice(half, None)))
    ]
    with ShardPipeline(tmp_path, settings, made, Progress("job", int(lengths.sum()))) as pipeline:
        pipeline.make(shards[::-1], made.auto_batch_tokens())
    stored = np.concatenate([Shard(shard_path(tmp_path, shard.name))["layer_33"] for shard in shards])
    np.testing.assert_allclose(stored, np.concatenate(rows(made, sequences)).astype(np.float16), rtol=0, atol=0.05)
    found = read_metrics([metrics_path(tmp_path, shard.name) for shard in shards])
    assert found["n_residues"].sum() == lengths.sum()
    # A batch's result may be waited for, and the next one's be there at once: its share alone is cut to 1.
    shares = found["device_ms"] / found["wall_ms"]
    np.testing.assert_allclose(found["gpu_busy"], shares.clip(upper=1))
    busy = found["device_ms"].sum() / found["wall_ms"].sum()
    assert 0 < busy <= 1.01  # it computes one batch at a time, so no longer than all of the time
    print(f"gpu_busy {busy:.2f}, wait_write_ms {found['wait_write_ms'].sum():.0f} of {found['wall_ms'].sum():.0f}")


def test_a_job_is_compared_with_fair_esm_on_its_gpu(small_store, random_proteins):
    store = small_store(device="cuda")
    store.ingest("a", random_proteins(30))
    (job,) = store.plan()["job"]
    job_record = store.embed(job)
    assert job_record["device"] == torch.cuda.get_device_name()
    assert job_record["parity"]["engine"]["share_of_limit"] < 0.5
    assert job_record["parity"]["stored"]["share_of_limit"] < 0.5
    assert job_record["versions"]["driver"]
