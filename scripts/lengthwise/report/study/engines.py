"""The two engines of the scaling study, loaded as the study measures them: this one without gradients as a job loads it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lengthwise.esm2 import checkpoint
from lengthwise.esm2.devices import DTYPES, is_out_of_memory
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.model import ESM2, Packing
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.tokens import RESIDUES, tokenize
from lengthwise.jobs.embed_job import MIN_COMPILED_SECONDS
from lengthwise.plan.jobs_table import job_rows
from lengthwise.report.study.schema import FAIR_ESM, LENGTHWISE

SEED = 0
# RESIDUES goes on with X, B, U, Z and O.
STANDARD_RESIDUES = np.frombuffer(RESIDUES[:20], np.uint8)


@dataclass(frozen=True)
class Loaded:
    """A model on the device, ready for passes."""

    weights_bytes: int
    # [N, L + 2] int64 tokens -> a pass over them, which returns the last layer's rows, [..., D]; these keep the graph alive
    prepare: Callable[[Tensor], Callable[[], Tensor]]
    compiled: bool | None = None  # of this engine, whether torch compiled the layers


@dataclass(frozen=True)
class Stage:
    """Series that are measured in the same rounds: both engines in one precision, with or without gradients."""

    precision: str
    gradients: bool
    batch_tokens: tuple[int | None, ...]
    share: int  # of the time


def load_engines(weights: Path, device: torch.device, stage: Stage, compile: bool) -> dict[str, Loaded]:
    """Load both engines and warm them up, without those whose weights do not fit on the device."""
    loaded = {}
    # fair-esm first: it loads in float32.
    for engine, load in ((FAIR_ESM, _load_fair_esm), (LENGTHWISE, _load_lengthwise)):
        try:
            loaded[engine] = load(weights, device, stage, compile)
            with torch.no_grad():  # libraries allocate workspaces now, so no point counts them
                loaded[engine].prepare(random_tokens(1, 50).to(device))()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            loaded.pop(engine, None)
    return loaded


def _load_lengthwise(weights: Path, device: torch.device, stage: Stage, compile: bool) -> Loaded:
    """This engine; without gradients as a job loads it."""
    dtype = DTYPES[stage.precision]
    if compile and not stage.gradients:
        model = _compiled_model(weights, device, stage.precision)
    else:
        pack = not stage.gradients
        model = checkpoint.load_model(weights, device, dtype, pack).requires_grad_(stage.gradients)
    packed: list[Tensor] = [each for module in model.modules() if (each := getattr(module, "packed", None)) is not None]
    last = model.config.num_layers

    def prepare(tokens: Tensor) -> Callable[[], Tensor]:
        packing, flat = Packing.of([tokens.shape[1]] * tokens.shape[0]).to(device), tokens.flatten()

        def forward() -> Tensor:
            with torch.inference_mode(not stage.gradients):  # as in a job: compiled code is made for one mode
                return model(flat, packing, (last,))[last]  # [T, D]

        return forward

    size = _model_bytes(model) + sum(int(tensor.numel()) * dtype.itemsize for tensor in packed)
    return Loaded(size, prepare, model.compiled)


def _compiled_model(weights: Path, device: torch.device, precision: str) -> ESM2:
    """The model of a job's engine; uncompiled where torch finds no compiler."""
    last = checkpoint.read(weights)[0].num_layers
    storage = "float32" if precision == "float32" else "float16"
    return Engine(weights, device, precision, Output((last,), ("residue",), storage), compile=True).model


def _load_fair_esm(weights: Path, device: torch.device, stage: Stage, _compile: bool) -> Loaded:
    model = checkpoint.reference_model(weights, device).to(DTYPES[stage.precision]).requires_grad_(stage.gradients)

    def prepare(tokens: Tensor) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            return model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]  # [N, L + 2, D]

        return forward

    return Loaded(_model_bytes(model), prepare)


def _model_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def random_tokens(n: int, length: int) -> Tensor:
    """[N, L + 2] int64: random proteins of one length."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    sequences = [rng.choice(STANDARD_RESIDUES, length).tobytes() for _ in range(n)]
    return torch.from_numpy(np.stack([tokenize(sequence) for sequence in sequences])).long()


def jobs_compile(store: Path) -> bool:
    """Whether a job of the plan is so long that it compiles the layers."""
    with suppress(OSError):
        rows = job_rows(store / "plan" / "jobs.tsv").values()
        return any(float(row.get("forecast_seconds") or 0) > MIN_COMPILED_SECONDS for row in rows)
    return False
