"""Weights streamed layer by layer: an engine for models that do not fit into memory (`lengthwise.esm2.residency`).

All batches of a wave pass through a layer before the next one. A thread loads the next layer meanwhile; on a GPU through pinned
memory and on a stream of its own. The sums of a wave stay on the device, and between layers nothing leaves it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lengthwise.esm2.batching import prefetch
from lengthwise.esm2.checkpoint import load_ends, load_layer, read
from lengthwise.esm2.costs import result_bytes_per_token
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.engine import Engine, free_bytes
from lengthwise.esm2.meters import Peaks
from lengthwise.esm2.model import ESM2, Layer, Packing
from lengthwise.esm2.outputs import Output, finite_status
from lengthwise.esm2.passes import Batch, BatchResult, Pass, StartedBatch, Timer, if_memory_holds
from lengthwise.esm2.residency import (
    LAYERS_HELD,
    computing_bytes,
    fits_resident,
    layer_bytes,
    tokens_in_memory,
    tokens_in_time,
)
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MOST_AT_ONCE

log = logging.getLogger("lengthwise")
# Smaller products do not keep a core busy.
MIN_BATCH_TOKENS = 256


def open_engine(
    checkpoint: Path,
    device: torch.device,
    precision: str,
    output: Output,
    compile: bool = False,
    residency: str = "auto",
) -> Engine:
    """An engine that has all weights in memory, or one that streams them. The numbers are the same; on a CPU to the bit.

    Parameters
    ----------
    checkpoint, device, precision, output, compile
        As of `Engine`.
    residency
        resident, streamed, or auto: resident where weights and batches fit into what is free.
    """
    if residency == "auto":
        shape, itemsize, free = read(checkpoint)[0], DTYPES[precision].itemsize, free_bytes(device)
        residency = "resident"
        if not fits_resident(shape, device.type, itemsize, min(torch.get_num_threads(), MOST_AT_ONCE), free):
            residency = "streamed"
            log.info(
                "weights are streamed: all of them take %.1f GB in %s, a layer %.2f, and %.1f GB are free",
                itemsize * shape.parameters / 1e9,
                precision,
                layer_bytes(shape, itemsize) / 1e9,
                free / 1e9,
            )
    kind = StreamedEngine if residency == "streamed" else Engine
    return kind(checkpoint, device, precision, output, compile)


@dataclass(eq=False)
class _Between:
    """A batch between two layers."""

    batch: Batch
    packing: Packing  # on the device
    x: Tensor  # [T, D] residual sums
    rotary: Tensor
    results: dict[str, Tensor]
    timers: list[Timer]


_Wave = list[_Between | None]  # None: memory did not hold the batch beside the others


class StreamedEngine(Engine):
    """An engine that has two layers' weights in memory: one that computes, and the next, which is being loaded."""

    leaves_more_memory = ""
    # Of the last wave: speed while it computed, and how long reading its weights took.
    flops_per_second: float | None = None
    read_seconds = 0.0
    # Of a wave, by what was free before the first: what a wave frees the allocator may keep.
    memory_tokens: int | None = None

    def _load(self) -> ESM2:
        if self.device.type == "cuda":
            self.weights = torch.cuda.Stream(self.device)
        return load_ends(self.checkpoint, self.device)

    def embed(self, batches: Iterable[list[bytes]]) -> Iterator[BatchResult]:
        """Embed batches, in order. Those of a wave come together."""
        for wave in self._cut_waves(prefetch(self._prepare, batches)):
            started = self._start_wave([batch for batch, _ in wave])
            for number, (batch, waited_ms) in enumerate(wave):
                yield self._finish(started[number] or self._start(batch), waited_ms)
                started[number] = None  # its results may be large

    def auto_batch_tokens(self) -> int:
        """Tokens per batch where the config says `auto`, by the formula: a measured pass would read all weights.

        On a CPU a wave has a batch for each core, so batches are small where a wave is.
        """
        if self.device.type == "cuda":
            return self._fitting_tokens()[1]
        return max(MIN_BATCH_TOKENS, min(AUTO_BATCH_TOKENS["cpu"], min(self._wave_tokens()) // self.at_once))

    def _fitting_tokens(self) -> tuple[float, int]:
        """Half of the memory that layers leave is for a batch, the other half for the sums of a wave."""
        held = LAYERS_HELD["cuda"] * layer_bytes(self.model.config, DTYPES[self.precision].itemsize)
        return self._fit(max(0.0, free_bytes(self.device) - held) / 2)

    def _cut_waves(self, prepared: Iterable[tuple[Batch, float]]) -> Iterator[list[tuple[Batch, float]]]:
        """Batches in waves, each of what memory and time allow when it begins; a batch for each core if memory holds them."""
        wave: list[tuple[Batch, float]] = []
        tokens, in_time, in_memory = 0, 0, 0
        for batch, waited_ms in prepared:
            with_it = tokens + len(batch.tokens)
            if wave and (with_it > in_memory or (with_it > in_time and len(wave) >= self.at_once)):
                yield wave
                wave, tokens = [], 0
            if not wave:
                in_time, in_memory = self._wave_tokens()
            wave.append((batch, waited_ms))
            tokens += len(batch.tokens)
        if wave:
            yield wave

    def _wave_tokens(self) -> tuple[int, int]:
        """Tokens of a wave by time, and by memory."""
        shape, output, itemsize = self.model.config, self.output, DTYPES[self.precision].itemsize
        if self.memory_tokens is None:
            stored_bytes = result_bytes_per_token(shape.embed_dim, 1, output.outputs, output.stored_dtype.itemsize)
            beside = computing_bytes(shape, self.device.type, itemsize, self.at_once)
            if self.device.type == "cuda":
                beside = self._fitting_tokens()[1] * self.bytes_per_token
            free, stored_bytes = free_bytes(self.device), stored_bytes * len(output.layers)
            self.memory_tokens = tokens_in_memory(shape, self.device.type, itemsize, stored_bytes, free, beside)
        in_time = tokens_in_time(shape, self.device.type, itemsize, self.flops_per_second, self.read_seconds)
        return in_time, self.memory_tokens

    def _start_unsplit(self, batch: Batch) -> StartedBatch | None:
        return self._start_wave([batch])[0]

    @torch.inference_mode()
    def _start_wave(self, batches: list[Batch]) -> list[StartedBatch | None]:
        """The forward passes of a wave; None for a batch that memory did not hold beside the others."""
        began, waited_ms = time.perf_counter(), 0.0
        self.read_seconds = 0.0
        with self.memory.measure() as peaks, self._cores() as run:
            wave: _Wave = [if_memory_holds(self._begin, batch) for batch in batches]
            for index, (layer, layer_waited_ms) in enumerate(self._stream_layers(), start=1):
                waited_ms += layer_waited_ms
                wave = run(partial(self._advance, index, layer), wave)
                del layer
                if not any(wave):
                    break
            started = [None if one is None else if_memory_holds(self._end, one, peaks) for one in wave]
        seconds, shape = time.perf_counter() - began, self.model.config
        flops = [sum(shape.flops(len(sequence)) for sequence in batch.sequences) for batch in batches]
        tokens, waited = sum(len(batch.tokens) for batch in batches), waited_ms / 1000
        for one, own in zip(started, flops, strict=True):
            if one is not None:
                one.wall_ms = 1000 * seconds * own / sum(flops)
        if self.device.type == "cpu":
            # A GPU's host launches ahead: what it waits for is room for the next layer.
            self.flops_per_second = sum(flops) / max(seconds - waited, 1e-9)
            share = waited / seconds
            log.info("a wave of %s tokens: %.1f s, %.0f %% waiting for weights", f"{tokens:,}", seconds, 100 * share)
        else:
            log.info("a wave of %s tokens: launched in %.1f s", f"{tokens:,}", seconds)
        return [None if one is None else StartedBatch([one], 0) for one in started]

    def _begin(self, batch: Batch) -> _Between:
        tokens, packing = self._on_device(batch)
        timer = Timer(self.device)
        x, rotary = self.model.begin(tokens, packing)
        results = self.output.pool({0: x} if 0 in self.output.layers else {}, packing)
        timer.stop()
        return _Between(batch, packing, x, rotary, results, [timer])

    def _advance(self, index: int, layer: Layer, one: _Between) -> _Between:
        """Take a batch through a layer; index counts from 1."""
        timer = Timer(self.device)
        one.x = self.model.advance(layer, one.x, one.rotary, one.packing)  # [T, D]
        if index in self.output.layers:
            one.results |= self.output.pool({index: self.model.representation(index, one.x)}, one.packing)
        timer.stop()
        one.timers.append(timer)
        return one

    def _end(self, one: _Between, peaks: Peaks) -> Pass:
        timer = Timer(self.device)
        status = finite_status(one.results, one.packing)
        timer.stop()
        return self._started(one.batch, one.results, status, [*one.timers, timer], peaks)

    @contextmanager
    def _cores(self) -> Iterator[Callable[[Callable[[_Between], _Between], _Wave], _Wave]]:
        """Applies a function to the batches of a wave: on a CPU to one on each core, and to a large one on all cores."""

        @torch.inference_mode()  # of the thread
        def run(function: Callable[[_Between], _Between], one: _Between | None) -> _Between | None:
            return None if one is None else if_memory_holds(function, one)

        def run_all(function: Callable[[_Between], _Between], wave: _Wave) -> _Wave:
            small = AUTO_BATCH_TOKENS["cpu"] if self.device.type == "cpu" else 0
            on_a_core = {
                number: cores.submit(run, function, one)
                for number, one in enumerate(wave)
                if one and len(one.batch.tokens) <= small
            }
            done = {number: future.result() for number, future in on_a_core.items()}
            return [done[number] if number in done else run(function, one) for number, one in enumerate(wave)]

        threads_per_batch = max(1, torch.get_num_threads() // self.at_once)
        with ThreadPoolExecutor(
            self.at_once, initializer=torch.set_num_threads, initargs=(threads_per_batch,)
        ) as cores:
            yield run_all

    def _stream_layers(self) -> Iterator[tuple[Layer, float]]:
        """The layers in order, each with the milliseconds that it was waited for."""
        done: list[torch.cuda.Event] = []  # recorded behind each layer's work
        load = partial(self._load_layer, done)
        for (layer, copied), waited_ms in prefetch(load, range(max(self.output.layers)), depth=1):
            if copied is not None:
                compute = torch.cuda.current_stream(self.device)
                compute.wait_event(copied)
                for tensor in layer.parameters():
                    tensor.record_stream(compute)
            yield layer, waited_ms
            del layer
            if copied is not None:
                done.append(compute.record_event())

    def _load_layer(self, done: list[torch.cuda.Event], index: int) -> tuple[Layer, torch.cuda.Event | None]:
        """Load a layer, on a thread. On a GPU once the layer before the last is done: two have room there."""
        began, dtype = time.perf_counter(), DTYPES[self.precision]
        layer = load_layer(self.checkpoint, index, torch.device("cpu"), dtype, pack=self.device.type == "cpu")
        self.read_seconds += time.perf_counter() - began
        if self.device.type == "cpu":
            return layer, None
        if index > 1:
            done[index - 2].synchronize()
        if copied := if_memory_holds(self._copy_layer, layer):
            return layer, copied
        self._release_memory()
        return layer, self._copy_layer(layer)

    def _copy_layer(self, layer: Layer) -> torch.cuda.Event:
        """Start the copies of a layer to the GPU."""
        with torch.cuda.stream(self.weights):
            pinned = {name: tensor.pin_memory() for name, tensor in layer.state_dict().items()}
            on_device = {name: tensor.to(self.device, non_blocking=True) for name, tensor in pinned.items()}
            layer.load_state_dict(on_device, assign=True)
            layer.requires_grad_(False)
            return self.weights.record_event()
