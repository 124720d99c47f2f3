"""What a batch costs the host: the interpreter's lock is held, so a GPU that is done meanwhile waits."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lengthwise.esm2.batching import prefetch
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.meters import Peaks
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.passes import Pass, Timer
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.ingest.digests import digest
from lengthwise.jobs.pipeline import Progress, ShardPipeline
from lengthwise.plan.work_orders import PlannedShard
from lengthwise.store import shard_writer

WIDTH = 320  # that of 8M, whose batches are the shortest on a GPU
BATCH_TOKENS, BATCHES, ROUNDS = 32_768, 20, 40
LAUNCHES_MS = 1.3  # assumed of a batch's launches: there are none without a GPU
# `reference_ms` on the core of an AMD EPYC server for which the goals were set.
REFERENCE_MS = 2.5


class FreeDevice(Engine):
    """A GPU's engine without launches and without the GPU's work: batches are prepared, started and finished."""

    def __init__(self, checkpoint: Path, lengths: list[int]):
        super().__init__(checkpoint, torch.device("cpu"), "float32", Output((1,), ("residue",), "float16"))
        self.arrays = {"layer_1": torch.zeros(sum(lengths), WIDTH, dtype=torch.float16)}
        self.status = torch.zeros(len(lengths), dtype=torch.uint8)

    def embed(self, batches):
        return self._embed_on_gpu(prefetch(self._prepare, batches))

    def _forward(self, batch):
        timer = Timer(self.device)
        timer.stop()
        return Pass(batch.packing, self.arrays, self.status, [timer], None, None, Peaks())


@pytest.fixture
def seconds_without_the_lock(monkeypatch):
    """Processor time in writes to the disk, which leave the lock to others; so do checksums, which are left out."""
    spent = [0.0]

    def timed(function):
        def call(*args):
            began = time.thread_time()
            try:
                return function(*args)
            finally:
                spent[0] += time.thread_time() - began

        return call

    for name in ("pwrite", "fsync", "posix_fadvise"):
        monkeypatch.setattr(os, name, timed(getattr(os, name)))
    monkeypatch.setattr(shard_writer, "reserve", timed(shard_writer.reserve))
    monkeypatch.setattr(shard_writer, "crc32c", lambda data, value=0, gil_release_mode=0: value)
    return spent


def reference_ms() -> float:
    """Processor time of a fixed piece of work, most of it the interpreter's: how fast this core is."""
    began = time.process_time()
    for _ in range(20):
        np.arange(5_000, dtype=np.int32).cumsum()
        sum(number * number for number in range(5_000))
    return (time.process_time() - began) * 1000


@pytest.mark.parametrize(("length", "goal_ms"), [(300, 2.5), (30, 3.4)])
def test_a_batch_of_8m_costs_the_host_less_than_it_takes_a_gpu(tmp_path, seconds_without_the_lock, length, goal_ms):
    """With launches. Its 32,768 tokens are predicted to take an H100 3.4 ms; at 300 residues the goal is 2.5 ms.

    Processor time, so that other processes do not count, and the best of many shards, which is 0.7 to 1.1 ms and 1.1 to 1.5 ms:
    others' use of the caches only adds. The first shard that is fast enough ends it.
    A core slower than the one of the goal gets more time, by as much as a reference takes longer on it.
    """
    write_random(tmp_path / "wide.pt", ModelConfig(1, WIDTH, 20))
    batch = BATCH_TOKENS // (length + 2)
    rng = np.random.default_rng(0)
    residues = rng.choice(np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8), (BATCHES * batch, length))
    sequences = [row.tobytes() for row in residues]
    lengths = np.full(len(sequences), length, np.int32)
    settings = {
        "layers": [1],
        "outputs": ["residue"],
        "embed_dim": WIDTH,
        "storage_dtype": "float16",
        "fingerprint": "",
    }
    engine = FreeDevice(tmp_path / "wide.pt", [length] * batch)
    host_ms, references_ms = [], []
    for number in range(ROUNDS):
        references_ms.append(reference_ms())
        shard = PlannedShard(f"{number:032x}", [digest(s) for s in sequences], lengths, sequences)
        with ShardPipeline(tmp_path, settings, engine, Progress("job", int(lengths.sum()))) as pipeline:
            before = time.process_time() - seconds_without_the_lock[0]
            pipeline.make([shard], BATCH_TOKENS)
            host_ms.append((time.process_time() - seconds_without_the_lock[0] - before) * 1000 / BATCHES)
        slowness = max(1.0, min(references_ms) / REFERENCE_MS)
        if min(host_ms) / slowness + LAUNCHES_MS <= goal_ms:
            break
    print(f"{length} residues: {min(host_ms):.2f} ms of the host for a batch, on a core {slowness:.2f} times as slow")
    assert min(host_ms) / slowness + LAUNCHES_MS <= goal_ms
