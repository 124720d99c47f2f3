"""The shard pipeline: the device computes while a thread writes, syncs and commits what is done."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.config import AUTO_BATCH_TOKENS
from lengthwise.esm2.devices import device_name, is_out_of_memory
from lengthwise.esm2.engine import BatchResult, Engine
from lengthwise.esm2.status import Status
from lengthwise.plan.work_orders import PlannedShard
from lengthwise.store.metrics import write_metrics
from lengthwise.store.paths import metrics_path
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.store.weights import require_unchanged
from lengthwise.system.locks import shared_store_lock
from lengthwise.system.text import count, duration

log = logging.getLogger("lengthwise")

PROGRESS_SECONDS = 10.0

# Batches that wait to be written while the device goes on: more only take memory.
WRITES_AHEAD = 2

# Between a job's last write and the end of its process, beside the last write itself.
CLOSING_SECONDS = 20.0


@dataclass(frozen=True)
class _Open:
    """A shard that is being made."""

    shard: PlannedShard
    writer: ShardWriter
    bounds: list[tuple[int, int]]  # of its batches, in the order of the work
    status: np.ndarray  # [n] uint8
    rows: list[dict] = field(default_factory=list)  # of its metrics
    writes: list[Future] = field(default_factory=list)


class Progress:
    """Says now and then how much of a job is done, how fast, and how long the rest will take."""

    def __init__(self, job: str, residues: int):
        self.job, self.total, self.done = job, residues, 0
        self.start()

    def start(self) -> None:
        """Time counts from now on."""
        self.started = self.previous = self.said = time.perf_counter()

    def batch_done(self, residues: int) -> float:
        """Count a batch; returns the milliseconds since the previous one."""
        now = time.perf_counter()
        self.done += residues
        if residues and (now - self.said >= PROGRESS_SECONDS or self.done == self.total):
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

    def state(self) -> tuple[int, int, float]:
        """Residues done, residues to do, and the seconds that they took."""
        return self.done, self.total, self.seconds

    @property
    def seconds(self) -> float:
        return self.previous - self.started


class ShardPipeline:
    """Makes shards one after the other: the device computes while a thread writes, syncs and commits what is done.

    Use as a context manager; what is not committed on leaving is not made.
    """

    def __init__(self, store: Path, settings: dict, engine: Engine, progress: Progress, deadline: float = math.inf):
        self.store, self.settings, self.engine = store, settings, engine
        self.progress, self.deadline = progress, deadline
        self.open: deque[_Open] = deque()  # begun, and not yet given to the thread whole
        self.begun = 0  # residues of all shards that were begun
        self.writes: deque[Future] = deque()
        self.stack = ExitStack()
        self.stack.enter_context(shared_store_lock(store))
        self.thread = ThreadPoolExecutor(1)

    def make(self, shards: list[PlannedShard], batch_tokens: int) -> set[str]:
        """Make shards in this order; returns those that this process made.

        Raises
        ------
        LengthwiseError
            The rest would not be done by the deadline.
        """
        rest, made = deque(shards), set()
        while rest and self._in_time(rest[0]):
            for result in self.engine.embed(self._batches(rest, batch_tokens)):
                current = self.open[0]
                self._take(current, *current.bounds[len(current.rows)], result, self.engine)
                if len(current.rows) == len(current.bounds):
                    if self.engine.device.type == "cpu":
                        _share_time(current.rows, self.engine.at_once)
                    self._repair(current)
                    made.add(current.shard.name)
                    self.writes.append(self.thread.submit(self._commit, self.open.popleft()))
        while self.writes:
            self.writes.popleft().result()
        if rest:
            raise LengthwiseError(
                f"job {self.progress.job}: its time ends at {time.strftime('%H:%M', time.localtime(self.deadline))}, before "
                f"the next shard would be done; {count(len(rest), 'shard')} of {len(shards)} left: run again to go on"
            )
        return made

    def _in_time(self, shard: PlannedShard) -> bool:
        """Whether a shard would be done by the deadline, after those that were begun, at the rate of this job so far."""
        now = time.perf_counter()
        seconds = 0.0
        if self.progress.done:
            waiting = self.begun - self.progress.done + int(shard.lengths.sum())
            seconds = waiting * (now - self.progress.started) / self.progress.done
        return time.time() + seconds + CLOSING_SECONDS < self.deadline

    def _batches(self, rest: deque[PlannedShard], batch_tokens: int) -> Iterator[list[bytes]]:
        """The batches of shards that are not there yet, the longest first.

        Ends early at one that there is no time for, and at one that another process makes: waiting for that while shards of its
        own are unfinished could make two processes wait for each other.
        """
        while rest and self._in_time(shard := rest[0]):
            try:
                writer = ShardWriter(
                    self.store, shard.name, shard.digests, shard.lengths, self.settings, wait=not self.open
                )
            except BlockingIOError:
                return
            rest.popleft()
            self.stack.enter_context(writer)
            if writer.already_there:
                writer.abandon()
                continue
            self.begun += int(shard.lengths.sum())
            bounds = list(cut_batches(shard.lengths, batch_tokens))[::-1]
            self.open.append(_Open(shard, writer, bounds, np.zeros(len(shard.lengths), np.uint8)))
            for start, stop in bounds:
                yield shard.sequences[start:stop]

    def _take(self, current: "_Open", start: int, stop: int, result: BatchResult, engine: Engine) -> None:
        """Pass a batch's rows on to the thread, and note what they took."""
        lengths = current.shard.lengths[start:stop]
        began = time.perf_counter()
        while len(self.writes) >= WRITES_AHEAD:
            self.writes.popleft().result()
        wait_write_ms = (time.perf_counter() - began) * 1000
        write = self.thread.submit(current.writer.write, start, result.arrays, lengths.tolist(), result.status)
        self.writes.append(write)
        current.writes.append(write)
        current.status[start:stop] = result.status
        repeated = engine is not self.engine
        wall_ms = self.progress.batch_done(0 if repeated else int(lengths.sum()))
        current.rows.append(
            {
                "job": self.progress.job,
                "shard": current.shard.name,
                "batch": len(current.rows),
                **_metrics(engine, lengths, result),
                "wall_ms": wall_ms,
                "gpu_busy": min(1.0, result.device_ms / wall_ms) if engine.device.type == "cuda" else None,
                "wait_write_ms": wait_write_ms,
            }
        )

    def _repair(self, current: "_Open") -> None:
        """Compute again in float32 what overflowed in half precision."""
        overflowed = np.flatnonzero(current.status == Status.NON_FINITE).tolist()
        if not overflowed or self.engine.precision == "float32":
            return
        what = f"shard {current.shard.name}: {count(len(overflowed), 'sequence')} overflowed {self.engine.precision}"
        try:
            exact = self.engine.in_float32()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s, and the weights in float32 do not fit into the device's memory too", what)
            return
        require_unchanged(self.store, self.settings["weights_sha256"])  # the file was read again
        log.warning("%s; computed again in float32", what)
        results = exact.embed([current.shard.sequences[i]] for i in overflowed)
        for i, result in zip(overflowed, results, strict=True):
            self._take(current, i, i + 1, result, exact)

    def _commit(self, finished: "_Open") -> None:
        for write in finished.writes:  # done by now; one that failed must not be committed
            write.result()
        write_metrics(metrics_path(self.store, finished.shard.name), finished.rows)
        finished.writer.commit()

    def __enter__(self) -> "ShardPipeline":
        return self

    def __exit__(self, *_):
        self.thread.shutdown(cancel_futures=True)
        self.stack.close()


def _share_time(rows: list[dict], cores: int) -> None:
    """Batches that were computed at the same time end together: give each the share of the time that it took of the cores.

    A batch has a core, or, where it is longer than usual, all of them.
    """
    took = [row["device_ms"] * (cores if row["n_tokens"] > AUTO_BATCH_TOKENS["cpu"] else 1) for row in rows]
    walls = sum(row["wall_ms"] for row in rows)
    for row, time_of_cores in zip(rows, took, strict=True):
        row["wall_ms"] = walls * time_of_cores / sum(took) if any(took) else walls / len(rows)


def _metrics(engine: Engine, lengths: np.ndarray, result: BatchResult) -> dict:
    """What a batch's row of the metrics says of the batch itself."""
    residues = int(lengths.sum())
    return {
        "n_sequences": len(lengths),
        "n_residues": residues,
        "n_tokens": residues + 2 * len(lengths),
        "min_length": int(lengths.min()),
        "mean_length": float(lengths.mean()),
        "max_length": int(lengths.max()),
        "device_ms": result.device_ms,
        "wait_read_ms": result.wait_read_ms,
        "peak_allocated_bytes": result.peak_allocated_bytes,
        "peak_reserved_bytes": result.peak_reserved_bytes,
        "peak_rss_bytes": result.peak_rss_bytes,
        "oom_splits": result.oom_splits,
        "device": device_name(engine.device),
        "precision": engine.precision,
    }
