"""The contenders of the benchmark: every installed engine, in each precision that it is timed in."""

import importlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lengthwise.benchmark import esm_cpp, peers
from lengthwise.benchmark.peers import Embed, Part
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.model import emulated_on_cpu
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.residency import hiding_tokens
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.esm2.streamed import StreamedEngine

EXTRACT = "fair-esm extract.py"
RESIDUE, MEAN, DISK = "Lengthwise", "Lengthwise, means alone", "Lengthwise, to disk"
STREAMED = "Lengthwise, streamed"
# A timed pass of streamed weights has so many times the tokens that hide reading them at the assumed speed: a GPU may be several
# times as fast, and nothing hides reading the first layer.
HIDING_TIMES = 10
SHARD_BYTES = 1 << 30  # the config's default
# Larger models run in half precision alone, the type of their published checkpoints.
FLOAT32_PARAMETERS = 1e9


@dataclass(frozen=True)
class Choice:
    """Which contenders take part, where the user has a choice."""

    esm_cpp: Path  # a virtual environment that has it, if it exists
    emulated: bool = False  # types too that the device has no instructions for


@dataclass(frozen=True)
class Loaded:
    """A model on the device, and the ways to run it by their names."""

    ways: dict[str, Embed]
    engine: Engine | None = None  # where it is this package's
    batch_tokens: int | None = None  # of a batch of this package's engine
    least_tokens: int = 0  # of a timed pass

    @property
    def is_compiled(self) -> bool | None:
        """Whether torch compiled the layers; None of other engines."""
        return None if self.engine is None else self.engine.model.compiled


@dataclass(frozen=True)
class Contender:
    """A model in one precision that is loaded once and runs in one way or several, a row of the table each."""

    names: tuple[str, ...]
    precision: str
    every_length: bool  # or the first alone
    load: Callable[[], Loaded]


def contenders_of(
    weights: Path,
    config: ModelConfig,
    device: torch.device,
    rows_folder: Path,
    choice: Choice,
    log: Callable[[str], None],
) -> Iterator[Contender]:
    """The chosen contenders that can run on a device with the packages that are installed.

    Parameters
    ----------
    weights
        A fair-esm checkpoint.
    config
        Its shape.
    device
        Where to run.
    rows_folder
        Rows are written there, and removed.
    choice
        Who takes part.
    log
        Takes a line about each contender that is left out.
    """
    is_cuda = device.type == "cuda"
    production = "float16" if is_cuda else "float32"
    precisions = ["float16", "bfloat16"] if is_cuda else ["float32", "bfloat16"]
    if is_cuda and config.parameters < FLOAT32_PARAMETERS:
        precisions.append("float32")
    if not choice.emulated:
        for precision in [each for each in precisions if is_emulated(device, each)]:
            precisions.remove(precision)
            log(f"left out, {precision}: this device emulates it (--emulated times it all the same)")
    yield Contender((EXTRACT,), "float32", True, partial(_load_peer, EXTRACT, peers.load_extract_loop, weights, device))
    if error := _missing("transformers.models.esm.modeling_esm"):
        log(f"left out, transformers: {error}; the extra [benchmark] has it")
    else:
        for precision in (production,) if is_cuda else precisions:
            load = partial(_load_peer, "transformers", peers.load_transformers, weights, config, device, precision)
            yield Contender(("transformers",), precision, precision == production, load)
    if not is_cuda and esm_cpp.python_of(choice.esm_cpp).exists():
        load = partial(_load_peer, "esm-cpp", esm_cpp.load, weights, config, choice.esm_cpp, rows_folder)
        yield Contender(("esm-cpp",), "float32", True, load)
    elif not is_cuda:
        log(f"left out, esm-cpp: it is not installed; {esm_cpp.how_to_install(choice.esm_cpp)}")
    names: tuple[str, ...] = (RESIDUE, MEAN, DISK)
    if error := _missing("lengthwise.jobs.pipeline"):
        log(f"left out, rows written to disk: {error}")
        names = names[:2]
    for precision in precisions:
        chosen = names if precision == production else names[:1]
        load = partial(_load_lengthwise, weights, config, device, precision, chosen, rows_folder)
        yield Contender(chosen, precision, precision == production, load)
    if error := _missing("psutil"):  # which says how much memory is free for a wave
        log(f"left out, streamed weights: {error}")
        return
    load = partial(_load_lengthwise, weights, config, device, production, (STREAMED,), rows_folder)
    yield Contender((STREAMED,), production, False, load)


def _missing(module: str) -> str:
    """Why a module cannot be imported: it or what it needs is missing, or of another version. Empty if it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return ""


def is_emulated(device: torch.device, precision: str) -> bool:
    """Whether a device has no instructions for a type, so that it is slower than float32. torch knows."""
    if device.type == "cuda":
        return precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return emulated_on_cpu(DTYPES[precision])


def _load_peer(name: str, load: Callable[..., Embed], *given: object) -> Loaded:
    """Load another engine."""
    return Loaded({name: load(*given)})


def _load_lengthwise(
    weights: Path, config: ModelConfig, device: torch.device, precision: str, names: tuple[str, ...], rows_folder: Path
) -> Loaded:
    """One engine for all ways: what differs is what becomes of the last layer's rows."""
    storage = "float32" if precision == "float32" else "float16"
    residue, mean = (Output((config.num_layers,), (kind,), storage) for kind in ("residue", "mean"))
    kind = StreamedEngine if STREAMED in names else Engine
    engine = kind(weights, device, precision, residue, compile=True)
    batch_tokens = engine.auto_batch_tokens()
    ways: dict[str, Embed] = {
        RESIDUE: partial(_embed, engine, residue, batch_tokens),
        STREAMED: partial(_embed, engine, residue, batch_tokens),
        MEAN: partial(_embed, engine, mean, batch_tokens),
    }
    if DISK in names:
        ways[DISK] = _to_disk(engine, residue, batch_tokens, rows_folder)
    least_tokens = batch_tokens
    if STREAMED in names:
        least_tokens = max(batch_tokens, HIDING_TIMES * hiding_tokens(config, device.type, DTYPES[precision].itemsize))
    return Loaded({name: ways[name] for name in names}, engine, batch_tokens, least_tokens)


def _embed(engine: Engine, output: Output, batch_tokens: int, sequences: list[bytes]) -> Iterator[Part]:
    """Rows are dropped once they are on the host, as a job drops them once they are written: buffers are used again."""
    lengths = np.array([len(sequence) for sequence in sequences])
    bounds = list(cut_batches(lengths, batch_tokens))

    def parts() -> Iterator[Part]:
        engine.output = output
        for result in engine.embed(sequences[start:stop] for start, stop in bounds):
            yield Part(list(result.arrays.values()), result.peak_allocated_bytes)

    return parts()


def _to_disk(engine: Engine, output: Output, batch_tokens: int, rows_folder: Path) -> Embed:
    """A job's own pipeline, with shards written and synced; each call removes those of the call before."""
    from lengthwise.ingest.digests import digest
    from lengthwise.jobs.pipeline import Progress, ShardPipeline
    from lengthwise.plan.work_orders import PlannedShard
    from lengthwise.store.metrics import read_metrics
    from lengthwise.store.paths import metrics_path, shard_path
    from lengthwise.store.shard import Shard

    config = engine.model.config
    folder = tempfile.TemporaryDirectory(prefix="rows-", dir=rows_folder)
    settings = {
        "layers": list(output.layers),
        "outputs": list(output.outputs),
        "embed_dim": config.embed_dim,
        "storage_dtype": output.storage_dtype,
        "fingerprint": "",
    }
    row_bytes = config.embed_dim * np.dtype(output.storage_dtype).itemsize
    calls = itertools.count()

    def embed(sequences: list[bytes]) -> Iterator[Part]:
        call = next(calls)
        shutil.rmtree(Path(folder.name) / str(call - 1), ignore_errors=True)
        store = Path(folder.name) / str(call)
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        shard_numbers = lengths.cumsum(dtype=np.int64) * row_bytes // SHARD_BYTES
        bounds = np.flatnonzero(np.diff(shard_numbers, prepend=-1, append=-1)).tolist()
        shards = [
            PlannedShard(
                f"{start:032x}",
                [digest(sequence) for sequence in sequences[start:stop]],
                lengths[start:stop],
                sequences[start:stop],
            )
            for start, stop in itertools.pairwise(bounds)
        ]

        def parts() -> Iterator[Part]:
            engine.output = output
            with ShardPipeline(store, settings, engine, Progress("benchmark", int(lengths.sum()))) as pipeline:
                pipeline.make(shards[::-1], batch_tokens)
            metrics = read_metrics([metrics_path(store, shard.name) for shard in shards])
            peaks = metrics["peak_allocated_bytes"].dropna()
            written = [Shard(shard_path(store, shard.name)) for shard in shards]
            rows = [shard[f"layer_{config.num_layers}"] for shard in written]
            yield Part(rows, int(peaks.max()) if len(peaks) else None)

        return parts()

    return embed
