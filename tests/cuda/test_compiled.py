"""What torch compiles, counted on the CPU: the same graphs for all layers, sizes and models of a process."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fake import fake_model
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

from lengthwise.esm2 import checkpoint
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.model import COMPILED_PARTS, ESM2, Layer, Packing
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MODELS, ModelConfig

CPU = torch.device("cpu")
# A batch's first size decides what is compiled; the others are a head's channels, the width, one sequence and many.
BATCHES = [[33, 44, 52], [16], [64], [7, 9], [201], [50] * 11 + [49]]


def loaded(path, dtype: torch.dtype) -> ESM2:
    return checkpoint.load_model(path, CPU, dtype, pack=False)


def last_layer(model: ESM2, lengths: list[int]) -> np.ndarray:
    tokens = torch.randint(4, 24, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    last = model.config.num_layers
    with torch.inference_mode():
        return model(tokens, Packing.of(lengths), [last])[last].numpy()


@pytest.fixture
def dynamo():
    """Torch's counts, and its own answer to too many recompilations: to run uncompiled."""
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield counters["stats"]
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_three_graphs_serve_all_layers_and_sizes_and_give_the_same(tmp_path, monkeypatch, dynamo):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint.write_random(tmp_path / "tiny.pt", ModelConfig(4, 64, 4))
    plain, compiled = (loaded(tmp_path / "tiny.pt", torch.float32) for _ in range(2))
    compiled.compile()
    for lengths in BATCHES:
        expected = last_layer(plain, lengths)
        assert np.abs(last_layer(compiled, lengths) - expected).max() <= 2e-5 * np.abs(expected).max()
    assert dynamo["unique_graphs"] == len(COMPILED_PARTS) == 3
    assert not counters["graph_break"]


def test_what_is_computed_between_the_products_of_650m_is_fused(monkeypatch):
    """By the plan of torch's compiler for a CPU. A GPU's kernels, the last two sums of them in one: test_kernels.py."""
    config, tokens, found = replace(MODELS["esm2_t33_650M_UR50D"], num_layers=2), 32_615, []

    def capture(graph: GraphLowering) -> None:
        graph._update_scheduler()
        found.extend(node for node in graph.scheduler.nodes if not node.is_extern())
        found[:] = [round(node.get_read_write_buffers_sizes() / (tokens * config.embed_dim), 1) for node in found]
        raise NotImplementedError("planned, not built")

    monkeypatch.setattr(GraphLowering, "compile_to_module", capture)
    with FakeTensorMode(), torch.inference_mode(), torch._inductor.config.patch(fx_graph_cache=False):
        layer, following = fake_model(config, torch.float16, CPU).layers
        x = torch.empty(tokens, config.embed_dim)
        attended = torch.empty(tokens, config.attention_heads, config.head_dim, dtype=torch.float16)
        rotary = torch.empty(tokens, 1, 1, config.head_dim // 2, 2)
        with pytest.raises(InductorError, match="planned, not built"):
            torch.compile(Layer.finish_and_project, dynamic=True)(layer, x, attended, following, rotary)
    # LayerNorm, GELU, sums, LayerNorm, rotation (by this count it reads v too).
    assert found == [8.0, 16.0, 12.0, 6.0, 10.2]


@pytest.fixture
def traced_only(monkeypatch):
    """Graphs are traced and run as they are: what is compiled, without a compiler's time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("traced_only")
def test_nine_engines_in_one_process_all_run_compiled(tmp_path, dynamo):
    graphs = []
    for config in (ModelConfig(4, 64, 4), ModelConfig(3, 32, 2), ModelConfig(3, 96, 3)):
        checkpoint.write_random(tmp_path / "tiny.pt", config)
        for dtype in DTYPES.values():
            compiled = loaded(tmp_path / "tiny.pt", dtype)
            compiled.compile()
            for lengths in BATCHES:
                last_layer(compiled, lengths)
            graphs.append(dynamo["unique_graphs"])
    assert graphs == [3 * n for n in range(1, 10)]


@pytest.mark.usefixtures("traced_only")
def test_a_model_that_torch_would_run_uncompiled_in_silence_is_refused(tmp_path, dynamo):
    checkpoint.write_random(tmp_path / "tiny.pt", ModelConfig(3, 32, 2))
    compiled = loaded(tmp_path / "tiny.pt", torch.float32)
    compiled.compile()
    last_layer(compiled, [33, 44, 52])
    compiled.double()
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        last_layer(compiled, [33, 44, 52])


def test_an_engine_compiles_at_the_usual_size_with_odd_numbers_of_tokens(tmp_path, monkeypatch):
    checkpoint.write_random(tmp_path / "tiny.pt", ModelConfig(3, 32, 2))
    engine = Engine(tmp_path / "tiny.pt", CPU, "float32", Output((3,), ("residue",), "float32"))
    passes, forward = [], Engine._forward
    monkeypatch.setattr(ESM2, "compile", lambda _: None)
    monkeypatch.setattr(Engine, "_forward", lambda *one: (passes.append(len(one[1].tokens)), forward(*one))[1])
    engine._compile()
    first, second = passes
    assert 0.8 * AUTO_BATCH_TOKENS["cpu"] < first <= AUTO_BATCH_TOKENS["cpu"]
    assert first % 2 == second % 2 == 1
    assert first != second


def test_bfloat16_on_a_gpu_that_emulates_it_runs_uncompiled_and_says_so(tmp_path, monkeypatch, caplog):
    """Torch would run it uncompiled without a word of it."""
    checkpoint.write_random(tmp_path / "tiny.pt", ModelConfig(3, 32, 2))
    engine = Engine(tmp_path / "tiny.pt", CPU, "bfloat16", Output((3,), ("residue",), "float32"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    caplog.clear()
    engine._compile()
    assert not engine.model.compiled
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.endswith("torch compiles nothing in bfloat16 for this GPU, which emulates it")
