"""Embed: walk the shards of one job, and commit it."""

import logging
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from lengthwise._version import __version__
from lengthwise.engine import AUTO_BATCH_TOKENS, Engine, Output, cut_batches, device_name, resolve_device, set_threads
from lengthwise.errors import LengthwiseError
from lengthwise.files import write_json
from lengthwise.logs import duration
from lengthwise.metrics import write_metrics
from lengthwise.settings import require as require_settings
from lengthwise.store import ShardWriter, is_made, metrics_path, shard_path
from lengthwise.weights import require_unchanged

PROGRESS_SECONDS = 10.0

log = logging.getLogger("lengthwise")


def embed_job(
    store: Path, spec: Path, commit: Path, device: str = "auto", batch_tokens: int | str = "auto", threads: int = 1
) -> dict:
    """Make every shard of a job that is not there yet, then write the job's commit.

    Parameters
    ----------
    store
        The store, with settings.json and weights.json.
    spec
        The job's work order, as `lengthwise.plan` wrote it.
    commit
        The JSON file to write last: shards, versions, device, timings.
    device
        cuda, cpu, or auto: the store's own.
    batch_tokens
        Tokens of a forward pass, or auto.
    threads
        CPU threads for torch, at most as many as this process has cores.

    Returns
    -------
    What the commit says.

    Raises
    ------
    LengthwiseError
        No such device or weights, or no space.
    """
    settings = require_settings(store)
    set_threads(threads)
    device = resolve_device(settings["device"] if device == "auto" else device)
    checkpoint = require_unchanged(store, settings["weights_sha256"])
    if batch_tokens == "auto":
        batch_tokens = AUTO_BATCH_TOKENS[device.type]
    job, started = spec.stem, datetime.now(UTC)
    shards = list(_shards(spec))
    if any(sequence is None for *_, sequences in shards for sequence in sequences):
        raise LengthwiseError(
            f"{spec}: was restored without sequences that no input has; run snakemake --forcerun plan"
        )
    load_seconds = 0.0
    engine, progress = None, None
    made = []
    for shard, digests, lengths, sequences in shards:
        with ShardWriter(store, shard, digests, lengths, settings) as writer:
            if writer.already_there:
                continue
            if engine is None:
                begin = time.perf_counter()
                engine = _engine(settings, checkpoint, device)
                require_unchanged(store, settings["weights_sha256"])  # nor was it exchanged while it was read
                load_seconds = time.perf_counter() - begin
                left = [
                    entry
                    for entry in shards
                    if not is_made(shard_path(store, entry[0]), entry[1], settings["fingerprint"])
                ]
                progress = Progress(job, sum(int(entry[2].sum()) for entry in left))
            rows = _fill(engine, writer, job, shard, lengths, sequences, batch_tokens, progress)
            write_metrics(metrics_path(store, shard), rows)
            writer.commit()
            made.append(shard)
    result = {
        "job": job,
        "shards": {shard: shard_path(store, shard).stat().st_size for shard, *_ in shards},
        "made": made,
        "sequences": sum(len(lengths) for _, _, lengths, _ in shards),
        "residues": sum(int(lengths.sum()) for _, _, lengths, _ in shards),
        "made_residues": progress.done if progress else 0,
        "device": device_name(device),
        "precision": settings["precision"],
        "batch_tokens": batch_tokens,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_seconds": round(load_seconds, 3),
        "embed_seconds": round(progress.seconds if progress else 0.0, 3),
    }
    write_json(commit, result)
    return result


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on."""
    return {
        "lengthwise": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


class Progress:
    """Says now and then how much of a job is done, how fast, and how long the rest will take."""

    def __init__(self, job: str, residues: int):
        self.job, self.total, self.done = job, residues, 0
        self.started = self.previous = self.said = time.perf_counter()

    def batch_done(self, residues: int) -> float:
        """Count a batch; returns the milliseconds since the previous one."""
        now = time.perf_counter()
        self.done += residues
        if now - self.said >= PROGRESS_SECONDS or self.done == self.total:
            self.said = now
            rate = self.done / max(now - self.started, 1e-9)
            log.info(
                "job %s: %s of %s residues (%.0f %%), %s residues/s, %s left",
                self.job,
                f"{self.done:,}",
                f"{self.total:,}",
                100 * self.done / self.total,
                f"{rate:,.0f}",
                duration((self.total - self.done) / rate),
            )
        elapsed, self.previous = now - self.previous, now
        return elapsed * 1000

    @property
    def seconds(self) -> float:
        return self.previous - self.started


def _engine(settings: dict, checkpoint: Path, device: torch.device) -> Engine:
    output = Output(tuple(settings["layers"]), tuple(settings["outputs"]), settings["storage_dtype"])
    return Engine(checkpoint, device, settings["precision"], output)


def _shards(spec: Path) -> Iterator[tuple[str, list[bytes], np.ndarray, list[bytes]]]:
    """(shard, digests, lengths, sequences) of each shard of a spec, in its order."""
    table = pq.read_table(spec)
    for shard in dict.fromkeys(table.column("shard").to_pylist()):
        rows = table.filter(np.asarray(table.column("shard").to_numpy(zero_copy_only=False) == shard))
        yield (
            shard,
            rows.column("digest").to_pylist(),
            rows.column("length").to_numpy(),
            rows.column("sequence").to_pylist(),
        )


def _fill(engine, writer, job, shard, lengths, sequences, batch_tokens, progress) -> list[dict]:
    """Embed a shard's sequences into its writer; returns the rows of its metrics."""
    rows = []
    name = device_name(engine.device)
    for number, (start, stop) in enumerate(cut_batches(lengths, batch_tokens)):
        result = engine.embed(sequences[start:stop])
        here = lengths[start:stop]
        writer.write(start, result.arrays, here.tolist(), result.status)
        residues = int(here.sum())
        rows.append(
            {
                "job": job,
                "shard": shard,
                "batch": number,
                "n_sequences": stop - start,
                "n_residues": residues,
                "n_tokens": residues + 2 * (stop - start),
                "min_length": int(here.min()),
                "mean_length": float(here.mean()),
                "max_length": int(here.max()),
                "wall_ms": progress.batch_done(residues),
                "device_ms": result.device_ms,
                "peak_allocated_bytes": result.peak_allocated_bytes,
                "peak_reserved_bytes": result.peak_reserved_bytes,
                "peak_rss_bytes": result.peak_rss_bytes,
                "oom_splits": result.oom_splits,
                "device": name,
                "precision": engine.precision,
            }
        )
    return rows
