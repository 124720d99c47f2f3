"""Embed: walk the shards of one job, and commit it."""

import logging
import math
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.esm2.costs import forecast_seconds
from lengthwise.esm2.devices import device_name, resolve_device, set_threads
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.meters import driver_version
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.status import Status
from lengthwise.jobs.heartbeat import Heartbeat
from lengthwise.jobs.parity import ParityError, receipt
from lengthwise.jobs.pipeline import Progress, ShardPipeline
from lengthwise.plan.work_orders import PlannedShard, read_work_order
from lengthwise.store.paths import shard_path
from lengthwise.store.settings import require as require_settings
from lengthwise.store.settings import shape_of
from lengthwise.store.shard import Shard, is_complete
from lengthwise.store.weights import require_unchanged
from lengthwise.system.files import write_json, writing
from lengthwise.system.text import count
from lengthwise.system.versions import git_commit

log = logging.getLogger("lengthwise")

# Forecast seconds of a GPU from which on a job earns back what compiling takes, about a minute.
COMPILING_PAYS_SECONDS = 300.0


def embed_job(
    store: Path,
    work_order: Path,
    job_record: Path,
    device: str = "auto",
    batch_tokens: int | str = "auto",
    threads: int = 1,
    deadline: float = math.inf,
) -> dict:
    """Make every shard of a job that is not there yet, then write the job's commit.

    Parameters
    ----------
    store
        The store, with settings.json and weights.json.
    spec
        The job's work order, as `lengthwise.plan.planner` wrote it.
    commit
        The JSON file to write last: shards, versions, device, timings.
    device
        cuda, cpu, or auto: the store's own.
    batch_tokens
        Tokens of a forward pass, or auto.
    threads
        CPU threads for torch, at most as many as this process has cores.
    deadline
        When this process is going to be ended, in seconds of the epoch: no shard is begun that would not be done by then.

    Returns
    -------
    What the commit says.

    Raises
    ------
    LengthwiseError
        No such device or weights, no space, no time, or what was made is not what fair-esm computes.
    """
    settings = require_settings(store)
    set_threads(threads)
    device = resolve_device(settings["device"] if device == "auto" else device)
    checkpoint = require_unchanged(store, settings["weights_sha256"])
    job, started = work_order.stem, datetime.now(UTC)
    shards = list(read_work_order(work_order))
    if any(sequence is None for shard in shards for sequence in shard.sequences):
        raise LengthwiseError(
            f"{work_order}: was restored without sequences that no input has; run snakemake --forcerun plan"
        )
    todo = [s for s in shards if not is_complete(shard_path(store, s.name), s.digests, settings["fingerprint"])]
    lengths = np.concatenate([shard.lengths for shard in todo]) if todo else np.empty(0, np.int64)
    progress = Progress(job, int(lengths.sum()))
    with Heartbeat(store, job, device_name(device), progress.state):  # until the commit is there
        made, began = set(), time.perf_counter()
        loaded, loaded_bytes = began, None
        if todo:
            engine = _load(store, settings, checkpoint, device, lengths)
            loaded_bytes = engine.memory.used()
            batch_tokens = engine.auto_batch_tokens() if batch_tokens == "auto" else batch_tokens
            loaded = time.perf_counter()
            progress.start()
            with ShardPipeline(store, settings, engine, progress, deadline) as walk:
                # The longest sequences first: what does not fit shows at once.
                made = walk.make(todo[::-1], batch_tokens)
            del engine, walk.engine  # their memory is the reference's
        maker = {"device": device_name(device), "versions": versions()}
        parity = _compare(store, settings, checkpoint, device, maker, shards, made)
        result = {
            "job": job,
            "shards": {shard.name: shard_path(store, shard.name).stat().st_size for shard in shards},
            "does_not_fit": [
                s.name for s in shards if (Shard(shard_path(store, s.name))["status"] == Status.DOES_NOT_FIT).any()
            ],
            "made": [shard.name for shard in shards if shard.name in made],
            "sequences": sum(len(shard.lengths) for shard in shards),
            "residues": sum(int(shard.lengths.sum()) for shard in shards),
            "made_residues": progress.done,
            **maker,
            "precision": settings["precision"],
            "batch_tokens": batch_tokens if todo else None,
            "threads": torch.get_num_threads(),
            "parity": parity,
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "load_seconds": round(loaded - began, 3),
            "loaded_bytes": loaded_bytes,
            "embed_seconds": round(progress.seconds, 3),
        }
        write_json(job_record, result)
    return result


def _load(store: Path, settings: dict, checkpoint: Path, device: torch.device, lengths: np.ndarray) -> Engine:
    """The model, ready for sequences of these lengths."""
    # For this store's other jobs too.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(store.resolve() / "compiled"))
    worth_compiling = (
        float(forecast_seconds(lengths, shape_of(settings), settings["device"]).sum()) > COMPILING_PAYS_SECONDS
    )
    output = Output(tuple(settings["layers"]), tuple(settings["outputs"]), settings["storage_dtype"])
    engine = Engine(checkpoint, device, settings["precision"], output, compile=worth_compiling)
    require_unchanged(store, settings["weights_sha256"])  # nor was it exchanged while it was read
    return engine


def _compare(
    store: Path,
    settings: dict,
    checkpoint: Path,
    device: torch.device,
    maker: dict,
    shards: list[PlannedShard],
    made: set[str],
) -> dict:
    """The parity receipt of what this process made, or of all shards if it made none; what is wrong is removed again."""
    try:
        return receipt(store, settings, checkpoint, device, maker, [s for s in shards if s.name in made] or shards)
    except ParityError as error:
        for shard in made:  # or the next run would take them for finished work
            with writing(path := shard_path(store, shard)):
                path.unlink()
        done = f"what this job had made is removed ({count(len(made), 'shard')})" if made else "remove that file"
        raise LengthwiseError(f"{error}; {done}: run again, on another device if it comes back") from error


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on."""
    return {
        "lengthwise": __version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }
