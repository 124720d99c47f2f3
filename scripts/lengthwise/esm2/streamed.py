"""Weights streamed layer by layer: an engine for models that do not fit into memory (`lengthwise.esm2.residency`).

All batches of a wave pass through a layer before the next one. A thread loads the next layer meanwhile; on a GPU through pinned
memory and on a stream of its own. The sums of a wave stay on the device, and between layers nothing leaves it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from lengthwise.esm2.batching import prefetch
from lengthwise.esm2.checkpoint import load_ends, load_layer, read
from lengthwise.esm2.contacts import ContactSums
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.engine import Engine, free_bytes
from lengthwise.esm2.meters import Peaks
from lengthwise.esm2.model import ESM2, Layer, Packing
from lengthwise.esm2.outputs import Output, finite_status
from lengthwise.esm2.passes import Batch, BatchResult, Pass, StartedBatch, Timer, if_memory_holds
from lengthwise.esm2.residency import (
    LAYERS_HELD,
    MIN_BATCH_TOKENS,
    computing_bytes,
    fits_resident,
    layer_bytes,
    room_for_results,
    room_for_wave,
    streamed_batch_tokens,
    sums_bytes,
    tokens_in_time,
)
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MOST_AT_ONCE
from lengthwise.system.machine import host_available

log = logging.getLogger("lengthwise")


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
        shape, itemsize, free = read(checkpoint).shape, DTYPES[precision].itemsize, _free_beside(checkpoint, device)
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


def _free_beside(checkpoint: Path, device: torch.device) -> int:
    """What a device has free while the checkpoint is mapped: in a limit of this process all of the file counts then."""
    mapped = read(checkpoint)
    free = free_bytes(device)
    del mapped
    return free


@dataclass(eq=False)
class _Between:
    """A batch between two layers."""

    batch: Batch
    packing: Packing  # on the device
    x: Tensor  # [T, D] residual sums
    rotary: Tensor
    tokens: Tensor
    contacts: ContactSums | None
    results: dict[str, Tensor]
    timers: list[Timer]


_Wave = list[_Between | None]  # None: memory did not hold the batch beside the others
_Part = tuple[int, int, Batch]  # of a wave's batches the number, of its sequences the first, and these


class StreamedEngine(Engine):
    """An engine that has two layers' weights in memory: one that computes, and the next, which is being loaded."""

    leaves_more_memory, twin_residency = "", "streamed"
    # Of the last wave: speed while it computed, and how long reading its weights took.
    flops_per_second: float | None = None
    read_seconds = 0.0
    # For a wave, on the device and on a GPU's host, by what was free before the first: what it frees the allocators may keep.
    rooms: tuple[float, float] | None = None

    def _load(self) -> ESM2:
        if self.device.type == "cuda":
            self.weights = torch.cuda.Stream(self.device)
        return load_ends(self.checkpoint, self.device)

    def _compile(self) -> None:
        super()._compile()
        self.flops_per_second = self.rooms = None  # of fewer layers, and the time of compiling is in it

    def embed(self, batches: Iterable[list[bytes]]) -> Iterator[BatchResult]:
        """Embed batches, in order. Those of a wave come together."""
        for wave in self._cut_waves(prefetch(self._prepare, batches)):
            started = self._start_wave([batch for batch, _ in wave])
            for _, waited_ms in wave:
                yield self._finish(started.popleft(), waited_ms)  # popped: its results may be large

    def auto_batch_tokens(self) -> int:
        """Tokens per batch where the config says `auto`, by the formula: a measured pass would read all weights."""
        if self.device.type == "cuda":
            return self._fitting_tokens()[1]
        tokens = streamed_batch_tokens(self.model.config, DTYPES[self.precision].itemsize, self.at_once)
        # Each core is to have a batch in a wave.
        while tokens > MIN_BATCH_TOKENS and self._room(tokens) < self.at_once * tokens * sums_bytes(self.model.config):
            tokens //= 2
        return tokens

    def _fitting_tokens(self) -> tuple[float, int]:
        """Half of the memory that layers leave is for a batch, the other half for the sums of a wave."""
        held = LAYERS_HELD["cuda"] * layer_bytes(self.model.config, DTYPES[self.precision].itemsize)
        return self._fit(max(0.0, free_bytes(self.device) - held) / 2)

    def _cut_waves(self, prepared: Iterable[tuple[Batch, float]]) -> Iterator[list[tuple[Batch, float]]]:
        """Batches in waves, each of what memory and time allow when it begins; a batch for each core if memory holds them."""
        wave: list[tuple[Batch, float]] = []
        taken = 0, 0, 0  # by the wave: tokens, bytes on the device, and on a GPU's host
        for batch, waited_ms in prepared:
            own = len(batch.tokens), *self._bytes_of([batch])
            with_it = taken[0] + own[0], taken[1] + own[1], taken[2] + own[2]
            if wave and self._is_full(len(wave), *with_it):
                yield wave
                wave, with_it = [], own
            wave.append((batch, waited_ms))
            taken = with_it
        if wave:
            yield wave

    def _is_full(self, batches: int, tokens: int, on_device: int, on_host: int) -> bool:
        """Whether a wave has so many batches that the following one, with which it needs so much, is not allowed in it."""
        in_time, rooms = self._wave_limits()
        return on_device > rooms[0] or on_host > rooms[1] or (batches >= self.at_once and tokens > in_time)

    def _wave_limits(self) -> tuple[int, tuple[float, float]]:
        """Tokens of a wave by time, and its bytes by memory: on the device, and on a GPU's host."""
        shape, itemsize = self.model.config, DTYPES[self.precision].itemsize
        if self.rooms is None:
            on_host = room_for_results(shape, host_available()) if self.device.type == "cuda" else 0.0
            self.rooms = self._room(self.auto_batch_tokens()), on_host
        in_time = tokens_in_time(shape, self.device.type, itemsize, self.flops_per_second, self.read_seconds)
        return in_time, self.rooms

    def _room(self, batch_tokens: int) -> float:
        """Bytes that the device has for a wave beside batches of so many tokens."""
        shape, itemsize = self.model.config, DTYPES[self.precision].itemsize
        if self.device.type == "cuda":
            beside = batch_tokens * self.bytes_per_token
        else:
            beside = computing_bytes(shape, "cpu", itemsize, self.at_once, batch_tokens)
        return room_for_wave(shape, self.device.type, itemsize, _free_beside(self.checkpoint, self.device), beside)

    def _bytes_of(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """What a wave's sums and results take on the device, and its results on a GPU's host."""
        tokens, sequences = sum(len(batch.tokens) for batch in batches), sum(len(batch.sequences) for batch in batches)
        results = self.output.bytes_of(self.model.config.embed_dim, tokens, sequences)
        of_contacts = [self.output.contact_bytes(batch.packing.lengths) for batch in batches]
        results += sum(stored for stored, _ in of_contacts)
        sums = sums_bytes(self.model.config) * tokens + sum(computed for _, computed in of_contacts)
        return sums + results, results if self.device.type == "cuda" else 0

    def _start_wave(self, batches: list[Batch]) -> deque[StartedBatch]:
        """The forward passes of a wave. What memory did not hold beside the rest goes through the layers again, together.

        If it holds nothing of a wave, batches are halved, and sequences are tried alone.
        """
        passes: list[dict[int, Pass]] = [{} for _ in batches]  # {first sequence: its pass}
        too_long = [0] * len(batches)
        waves = deque([[part for number, batch in enumerate(batches) for part in self._parts((number, 0, batch))]])
        again, held = None, 0
        while waves:
            wave = waves.popleft()
            computed, refused = self._compute(wave)
            for (number, first, _), one in computed:
                passes[number][first] = one
            held = max(held, self._bytes_of([batch for (_, _, batch), _ in computed])[0])
            if computed and wave is again:  # beside fewer others: later waves are no larger than what memory held
                rooms = self._wave_limits()[1]
                self.rooms = min(rooms[0], held), rooms[1]
            if computed and refused:
                waves.append(again := refused)
            elif whole := [batch for *_, batch in refused if len(batch.sequences) > 1]:
                self.token_limit = max(len(half.tokens) for batch in whole for half in self._halves(batch))
                waves.append([piece for part in refused for piece in self._parts(part)])
            elif len(refused) > 1:
                waves.extend([part] for part in refused)
            elif refused:
                ((number, first, batch),) = refused
                passes[number][first] = self._does_not_fit(batch)
                too_long[number] += 1
        return deque(
            StartedBatch([one for _, one in sorted(parts.items(), key=itemgetter(0))], len(parts) - 1 + lost)
            for parts, lost in zip(passes, too_long, strict=True)
        )

    def _parts(self, part: _Part) -> list[_Part]:
        """A part of a wave, cut where it is larger than what memory held before."""
        number, first, batch = part
        if len(batch.sequences) == 1 or len(batch.tokens) <= self.token_limit:
            return [part]
        left, right = self._halves(batch)
        return self._parts((number, first, left)) + self._parts((number, first + len(left.sequences), right))

    def _compute(self, wave: list[_Part]) -> tuple[list[tuple[_Part, Pass]], list[_Part]]:
        """The parts of a wave that memory held, with their passes, and the others."""
        for _ in range(2):  # if it held none, the second time after all other memory was released
            found = list(zip(wave, self._through_layers([batch for *_, batch in wave]), strict=True))
            computed = [(part, one) for part, one in found if one is not None]
            if len(computed) < len(found):
                self._release_memory()
            if computed:
                break
        return computed, [part for part, one in found if one is None]

    @torch.inference_mode()
    def _through_layers(self, batches: list[Batch]) -> list[Pass | None]:
        """A forward pass of each batch, layer by layer; None for a batch that memory did not hold beside the others."""
        waited_ms, self.read_seconds = 0.0, 0.0
        with self.memory.measure() as peaks, self._cores() as run:
            wave: _Wave = [if_memory_holds(self._begin, batch) for batch in batches]
            for index, (layer, layer_waited_ms) in enumerate(self._stream_layers(), start=1):
                waited_ms += layer_waited_ms
                wave = run(partial(self._advance, index, layer), wave)
                del layer
                if not any(wave):
                    break
            passes = [None if one is None else if_memory_holds(self._end, one, peaks) for one in wave]
        computed = [(batch, one) for batch, one in zip(batches, passes, strict=True) if one is not None]
        if computed:
            self._measure(computed, waited_ms)
        return passes

    def _measure(self, wave: list[tuple[Batch, Pass]], waited_ms: float) -> None:
        """Wait for a wave; note its speed, and give each batch its share of the time by its operations."""
        shape, first = self.model.config, wave[0][1].timers[0]
        for _, one in wave:
            one.settle()
        wall_ms = max(one.timers[-1].elapsed_ms(since=first) for _, one in wave)
        if self.device.type == "cuda":  # the host launched ahead, so by the GPU's own clock
            waited_ms = wall_ms - sum(timer.elapsed_ms() for _, one in wave for timer in one.timers)
        flops = [sum(shape.flops(len(sequence)) for sequence in batch.sequences) for batch, _ in wave]
        for (_, one), own in zip(wave, flops, strict=True):
            one.wall_ms = wall_ms * own / sum(flops)
        self.flops_per_second = 1000 * sum(flops) / max(wall_ms - waited_ms, 1e-6)
        log.info(
            "a wave of %s tokens: %.1f s, %.0f %% waiting for weights",
            f"{sum(len(batch.tokens) for batch, _ in wave):,}",
            wall_ms / 1000,
            100 * waited_ms / wall_ms,
        )

    @property
    def _computed(self) -> tuple[int, ...]:
        return self.output.computed(self.model.config.num_layers)

    def _begin(self, batch: Batch) -> _Between:
        tokens, packing = self._on_device(batch)
        timer = Timer(self.device)
        x, rotary = self.model.begin(tokens, packing)
        contacts = self._contacts(packing)
        results = self._results({0: x} if 0 in self._computed else {}, tokens, packing, contacts)
        timer.stop()
        return _Between(batch, packing, x, rotary, tokens, contacts, results, [timer])

    def _advance(self, index: int, layer: Layer, one: _Between) -> _Between:
        """Take a batch through a layer; index counts from 1."""
        timer = Timer(self.device)
        on_attention = partial(one.contacts.add, index - 1) if one.contacts else None
        one.x = self.model.advance(layer, one.x, one.rotary, one.packing, on_attention)  # [T, D]
        if index in self._computed:
            hidden = {index: self.model.representation(index, one.x)}
            one.results |= self._results(hidden, one.tokens, one.packing, one.contacts)
        if index == self.model.config.num_layers:
            one.contacts = None  # its sums are large
        timer.stop()
        one.timers.append(timer)
        return one

    def _end(self, one: _Between, peaks: Peaks) -> Pass:
        timer = Timer(self.device)
        status = finite_status(one.results, one.packing, self.output.contacts_max_residues)
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
        for (layer, copied), waited_ms in prefetch(load, range(max(self._computed)), depth=1):
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
