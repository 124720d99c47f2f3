"""The contenders of the benchmark: every installed engine, in each precision that it is timed in."""

import importlib.util
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lengthwise.benchmark import peers
from lengthwise.benchmark.peers import Embed, Part
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.ingest.digests import digest

EXTRACT = "fair-esm extract.py"
RESIDUE, MEAN, DISK = "Lengthwise", "Lengthwise, means alone", "Lengthwise, to disk"
SHARD_BYTES = 1 << 30  # the config's default
# Larger models run in half precision alone, the type of their published checkpoints.
FLOAT32_PARAMETERS = 1e9


@dataclass(frozen=True)
class Loaded:
    """A model on the device, and the ways to run it by their names."""

    ways: dict[str, Embed]
    engine: Engine | None = None  # where it is this package's
    batch_tokens: int | None = None  # of a batch of this package's engine

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
    weights: Path, config: ModelConfig, device: torch.device, rows_folder: Path, log: Callable[[str], None]
) -> Iterator[Contender]:
    """The contenders that can run on a device with the packages that are installed.

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
    log
        Takes a line about a contender that is left out.
    """
    is_cuda = device.type == "cuda"
    production = "float16" if is_cuda else "float32"
    yield Contender((EXTRACT,), "float32", True, partial(_load_peer, EXTRACT, peers.load_extract_loop, weights, device))
    if importlib.util.find_spec("transformers"):
        for precision in (production,) if is_cuda else ("float32", "bfloat16"):
            load = partial(_load_peer, "transformers", peers.load_transformers, weights, config, device, precision)
            yield Contender(("transformers",), precision, precision == production, load)
        if importlib.util.find_spec("esm_cpp") and not is_cuda:
            load = partial(_load_peer, "esm-cpp", peers.load_esm_cpp, weights, config)
            yield Contender(("esm-cpp",), "float32", True, load)
    precisions = ["float16", "bfloat16"] if is_cuda else ["float32", "bfloat16"]
    if is_cuda and config.parameters < FLOAT32_PARAMETERS:
        precisions.append("float32")
    names: tuple[str, ...] = (RESIDUE, MEAN, DISK)
    try:
        import lengthwise.jobs.pipeline  # noqa: F401
    except ImportError as error:  # missing, or a pyarrow built for another numpy than the peers'
        log(f"left out, rows written to disk: {error}")
        names = names[:2]
    for precision in precisions:
        chosen = names if precision == production else names[:1]
        load = partial(_load_lengthwise, weights, config, device, precision, chosen, rows_folder)
        yield Contender(chosen, precision, precision == production, load)


def _load_peer(name: str, load: Callable[..., Embed], *given: object) -> Loaded:
    """Load another engine."""
    return Loaded({name: load(*given)})


def _load_lengthwise(
    weights: Path, config: ModelConfig, device: torch.device, precision: str, names: tuple[str, ...], rows_folder: Path
) -> Loaded:
    """One engine for all ways: what differs is what becomes of the last layer's rows."""
    storage = "float32" if precision == "float32" else "float16"
    residue, mean = (Output((config.num_layers,), (kind,), storage) for kind in ("residue", "mean"))
    engine = Engine(weights, device, precision, residue, compile=True)
    batch_tokens = engine.auto_batch_tokens()
    ways: dict[str, Embed] = {
        RESIDUE: partial(_embed, engine, residue, batch_tokens),
        MEAN: partial(_embed, engine, mean, batch_tokens),
    }
    if DISK in names:
        ways[DISK] = _to_disk(engine, residue, batch_tokens, rows_folder)
    return Loaded({name: ways[name] for name in names}, engine, batch_tokens)


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
