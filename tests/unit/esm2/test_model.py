"""The packed forward pass against fair-esm's own ESM2: in float64, on checkpoints like trained ones, by the receipt's limits."""

import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoints
from checkpoints import SHAPES
from fair_esm import assert_close, assert_right, random_sequences, references, share_of_limit
from lengthwise.esm2 import checkpoint, outputs, rotary, tensors
from lengthwise.esm2 import model as model_module
from lengthwise.esm2 import tokens as tokens_module
from lengthwise.esm2.accuracy import Reference
from lengthwise.esm2.batching import prefetch
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.model import Packing
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.reference import reference_rows
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MODELS, ModelConfig
from lengthwise.system.machine import host_available

CPU = torch.device("cpu")
# All kinds at one shape (and, with the planted bugs, at another), these at every shape.
TRAINED = ("flat", "q,k x 6, others x 3, massive 3,000", "q,k x 4, massive 3,000, gains x 100")
TRAINED_SHAPES = [("8M", kind) for kind in checkpoints.KINDS] + [
    (name, kind) for name in SHAPES if name != "8M" for kind in TRAINED
]


@torch.inference_mode()
def reference(path, sequence: bytes, layers) -> dict[int, np.ndarray]:
    """fair-esm's representations of one sequence's residues, tokenised by fair-esm."""
    model = checkpoint.reference_model(path)
    _, _, tokens = model.alphabet.get_batch_converter()([("", sequence.decode())])
    result = model(tokens, repr_layers=list(layers))["representations"]
    return {layer: value[0, 1:-1].numpy() for layer, value in result.items()}


def embed(path, sequences, layers, precision="float32", storage_dtype="float32"):
    engine = Engine(path, CPU, precision, Output(tuple(layers), ("residue", *tensors.POOLED), storage_dtype))
    (result,) = engine.embed([sequences])
    return result


@pytest.fixture(scope="module", params=SHAPES)
def any_head(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    checkpoint.write_random(path, SHAPES[request.param], seed=SHAPES[request.param].head_dim)
    return path


@pytest.mark.parametrize(("name", "kind"), TRAINED_SHAPES)
def test_every_head_size_equals_fair_esm_on_every_layer_and_output(tmp_path, name, kind):
    checkpoints.write(tmp_path / "tiny.pt", SHAPES[name], kind)
    sequences, layers = random_sequences([1, 2, 2, 37, 37, 150]), [0, 2, 3]
    theirs = references(tmp_path / "tiny.pt", sequences, layers)
    for precision, reference in theirs.items():
        ours = embed(tmp_path / "tiny.pt", sequences, layers, precision)
        assert_right(ours.arrays, reference, precision, kind)


@pytest.mark.parametrize("name", SHAPES)
def test_recomputing_inv_freq_would_be_noticed(tmp_path, name):
    """The checkpoint's frequencies are rounded; exact ones move a long sequence by far more than the limit."""
    checkpoints.write(tmp_path / "tiny.pt", SHAPES[name], "q,k x 4")
    (sequence,) = random_sequences([1_000])
    theirs = references(tmp_path / "tiny.pt", [sequence], [3], ["float32"])["float32"]
    engine = Engine(tmp_path / "tiny.pt", CPU, "float32", Output((3,), ("residue",), "float32"))
    assert_right(next(engine.embed([[sequence]])).arrays, theirs, "float32")
    head_dim = engine.model.config.head_dim
    engine.model.inv_freq = 1.0 / 10_000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    assert share_of_limit(next(engine.embed([[sequence]])).arrays, theirs, "float32") > 100


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_protein_alone_equals_the_same_among_others(any_head, precision):
    sequences = random_sequences([30, 31, 60, 60, 63])
    together = embed(any_head, sequences, [3], precision)
    start = sum(map(len, sequences[:3]))
    alone = embed(any_head, [sequences[3]], [3], precision).arrays["layer_3"]
    among = together.arrays["layer_3"][start : start + len(sequences[3])]
    # Two roundings of the compute type, carried through three layers.
    assert np.abs(alone - among).max() <= 32 * torch.finfo(getattr(torch, precision)).eps * np.abs(among).max()


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_protein_among_others_is_right_where_attention_is_sharp(tmp_path, precision):
    kind = "q,k x 6, others x 3, massive 3,000"
    checkpoints.write(tmp_path / "tiny.pt", SHAPES["150M"], kind)
    sequences = random_sequences([30, 31, 60, 60, 63])
    theirs = references(tmp_path / "tiny.pt", [sequences[3]], [3], [precision])[precision]
    start = sum(map(len, sequences[:3]))
    together = embed(tmp_path / "tiny.pt", sequences, [3], precision).arrays
    among = {"layer_3": together["layer_3"][start : start + len(sequences[3])]}
    assert_right(among, theirs, precision, kind)
    wrong = {"layer_3": together["layer_3"][start - len(sequences[2]) : start]}
    assert share_of_limit(wrong, theirs, precision) > 1


def test_float16_storage_differs_by_its_rounding_alone(any_head):
    sequences = random_sequences([5, 40])
    wide = embed(any_head, sequences, [1, 3]).arrays
    narrow = embed(any_head, sequences, [1, 3], storage_dtype="float16").arrays
    for layer in (1, 3):
        assert narrow[f"layer_{layer}"].dtype == np.float16
        assert np.array_equal(narrow[f"layer_{layer}"], wide[f"layer_{layer}"].astype(np.float16))


def test_packing_positions_restart_at_each_sequence():
    packing = Packing.of([3, 5, 4])
    assert packing.residues.tolist() == [1, 4, 5, 6, 9, 10]
    assert packing.bounds.tolist() == [0, 3, 8, 12]
    assert packing.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert {tensor.dtype for tensor in packing.tensors()} == {torch.int32}
    assert packing.max_length == 5


def test_flops_are_those_that_torch_counts_in_fair_esm(any_head):
    from torch.utils.flop_counter import FlopCounterMode

    model, config = checkpoint.reference_model(any_head), checkpoint.read(any_head)[0]
    tokens = torch.from_numpy(tokens_module.tokenize(*random_sequences([100]))).long()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(tokens[None])
    head = 2 * len(tokens) * config.embed_dim * (config.embed_dim + config.vocabulary_size)  # the logits, not ours
    assert counter.get_total_flops() == config.flops(100) + head


def test_a_precision_without_instructions_is_warned_of(any_head, caplog):
    """No CPU that the tests have seen computes float16 through oneDNN's packed products."""
    Engine(any_head, CPU, "float16", Output((3,), ("residue",), "float32"))
    assert "no instructions for float16" in caplog.text
    caplog.clear()
    Engine(any_head, CPU, "float32", Output((3,), ("residue",), "float32"))
    assert caplog.text == ""


def random_qkv(lengths, heads=2, channels=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 3, heads, channels, generator=generator).unbind(1)


@pytest.mark.parametrize("lengths", [[3], [5, 5, 5], [3, 4, 7], [33, 40, 40, 63], [1, 1], range(20, 60, 3)])
def test_a_gpus_padded_attention_equals_attention_sequence_by_sequence(lengths):
    """What older cards and float32 take: the same code, here on the CPU."""
    lengths = list(lengths)
    q, k, v = random_qkv(lengths)
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in one)).transpose(0, 1)
            for one in zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
        ]
    )
    found = model_module._attention_padded(q, k, v, Packing.of(lengths))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [[3], [130, 3, 131], [1_002, 258, 259, 40]])
def test_a_gpus_means_in_parts_are_means(lengths):
    packing = Packing.of(lengths)
    residues = torch.randn(len(packing.residues), 5, generator=torch.Generator().manual_seed(0))
    parts = residues.split([length - 2 for length in lengths])
    assert torch.equal(
        outputs._reduce_in_parts(residues, packing, "max"), torch.stack([part.amax(0) for part in parts])
    )
    expected = torch.stack([part.double().mean(0) for part in parts])
    torch.testing.assert_close(
        outputs._reduce_in_parts(residues, packing, "mean").double(), expected, rtol=0, atol=1e-6
    )


def test_a_rotation_written_out_equals_the_complex_product(monkeypatch):
    """Compiled code computes with real numbers what other code computes with complex ones."""
    q, k, _ = random_qkv([9, 4])
    angles = rotary.rotary_angles(1 / 10_000 ** (torch.arange(8) / 8), Packing.of([9, 4]).positions)
    x = torch.stack((q, k), 1)
    complex_ = rotary.rotate(x, angles)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotary.rotate(x, angles), complex_, rtol=0, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    "any_head",
    [pytest.param(head_dim, marks=pytest.mark.slow) for head_dim in SHAPES],
    indirect=True,
)
def test_the_layers_are_compiled_once_for_all_layers_and_sizes_and_give_the_same(any_head, monkeypatch, tmp_path):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    packed = checkpoint.load_model(any_head, CPU, torch.float32)
    compiled = checkpoint.load_model(any_head, CPU, torch.float32, pack=False)
    compiled.compile()
    counters.clear()
    for lengths in ([20, 30], [20, 30, 31], [100]):
        packing = Packing.of(lengths)
        tokens = torch.randint(4, 24, (sum(lengths),), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            assert_close(compiled(tokens, packing, [3])[3].numpy(), packed(tokens, packing, [3])[3].numpy())
    assert counters["stats"]["unique_graphs"] == len(model_module.COMPILED_PARTS)
    compiled.uncompile()
    with torch.inference_mode():
        assert_close(compiled(tokens, packing, [3])[3].numpy(), packed(tokens, packing, [3])[3].numpy())


def test_where_torch_cannot_compile_the_engine_runs_uncompiled_and_says_so(any_head, caplog):
    """On a CPU it never can: its compiler does not know oneDNN's packed weights."""
    caplog.set_level("INFO")
    engine = Engine(any_head, CPU, "float32", Output((3,), ("residue",), "float32"))
    engine._compile()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("the layers run uncompiled, which takes 1.2 to 1.4 times as long: ")
    assert "\n" not in record.getMessage()
    (sequence,) = random_sequences([50])
    assert_close(next(engine.embed([[sequence]])).arrays["layer_3"], reference(any_head, sequence, [3])[3])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_torch_without_onednn_computes_the_same_and_calls_float32_fast(any_head, monkeypatch, caplog, precision):
    """As torch for macOS has none."""
    sequences = random_sequences([20, 50])
    theirs = references(any_head, sequences, [3], [precision])[precision]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert_right(embed(any_head, sequences, [3], precision).arrays, theirs, precision)
    assert ("emulated" in caplog.text) == (precision == "bfloat16")


def test_before_a_second_try_the_results_of_earlier_batches_leave_the_device(any_head, monkeypatch):
    engine = Engine(any_head, CPU, "float32", Output((3,), ("residue",), "float32"))
    original, waiting = Engine._forward, []

    def crowded(self, batch):
        if any(part.on_device is not None for part in waiting):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        part = original(self, batch)
        part.on_device = "results"  # as on a GPU, where they wait to be copied out
        waiting.append(part)
        self.unsettled.add(part)
        return part

    monkeypatch.setattr(Engine, "_forward", crowded)
    batches = prefetch(engine._prepare, [[sequence] for sequence in random_sequences([5, 6, 7])])
    results = list(engine._embed_on_gpu(batches))
    assert [(result.status.tolist(), result.oom_splits) for result in results] == [([0], 0)] * 3


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Together:
    """Counts the forward passes that go on at the same time, and refuses memory to those of `refused` tokens and more then."""

    def __init__(self, monkeypatch, refused=sys.maxsize):
        self.now, self.most, lock, original = 0, {}, threading.Lock(), Engine._forward

        def counted(engine, batch):
            with lock:
                self.now += 1
            time.sleep(0.1)  # long enough for the other to begin
            try:
                with lock:
                    size = len(batch.tokens)
                    self.most[size] = max(self.most.get(size, 0), self.now)
                    if self.now > 1 and size >= refused:
                        raise MemoryError
                return original(engine, batch)
            finally:
                with lock:
                    self.now -= 1

        monkeypatch.setattr(Engine, "_forward", counted)


def test_a_cpus_cores_compute_a_batch_each_and_long_ones_together(tiny_checkpoint, monkeypatch, two_threads):
    sequences = random_sequences([AUTO_BATCH_TOKENS["cpu"], 60, 50, 40, 30])
    expected = [reference(tiny_checkpoint, sequence, [2])[2] for sequence in sequences]
    engine = Engine(tiny_checkpoint, CPU, "float32", Output((2,), ("residue",), "float32"))
    together = Together(monkeypatch)
    for result, rows in zip(engine.embed([[sequence] for sequence in sequences]), expected, strict=True):
        assert_close(result.arrays["layer_2"], rows)
    assert together.most.pop(len(sequences[0]) + 2) == 1
    assert max(together.most.values()) == 2


def test_what_memory_refuses_beside_others_is_tried_alone(tiny_checkpoint, monkeypatch, two_threads):
    engine = Engine(tiny_checkpoint, CPU, "float32", Output((2,), ("residue",), "float32"))
    together = Together(monkeypatch, refused=0)
    lengths = [9, 8, 7, 6, 5, 4]
    results = list(engine.embed([[sequence] for sequence in random_sequences(lengths)]))
    assert [(result.status.tolist(), result.oom_splits) for result in results] == [([0], 0)] * 6
    assert max(together.most.values()) == 2
    assert together.most[5 + 2] == together.most[4 + 2] == 1  # from then on fewer at once


@pytest.mark.parametrize("varlen", [True, False], ids=["varlen", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_operators_that_only_gpus_take_fit_together(monkeypatch, varlen, dtype):
    """On the meta device, which computes shapes and types and no numbers."""
    if varlen and not model_module.has_varlen():
        pytest.skip("this torch has no varlen_attn")
    monkeypatch.setattr(model_module, "uses_varlen", lambda *_: varlen)
    config, meta = ModelConfig(2, 64, 4), torch.device("meta")
    with meta:
        gpu = model_module.ESM2(config)
    for module in gpu.modules():
        if isinstance(module, model_module.Linear):
            module.to(dtype)
    hidden = gpu(torch.empty(12, dtype=torch.uint8, device=meta), Packing.of([3, 5, 4]).to(meta), [0, 1, 2])
    assert {layer: (value.shape, value.dtype) for layer, value in hidden.items()} == dict.fromkeys(
        range(3), ((12, 64), torch.float32)
    )


@pytest.mark.usefixtures("freed_memory_is_kept")
@pytest.mark.parametrize("length", [1_500, pytest.param(8_000, marks=pytest.mark.slow)])
def test_long_proteins_match_fair_esm_in_the_8m_shape(tmp_path, length):
    """fair-esm in float32 is the truth: in float64 it would need twice the memory."""
    needed = 240 * length**2  # by fair-esm
    if host_available() < 1.05 * needed:
        pytest.skip(f"fair-esm needs {needed / 1e9:.1f} GB for {length:,} residues")
    path, (sequence,) = tmp_path / "8M.pt", random_sequences([length])
    checkpoints.write(path, MODELS["esm2_t6_8M_UR50D"], "massive 3,000")
    truth = reference_rows(path, CPU, torch.float32, [sequence], [6])[6]
    share = 1e-5  # of the spread, about fair-esm's own error in float32: 3e-6 at 1,000 residues, against float64
    # Freed memory is kept, so a second type would need half as much again.
    for precision in ("float32", "bfloat16") if length < 2_000 else ("float32",):
        theirs = reference_rows(path, CPU, torch.bfloat16, [sequence], [6])[6] if precision == "bfloat16" else None
        reference = Reference.of(truth, theirs, share)
        ours = embed(path, [sequence], [6], precision).arrays["layer_6"]
        assert share_of_limit({"layer_6": ours}, {6: reference}, precision) <= 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("esm2_t6_8M_UR50D", "q,k x 4, massive 3,000, gains x 100"),
        ("esm2_t12_35M_UR50D", "q,k x 6, others x 3, massive 3,000"),
    ],
)
def test_the_real_shapes_equal_fair_esm(tmp_path, name, kind):
    """Deep as the real ones: rounding adds up from layer to layer. Larger shapes: tests/gpu, and docs/accuracy.md."""
    sequences, layer = random_sequences([20, 90]), MODELS[name].num_layers
    checkpoints.write(tmp_path / "real.pt", MODELS[name], kind)
    theirs = references(tmp_path / "real.pt", sequences, [layer])
    for precision, reference in theirs.items():
        ours = embed(tmp_path / "real.pt", sequences, [layer], precision)
        assert_right(ours.arrays, reference, precision, kind)
