"""What only a GPU can show. One command runs it all: `pytest -n 0 tests/gpu`; without a GPU it is skipped, and says so.

It needs torch, numpy, safetensors, fair-esm, pyarrow, pandas and crc32c, and takes about five minutes on an H100.
`tests/unit/test_gpu_rehearsal.py` runs most of it on a CPU.
"""

import gc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from lengthwise.benchmark.peers import reference
from lengthwise.benchmark.sequences import random_sequences
from lengthwise.benchmark.weights import write_weights
from lengthwise.esm2 import checkpoint, model
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.devices import DTYPES, device_name
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.reference import reference_rows
from lengthwise.esm2.shapes import MODELS
from lengthwise.esm2.streamed import StreamedEngine
from lengthwise.ingest.digests import digest
from lengthwise.jobs.embed_job import embed_job
from lengthwise.jobs.pipeline import Progress, ShardPipeline
from lengthwise.plan.work_orders import PlannedShard, work_order_table, write_work_order
from lengthwise.store import settings as settings_module
from lengthwise.store.metrics import read_metrics
from lengthwise.store.paths import job_record_path, metrics_path, shard_path, work_order_path
from lengthwise.store.shard import Shard
from lengthwise.system.files import sha256, stamp, write_json

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: nothing of CUDA was tested")
DEVICE = torch.device("cuda")
SMALLEST, MIDDLE, USUAL, LARGEST = (list(MODELS)[i] for i in (0, 2, 3, 5))
# Of the RMS, and of a residue's cosine: rounding of float32 in another order, and of each half precision.
BOUNDS = {"float32": (2e-5, 0.999999), "float16": (None, 0.9999), "bfloat16": (None, 0.999)}
RESIDUES = 60_000  # of most tests


@pytest.fixture(autouse=True)
def fresh_gpu():
    """Each test begins with the GPU's memory free and nothing compiled: torch compiles a function only so many times."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.compiler.reset()


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Makes the random checkpoint of a model, once."""
    made = {}

    def make(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("weights") / f"{name}.pt"
            write_weights(made[name], MODELS[name])
        return made[name]

    return make


def mixed(residues: int, longest: int = 1_000) -> list[bytes]:
    """Distinct random proteins of 20 residues to `longest`, shortest first."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, longest, 2 * residues // longest + 10)
    lengths = np.sort(lengths[: 1 + int(np.searchsorted(lengths.cumsum(), residues))])
    return [random_sequences(int(length), int(length), seed)[0] for seed, length in enumerate(lengths)]


def batches(sequences: list[bytes], tokens: int = 32_768) -> list[list[bytes]]:
    return [sequences[a:b] for a, b in cut_batches(np.array([len(s) for s in sequences]), tokens)]


def last_layer(path: Path) -> int:
    return checkpoint.read(path)[0].num_layers


def engine(path, precision="float16", storage="float32", outputs=("residue",), compile=False) -> Engine:
    return Engine(path, DEVICE, precision, Output((last_layer(path),), outputs, storage), compile)


def rows(made: Engine, sequences: list[bytes], tokens: int = 32_768) -> list[np.ndarray]:
    found = []
    for batch, result in zip(batches(sequences, tokens), made.embed(batches(sequences, tokens)), strict=True):
        (array,) = result.arrays.values()
        found += np.split(array, np.cumsum([len(sequence) for sequence in batch])[:-1])
    return found


def assert_alike(found: list[np.ndarray], expected: list[np.ndarray], dtype: torch.dtype = torch.float16) -> None:
    """Within two roundings of the compute type, carried through six layers."""
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 64 * torch.finfo(dtype).eps * np.abs(b).max()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_equals_fair_esm_in_each_precision(weights, name):
    path, sequences = weights(name), mixed(6_000)
    precisions = ["float16"] if name == LARGEST else list(BOUNDS)  # 60 GB in float32
    if DEVICE.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            precisions = [precision for precision in precisions if precision != "bfloat16"]
        itemsize = 4 if "float32" in precisions else 2
        if torch.cuda.mem_get_info()[0] < 1.1 * itemsize * MODELS[name].parameters + 4e9:
            pytest.skip(f"{name} does not fit into this GPU's memory")
    last = last_layer(path)
    padded = reference_rows(path, DEVICE, torch.float32, sequences, [last])[last]
    theirs = np.concatenate([array[1:-1] for array in padded])
    rms = np.sqrt(np.mean(theirs**2))
    for precision in precisions:
        error, cosine = BOUNDS[precision]
        ours = np.concatenate(rows(engine(path, precision), sequences)).astype(np.float64)
        if error is not None:
            assert np.abs(ours - theirs).max() <= error * max(1.0, rms)
        cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        assert cosines.min() >= cosine, precision


@pytest.mark.parametrize("length", [8_000, 35_000])
def test_long_sequences_run_and_match_fair_esm_where_it_can_run(weights, length):
    (sequence,) = random_sequences(length, length)
    (ours,) = rows(engine(weights(SMALLEST)), [sequence])
    assert np.isfinite(ours).all()
    try:
        (theirs,) = reference(weights(SMALLEST), [sequence], DEVICE)
    except torch.OutOfMemoryError:
        pytest.skip(f"fair-esm's pass of {length:,} residues does not fit into this GPU's memory")
    similarity = torch.nn.functional.cosine_similarity(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert float(similarity.min()) >= 0.9999


def test_batches_in_flight_give_what_each_gives_alone(weights):
    """Nothing is read before it was copied, and no buffer is reused too early."""
    made = engine(weights(SMALLEST), storage="float16")
    parts = batches(mixed(6 * RESIDUES), 8_192)
    together = list(made.embed(parts))
    for batch, expected in list(zip(parts, together, strict=True))[::7]:
        (alone,) = made.embed([batch])
        for name, array in alone.arrays.items():
            np.testing.assert_array_equal(array, expected.arrays[name])
    for one, other in zip(together, made.embed(parts), strict=True):
        assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_the_same_protein_in_other_batches_differs_by_rounding(weights, precision):
    sequences = mixed(RESIDUES)
    made = engine(weights(SMALLEST), precision)
    assert_alike(rows(made, sequences, 1_024), rows(made, sequences), DTYPES[precision])


def test_compiled_layers_give_the_same(weights):
    sequences = mixed(RESIDUES)
    plain, compiled = (engine(weights(SMALLEST), compile=c) for c in (False, True))
    assert compiled.model.compiled  # an engine that cannot compile runs on without
    assert_alike(rows(compiled, sequences), rows(plain, sequences))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_peak_memory_is_linear_in_tokens_independent_of_length_and_at_most_as_the_formula_says(
    weights, precision, compile
):
    made = engine(weights(MIDDLE), precision, storage="float16", compile=compile)
    list(made.embed([random_sequences(300, 3_000)]))  # libraries take their workspaces
    torch.cuda.synchronize()
    shares = {}
    for tokens in (8_192, 16_384, 32_768):
        for length in (50, 100, 300, 1_000, 3_000, 8_000):
            batch = random_sequences(length, tokens // (length + 2) * length)
            before = torch.cuda.memory_allocated()
            *_, result = made.embed([batch] * 3)
            used = (result.peak_allocated_bytes - before) / sum(len(sequence) + 2 for sequence in batch)
            shares[tokens, length] = used / made.bytes_per_token
    print(
        f"{precision}, compiled {made.model.compiled}: {min(shares.values()):.2f} to {max(shares.values()):.2f} of the formula"
    )
    assert max(shares.values()) <= 1.1, shares
    assert max(shares.values()) <= 1.15 * min(shares.values()), shares
    if precision == "float16" and not compile:
        assert min(shares.values()) >= 0.9, shares


def test_auto_batches_fit_and_a_batch_that_does_not_is_halved(weights):
    made = engine(weights(SMALLEST), storage="float16")
    tokens = made.auto_batch_tokens()
    sequences = mixed(5 * RESIDUES)
    expected = rows(made, sequences, tokens)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 6_000 * made.bytes_per_token
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        results = list(made.embed(batches(sequences, tokens)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sum(result.oom_splits for result in results) > 0
    assert made.token_limit < tokens
    assert all((result.status == 0).all() for result in results)
    found = np.concatenate([next(iter(result.arrays.values())) for result in results])
    assert_alike([found.astype(np.float32)], [np.concatenate(expected).astype(np.float32)])


def test_streamed_weights_give_the_rows_of_resident_ones(weights):
    pytest.importorskip("psutil")  # it says how much memory is free for a wave
    path, sequences = weights(MIDDLE), mixed(RESIDUES)
    resident = engine(path)
    output = Output((last_layer(path),), ("residue",), "float32")
    streamed = StreamedEngine(path, DEVICE, resident.precision, output)
    found = rows(streamed, sequences, 8_192)
    assert streamed.read_seconds > 0
    assert_alike(found, rows(resident, sequences, 8_192), DTYPES[resident.precision])


def test_cards_without_the_varlen_kernel_get_the_same(weights, monkeypatch):
    sequences = mixed(RESIDUES)
    expected = rows(engine(weights(SMALLEST)), sequences)
    monkeypatch.setattr(model, "uses_varlen", lambda *_: False)
    assert_alike(rows(engine(weights(SMALLEST)), sequences), expected)


def test_shards_are_written_while_the_gpu_computes_and_the_metrics_say_so(weights, tmp_path):
    path = weights(USUAL)
    made = engine(path, storage="float16", compile=True)
    sequences = mixed(10 * RESIDUES)
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    settings = {
        "layers": [last_layer(path)],
        "outputs": ["residue"],
        "embed_dim": made.model.config.embed_dim,
        "storage_dtype": "float16",
        "fingerprint": "",
    }
    half = len(sequences) // 2
    shards = [
        PlannedShard(name, [digest(s) for s in sequences[part]], lengths[part], sequences[part])
        for name, part in (("0" * 32, slice(0, half)), ("1" * 32, slice(half, None)))
    ]
    with ShardPipeline(tmp_path, settings, made, Progress("job", int(lengths.sum()))) as pipeline:
        pipeline.make(shards[::-1], made.auto_batch_tokens())
    stored = [Shard(shard_path(tmp_path, shard.name))[f"layer_{last_layer(path)}"] for shard in shards]
    expected = np.concatenate(rows(made, sequences)).astype(np.float16)
    np.testing.assert_allclose(np.concatenate(stored), expected, rtol=0, atol=0.05)
    found = read_metrics([metrics_path(tmp_path, shard.name) for shard in shards])
    assert found["n_residues"].sum() == lengths.sum()
    assert (found["device_ms"] > 0).all()
    if DEVICE.type == "cuda":
        assert found["gpu_busy"].between(0, 1).all()
        assert (found["peak_reserved_bytes"] >= found["peak_allocated_bytes"]).all()
        busy = found["device_ms"].sum() / found["wall_ms"].sum()
        assert 0 < busy <= 1.01  # it computes one batch at a time, so no longer than all of the time
        print(f"gpu busy {busy:.2f}, wait_write_ms {found['wait_write_ms'].sum():.0f} of {found['wall_ms'].sum():.0f}")


def test_a_job_is_compared_with_fair_esm_on_its_device(weights, tmp_path):
    path = weights(SMALLEST)
    shape = {name: getattr(checkpoint.read(path)[0], name) for name in ("num_layers", "embed_dim", "attention_heads")}
    receipt = {"model": str(path), "path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}
    receipt |= {**shape, **stamp(path), "random_weights": True}
    config = {
        "model": str(path),
        "layers": [-1],
        "default_layer": "auto",
        "precision": "auto",
        "storage_dtype": "float16",
    }
    config |= {"outputs": ["residue", "mean"], "device": DEVICE.type}
    settings = settings_module.make(config, receipt, DEVICE.type)
    write_json(tmp_path / "settings.json", settings)
    write_json(tmp_path / "weights.json", receipt)
    sequences = mixed(RESIDUES)
    planned = pa.table(
        {
            "digest": pa.array([digest(sequence) for sequence in sequences], pa.binary(24)),
            "length": pa.array([len(sequence) for sequence in sequences], pa.int32()),
            "sequence": pa.array(sequences, pa.binary()),
        }
    )
    job = write_work_order(tmp_path, work_order_table(planned, np.array([0, len(sequences)]), settings))
    job_record = embed_job(tmp_path, work_order_path(tmp_path, job), job_record_path(tmp_path, job))
    assert job_record["device"] == device_name(DEVICE)
    assert job_record["made_residues"] == sum(map(len, sequences))
    for part in ("engine", "stored"):
        assert job_record["parity"][part]["share_of_limit"] < 1
    if DEVICE.type == "cuda" and find_spec("pynvml"):
        assert job_record["versions"]["driver"]
