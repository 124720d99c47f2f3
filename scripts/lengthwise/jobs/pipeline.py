"""The shard pipeline: the device computes while a thread writes and commits. `ShardPipeline` says what runs where."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.devices import device_name, is_out_of_memory
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.passes import BatchResult
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS
from lengthwise.esm2.status import Status
from lengthwise.esm2.streamed import StreamedEngine
from lengthwise.plan.work_orders import PlannedShard, require_planned
from lengthwise.store.metrics import write_metrics
from lengthwise.store.paths import metrics_path
from lengthwise.store.settings import require_same
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.store.weights import require_unchanged
from lengthwise.system.limits import open_files
from lengthwise.system.locks import shared_store_lock
from lengthwise.system.text import count, duration

log = logging.getLogger("lengthwise")
PROGRESS_SECONDS = 10.0
# Results that wait for the writer thread; more would cost memory and no time less.
MAX_WAITING_WRITES = 2
# Of the files that a process may open, those for shards; libraries, logs and the writer's folders have the others.
OPEN_SHARE = 0.5
# Reserved for the end of a job: the job record, the process's exit.
END_OF_JOB_SECONDS = 20.0


@dataclass(frozen=True)
class _OpenShard:
    """A shard in progress, n sequences."""

    planned: PlannedShard
    writer: ShardWriter
    bounds: list[tuple[int, int]]  # (start, stop) of its batches, in the order of the work
    status: np.ndarray  # [n] uint8
    rows: list[dict] = field(default_factory=list)  # of its metrics, one per batch
    writes: list[Future] = field(default_factory=list)


class Progress:
    """Counts a job's residues and logs them with rate and time left, at most every `PROGRESS_SECONDS`."""

    def __init__(self, job: str, residues: int):
        self.job, self.total, self.done = job, residues, 0
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self.started = self.previous = self.logged = time.perf_counter()

    def batch_done(self, residues: int) -> float:
        """Count a batch; returns the milliseconds since the previous one."""
        now = time.perf_counter()
        self.done += residues
        if residues and (now - self.logged >= PROGRESS_SECONDS or self.done == self.total):
            self.logged = now
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

    def state(self) -> tuple[int, int, float]:
        """(residues done, residues in total, seconds up to the last batch)."""
        return self.done, self.total, self.seconds

    @property
    def seconds(self) -> float:
        return self.previous - self.started

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not the batches'."""
        self.started, self.previous, self.logged = (
            self.started + seconds,
            self.previous + seconds,
            self.logged + seconds,
        )


class ShardPipeline:
    """Turns planned shards into shard files, the device computing while one thread writes.

    The caller's thread pulls batches from the shards, opening each shard at its first batch; hands them to the engine; and
    takes the results in the same order. The engine tokenises and computes on threads of its own.

    The writer thread works first in, first out: a batch's rows; after a shard's last batch its metrics, fsync and rename.
    So metrics exist before their shard, and a shard is renamed after all its writes.

    Bounds: at most `MAX_WAITING_WRITES` results are queued for the writer; then the caller's thread waits. The engine works a few
    batches ahead, or a wave, so at most the shards of those batches are open at once, and no more than `OPEN_SHARE` of the files
    that a process may open. No shard is opened that would not be done by the deadline.

    Use as a context manager. Leaving it removes the temporary files of shards that are not committed.

    Parameters
    ----------
    store, settings
        The store and its settings.
    engine
        The loaded model.
    progress
        Counts the residues done.
    deadline
        When this process will be ended, in seconds of the epoch.
    work_order
        No shard is opened once this file is gone: a later plan has given its sequences to other jobs. None where the shards
        are of no plan.
    check
        Called before a shard is opened; raises where the job must stop.
    maker
        Who makes the shards, for `lengthwise.store.metrics.maker_of`.
    """

    def __init__(
        self,
        store: Path,
        settings: dict,
        engine: Engine,
        progress: Progress,
        deadline: float = math.inf,
        work_order: Path | None = None,
        check: Callable[[], None] | None = None,
        maker: str = "",
    ):
        self.store, self.settings, self.engine = store, settings, engine
        self.progress, self.deadline, self.work_order, self.check = progress, deadline, work_order, check
        self.maker = maker
        self.device = device_name(engine.device)  # once: on a CPU it reads a file
        self.open: deque[_OpenShard] = deque()  # opened, and not yet handed to the writer for commit
        self.most_open = max(1, int(OPEN_SHARE * open_files()))
        self.opened_residues = 0  # of all shards opened so far
        self.writes: deque[Future] = deque()  # of the writer thread, in order
        self.stack = ExitStack()
        self.stack.enter_context(shared_store_lock(store))
        self.writer_thread = ThreadPoolExecutor(1)

    def make(self, shards: list[PlannedShard], batch_tokens: int, later: int = 0) -> set[str]:
        """Make shards in this order.

        Parameters
        ----------
        shards
            Shards to make; one that another process finishes meanwhile is skipped.
        batch_tokens
            Tokens of a batch.
        later
            Number of the job's shards that a later call makes.

        Returns
        -------
        The names of the shards that this process made.

        Raises
        ------
        LengthwiseError
            The remaining shards would not be done by the deadline, the work order is gone, the disk is full, or the
            checkpoint changed.
        """
        remaining, made = deque(shards), set()
        while remaining and self._fits_deadline(remaining[0]):
            for result in self.engine.embed(self._batches(remaining, batch_tokens)):
                current = self.open[0]
                self._submit_write(current, *current.bounds[len(current.rows)], result, self.engine)
                if len(current.rows) == len(current.bounds):
                    if self.engine.device.type == "cpu" and not isinstance(self.engine, StreamedEngine):
                        _share_wall_time(current.rows, self.engine.at_once)
                    self._repair(current)
                    made.add(current.planned.name)
                    self.writes.append(self.writer_thread.submit(self._commit, self.open.popleft()))
        while self.writes:
            self.writes.popleft().result()
        if remaining:
            raise LengthwiseError(
                f"job {self.progress.job}: its time ends at {time.strftime('%H:%M', time.localtime(self.deadline))}, before "
                f"the next shard would be done; {count(len(remaining) + later, 'shard')} left: run again to go on"
            )
        return made

    def _fits_deadline(self, shard: PlannedShard) -> bool:
        """Whether a shard, after those opened before it, would be done by the deadline at the job's rate so far."""
        seconds = 0.0
        if self.progress.done:
            seconds_per_residue = (time.perf_counter() - self.progress.started) / self.progress.done
            seconds = (self.opened_residues - self.progress.done + int(shard.lengths.sum())) * seconds_per_residue
        return time.time() + seconds + END_OF_JOB_SECONDS < self.deadline

    def _batches(self, remaining: deque[PlannedShard], batch_tokens: int) -> Iterator[list[bytes]]:
        """Open the remaining shards one by one and yield their batches, longest sequences first.

        Ends early at a shard that would miss the deadline, at one for which too many are open, so that the engine computes what
        it has, and at one that another process is making while shards of this process are open: waiting then could deadlock.
        """
        while remaining and self._fits_deadline(shard := remaining[0]):
            if len(self.open) >= self.most_open:
                return
            if self.work_order:
                require_planned(self.work_order)
            if self.check:
                self.check()
            try:
                writer = ShardWriter(
                    self.store, shard.name, shard.digests, shard.lengths, self.settings, wait=not self.open
                )
            except BlockingIOError:
                return
            remaining.popleft()
            self.stack.enter_context(writer)
            if writer.already_there:
                writer.abandon()
                continue
            self.opened_residues += int(shard.lengths.sum())
            bounds = list(cut_batches(shard.lengths, batch_tokens))[::-1]
            self.open.append(_OpenShard(shard, writer, bounds, np.zeros(len(shard.lengths), np.uint8)))
            for start, stop in bounds:
                yield shard.sequences[start:stop]

    def _submit_write(self, current: _OpenShard, start: int, stop: int, result: BatchResult, engine: Engine) -> None:
        """Hand a batch's rows to the writer thread, and note the batch's metrics."""
        lengths = current.planned.lengths[start:stop]
        began = time.perf_counter()
        while len(self.writes) >= MAX_WAITING_WRITES:
            self.writes.popleft().result()
        wait_write_ms = (time.perf_counter() - began) * 1000
        write = self.writer_thread.submit(current.writer.write, start, result.arrays, result.status)
        self.writes.append(write)
        current.writes.append(write)
        current.status[start:stop] = result.status
        is_repair = engine is not self.engine  # its residues were counted before
        since_last_ms = self.progress.batch_done(0 if is_repair else int(lengths.sum()))
        row = {
            "job": self.progress.job,
            "shard": current.planned.name,
            "batch": len(current.rows),
            **_batch_metrics(engine, lengths, result),
            "wall_ms": since_last_ms if result.wall_ms is None else result.wall_ms,
            "wait_write_ms": wait_write_ms,
            "device": self.device,
        }
        current.rows.append(row | {"gpu_busy": _gpu_busy(row)})

    def _repair(self, current: _OpenShard) -> None:
        """Compute sequences that overflowed half precision again, in float32."""
        overflowed = np.flatnonzero(current.status == Status.NON_FINITE).tolist()
        if not overflowed or self.engine.precision == "float32":
            return
        what = f"shard {current.planned.name}: {count(len(overflowed), 'sequence')} overflowed {self.engine.precision}"
        try:
            float32_engine = self.engine.in_float32()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s, and the weights in float32 do not fit into the device's memory too", what)
            return
        require_unchanged(self.store, self.settings["weights_sha256"])  # the checkpoint may have been read again
        log.warning("%s; computed again in float32", what)
        results = float32_engine.embed([current.planned.sequences[i]] for i in overflowed)
        for i, result in zip(overflowed, results, strict=True):
            self._submit_write(current, i, i + 1, result, float32_engine)

    def _commit(self, finished: _OpenShard) -> None:
        """On the writer thread: metrics, then the shard's rename."""
        for write in finished.writes:
            write.result()  # raises if a write failed, so that the shard is not committed
        if self.work_order:
            require_same(self.store, self.settings)
            if isinstance(self.engine, StreamedEngine):  # which read the checkpoint again for each wave
                require_unchanged(self.store, self.settings["weights_sha256"])
        write_metrics(metrics_path(self.store, finished.planned.name), finished.rows, self.maker)
        finished.writer.commit()

    def __enter__(self) -> "ShardPipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.writer_thread.shutdown(cancel_futures=True)
        self.stack.close()


def _share_wall_time(rows: list[dict], cores: int) -> None:
    """Divide the shard's wall time among its batches by the core time of each: on a CPU several are computed at once."""
    core_ms = [row["device_ms"] * (cores if row["n_tokens"] > AUTO_BATCH_TOKENS["cpu"] else 1) for row in rows]
    wall_ms = sum(row["wall_ms"] for row in rows)
    for row, own_ms in zip(rows, core_ms, strict=True):
        row["wall_ms"] = wall_ms * own_ms / sum(core_ms) if any(core_ms) else wall_ms / len(rows)


def _gpu_busy(row: dict) -> float | None:
    if row["wait_launch_ms"] is None:
        return None
    return min(1.0, (row["device_ms"] - row["wait_launch_ms"]) / row["wall_ms"])


def _batch_metrics(engine: Engine, lengths: np.ndarray, result: BatchResult) -> dict:
    """The columns of a metrics row that do not depend on the job."""
    residues = int(lengths.sum())
    return {
        "n_sequences": len(lengths),
        "n_residues": residues,
        "n_tokens": residues + 2 * len(lengths),
        "min_length": int(lengths.min()),
        "mean_length": float(lengths.mean()),
        "max_length": int(lengths.max()),
        "device_ms": result.device_ms,
        "wait_launch_ms": result.wait_launch_ms,
        "wait_read_ms": result.wait_read_ms,
        "peak_allocated_bytes": result.peak_allocated_bytes,
        "peak_reserved_bytes": result.peak_reserved_bytes,
        "peak_rss_bytes": result.peak_rss_bytes,
        "oom_splits": result.oom_splits,
        "precision": engine.precision,
    }
