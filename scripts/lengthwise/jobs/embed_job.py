"""Embed one job: make its shards, compare rows of the first with fair-esm, write the job record."""

import logging
import math
import os
import platform
import time
from dataclasses import dataclass
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
from lengthwise.esm2.streamed import StreamedEngine, open_engine
from lengthwise.jobs.heartbeat import Heartbeat
from lengthwise.jobs.parity import Parity, ParityError
from lengthwise.jobs.pipeline import Progress, ShardPipeline
from lengthwise.plan.work_orders import (
    DamagedError,
    PlannedShard,
    add_sequences,
    read_work_order,
    require_planned,
)
from lengthwise.store.paths import find_metrics, shard_path
from lengthwise.store.settings import require as require_settings
from lengthwise.store.settings import shape_of
from lengthwise.store.shard import Shard, is_complete
from lengthwise.store.weights import require_unchanged
from lengthwise.system.cache import private_cache
from lengthwise.system.files import facts, write_json, writing
from lengthwise.system.versions import git_commit

log = logging.getLogger("lengthwise")
# Compiling takes about a minute, so only jobs of more forecast seconds compile.
MIN_COMPILED_SECONDS = 300.0


@dataclass(frozen=True)
class _Made:
    """What this process made of a job, and the cost of loading the model."""

    shards: set[str]
    batch_tokens: int | None
    load_seconds: float
    loaded_bytes: int | None  # memory in use once the whole model was loaded
    streamed: bool | None  # None where no model was loaded


def embed_job(
    store: Path,
    work_order: Path,
    job_record: Path,
    device: str = "auto",
    batch_tokens: int | str = "auto",
    threads: int = 1,
    deadline: float = math.inf,
    parity: str = "fail",
    residency: str = "auto",
) -> dict:
    """Make every shard of a job that does not exist yet, then write the job record.

    Parameters
    ----------
    store
        The store, with settings.json and weights.json.
    work_order
        The job's work order.
    job_record
        The JSON file to write last: shards, checksums of their metrics, versions, device, timings.
    device
        cuda, cpu, or auto: the store's own.
    batch_tokens
        Tokens of a batch, or auto.
    threads
        CPU threads for torch, at most as many as this process has cores.
    deadline
        When this process will be ended, in seconds of the epoch. No shard is begun that would not be done by then.
    parity
        What a miss of the parity receipt does: fail, warn, or off for no receipt.
    residency
        Whether weights are resident or streamed, or auto (`lengthwise.esm2.streamed`).

    Returns
    -------
    The job record.

    Raises
    ------
    LengthwiseError
        The device or the weights are missing, disk space or time runs out, there is a miss of the parity receipt, the work order
        is damaged, or a later plan has removed it.
    """
    settings = require_settings(store)
    set_threads(threads)
    torch_device = resolve_device(settings["device"] if device == "auto" else device)
    checkpoint = require_unchanged(store, settings["weights_sha256"])
    job, started = work_order.stem, datetime.now(UTC)
    maker = {"device": device_name(torch_device), "versions": versions()}
    receipt = Parity(store, settings, maker, parity)
    shards, pending = _read_shards(store, work_order, settings["fingerprint"], receipt)
    progress = Progress(job, sum(int(shard.lengths.sum()) for shard in pending))
    try:
        with Heartbeat(store, job, device_name(torch_device), progress.state):  # until the job record is there
            receipt.require_no_miss()
            made = _Made(set(), None, 0.0, None, None)
            if pending or receipt.is_due:
                made = _make(
                    store,
                    settings,
                    checkpoint,
                    torch_device,
                    shards,
                    pending,
                    progress,
                    batch_tokens,
                    deadline,
                    work_order,
                    receipt,
                    residency,
                )
            receipt.require_no_miss()
            record = {
                "job": job,
                **_contents(store, shards, made.shards),
                "made_residues": progress.done,
                **maker,
                "precision": settings["precision"],
                "batch_tokens": made.batch_tokens,
                "threads": torch.get_num_threads(),
                "parity": receipt.result(),
                "started": started.isoformat(timespec="seconds"),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "load_seconds": round(made.load_seconds, 3),
                "loaded_bytes": made.loaded_bytes,
                "streamed": made.streamed,
                "embed_seconds": round(progress.seconds, 3),
            }
            require_planned(work_order)  # or the shards would be in two job records
            write_json(job_record, record)
    except ParityError as miss:  # those of an earlier process too, which was killed before it compared
        raise ParityError(f"{miss}{receipt.quarantine_missed(shard.name for shard in shards)}") from miss
    return record


def _read_shards(
    store: Path, work_order: Path, fingerprint: str, receipt: Parity
) -> tuple[list[PlannedShard], list[PlannedShard]]:
    """All shards of a work order, and those that do not exist yet, with the sequences that they are to hold."""
    try:
        shards = list(read_work_order(work_order, fingerprint))
        receipt.bring_back(shard.name for shard in shards)
        receipt.quarantine_unproven(shard.name for shard in shards)
        pending = [s for s in shards if not is_complete(shard_path(store, s.name), s.digests, fingerprint)]
        add_sequences(store, pending)
    except DamagedError as error:
        with writing(work_order):
            work_order.unlink(missing_ok=True)  # the next plan makes it again
        raise LengthwiseError(
            f"{work_order}: {error}; it is removed: run snakemake again, which plans it again"
        ) from error
    return shards, pending


def _make(
    store: Path,
    settings: dict,
    checkpoint: Path,
    device: torch.device,
    shards: list[PlannedShard],
    pending: list[PlannedShard],
    progress: Progress,
    batch_tokens: int | str,
    deadline: float,
    work_order: Path,
    receipt: Parity,
    residency: str,
) -> _Made:
    """Load the model, make the pending shards, and take the parity receipt where it is due."""
    began = time.perf_counter()
    lengths = np.concatenate([shard.lengths for shard in pending or shards])
    engine = _load(store, settings, checkpoint, device, lengths, residency)
    loaded_bytes = engine.memory.used()
    tokens = engine.auto_batch_tokens() if isinstance(batch_tokens, str) else batch_tokens
    load_seconds = time.perf_counter() - began
    progress.start()
    check, maker = receipt.require_no_miss, receipt.maker_name
    with ShardPipeline(store, settings, engine, progress, deadline, work_order, check, maker) as pipeline:
        made: set[str] = set()
        if receipt.is_due:  # of the shortest sequences, because the comparison takes a share of the job's time
            first, pending = pending[:1], pending[1:]
            made = pipeline.make(first, tokens, later=len(pending))
            began = time.perf_counter()
            seconds = progress.seconds * progress.total / max(progress.done, 1)
            receipt.compare(engine, first or shards, made, seconds)
            if first:  # what others made was not compared
                again = receipt.quarantine_unproven(shard.name for shard in shards)
                left = again | {shard.name for shard in pending}
                pending = [shard for shard in shards if shard.name in left]
                add_sequences(store, pending)
                progress.total += sum(int(shard.lengths.sum()) for shard in pending if shard.name in again)
            progress.exclude(time.perf_counter() - began)
        # Longest sequences first, so that one that does not fit shows at once.
        made |= pipeline.make(pending[::-1], tokens)
    streamed = isinstance(engine, StreamedEngine)
    return _Made(made, tokens, load_seconds, None if streamed else loaded_bytes, streamed)


def _contents(store: Path, shards: list[PlannedShard], made: set[str]) -> dict:
    """The part of a job record that describes its shards."""
    too_long = [s.name for s in shards if (Shard(shard_path(store, s.name))["status"] == Status.DOES_NOT_FIT).any()]
    return {
        "shards": {shard.name: shard_path(store, shard.name).stat().st_size for shard in shards},
        "metrics": {s.name: facts(path) for s in shards if (path := find_metrics(store, s.name))},
        "does_not_fit": too_long,
        "made": [shard.name for shard in shards if shard.name in made],
        "sequences": sum(len(shard.lengths) for shard in shards),
        "residues": sum(int(shard.lengths.sum()) for shard in shards),
    }


def _load(
    store: Path, settings: dict, checkpoint: Path, device: torch.device, lengths: np.ndarray, residency: str
) -> Engine:
    """Load the model; compile it if sequences of these lengths take long enough."""
    seconds = float(forecast_seconds(lengths, shape_of(settings), settings["device"]).sum())
    output = Output(
        tuple(settings["layers"]),
        tuple(settings["outputs"]),
        settings["storage_dtype"],
        settings.get("contacts_max_residues", 0),
    )
    compiles = device.type == "cuda" and seconds > MIN_COMPILED_SECONDS and has_compile_cache()
    engine = open_engine(checkpoint, device, settings["precision"], output, compiles, residency)
    require_unchanged(store, settings["weights_sha256"])  # it may have been replaced while it was read
    if engine.model.config != shape_of(settings):
        raise LengthwiseError(
            f"{checkpoint}: its config.json has other sizes than when this store was made; put it back"
        )
    if engine.contact_head and engine.contact_head.sha256 != settings["contact_regression_sha256"]:
        raise LengthwiseError(
            f"{checkpoint}: its contact head has other weights than when this store was made; put them back, or use "
            "another 'results'"
        )
    return engine


def has_compile_cache() -> bool:
    """Whether torch may keep compiled code where nobody else can replace it; not in the store, which others may write to."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = private_cache("compiled")
        if folder is None:
            log.warning(
                "the layers run uncompiled: no cache folder of this user's own; set XDG_CACHE_HOME or TMPDIR to one"
            )
            return False
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return True


def versions() -> dict[str, str | None]:
    """Versions of the software that the numbers depend on."""
    return {
        "lengthwise": __version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }
