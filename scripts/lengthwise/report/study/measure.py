"""The measurements of the scaling study: forward passes at controlled lengths.

Production batches have about equal numbers of tokens, so their memory hardly shows the length. Here a batch holds sequences
of one length. This engine and fair-esm's are measured with and without gradients, in every precision that the device
has instructions for.
"""

import ctypes
import gc
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lengthwise.esm2 import checkpoint
from lengthwise.esm2.devices import DTYPES, device_name, is_out_of_memory, resolve_device, set_threads
from lengthwise.esm2.meters import MemoryMeter, clock_and_temperature
from lengthwise.esm2.model import Packing, onednn_serves
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, ModelConfig
from lengthwise.esm2.tokens import RESIDUES, tokenize
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
from lengthwise.system.machine import host_available, host_total
from lengthwise.system.text import count

log = logging.getLogger("lengthwise")
LENGTHS = (50, 100, 200, 350, 500, 700, 1000, 1500, 2500, 4000, 8000)
# Tokens of full batches. On a CPU half of production's, which keeps the study short.
BATCH_TOKENS = {"cpu": (1_024,), "cuda": (4_096, AUTO_BATCH_TOKENS["cuda"])}
SECONDS = {"cpu": 30.0, "cuda": 180.0}
MAX_REPEATS = 5
SEED = 0
# RESIDUES goes on with X, B, U, Z and O.
STANDARD_RESIDUES = np.frombuffer(RESIDUES[:20], np.uint8)


@dataclass(frozen=True)
class Loaded:
    """A model on the device, ready for passes."""

    weights_bytes: int
    forward: Callable[
        [Tensor], Tensor
    ]  # [N, L + 2] int64 tokens -> last layer's rows, [..., D]; they keep the graph alive


@dataclass(frozen=True)
class Series:
    """Points of ascending length with the same engine, precision, gradients and batch size."""

    engine: str
    precision: str
    gradients: bool
    batch_tokens: int | None  # None: one sequence at a time

    @property
    def points(self) -> list[tuple[int, int]]:
        """(length, number of sequences); a full batch has at least two."""
        if self.batch_tokens is None:
            return [(length, 1) for length in LENGTHS]
        return [(length, n) for length in LENGTHS if (n := round(self.batch_tokens / (length + 2))) > 1]


@dataclass(frozen=True)
class Point:
    """A measured point: its row, and what repeats its forward pass."""

    row: dict
    forward: Callable[[], Tensor]
    residues: int
    seconds: list[float]


def scaling(
    weights: Path, device: str, precision: str, table: Path, threads: int = 1, seconds: float | str = "auto"
) -> pd.DataFrame:
    """Time and memory of forward passes at controlled lengths.

    Series per engine: single sequences and full batches of equal tokens, each without gradients, in every precision that
    the device has instructions for (on a CPU, precisions other than the store's in full batches only); and single sequences
    with gradients in the store's precision. With gradients the forward pass keeps its graph; there is no backward pass.
    Equal lengths need no padding, which favours fair-esm. Lengths ascend. A series stops when memory runs out or half of its
    time is used; the rest of its time goes to repeats, at most `MAX_REPEATS` per length.

    Parameters
    ----------
    weights
        A checkpoint in fair-esm's layout.
    device, precision
        As in the store's settings.
    table
        The TSV to write; the receipt in its folder gets its checksum.
    threads
        CPU threads for torch: here a batch runs on all of them, while production gives each core a batch of its own.
    seconds
        Time for all measurements together, or auto: `SECONDS` of the device; loading the weights is not counted.

    Returns
    -------
    The rows of the TSV, one per engine, precision, gradients, batch_tokens (null: one sequence per batch) and length. The
    columns are explained in `lengthwise.report.tables.COLUMNS`.

    Raises
    ------
    LengthwiseError
        No such device or checkpoint.
    """
    set_threads(threads)
    place = resolve_device(device)
    config, *_ = checkpoint.read(weights)
    probe = Probe(place)
    fixed = {"device": device_name(place), "device_bytes": probe.device_bytes(), "memory_measure": probe.memory_measure}
    rows: list[dict] = []
    left = SECONDS[place.type] if isinstance(seconds, str) else seconds
    plan = _plan(place, precision)
    shares_left = sum(share * len(sizes) for *_, sizes, share in plan)
    for engine, kind, gradients, sizes, share in plan:
        loaded = _load(engine, weights, place, kind, gradients)
        for batch_tokens in sizes:
            series = Series(engine, kind, gradients, batch_tokens)
            began = time.perf_counter()
            what = "one at a time" if batch_tokens is None else f"batches of {count(batch_tokens, 'token')}"
            log.info("%s %s %s gradients, %s", engine, kind, "with" if gradients else "without", what)
            if loaded is None:
                rows.append(_row(series, config, *series.points[0]) | {"status": OUT_OF_MEMORY} | fixed)
            else:
                found = _measure_series(series, loaded, config, probe, left * share / shares_left)
                rows += [row | {"weights_bytes": loaded.weights_bytes} | fixed for row in found]
            left, shares_left = left - (time.perf_counter() - began), shares_left - share
        del loaded
        _release(place)
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    with atomic(table) as part:
        frame.to_csv(part, sep="\t", index=False)
    add_to_receipt(table.parent, table.name)
    return frame


class Probe:
    """Measures time and memory of a forward pass on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.meter = MemoryMeter(device)
        # glibc keeps freed memory, which would hide growth, so it is returned before each pass.
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if self.meter.resident else None
        resident = "resident" if self.trim else None
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
        if self.trim:
            self.trim(0)
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

    def available_bytes(self) -> int | None:
        """Free memory; None on CUDA, whose allocator fails without harm."""
        return None if self.device.type == "cuda" else host_available()

    def device_bytes(self) -> int:
        """Total memory of the device."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return host_total()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _plan(device: torch.device, own: str) -> list[tuple[str, str, bool, tuple[int | None, ...], int]]:
    """(engine, precision, gradients, batch_tokens of each series, share of the time per series)."""
    served = [name for name, dtype in DTYPES.items() if device.type == "cuda" or onednn_serves(dtype)]
    full, single = BATCH_TOKENS[device.type], (None,)
    # Time that a series leaves goes to later ones, so the most used series are last. A CPU has less time.
    others = full if device.type == "cpu" else full + single
    runs = [(kind, False, others, 1) for kind in served if kind != own]
    runs += [(own, True, single, 1), (own, False, full + single, 2)]
    return [(engine, *run) for run in runs for engine in (LENGTHWISE, FAIR_ESM)]


def _load(engine: str, weights: Path, device: torch.device, precision: str, gradients: bool) -> Loaded | None:
    """Load an engine and warm it up; None where its weights do not fit on the device."""
    load = {LENGTHWISE: _load_lengthwise, FAIR_ESM: _load_fair_esm}[engine]
    try:
        loaded = load(weights, device, DTYPES[precision], gradients)
        with torch.no_grad():  # libraries allocate workspaces now, so no point counts them
            loaded.forward(_random_tokens(np.random.Generator(np.random.PCG64(SEED)), 1, LENGTHS[0]).to(device))
        return loaded
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def _load_lengthwise(weights: Path, device: torch.device, dtype: torch.dtype, gradients: bool) -> Loaded:
    model = checkpoint.load_model(weights, device, dtype, pack=not gradients).requires_grad_(gradients)
    packed: list[Tensor] = [each for module in model.modules() if (each := getattr(module, "packed", None)) is not None]

    def forward(tokens: Tensor) -> Tensor:
        packing = Packing.of([tokens.shape[1]] * tokens.shape[0]).to(device)
        return model(tokens.flatten(), packing, (model.config.num_layers,))[model.config.num_layers]  # [T, D]

    return Loaded(_model_bytes(model) + sum(int(tensor.numel()) * dtype.itemsize for tensor in packed), forward)


def _load_fair_esm(weights: Path, device: torch.device, dtype: torch.dtype, gradients: bool) -> Loaded:
    model = checkpoint.reference_model(weights).to(device, dtype).requires_grad_(gradients)

    def forward(tokens: Tensor) -> Tensor:
        return model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]  # [N, L + 2, D]

    return Loaded(_model_bytes(model), forward)


def _model_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _measure_series(series: Series, loaded: Loaded, config: ModelConfig, probe: Probe, budget: float) -> list[dict]:
    """The rows of a series, in at most about `budget` seconds."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    ends = time.perf_counter() + budget
    rows: list[dict] = []
    measured: list[Point] = []
    # The best rate so far, because one slow pass must not end a series; the memory of the last point.
    seconds_per_flop, bytes_per_square = np.inf, 0.0
    for length, n in series.points:
        row = _row(series, config, length, n)
        rows.append(row)
        flops, square = row["product_flops"] + row["attention_flops"], n * length**2
        left, available = ends - time.perf_counter(), probe.available_bytes()
        # One pass for memory, one for time; half of the time is kept for repeats.
        if left <= budget / 2 or (measured and 2 * flops * seconds_per_flop > left - budget / 2):
            row["status"] = SKIPPED_TIME
            continue
        if available is not None and square * bytes_per_square > available:
            row["status"] = SKIPPED_MEMORY
            continue
        tokens = _random_tokens(rng, n, length).to(probe.device)  # [N, L + 2]
        try:
            measured.append(_measure_point(series, loaded, row, tokens, probe))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row["status"] = OUT_OF_MEMORY
        if row["status"] == OUT_OF_MEMORY:  # outside the handler: its traceback keeps tensors alive
            _release(probe.device)
            break
        seconds_per_flop = min(seconds_per_flop, measured[-1].seconds[0] / flops)
        bytes_per_square = (row["peak_bytes"] or 0) / square
    # In rounds over the lengths, so that a slow moment of the machine does not hit one length alone.
    for _ in range(MAX_REPEATS - 1):
        for point in measured:
            if point.seconds[0] < ends - time.perf_counter():
                point.seconds.append(probe.seconds(point.forward))
    clock, temperature = clock_and_temperature(probe.device)
    for point in measured:
        middle = statistics.median(point.seconds)
        point.row.update(repeats=len(point.seconds), residues_per_second=point.residues / middle)
        point.row.update(
            wall_ms=1000 * middle, wall_ms_min=1000 * min(point.seconds), wall_ms_max=1000 * max(point.seconds)
        )
        point.row.update(clock_mhz=clock, temperature_c=temperature)
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
        "status": OK,
    }


def _measure_point(series: Series, loaded: Loaded, row: dict, tokens: Tensor, probe: Probe) -> Point:
    """Measure memory, which also warms up this shape, then copies and the first time."""

    def forward() -> Tensor:
        # Not inference_mode: fair-esm caches rotary tables, and autograd refuses inference tensors.
        with torch.set_grad_enabled(series.gradients):
            return loaded.forward(tokens)

    row["peak_bytes"] = probe.peak_bytes(forward)
    if series.engine == LENGTHWISE and not series.gradients:
        row |= probe.copies(tokens, forward)
    return Point(row, forward, tokens.shape[0] * (tokens.shape[1] - 2), [probe.seconds(forward)])


def _random_tokens(rng: np.random.Generator, n: int, length: int) -> Tensor:
    """[N, L + 2] int64: random proteins of one length."""
    sequences = [rng.choice(STANDARD_RESIDUES, length).tobytes() for _ in range(n)]
    return torch.from_numpy(np.stack([tokenize(sequence) for sequence in sequences])).long()


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
