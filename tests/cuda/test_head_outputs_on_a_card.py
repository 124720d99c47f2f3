"""Maximum, deviation, logits and contacts on a pretended device: the CPU's numbers, and no wait but that for results."""

import numpy as np
import pytest
import torch
from pretend import Card
from rehearsal import BATCHES, HOPPER, TURING, pretended, rms, rows, the_host_waits_for_results_alone

from lengthwise.esm2.checkpoint import write_random, write_random_regression
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.fair_esm_layout import contact_regression_path
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.esm2.streamed import StreamedEngine

SHAPE = ModelConfig(3, 64, 4)
OUTPUT = Output((1,), ("max", "std", "logits", "contacts"), "float32", contacts_max_residues=255, rounds_contacts=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "16.pt"
    write_random(path, SHAPE)
    write_random_regression(contact_regression_path(path), SHAPE)
    return path


@pytest.fixture(scope="module")
def on_cpu(weights):
    """{precision: rows of `BATCHES` from the engine on the CPU}"""
    return {
        precision: rows(list(Engine(weights, torch.device("cpu"), precision, OUTPUT).embed(BATCHES)))
        for precision in ("float32", "float16")
    }


@pytest.mark.parametrize("capability", [TURING, HOPPER], ids=["padded", "varlen"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_card_gives_the_numbers_of_the_cpu_and_is_awaited_for_results_alone(weights, on_cpu, precision, capability):
    with pretended(Card(capability=capability)) as device:
        engine = Engine(weights, torch.device("cuda"), precision, OUTPUT)
        before = device.live_bytes
        with the_host_waits_for_results_alone(device, len(BATCHES)):
            results = list(engine.embed(BATCHES))
        assert device.live_bytes == before
    found = rows(results)
    assert found.keys() == on_cpu[precision].keys()
    for name, right in on_cpu["float32"].items():
        if precision == "float32":  # another order of sums
            assert np.abs(found[name] - right).max() <= 2e-5 * max(1, rms(right)), name
        elif name != "pseudo_perplexity":  # an exponential of logits; rounding moves others as far as on the CPU
            assert rms(found[name] - right) / rms(on_cpu[precision][name] - right) < 1.5, name


def test_streamed_weights_give_the_same(weights, on_cpu):
    with pretended(Card(capability=HOPPER)):
        found = rows(list(StreamedEngine(weights, torch.device("cuda"), "float32", OUTPUT).embed(BATCHES)))
    for name, right in on_cpu["float32"].items():
        assert np.abs(found[name] - right).max() <= 2e-5 * max(1, rms(right)), name
