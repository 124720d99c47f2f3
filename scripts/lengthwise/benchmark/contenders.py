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
from lengthwise.benchmark.peers import Embed, Rows
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.ingest.digests import digest

SHARD_BYTES = 1 << 30  # the config's default


@dataclass(frozen=True)
class Contender:
    """An engine and a precision. `load` loads the model and returns its embedding function."""

    engine: str
    precision: str
    load: Callable[[], Embed]


def contenders_of(
    weights: Path, config: ModelConfig, device: torch.device, log: Callable[[str], None]
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
    log
        Takes a line about a contender that is left out.
    """
    is_cuda = device.type == "cuda"
    yield Contender("fair-esm extract.py", "float32", partial(peers.load_extract_loop, weights, device))
    if importlib.util.find_spec("transformers"):
        for precision in ("float16",) if is_cuda else ("float32", "bfloat16"):
            load = partial(peers.load_transformers, weights, config, device, precision)
            yield Contender("transformers", precision, load)
        if importlib.util.find_spec("esm_cpp") and not is_cuda:
            yield Contender("esm-cpp", "float32", partial(peers.load_esm_cpp, weights, config))
    load_lengthwise = partial(_load_lengthwise, weights, config, device)
    for precision in ("float32", "float16", "bfloat16") if is_cuda else ("float32", "bfloat16"):
        yield Contender("Lengthwise", precision, partial(load_lengthwise, precision, "residue"))
    production = "float16" if is_cuda else "float32"
    yield Contender("Lengthwise, means alone", production, partial(load_lengthwise, production, "mean"))
    try:
        import lengthwise.jobs.embed_job  # noqa: F401
    except ImportError as error:  # missing, or a pyarrow built for another numpy than the peers'
        log(f"left out, rows written to disk: {error}")
    else:
        load = partial(_load_lengthwise_to_disk, weights, config, device, production)
        yield Contender("Lengthwise, to disk", production, load)


def _engine(weights: Path, config: ModelConfig, device: torch.device, precision: str, kind: str) -> Engine:
    output = Output((config.num_layers,), (kind,), "float32" if precision == "float32" else "float16")
    return Engine(weights, device, precision, output, compile=True)


def _load_lengthwise(weights: Path, config: ModelConfig, device: torch.device, precision: str, kind: str) -> Embed:
    engine = _engine(weights, config, device, precision, kind)
    batch_tokens = engine.auto_batch_tokens()

    def embed(sequences: list[bytes]) -> Rows:
        lengths = np.array([len(sequence) for sequence in sequences])
        bounds = list(cut_batches(lengths, batch_tokens))
        results = engine.embed(sequences[start:stop] for start, stop in bounds)
        rows: Rows = []
        for (start, stop), result in zip(bounds, results, strict=True):
            if kind == "mean":
                rows += list(result.arrays[f"mean_{config.num_layers}"][:, None])  # [1, D] each
            else:
                rows += np.split(result.arrays[f"layer_{config.num_layers}"], np.cumsum(lengths[start : stop - 1]))
        return rows

    return embed


def _load_lengthwise_to_disk(weights: Path, config: ModelConfig, device: torch.device, precision: str) -> Embed:
    """A job's own pipeline with shards in a temporary folder, written and synced; each call removes the previous shards."""
    from lengthwise.jobs.pipeline import Progress, ShardPipeline
    from lengthwise.plan.work_orders import PlannedShard
    from lengthwise.store.paths import shard_path
    from lengthwise.store.shard import Shard

    engine = _engine(weights, config, device, precision, "residue")
    batch_tokens, storage_dtype = engine.auto_batch_tokens(), engine.output.storage_dtype
    layer, folder = config.num_layers, tempfile.TemporaryDirectory()
    settings = {"layers": [layer], "outputs": ["residue"], "embed_dim": config.embed_dim, "fingerprint": ""}
    settings["storage_dtype"] = storage_dtype
    calls = itertools.count()

    def embed(sequences: list[bytes]) -> Rows:
        call = next(calls)
        shutil.rmtree(Path(folder.name) / str(call - 1), ignore_errors=True)
        store = Path(folder.name) / str(call)
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        row_bytes = config.embed_dim * np.dtype(storage_dtype).itemsize
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
        with ShardPipeline(store, settings, engine, Progress("benchmark", int(lengths.sum()))) as pipeline:
            pipeline.make(shards[::-1], batch_tokens)
        written = [Shard(shard_path(store, shard.name)) for shard in shards]
        return [rows for shard in written for rows in np.split(shard[f"layer_{layer}"], shard["offsets"][1:-1])]

    return embed
