"""The engine: sequences in, embeddings out, one batch at a time.

It needs torch, numpy, safetensors and fair-esm only, and knows nothing of files but the checkpoint.
"""

import gc
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from lengthwise.esm2.batching import ahead, fitting_tokens
from lengthwise.esm2.checkpoint import load_model
from lengthwise.esm2.config import AUTO_BATCH_TOKENS, MEMORY_MARGIN, MOST_AT_ONCE
from lengthwise.esm2.devices import DTYPES, device_name, is_out_of_memory
from lengthwise.esm2.meters import MemoryMeter, Peaks
from lengthwise.esm2.model import Packing, onednn_serves
from lengthwise.esm2.status import Status
from lengthwise.esm2.tokens import tokenize

log = logging.getLogger("lengthwise")


@dataclass(frozen=True)
class Output:
    """What is computed and in which types."""

    layers: tuple[int, ...]
    outputs: tuple[str, ...]  # of residue, mean, bos
    storage_dtype: str


@dataclass(frozen=True)
class BatchResult:
    """Embeddings of a batch's sequences, on the host, and what it took."""

    arrays: dict[str, np.ndarray]  # layer_<n> [R, D] in the storage type; mean_<n>, bos_<n> [N, D] float32
    status: (
        np.ndarray
    )  # [N] uint8: Status.GOOD, Status.NON_FINITE or Status.DOES_NOT_FIT; rows that are not good are NaN
    device_ms: float  # of the forward pass and pooling, by the device's own clock
    wait_read_ms: float  # the engine's wait for the next batch to be tokenised
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_rss_bytes: int | None
    oom_splits: int


@dataclass(frozen=True)
class _Batch:
    """A batch on the host, ready to be copied to the device."""

    sequences: list[bytes]
    tokens: Tensor  # [T] uint8
    packing: Packing


@dataclass(eq=False)
class _Part:
    """A forward pass that was started: its results are on the host once it is settled."""

    packing: Packing  # on the host
    arrays: dict[str, Tensor]
    status: Tensor
    ticks: tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event] | None
    done: torch.cuda.Event | None
    on_device: object  # what is being copied out: memory that must not be used for anything else before that
    peaks: Peaks

    def settle(self) -> None:
        """Wait for the copies, and let go of the device's memory."""
        if self.done is not None:
            self.done.synchronize()
        self.on_device = None


# oneDNN, and torch's layer over it, keep what they prepared for each of the last 1,024 shapes, and nearly every batch has a
# number of tokens of its own: in 400,000 residues that grew to 490 MB (8M, bfloat16), and with eight for each core to 200 MB,
# in the same time.
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


class Engine:
    """A model on a device, ready to embed batches.

    On a GPU three things happen at once: a thread tokenises the next batches and puts them into pinned memory, the GPU
    computes one batch, and the results of the one before are copied out. The host waits for nothing but results.

    A CPU's cores compute a batch each, rather than all of them a part of the same one: so they do not wait for each other in
    every operator. Measured on two cores that had other work too: 3 to 5 times as fast (8M).

    Parameters
    ----------
    checkpoint
        In fair-esm's layout.
    device, precision
        Where to compute, and the compute type.
    output
        What to compute.
    compile
        Whether torch may compile the layers on a GPU, which takes a minute once on a machine; without a compiler there the
        engine runs as it is. CPUs have something faster: oneDNN's packed weights (measured: about 1.2 times).
    """

    def __init__(self, checkpoint: Path, device: torch.device, precision: str, output: Output, compile: bool = False):
        self.checkpoint = checkpoint
        self.device = device
        self.precision = precision
        self.output = output
        if device.type == "cpu" and not onednn_serves(DTYPES[precision]):
            log.warning("this CPU has no instructions for %s: it is emulated, slower than float32", precision)
        self.at_once = 1 if device.type == "cuda" else min(torch.get_num_threads(), MOST_AT_ONCE)
        for cache in _CACHES:
            os.environ.setdefault(cache, str(8 * self.at_once))  # read when the first is prepared
        self.model = load_model(checkpoint, device, DTYPES[precision])
        self.memory = MemoryMeter(device)
        self.token_limit = sys.maxsize  # the largest batch that memory is known not to refuse
        self.parts: WeakSet[_Part] = WeakSet()  # on a GPU, that nobody has taken yet
        self.most_started = self.at_once + 1  # and not finished: one waits, so that no core does
        if device.type == "cuda":
            self.incoming, self.outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
            if compile:
                self._compile()

    def embed(self, batches: Iterable[list[bytes]]) -> Iterator[BatchResult]:
        """Embed batches, in order, working ahead: a result comes when the batch behind it has been started.

        Parameters
        ----------
        batches
            Each the normalised residues of its sequences.
        """
        prepared = ahead(self._prepare, batches)
        return self._embed_on_gpu(prepared) if self.device.type == "cuda" else self._embed_on_cores(prepared)

    def _embed_on_gpu(self, prepared: Iterable[tuple[_Batch, float]]) -> Iterator[BatchResult]:
        waiting: deque[tuple[tuple[list[_Part], int], float]] = deque()
        for batch, waited_ms in prepared:
            waiting.append((self._start(batch), waited_ms))
            if len(waiting) > 1:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _embed_on_cores(self, prepared: Iterable[tuple[_Batch, float]]) -> Iterator[BatchResult]:
        share = max(1, torch.get_num_threads() // self.at_once)
        started: deque[tuple[_Batch, Future, float]] = deque()

        def first() -> BatchResult:
            batch, future, waited_ms = started.popleft()
            result = future.result()
            if result is None:  # refused beside others: try it alone, and go on with fewer at once
                wait([future for _, future, _ in started])
                self.most_started = max(1, self.most_started // 2)
                result = self._start(batch)
            return self._finish(result, waited_ms)

        with ThreadPoolExecutor(self.at_once, initializer=torch.set_num_threads, initargs=(share,)) as cores:
            for batch, waited_ms in prepared:
                long = len(batch.tokens) > AUTO_BATCH_TOKENS["cpu"]  # alone, on all cores: it takes much memory
                while started and (long or len(started) >= self.most_started):
                    yield first()
                if long:
                    yield self._finish(self._start(batch), waited_ms)
                else:
                    started.append((batch, cores.submit(self._tried, batch), waited_ms))
            while started:
                yield first()

    def in_float32(self) -> "Engine":
        """The same engine in float32, for what overflowed."""
        return Engine(self.checkpoint, self.device, "float32", self.output)

    def auto_batch_tokens(self) -> int:
        """Tokens for a batch where the config leaves it open.

        On a GPU as many as it is busy with, or as fit in nine tenths of what is free: by the closed formula
        (`ModelConfig.bytes_per_token`), corrected by one pass of that size.
        """
        if self.device.type == "cpu":
            return AUTO_BATCH_TOKENS["cpu"]
        torch.cuda.empty_cache()
        free = MEMORY_MARGIN * torch.cuda.mem_get_info(self.device)[0]
        tokens = fitting_tokens(free, self.bytes_per_token, AUTO_BATCH_TOKENS["cuda"])
        before = torch.cuda.memory_allocated(self.device)
        length = min(300, tokens - 2)
        batch = [b"A" * length] * (tokens // (length + 2))
        *_, result = self.embed([batch, batch])  # the second while the first one's results are copied out
        if result.oom_splits:
            return max(1_024, tokens // 2)
        needed = (result.peak_allocated_bytes - before) / tokens
        log.info(
            "%s tokens a batch need %.2f GB (%.2f by the formula) of the %.2f GB that are free",
            f"{tokens:,}",
            needed * tokens / 1e9,
            self.bytes_per_token * tokens / 1e9,
            free / 1e9,
        )
        return fitting_tokens(free, needed, tokens)

    @property
    def bytes_per_token(self) -> int:
        """Memory that a batch needs beside the weights for each of its tokens, by the closed formula."""
        stored = "residue" in self.output.outputs and DTYPES[self.output.storage_dtype].itemsize
        stored *= len(self.output.layers) * self.model.config.embed_dim
        stored += 4 * (len(self.output.layers) - 1) * self.model.config.embed_dim  # layers that wait to be stored
        return self.model.config.bytes_per_token(DTYPES[self.precision].itemsize, stored)

    def _compile(self) -> None:
        began = time.perf_counter()
        self.model.compile()
        try:
            for n in (2, 3):  # two sizes, so that none is taken for a constant
                list(self.embed([[b"A" * 30] * n]))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.model.uncompile()
            log.info("the layers run uncompiled: %s", " ".join(f"{type(error).__name__}: {error}".split())[:200])
        else:
            log.info("compiled the layers in %.1f s", time.perf_counter() - began)

    def _prepare(self, sequences: list[bytes]) -> _Batch:
        """On a thread of its own, while the device computes."""
        pin = self.device.type == "cuda"
        tokens = torch.from_numpy(np.concatenate([tokenize(sequence) for sequence in sequences]))  # [T]
        packing = Packing.of((len(sequence) + 2 for sequence in sequences), pin)
        return _Batch(sequences, tokens.pin_memory() if pin else tokens, packing)

    def _start(self, batch: _Batch) -> tuple[list[_Part], int]:
        """Start a batch; where memory does not hold it, in halves, and all later batches of its size too.

        Returns
        -------
        (parts, splits)
            The parts in order, and how often something was too large.
        """
        n = len(batch.sequences)
        if n == 1 or len(batch.tokens) <= self.token_limit:
            for _ in range(2):  # again once everything else was given back
                if result := self._tried(batch):
                    return result
                self._give_memory_back()
            if n == 1:
                self._warn_of(len(batch.sequences[0]))
                return [self._nothing(batch)], 1
            self.token_limit = len(batch.tokens) - 1
        middle = n // 2
        parts, splits = [], 1
        for half in (batch.sequences[:middle], batch.sequences[middle:]):
            more, deeper = self._start(self._prepare(half))
            parts, splits = parts + more, splits + deeper
        return parts, splits

    def _tried(self, batch: _Batch) -> tuple[list[_Part], int] | None:
        """A forward pass of the whole batch; None where memory does not hold it."""
        try:
            return [self._forward(batch)], 0
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None  # outside of the handler, whose traceback keeps the tensors alive

    @torch.inference_mode()
    def _forward(self, batch: _Batch) -> _Part:
        """One forward pass; on a GPU this returns before it is done."""
        cuda = self.device.type == "cuda"
        with self.memory.measure() as peaks:
            tokens, packing = self._copied_in(batch) if cuda else (batch.tokens, batch.packing)
            began = self._tick()
            results = self._pool(self.model(tokens, packing, self.output.layers), packing)
            status = _status(results, packing)
            ended = self._tick()
        if not cuda:
            return _Part(batch.packing, results, status, (began, ended), None, None, peaks)
        on_device = results, status
        results, status, done = self._copied_out(results, status)
        part = _Part(batch.packing, results, status, (began, ended), done, on_device, peaks)
        self.parts.add(part)
        return part

    def _copied_in(self, batch: _Batch) -> tuple[Tensor, Packing]:
        with torch.cuda.stream(self.incoming):
            tokens, packing = batch.tokens.to(self.device, non_blocking=True), batch.packing.to(self.device)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self.incoming)
        for tensor in (tokens, *packing.tensors()):
            tensor.record_stream(compute)
        return tokens, packing

    def _copied_out(self, results: dict[str, Tensor], status: Tensor) -> tuple[dict[str, Tensor], Tensor, object]:
        self.outgoing.wait_stream(torch.cuda.current_stream(self.device))
        on_host = {}
        with torch.cuda.stream(self.outgoing):
            for name, value in {**results, "status": status}.items():
                # torch keeps pinned memory for the next batch: after a few there are no new ones.
                on_host[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                on_host[name].copy_(value, non_blocking=True)
            done = self.outgoing.record_event()
        return on_host, on_host.pop("status"), done

    def _finish(self, started: tuple[list[_Part], int], waited_ms: float) -> BatchResult:
        """Wait for a batch's results; rows of sequences that are not good become NaN."""
        parts, splits = started
        joined = [_on_host(part) for part in parts]
        arrays, status = joined[0]
        if len(joined) > 1:
            arrays = {name: np.concatenate([each[name] for each, _ in joined]) for name in arrays}
            status = np.concatenate([each for _, each in joined])
        device_ms = sum(_elapsed_ms(*part.ticks) for part in parts if part.ticks)
        peaks = [
            max((peak for part in parts if (peak := getattr(part.peaks, kind)) is not None), default=None)
            for kind in ("allocated", "reserved", "resident")
        ]
        return BatchResult(arrays, status, device_ms, waited_ms, *peaks, splits)

    def _pool(self, hidden: dict[int, Tensor], packing: Packing) -> dict[str, Tensor]:
        """What is stored: residue rows in the storage type; means (over residues alone) and BOS rows in float32."""
        results = {}
        for layer in self.output.layers:
            residues = hidden[layer].index_select(0, packing.residues)  # [R, D]
            if "residue" in self.output.outputs:
                results[f"layer_{layer}"] = residues.to(DTYPES[self.output.storage_dtype])
            if "mean" in self.output.outputs:
                counts = packing.bounds.diff().long() - 2  # [N]
                results[f"mean_{layer}"] = torch.segment_reduce(residues, "mean", lengths=counts, unsafe=True)
            if "bos" in self.output.outputs:
                results[f"bos_{layer}"] = hidden[layer].index_select(0, packing.bounds[:-1])  # [N, D]
        return results

    def _tick(self) -> "float | torch.cuda.Event":
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _give_memory_back(self) -> None:
        for part in self.parts:
            part.settle()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _warn_of(self, length: int) -> None:
        log.warning(
            "a sequence of %s residues does not fit into the memory of %s even alone: it would need about %.1f GB beside "
            "the weights; its rows are NaN, its record is rejected, and retry_rejected takes it up on a larger device",
            f"{length:,}",
            device_name(self.device),
            self.bytes_per_token * (length + 2) / 1e9,
        )

    def _nothing(self, batch: _Batch) -> _Part:
        """The rows of a sequence that cannot be embedded."""
        width, residues = self.model.config.embed_dim, len(batch.sequences[0])
        arrays = {}
        for layer in self.output.layers:
            for output in self.output.outputs:
                if output == "residue":
                    dtype = DTYPES[self.output.storage_dtype]
                    arrays[f"layer_{layer}"] = torch.full((residues, width), torch.nan, dtype=dtype)
                else:
                    arrays[f"{output}_{layer}"] = torch.full((1, width), torch.nan)
        status = torch.full((1,), Status.DOES_NOT_FIT, dtype=torch.uint8)
        return _Part(batch.packing, arrays, status, None, None, None, Peaks())


def _on_host(part: _Part) -> tuple[dict[str, np.ndarray], np.ndarray]:
    part.settle()
    arrays, status = {name: value.numpy() for name, value in part.arrays.items()}, part.status.numpy()
    if (bad := status != Status.GOOD).any():
        counts = part.packing.bounds.diff().numpy() - 2  # [N]
        for name, value in arrays.items():
            value[bad.repeat(counts) if name.startswith("layer_") else bad] = np.nan
    return arrays, status


def _elapsed_ms(began, ended) -> float:
    return (ended - began) * 1000 if isinstance(began, float) else began.elapsed_time(ended)


def _status(results: dict[str, Tensor], packing: Packing) -> Tensor:
    """[N] uint8 on the device: whether all that is stored of a sequence is finite, in the type that it is stored in."""
    finite = torch.ones(len(packing.lengths), dtype=torch.bool, device=packing.bounds.device)
    for name, value in results.items():
        rows = value.isfinite().all(dim=1)  # [R] or [N]
        if name.startswith("layer_"):
            counts = packing.bounds.diff().long() - 2  # [N]
            rows = torch.segment_reduce(rows.float(), "min", lengths=counts, unsafe=True) > 0  # [N]
        finite &= rows
    return torch.where(finite, Status.GOOD, Status.NON_FINITE).to(torch.uint8)
