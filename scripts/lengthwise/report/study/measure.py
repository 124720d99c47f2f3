"""The measurements of the scaling study: forward passes at controlled lengths.

Production batches have about equal numbers of tokens, so their memory hardly shows the length. Here a batch holds sequences
of one length. This engine and fair-esm's are measured with and without gradients, in every precision that the device
has instructions for. Both are loaded at once, so that their passes alternate.
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import torch
from torch import Tensor

from lengthwise.esm2 import checkpoint
from lengthwise.esm2.devices import DTYPES, device_name, is_out_of_memory, resolve_device, set_threads
from lengthwise.esm2.meters import MemoryMeter, clock_and_temperature
from lengthwise.esm2.model import emulated_on_cpu
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MEMORY_MARGIN, ModelConfig
from lengthwise.jobs.embed_job import has_compile_cache
from lengthwise.report.study.budget import engines_bytes, pass_bytes
from lengthwise.report.study.engines import Loaded, Stage, load_engines, random_tokens
from lengthwise.report.study.rounds import Point, measure_in_rounds
from lengthwise.report.study.schema import (
    COLUMNS,
    FAIR_ESM,
    LENGTHWISE,
    OK,
    OUT_OF_MEMORY,
    SKIPPED_MEMORY,
    SKIPPED_TIME,
)
from lengthwise.store.receipts import add_to_receipt
from lengthwise.system.files import atomic
from lengthwise.system.machine import host_available, host_total, idle_cores
from lengthwise.system.memory import return_freed_memory

log = logging.getLogger("lengthwise")
# Fewer on a CPU, whose study is short.
LENGTHS = {
    "cpu": (50, 200, 500, 1000, 2000, 4000, 8000),
    "cuda": (50, 100, 200, 350, 500, 700, 1000, 1500, 2500, 4000, 8000),
}
# Tokens of full batches. On a CPU half of production's, which keeps the study short.
BATCH_TOKENS = {"cpu": (1_024,), "cuda": (4_096, AUTO_BATCH_TOKENS["cuda"])}
ENGINES = (LENGTHWISE, FAIR_ESM)


@dataclass(frozen=True)
class Series:
    """Points that differ in length alone."""

    engine: str
    precision: str
    gradients: bool
    batch_tokens: int | None  # None: one sequence at a time

    def sequences_at(self, length: int) -> int:
        """Number of sequences of a length in a batch; a full batch has at least two, else there is none: 0."""
        if self.batch_tokens is None:
            return 1
        n = round(self.batch_tokens / (length + 2))
        return n if n > 1 else 0


@dataclass(frozen=True)
class Measured:
    """A point and its row of the table."""

    series: Series
    row: dict
    point: Point


def scaling(
    weights: Path,
    device: str,
    precision: str,
    table: Path,
    threads: int = 1,
    seconds: float = 60.0,
    loading_counts: bool = False,
    memory_bytes: float | None = None,
    compile: bool = False,
) -> pd.DataFrame:
    """Time and memory of forward passes at controlled lengths.

    Series per engine: single sequences and full batches of equal tokens, each without gradients, in every precision that
    the device has instructions for (on a CPU, precisions other than the store's in full batches only); and single sequences
    with gradients in the store's precision. With gradients the forward pass keeps its graph; there is no backward pass.
    Equal lengths need no padding, which favours fair-esm. The passes come in rounds over all lengths, the engines in turn
    (`lengthwise.report.study.rounds`). On a CPU without memory for both engines nothing is measured.

    Parameters
    ----------
    weights
        A checkpoint, as of `lengthwise.esm2.checkpoint.read`.
    device, precision
        As in the store's settings.
    table
        The TSV to write; the receipt in its folder gets its checksum.
    threads
        Most CPU threads for torch; on a CPU no more than cores are idle, because a pass waits for its slowest thread. A batch
        runs on all of them, while production gives each core a batch of its own.
    seconds
        Time for all passes together.
    loading_counts
        Whether loading the weights is a part of `seconds`.
    memory_bytes
        Host memory that this process was given, if the system does not tell; None: what is free.
    compile
        Whether torch compiles this engine's layers on a GPU, but for gradients: as the store's jobs do
        (`lengthwise.report.study.engines.jobs_compile`).

    Returns
    -------
    The rows of the TSV, one per engine, precision, gradients, batch_tokens (null: one sequence per batch) and length. The
    columns are explained in `lengthwise.report.tables.COLUMNS`.

    Raises
    ------
    LengthwiseError
        No such device or checkpoint.
    """
    place = resolve_device(device)
    set_threads(threads if place.type == "cuda" else min(threads, max(1, round(idle_cores()))))
    config, *_ = checkpoint.read(weights)
    probe = Probe(place, memory_bytes)
    fixed = {"device": device_name(place), "device_bytes": probe.device_bytes(), "memory_measure": probe.memory_measure}
    fixed["threads"] = torch.get_num_threads()
    rows: list[dict] = []
    left = seconds
    stages = _stages(place, precision)
    shares_left = sum(stage.share for stage in stages)
    compile = compile and place.type == "cuda" and has_compile_cache()
    for stage in stages:
        began = time.perf_counter()
        what = f"{stage.precision}, {'with' if stage.gradients else 'without'} gradients"
        needed, free = _needed_bytes(config, stage), probe.free_bytes()
        if free is not None and needed > MEMORY_MARGIN * free:
            log.info("%s: skipped, takes %.1f GB of the %.1f GB that are free", what, needed / 1e9, free / 1e9)
            measured = _points(stage, None, config, probe)
            for each in measured:
                each.point.status = SKIPPED_MEMORY
                each.row.update(needed_bytes=needed, free_bytes=free)
        else:
            log.info("%s", what)
            loaded = load_engines(weights, place, stage, compile) if left > 0 else None
            loading = time.perf_counter() - began
            measured = _points(stage, loaded, config, probe)
            budget = (left - loading if loading_counts else left) * stage.share / shares_left
            measure_in_rounds([each.point for each in measured], budget if loaded else 0.0)
            if not loading_counts:
                left += loading
            del loaded
        rows += [row | fixed for row in _rows(measured, place)]
        del measured
        _release(place)
        left, shares_left = left - (time.perf_counter() - began), shares_left - stage.share
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    with atomic(table) as part:
        frame.to_csv(part, sep="\t", index=False)
    add_to_receipt(table.parent, table.name)
    return frame


class Probe:
    """Measures time and memory of a forward pass on a device."""

    def __init__(self, device: torch.device, memory_bytes: float | None = None):
        self.device, self.memory_bytes = device, memory_bytes
        self.meter = MemoryMeter(device)
        # Memory that the C library keeps after it was freed would hide growth, so it is returned before each pass.
        resident = "resident" if self.meter.resident and return_freed_memory() else None
        self.memory_measure = "allocated" if device.type == "cuda" else resident

    def seconds(self, forward: Callable[[], object]) -> float:
        """Seconds of one forward pass until the device has finished."""
        self._synchronize()
        started = time.perf_counter()
        kept = forward()  # freed after the clock stops
        self._synchronize()
        elapsed = time.perf_counter() - started
        del kept
        return elapsed

    def peak_bytes(self, forward: Callable[[], object]) -> int | None:
        """Growth of memory during one forward pass; None where memory cannot be measured."""
        if self.memory_measure is None:
            forward()
            return None
        if self.memory_measure == "resident":
            return_freed_memory()
        with self.meter.measure() as peaks:
            before = self.meter.used()
            kept = forward()
        del kept
        peak = peaks.allocated if peaks.resident is None else peaks.resident
        return None if peak is None or before is None else peak - before

    def copies(self, tokens: Tensor, forward: Callable[[], Tensor]) -> dict[str, float]:
        """Milliseconds of the copies to and from the device with pinned memory; empty on a CPU."""
        if self.device.type == "cpu":
            return {}
        tokens, rows = tokens.to(torch.uint8), forward().half()

        def milliseconds(to: Tensor, of: Tensor) -> float:
            copy = partial(to.copy_, of, non_blocking=True)
            return 1000 * statistics.median(self.seconds(copy) for _ in range(3))

        on_host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        return {
            "copy_in_ms": milliseconds(tokens, tokens.cpu().pin_memory()),
            "copy_out_ms": milliseconds(on_host, rows),
        }

    def free_bytes(self) -> float | None:
        """Free memory; None on CUDA, whose allocator fails without harm."""
        if self.device.type == "cuda":
            return None
        free = float(host_available())
        if self.memory_bytes is not None:
            free = min(free, self.memory_bytes - psutil.Process().memory_info().rss)
        return free

    def device_bytes(self) -> int:
        """Total memory of the device."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return host_total()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _stages(device: torch.device, own: str) -> list[Stage]:
    """The store's own precision first: a short study has it alone."""
    served = [name for name, dtype in DTYPES.items() if device.type == "cuda" or not emulated_on_cpu(dtype)]
    full, single = BATCH_TOKENS[device.type], (None,)
    others = full if device.type == "cpu" else single + full
    stages = [Stage(own, False, single + full, 4), Stage(own, True, single, 1)]
    return stages + [Stage(kind, False, others, 1) for kind in served if kind != own]


def _needed_bytes(config: ModelConfig, stage: Stage) -> int:
    """Memory of both engines and of fair-esm's first pass."""
    return engines_bytes(config, stage.precision) + pass_bytes(config, stage.gradients, True, 1, 50)


def _points(stage: Stage, loaded: dict[str, Loaded] | None, config: ModelConfig, probe: Probe) -> list[Measured]:
    """The points of a stage in the order of a round: lengths ascend, and the engines take turns."""
    series = {
        (batch_tokens, engine): Series(engine, stage.precision, stage.gradients, batch_tokens)
        for batch_tokens in stage.batch_tokens
        for engine in ENGINES
    }
    last: dict[Series, tuple[int, int]] = {}  # (pairs of residues, bytes) of the longest point
    measured = []
    for length in LENGTHS[probe.device.type]:
        for (batch_tokens, engine), each in series.items():
            if not (n := each.sequences_at(length)):
                continue
            row = _row(each, config, length, n)
            if loaded and engine in loaded:
                row.update(weights_bytes=loaded[engine].weights_bytes, compiled=loaded[engine].compiled)
                point = _point(each, row, loaded[engine], config, probe, last)
            else:
                status = SKIPPED_TIME if loaded is None else OUT_OF_MEMORY
                point = Point(each, (batch_tokens, length), 1, lambda: OUT_OF_MEMORY, lambda: 0.0, status=status)
            measured.append(Measured(each, row, point))
    return measured


def _point(
    series: Series,
    row: dict,
    loaded: Loaded,
    config: ModelConfig,
    probe: Probe,
    last: dict[Series, tuple[int, int]],
) -> Point:
    """A point whose passes fill in its row."""
    n, length = row["n_sequences"], row["length"]
    tokens = random_tokens(n, length).to(probe.device)  # [N, L + 2]
    run = loaded.prepare(tokens)  # before the clock starts: in a job another thread does it meanwhile

    def forward() -> Tensor:
        # Not inference_mode: fair-esm caches rotary tables, and autograd refuses inference tensors.
        with torch.set_grad_enabled(series.gradients):
            return run()

    def first() -> str:
        free = probe.free_bytes()
        if free is not None:
            squares, peak = last.get(series, (1, 0))
            formula = pass_bytes(config, series.gradients, series.engine == FAIR_ESM, n, length)
            needed = max(formula, round(peak * n * length**2 / squares))
            row.update(needed_bytes=needed, free_bytes=free)
            if needed > MEMORY_MARGIN * free:
                return SKIPPED_MEMORY
            row.update(needed_bytes=None, free_bytes=None)
        try:
            row["peak_bytes"] = probe.peak_bytes(forward)
            if series.engine == LENGTHWISE and not series.gradients:
                row.update(probe.copies(tokens, forward))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            last[series] = n * length**2, row["peak_bytes"] or 0
            return OK
        _release(probe.device)  # outside the handler: its traceback keeps tensors alive
        return OUT_OF_MEMORY

    operations = row["product_flops"] + row["attention_flops"]
    return Point(series, (series.batch_tokens, length), operations, first, lambda: probe.seconds(forward))


def _rows(measured: list[Measured], device: torch.device) -> list[dict]:
    """The rows of a stage; of a series whose memory ran out, those up to there."""
    clock, temperature = clock_and_temperature(device)
    rows, ended = [], set()
    for each in measured:
        row, seconds = each.row, each.point.seconds
        row["status"] = each.point.status
        if each.series in ended:
            continue
        if row["status"] == OUT_OF_MEMORY:
            ended.add(each.series)
        if seconds:
            shortest = min(seconds)
            row.update(repeats=len(seconds), residues_per_second=row["n_sequences"] * row["length"] / shortest)
            row.update(wall_ms=1000 * shortest, wall_ms_median=1000 * statistics.median(seconds))
            row.update(wall_ms_max=1000 * max(seconds), clock_mhz=clock, temperature_c=temperature)
        rows.append(row)
    return rows


def _row(series: Series, config: ModelConfig, length: int, n: int) -> dict:
    """The row of a point that is not measured yet."""
    flops, attention = n * config.flops(length), n * config.attention_flops(length)
    return {
        "engine": series.engine,
        "precision": series.precision,
        "gradients": series.gradients,
        "batch_tokens": series.batch_tokens,
        "length": length,
        "n_sequences": n,
        "n_tokens": n * (length + 2),
        "product_flops": flops - attention,
        "attention_flops": attention,
        "repeats": 0,
    }


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
