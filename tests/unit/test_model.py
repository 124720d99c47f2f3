"""The packed forward pass against fair-esm's own ESM2, one sequence at a time in float32."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lengthwise import alphabet, checkpoint
from lengthwise.engine import Engine, Output
from lengthwise.model import Packing
from lengthwise.shapes import ModelConfig

CPU = torch.device("cpu")
# Float32 sums in another order: measured errors are about 4e-6 of the RMS; a wrong formula is off by 1e-3 and more.
FLOAT32_TOLERANCE = 2e-5
SHAPES = {
    16: ModelConfig(3, 64, 4),
    24: ModelConfig(3, 72, 3),
    32: ModelConfig(3, 64, 2),
    64: ModelConfig(3, 128, 2),
    128: ModelConfig(3, 256, 2),
}


def random_sequences(lengths, seed=0) -> list[bytes]:
    rng = random.Random(seed)
    return [bytes(rng.choices(alphabet.RESIDUES, k=length)) for length in lengths]


@torch.inference_mode()
def reference(path, sequence: bytes, layers) -> dict[int, np.ndarray]:
    """fair-esm's representations of one sequence's residues, tokenised by fair-esm."""
    model = checkpoint.reference_model(path)
    _, _, tokens = model.alphabet.get_batch_converter()([("", sequence.decode())])
    result = model(tokens, repr_layers=list(layers))["representations"]
    return {layer: value[0, 1:-1].numpy() for layer, value in result.items()}


def assert_close(ours, theirs, tolerance=FLOAT32_TOLERANCE):
    rms = float(np.sqrt(np.mean(np.square(theirs, dtype=np.float64))))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * max(1.0, rms)


def embed(path, sequences, layers, precision="float32", storage_dtype="float32"):
    engine = Engine(path, CPU, precision, Output(tuple(layers), ("residue", "mean", "bos"), storage_dtype))
    (result,) = engine.embed([sequences])
    return result


@pytest.fixture(scope="module", params=SHAPES, ids=lambda head_dim: f"head{head_dim}")
def any_head(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    checkpoint.write_random(path, SHAPES[request.param], seed=request.param)
    return path


def test_every_head_size_equals_fair_esm_on_every_layer(any_head):
    sequences = random_sequences([1, 2, 2, 37, 37, 200, 3000])
    result = embed(any_head, sequences, [0, 2, 3])
    start = 0
    for i, sequence in enumerate(sequences):
        expected = reference(any_head, sequence, [0, 2, 3])
        for layer, theirs in expected.items():
            assert_close(result.arrays[f"layer_{layer}"][start : start + len(sequence)], theirs)
            assert_close(result.arrays[f"mean_{layer}"][i], theirs.mean(0))
        start += len(sequence)


def test_bos_is_fair_esms_first_row(any_head):
    (sequence,) = random_sequences([50])
    model = checkpoint.reference_model(any_head)
    tokens = torch.from_numpy(alphabet.tokenize(sequence)).long()[None]
    with torch.inference_mode():
        theirs = model(tokens, repr_layers=[3])["representations"][3][0, 0].numpy()
    assert_close(embed(any_head, [sequence], [3]).arrays["bos_3"][0], theirs)


def test_recomputing_inv_freq_would_be_noticed(any_head):
    """The checkpoint's frequencies are rounded; exact ones move a long sequence by far more than the tolerance."""
    (sequence,) = random_sequences([3000])
    expected = reference(any_head, sequence, [3])[3]
    engine = Engine(any_head, CPU, "float32", Output((3,), ("residue",), "float32"))
    exact = 1.0 / 10_000 ** (torch.arange(0, engine.model.config.head_dim, 2).float() / engine.model.config.head_dim)
    assert_close(next(engine.embed([[sequence]])).arrays["layer_3"], expected)
    engine.model.inv_freq = exact
    with pytest.raises(AssertionError):
        assert_close(next(engine.embed([[sequence]])).arrays["layer_3"], expected)


@pytest.mark.parametrize(
    ("precision", "cosine"),
    # Half precision's rounding of every activation; a residue's direction is what downstream models read.
    [("float32", 0.999999), ("float16", 0.9999), ("bfloat16", 0.999)],
)
def test_a_protein_alone_equals_the_same_among_others(any_head, precision, cosine):
    sequences = random_sequences([30, 31, 60, 60, 63])
    together = embed(any_head, sequences, [3], precision)
    start = sum(map(len, sequences[:3]))
    alone = embed(any_head, [sequences[3]], [3], precision).arrays["layer_3"]
    among = together.arrays["layer_3"][start : start + len(sequences[3])]
    expected = reference(any_head, sequences[3], [3])[3]
    for rows in (alone, among):
        similarity = F.cosine_similarity(torch.from_numpy(rows), torch.from_numpy(expected))
        assert float(similarity.min()) >= cosine
    # Two roundings of the compute type, carried through three layers.
    assert np.abs(alone - among).max() <= 32 * torch.finfo(getattr(torch, precision)).eps * np.abs(expected).max()


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


def test_flops_are_those_that_torch_counts_in_fair_esm(any_head):
    from torch.utils.flop_counter import FlopCounterMode

    model, config = checkpoint.reference_model(any_head), checkpoint.read(any_head)[0]
    tokens = torch.from_numpy(alphabet.tokenize(*random_sequences([100]))).long()
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
