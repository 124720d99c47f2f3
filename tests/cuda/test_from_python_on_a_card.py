"""lengthwise.load on a pretended card: other outputs of the same weights, in turns, and what is measured for them."""

import numpy as np
import pytest
from order import CONTEXT_BYTES
from pretend import Card
from rehearsal import pretended, random_sequences

import lengthwise
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.shapes import ModelConfig


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "three_layers.pt"
    write_random(path, ModelConfig(3, 64, 4))
    return path


@pytest.mark.filterwarnings("ignore:.*RANDOM WEIGHTS")
def test_iterations_that_take_turns_on_a_card_give_what_a_cpu_gives(weights):
    sequences = [sequence.decode() for sequence in random_sequences(range(5, 65))]
    on_cpu = lengthwise.load(weights, device="cpu")
    expected = on_cpu.embed(sequences, [3, 1], ["residue", "mean", "logits"])
    with pretended(Card()):
        model = lengthwise.load(weights, device="cuda", precision="float32", batch_tokens=128)
        rows = model.iter(sequences, [3, 1], ["residue", "mean"])
        logits = model.iter(sequences, 3, "logits")
        found = list(zip(rows, logits, strict=True))
    for (one, other), right in zip(found, expected, strict=True):
        assert one.arrays.keys() | other.arrays.keys() == right.arrays.keys()
        for name, values in (one.arrays | other.arrays).items():
            np.testing.assert_allclose(values, right.arrays[name], rtol=1e-4, atol=1e-4, err_msg=name)
            assert values.base is None  # memory of its own, not a batch's in pinned memory


@pytest.mark.filterwarnings("ignore:.*RANDOM WEIGHTS")
def test_the_tokens_of_a_batch_are_measured_for_the_outputs_that_are_asked_for(weights):
    with pretended(Card(total_bytes=CONTEXT_BYTES + (14 << 20))):
        model = lengthwise.load(weights, device="cuda")
        assert model.precision == "float16"
        model.embed(["MKTAY"], -1, "mean")
        model.embed(["MKTAYI"], -1, "mean")
        model.embed(["MKTAY"], [0, 1, 2, 3], "residue")
        measured = {output.outputs: tokens for output, tokens in model._tokens.items()}
    assert measured[("residue",)] < measured[("mean",)] < 32_768
