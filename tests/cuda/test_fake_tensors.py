"""A pass on a GPU that is not there, in fake tensors: all on the device, nothing waits for it, memory as the formula says."""

from dataclasses import replace

import pytest
import torch
from fake import Memory, fake_batch, fake_gpu, fake_model

from lengthwise.esm2.costs import result_bytes_per_token
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.outputs import Output, finite_status
from lengthwise.esm2.shapes import MODELS

# Tokens of the sequences of a batch, sorted as in a shard.
BATCHES = {
    "equal": [302] * 108,
    "unequal": list(range(258, 512, 3)),
    "three long": [8_000, 9_000, 15_000],
    "one": [32_767],
}
OUTPUTS = ("residue", "mean", "bos")


def pass_of(name: str, precision: str, lengths: list[int], output: Output):
    """The pass of a model with two layers, its results, and its peak bytes per token."""
    config, dtype = replace(MODELS[name], num_layers=2), DTYPES[precision]
    model = fake_model(config, dtype)
    tokens, packing = fake_batch(lengths)
    with Memory() as memory:
        results = output.pool(model(tokens, packing, output.layers), packing)
        status = finite_status(results, packing)
    return memory, results, status


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_stays_on_the_device_and_takes_the_memory_of_the_formula(
    monkeypatch, name, precision, capability, batch
):
    config, lengths, output = MODELS[name], BATCHES[batch], Output((2,), OUTPUTS, "float16")
    with fake_gpu(monkeypatch, capability):
        memory, results, status = pass_of(name, precision, lengths, output)
    tokens, n, d = sum(lengths), len(lengths), config.embed_dim
    assert {key: (value.shape, value.dtype) for key, value in results.items()} == {
        "layer_2": ((tokens - 2 * n, d), torch.float16),
        "mean_2": ((n, d), torch.float32),
        "bos_2": ((n, d), torch.float32),
    }
    assert (status.shape, status.dtype) == ((n,), torch.uint8)
    varlen = precision != "float32" and capability >= (8, 0)
    assert ("torch_attn._varlen_attn.default" in memory.operators) == varlen
    # Small models: indices and statistics count a little.
    assert memory.peak == pytest.approx(config.bytes_per_token(DTYPES[precision].itemsize) * tokens, rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_results_of_the_previous_batch_and_of_several_layers_are_in_the_formula(monkeypatch, precision):
    config, lengths = MODELS["esm2_t33_650M_UR50D"], BATCHES["unequal"]
    output = Output((0, 2), ("residue",), precision)
    with fake_gpu(monkeypatch, (9, 0)):
        memory, results, _ = pass_of("esm2_t33_650M_UR50D", precision, lengths, output)
    previous = sum(value.nbytes for value in results.values())
    itemsize = DTYPES[precision].itemsize
    stored = result_bytes_per_token(config.embed_dim, 2, output.outputs, itemsize)
    assert memory.peak + previous == pytest.approx(config.bytes_per_token(itemsize, stored) * sum(lengths), rel=0.02)


def test_a_torch_without_the_flash_kernel_attends_without_it(monkeypatch):
    output = Output((2,), ("residue",), "float16")
    with fake_gpu(monkeypatch, (9, 0), flash=False):
        memory, *_ = pass_of("esm2_t6_8M_UR50D", "float16", BATCHES["unequal"], output)
    assert "torch_attn._varlen_attn.default" not in memory.operators


def test_what_waits_for_the_device_is_refused(monkeypatch):
    with fake_gpu(monkeypatch, (9, 0)):
        _, packing = fake_batch([3, 4])
        with pytest.raises(Exception, match=r"_local_scalar_dense"):
            packing.bounds.max().item()
        with pytest.raises(AssertionError, match="takes or gives"), Memory():
            packing.bounds.cpu()
