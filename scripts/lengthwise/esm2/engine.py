"""The engine: batches of sequences in, embeddings out, with several batches in progress at the same time.

The only file that it reads is the checkpoint.
"""

import copy
import gc
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from lengthwise.esm2.batching import fitting_tokens, prefetch
from lengthwise.esm2.checkpoint import load_model
from lengthwise.esm2.contacts import CPU_BLOCK_BYTES, ContactHead, ContactSums
from lengthwise.esm2.costs import result_bytes_per_token
from lengthwise.esm2.devices import DTYPES, device_name, is_out_of_memory
from lengthwise.esm2.heads import load_lm_head
from lengthwise.esm2.meters import MemoryMeter, Peaks
from lengthwise.esm2.model import ESM2, Packing, emulated_on_cpu
from lengthwise.esm2.outputs import Output, fill_bad_with_nan, finite_status
from lengthwise.esm2.passes import Batch, BatchResult, Pass, StartedBatch, Timer, if_memory_holds, joined, largest
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MEMORY_MARGIN, MOST_AT_ONCE
from lengthwise.esm2.status import Status
from lengthwise.esm2.tokens import tokenize
from lengthwise.system.machine import host_available

log = logging.getLogger("lengthwise")
# oneDNN and torch cache a primitive per input shape; almost every batch is a new shape, so both caches are capped.
_SHAPE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_CACHED_SHAPES_PER_CORE = 8


class Engine:
    """A model on a device, ready to embed batches.

    On a GPU three things overlap: a thread tokenises the next batches into pinned memory, the GPU computes one batch, and the
    results of the previous batch are copied to the host.

    On a CPU each core computes a batch of its own, so that cores do not wait for each other in every operator.

    Parameters
    ----------
    checkpoint
        A checkpoint, as of `lengthwise.esm2.checkpoint.read`.
    device, precision
        The device and the compute type.
    output
        The layers and outputs to compute.
    compile
        Whether torch compiles the layers on a GPU (about a minute, once per machine). Without a C compiler the engine runs
        uncompiled, after a warning. CPUs use oneDNN's packed weights instead.

    Raises
    ------
    LengthwiseError
        The checkpoint cannot be read or is not ESM-2.
    """

    leaves_more_memory = ", or here with residency: streamed"  # what a user may try, in words
    twin_residency = "auto"  # float32 may not fit where half precision does

    def __init__(self, checkpoint: Path, device: torch.device, precision: str, output: Output, compile: bool = False):
        self.checkpoint, self.device, self.precision, self.output = checkpoint, device, precision, output
        if device.type == "cpu" and emulated_on_cpu(DTYPES[precision]):
            log.warning("this CPU has no instructions for %s: it is emulated, slower than float32", precision)
        self.at_once = 1 if device.type == "cuda" else min(torch.get_num_threads(), MOST_AT_ONCE)
        for cache in _SHAPE_CACHES:  # read when the first primitive is created
            os.environ.setdefault(cache, str(_CACHED_SHAPES_PER_CORE * self.at_once))
        self.model = self._load()
        self._load_heads()
        self.memory = MemoryMeter(device)
        self.twin: Engine | None = None  # in float32
        self.token_limit = sys.maxsize  # a larger batch was refused by memory before
        self.unsettled: WeakSet[Pass] = WeakSet()  # passes whose results may still occupy the GPU
        self.max_started = self.at_once + 1  # one batch more than cores, so that no core idles
        if device.type == "cuda":
            self.incoming, self.outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
            if compile:
                self._compile()

    def _load(self) -> ESM2:
        return load_model(self.checkpoint, self.device, DTYPES[self.precision])

    def _load_heads(self) -> None:
        path, outputs, layers = self.checkpoint, self.output.outputs, self.model.config.num_layers
        self.lm_head = load_lm_head(path, self.device, DTYPES[self.precision]) if "logits" in outputs else None
        self.contact_head = ContactHead.load(path, layers, self.device) if "contacts" in outputs else None

    def with_output(self, output: Output) -> "Engine":
        """The same weights with other outputs; the two may take turns."""
        other = copy.copy(self)
        other.output, other.twin = output, None
        other._load_heads()
        return other

    def embed(self, batches: Iterable[list[bytes]]) -> Iterator[BatchResult]:
        """Embed batches, in order. A result is yielded after the next batch was started.

        Parameters
        ----------
        batches
            For each batch the normalised residues of its sequences.

        Raises
        ------
        ValueError
            A byte is not a residue.
        """
        prepared = prefetch(self._prepare, batches)
        return self._embed_on_gpu(prepared) if self.device.type == "cuda" else self._embed_on_cores(prepared)

    def _embed_on_gpu(self, prepared: Iterable[tuple[Batch, float]]) -> Iterator[BatchResult]:
        """Start each batch before the results of the previous one are awaited."""
        started: deque[tuple[StartedBatch, float]] = deque()
        for batch, waited_ms in prepared:
            started.append((self._start(batch), waited_ms))
            if len(started) > 1:
                yield self._finish(*started.popleft())
        while started:
            yield self._finish(*started.popleft())

    def _embed_on_cores(self, prepared: Iterable[tuple[Batch, float]]) -> Iterator[BatchResult]:
        """Compute a batch on each core; a batch of more tokens than usual runs alone on all cores, to save memory."""
        threads_per_batch = max(1, torch.get_num_threads() // self.at_once)
        started: deque[tuple[Batch, Future[StartedBatch | None], float]] = deque()

        def oldest_result() -> BatchResult:
            batch, future, waited_ms = started.popleft()
            result = future.result()
            if result is None:  # memory did not hold it beside others: compute it alone, and fewer at once from now on
                wait([future for _, future, _ in started])
                self.max_started = max(1, self.max_started // 2)
                result = self._start(batch)
            return self._finish(result, waited_ms)

        with ThreadPoolExecutor(
            self.at_once, initializer=torch.set_num_threads, initargs=(threads_per_batch,)
        ) as cores:
            for batch, waited_ms in prepared:
                alone = len(batch.tokens) > AUTO_BATCH_TOKENS["cpu"]
                while started and (alone or len(started) >= self.max_started):
                    yield oldest_result()
                if alone:
                    yield self._finish(self._start(batch), waited_ms)
                else:
                    started.append((batch, cores.submit(self._start_unsplit, batch), waited_ms))
            while started:
                yield oldest_result()

    def in_float32(self) -> "Engine":
        """The same engine in float32, loaded once: for sequences that overflowed, and for the parity receipt."""
        if self.twin is None:
            from lengthwise.esm2.streamed import open_engine  # here: a streamed engine is an engine

            self.twin = open_engine(self.checkpoint, self.device, "float32", self.output, residency=self.twin_residency)
        return self.twin

    def auto_batch_tokens(self) -> int:
        """Tokens per batch where the config says `auto`.

        On a GPU the smaller of the count that keeps it busy and the count that fits into nine tenths of the free memory. The
        second comes from a measured pass, whose size comes from `ModelConfig.bytes_per_token`. Compiled layers need about half of
        that.
        """
        if self.device.type == "cpu":
            return AUTO_BATCH_TOKENS["cpu"]
        free_bytes, tokens = self._fitting_tokens()
        before_bytes = torch.cuda.memory_allocated(self.device)
        # Padded attention takes most where one of a batch's lengths, which lie between two powers of two, is twice the others.
        batch = [b"A" * 256] * ((tokens - 513) // 258) + [b"A" * 511]
        *_, result = self.embed([batch, batch])  # the second batch runs while the first one's results are copied
        if result.oom_splits:
            return max(1_024, tokens // 2)
        tokens = sum(len(sequence) + 2 for sequence in batch)
        measured_bytes_per_token = ((result.peak_allocated_bytes or 0) - before_bytes) / tokens
        log.info(
            "%s tokens a batch need %.2f GB (%.2f by the formula) of the %.2f GB that are free",
            f"{tokens:,}",
            measured_bytes_per_token * tokens / 1e9,
            self.bytes_per_token * tokens / 1e9,
            free_bytes / 1e9,
        )
        return fitting_tokens(free_bytes, measured_bytes_per_token, AUTO_BATCH_TOKENS["cuda"])

    @property
    def bytes_per_token(self) -> int:
        """Memory that a batch needs beside the weights for each of its tokens, by `ModelConfig.bytes_per_token`."""
        shape, output = self.model.config, self.output
        stored_bytes = result_bytes_per_token(
            shape.embed_dim,
            len(output.layers),
            output.outputs,
            output.stored_dtype.itemsize,
            output.contacts_max_residues,
        )
        return shape.bytes_per_token(DTYPES[self.precision].itemsize, stored_bytes, self.model.compiled)

    def _fitting_tokens(self) -> tuple[float, int]:
        """The bytes of a GPU that a batch may take, and the tokens of a batch that fit by the formula."""
        return self._fit(free_bytes(self.device))

    def _fit(self, free: float) -> tuple[float, int]:
        free *= MEMORY_MARGIN
        return free, fitting_tokens(free, self.bytes_per_token, AUTO_BATCH_TOKENS["cuda"])

    def _compile(self) -> None:
        """Compile the layers in passes of the usual size: inductor chooses the kernels' launch configurations in the first.

        Two layers have all the parts that are compiled.
        """
        began = time.perf_counter()
        self.model.compile()
        tokens = self._fitting_tokens()[1] if self.device.type == "cuda" else AUTO_BATCH_TOKENS["cpu"]
        output, two = self.output, (min(2, self.model.config.num_layers),)
        self.output = replace(output, layers=two, outputs=("mean",))  # logits and contacts need all layers
        try:
            if self.precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
                raise RuntimeError("torch compiles nothing in bfloat16 for this GPU, which emulates it")
            # An odd number of tokens is no other size of the model, which torch would take to be the same.
            list(self.embed([b"A" * 300] * (n - 1) + [b"A" * 299] for n in (tokens // 302, tokens // 604)))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.model.uncompile()
            log.warning(
                "the layers run uncompiled, which takes 1.2 to 1.4 times as long: %s",
                " ".join(f"{type(error).__name__}: {error}".split())[:200],
            )
        else:
            log.info("compiled the layers in %.1f s", time.perf_counter() - began)
        finally:
            self.output = output

    def _prepare(self, sequences: list[bytes]) -> Batch:
        """Tokenise a batch; runs on a thread while the device computes."""
        pin = self.device.type == "cuda"
        tokens = torch.from_numpy(tokenize(*sequences))  # [T]
        packing = Packing.of([len(sequence) + 2 for sequence in sequences], pin)
        return Batch(sequences, tokens.pin_memory() if pin else tokens, packing)

    def _start(self, batch: Batch) -> StartedBatch:
        """Start a batch; if memory does not hold it, start its halves, and split later batches of its size at once."""
        n = len(batch.sequences)
        if n == 1 or len(batch.tokens) <= self.token_limit:
            for _ in range(2):  # the second time after all other memory was released
                if started := self._start_unsplit(batch):
                    return started
                self._release_memory()
            if n == 1:
                return StartedBatch([self._does_not_fit(batch)], 1)
            self.token_limit = len(batch.tokens) - 1
        halves = [self._start(half) for half in self._halves(batch)]
        return StartedBatch([part for half in halves for part in half.passes], 1 + sum(h.oom_splits for h in halves))

    def _halves(self, batch: Batch) -> list[Batch]:
        middle = len(batch.sequences) // 2
        return [self._prepare(half) for half in (batch.sequences[:middle], batch.sequences[middle:])]

    def _start_unsplit(self, batch: Batch) -> StartedBatch | None:
        """One forward pass of the whole batch; None if memory does not hold it."""
        started = if_memory_holds(self._forward, batch)
        return None if started is None else StartedBatch([started], 0)

    @torch.inference_mode()
    def _forward(self, batch: Batch) -> Pass:
        """One forward pass; on a GPU this returns while the GPU computes."""
        with self.memory.measure() as peaks:
            tokens, packing = self._on_device(batch)
            timer = Timer(self.device)
            contacts = self._contacts(packing)
            layers = self.output.computed(self.model.config.num_layers)
            hidden = self.model(tokens, packing, layers, contacts.add if contacts else None)
            results = self._results(hidden, tokens, packing, contacts)
            del hidden, contacts
            status = finite_status(results, packing, self.output.contacts_max_residues)
            timer.stop()
        return self._started(batch, results, status, [timer], peaks)

    def _contacts(self, packing: Packing) -> ContactSums | None:
        """What a batch's attention maps are added to; None where contacts are no output."""
        if self.contact_head is None or "contacts" not in self.output.outputs:
            return None
        block_bytes = CPU_BLOCK_BYTES
        if self.device.type == "cuda":
            # The memory of fc1's result, which no layer needs while it attends, for maps before and after softmax.
            block_bytes = 2 * sum(packing.lengths) * self.model.config.embed_dim * DTYPES[self.precision].itemsize
        return ContactSums(self.contact_head, packing, self.output.contacts_max_residues, block_bytes)

    def _results(
        self, hidden: dict[int, Tensor], tokens: Tensor, packing: Packing, contacts: ContactSums | None
    ) -> dict[str, Tensor]:
        """The tensors of a batch that these hidden representations give, {layer: [T, D]} of some or all of the layers."""
        results, last = self.output.pool(hidden, packing), self.model.config.num_layers
        if contacts is not None and last in hidden:
            results["contacts"] = contacts.probabilities(self.output.contacts_dtype)
        if self.lm_head is not None and "logits" in self.output.outputs and last in hidden:
            results |= self.lm_head.results(hidden[last], tokens, packing, self.output.stored_dtype)
        return results

    def _started(
        self, batch: Batch, results: dict[str, Tensor], status: Tensor, timers: list[Timer], peaks: Peaks
    ) -> Pass:
        """A pass whose results are computed, or will be; on a GPU their copies to the host begin."""
        if self.device.type == "cpu":
            return Pass(batch.packing, results, status, timers, None, None, peaks)
        on_device = results, status
        results, status, copied = self._copy_out(results, status)
        started = Pass(batch.packing, results, status, timers, copied, on_device, peaks)
        self.unsettled.add(started)
        return started

    def _on_device(self, batch: Batch) -> tuple[Tensor, Packing]:
        return self._copy_in(batch) if self.device.type == "cuda" else (batch.tokens, batch.packing)

    def _copy_in(self, batch: Batch) -> tuple[Tensor, Packing]:
        """Start the copies of a batch to the GPU, on a stream of their own."""
        with torch.cuda.stream(self.incoming):
            tokens, packing = batch.tokens.to(self.device, non_blocking=True), batch.packing.to(self.device)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self.incoming)
        for tensor in (tokens, *packing.tensors()):
            tensor.record_stream(compute)
        return tokens, packing

    def _copy_out(
        self, results: dict[str, Tensor], status: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, torch.cuda.Event]:
        """Start the copies of a batch's results to the host, on a stream of their own."""
        self.outgoing.wait_stream(torch.cuda.current_stream(self.device))
        on_host = {}
        with torch.cuda.stream(self.outgoing):
            for name, value in {**results, "status": status}.items():
                # torch reuses pinned memory: after a few batches nothing is pinned anew.
                on_host[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                on_host[name].copy_(value, non_blocking=True)
            copied = self.outgoing.record_event()
        return on_host, on_host.pop("status"), copied

    def _finish(self, started: StartedBatch, waited_ms: float) -> BatchResult:
        """Wait for a batch's results, and join those of its forward passes."""
        passes = started.passes
        for one in passes:
            one.settle()
            fill_bad_with_nan(one.arrays, one.status, one.packing, self.output.contacts_max_residues)
        timers = [timer for one in passes for timer in one.timers]
        return BatchResult(
            arrays={name: joined([one.arrays[name] for one in passes]) for name in passes[0].arrays},
            status=joined([one.status for one in passes]),
            device_ms=sum(timer.elapsed_ms() for timer in timers),
            wait_launch_ms=sum(timer.wait_launch_ms() for timer in timers) if self.device.type == "cuda" else None,
            wall_ms=started.wall_ms,
            wait_read_ms=waited_ms,
            peak_allocated_bytes=largest(one.peaks.allocated for one in passes),
            peak_reserved_bytes=largest(one.peaks.reserved for one in passes),
            peak_rss_bytes=largest(one.peaks.resident for one in passes),
            oom_splits=started.oom_splits,
        )

    def _release_memory(self) -> None:
        for one in self.unsettled:
            one.settle()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _does_not_fit(self, batch: Batch) -> Pass:
        """NaN rows for a sequence that does not fit into memory even alone, after a warning."""
        residues = len(batch.sequences[0])
        log.warning(
            "a sequence of %s residues does not fit into the memory of %s, even alone: it would need about %.1f GB beside the "
            "weights; its rows are NaN and its record is rejected; set retry_rejected to embed it on a larger device%s",
            f"{residues:,}",
            device_name(self.device),
            self.bytes_per_token * (residues + 2) / 1e9,
            self.leaves_more_memory,
        )
        arrays = self.output.of_nan(residues, self.model.config.embed_dim)
        status = torch.full((1,), Status.DOES_NOT_FIT, dtype=torch.uint8)
        return Pass(batch.packing, arrays, status, [], None, None, Peaks())


def free_bytes(device: torch.device) -> int:
    """Memory of a device that this process may still take."""
    if device.type == "cpu":
        return host_available()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
