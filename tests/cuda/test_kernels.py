"""Inductor's kernels for GPUs that are not there: how many, what they move, their memory, and that they build.

Bytes are those of each tensor that a kernel reads or writes, once: a LayerNorm reads its row again from the cache.
Products and attention are counted as kernels, and their bytes are not.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
    pytest.skip("needs a CUDA build of torch, and triton", allow_module_level=True)

from fake import GPU, fake_model
from inductor import MULTIPROCESSORS, Compiled, compile_for_gpu, configurations, cubins, pretended

from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.model import COMPILED_PARTS, Layer
from lengthwise.esm2.shapes import MODELS

pytestmark = pytest.mark.slow
TOKENS = 32_615
ATTENTION = 1  # kernels


def compile_part(part: str, name: str, precision: str, tokens: int = TOKENS) -> Compiled:
    """A part of a model's layers, compiled for a first pass of these tokens."""
    config, dtype = MODELS[name], DTYPES[precision]
    with FakeTensorMode(), torch.inference_mode():
        layer, following = fake_model(replace(config, num_layers=2), dtype).layers
        x = torch.empty(tokens, config.embed_dim, device=GPU)
        attended = torch.empty(tokens, config.attention_heads, config.head_dim, dtype=dtype, device=GPU)
        rotary = torch.empty(tokens, 1, 1, config.head_dim // 2, 2, device=GPU)
        arguments = {
            "project": (layer, x, rotary),
            "finish_and_project": (layer, x, attended, following, rotary),
            "finish": (layer, x, attended),
        }
        return compile_for_gpu(getattr(Layer, part), *arguments[part])


@pytest.fixture(scope="module", params=MULTIPROCESSORS, ids=str)
def capability(request):
    with pretended(request.param):
        yield request.param


def test_a_layer_of_650m_takes_nine_kernels_and_moves_46_bytes_a_channel_outside_products_and_attention(capability):
    layer = compile_part("finish_and_project", "esm2_t33_650M_UR50D", "float16")
    moved = [round(launch.bytes / (TOKENS * 1280), 1) for launch in layer.launches]
    assert len(layer.launches) + layer.products + ATTENTION == 9
    # LayerNorm behind attention, GELU, LayerNorm before the next attention, rotation.
    assert moved == [8.0, 16.0, 14.0, 8.2]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D"])
def test_compiled_layers_take_the_memory_of_the_formula(name, precision):
    config, itemsize = MODELS[name], DTYPES[precision].itemsize
    with pretended((9, 0)):
        layer = compile_part("finish_and_project", name, precision)
    held = config.embed_dim * (4 + itemsize) + 4 * config.head_dim  # the sums, the result of attention, the angles
    expected = config.bytes_per_token(itemsize, compiled=True)
    assert layer.peak_bytes / TOKENS + held == pytest.approx(expected, rel=0.02)


def test_layers_compiled_at_the_usual_size_fill_the_gpu_and_at_a_small_size_are_others(capability):
    usual, small = (compile_part("finish_and_project", "esm2_t6_8M_UR50D", "float16", n) for n in (TOKENS, 97))
    chosen = {name: configurations(name, source) for name, source in usual.sources.items()}
    for launch in usual.launches:
        for configuration in chosen[launch.name]:
            assert launch.sizes[0] / configuration["XBLOCK"] >= 4 * MULTIPROCESSORS[capability]
    assert chosen != {name: configurations(name, source) for name, source in small.sources.items()}


@pytest.mark.parametrize("precision", DTYPES)
def test_every_kernel_builds(capability, precision):
    if precision == "bfloat16" and capability < (8, 0):
        pytest.skip("torch compiles no bfloat16 for it")
    for part in COMPILED_PARTS:
        for name, source in compile_part(part, "esm2_t33_650M_UR50D", precision).sources.items():
            assert all(cubins(name, source))
