"""Scaling: controlled forward passes on the user's device, for the laws that production metrics cannot show.

Production packs batches, so that its memory is flat in sequence length on purpose. Here every batch holds sequences of
one length, and this engine runs beside fair-esm's own forward pass, with and without gradients.
"""

import ctypes
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lengthwise import alphabet, checkpoint
from lengthwise.engine import AUTO_BATCH_TOKENS, DTYPES, device_name, is_out_of_memory, resolve_device, set_threads
from lengthwise.files import atomic
from lengthwise.logs import count
from lengthwise.memory import MemoryMeter
from lengthwise.model import Packing
from lengthwise.scaling_table import COLUMNS, FAIR_ESM, LENGTHWISE, OK, OUT_OF_MEMORY, SKIPPED_MEMORY, SKIPPED_TIME
from lengthwise.shapes import ModelConfig

log = logging.getLogger("lengthwise")

LENGTHS = (50, 100, 200, 350, 500, 700, 1000, 1500)
# Tokens of a full batch. On the CPU half of production's, so that the study takes seconds and not minutes.
BATCH_TOKENS = {"cpu": 1_024, "cuda": AUTO_BATCH_TOKENS["cuda"]}
MAX_REPEATS = 3
SEED = 0
# The twenty standard amino acids: alphabet.RESIDUES goes on with X, B, U, Z and O.
STANDARD_RESIDUES = np.frombuffer(alphabet.RESIDUES[:20], np.uint8)


@dataclass(frozen=True)
class Series:
    """Points of ascending length that share an engine, a mode and a rule for the size of the batch."""

    engine: str
    gradients: bool
    forward: Callable[[Tensor], object]  # takes [N, L + 2] int64 tokens; what it returns keeps the graph alive
    points: tuple[tuple[int, int], ...]  # (length, sequences of the batch)


def scaling(
    weights: Path, device: str, precision: str, table: Path, threads: int = 1, seconds: float = 30.0
) -> pd.DataFrame:
    """Time and memory of forward passes at controlled lengths.

    Each engine runs one sequence per batch, without and with gradients (the forward pass keeps its graph; there is no
    backward pass), and full batches of equal tokens without gradients. Equal lengths need no padding, so fair-esm is seen
    at its best. Lengths ascend, and a series ends where its memory does, or where its share of the time does.

    Parameters
    ----------
    weights
        A checkpoint in fair-esm's layout.
    device, precision
        As in the store's settings.
    table
        The TSV to write.
    threads
        CPU threads for torch.
    seconds
        Time for all measurements together; loading the weights is not counted.

    Returns
    -------
    The rows of the TSV, one per engine, gradients, length and n_sequences. `wall_ms` is the median forward pass of
    `repeats`, warm-up excluded. `peak_bytes` is the growth during one forward pass over the memory in use just before it,
    so weights and libraries are not in it: of the allocator on CUDA (`memory_measure` "allocated"), of resident memory
    on the CPU ("resident"), null where neither can be measured. `status` is ``ok``, ``skipped_time`` or
    ``skipped_memory`` (would not fit in what is left), or ``out_of_memory``.

    Raises
    ------
    LengthwiseError
        No such device or checkpoint.
    """
    set_threads(threads)
    place = resolve_device(device)
    config, *_ = checkpoint.read(weights)
    probe = Probe(place)
    fixed = {"device": device_name(place), "precision": precision, "memory_measure": probe.memory_measure}
    rows: list[dict] = []
    left, series_left = seconds, 6
    for load in (_load_lengthwise, _load_fair_esm):
        for series in _series(load, weights, place, DTYPES[precision]):
            began = time.perf_counter()
            gradients, n = "with" if series.gradients else "without", max(n for _, n in series.points)
            log.info("%s %s gradients, batches of %s at most", series.engine, gradients, count(n, "sequence"))
            rows += [row | fixed for row in _measure_series(series, config, probe, left / series_left)]
            left, series_left = left - (time.perf_counter() - began), series_left - 1
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    with atomic(table) as part:
        frame.to_csv(part, sep="\t", index=False)
    return frame


class Probe:
    """Runs a forward pass on a device and says what it took."""

    def __init__(self, device: torch.device):
        self.device = device
        self.meter = MemoryMeter(device)
        # glibc keeps freed memory for later, which would hide the growth: it must be given back before each pass.
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if self.meter.resident else None
        resident = "resident" if self.trim else None
        self.memory_measure = "allocated" if device.type == "cuda" else resident

    def seconds(self, forward: Callable[[], object]) -> float:
        """Host time of one forward pass, to the end of the device's work."""
        self._synchronize()
        started = time.perf_counter()
        kept = forward()  # alive until the clock stops: freeing it is not part of the pass
        self._synchronize()
        elapsed = time.perf_counter() - started
        del kept
        return elapsed

    def peak_bytes(self, forward: Callable[[], object]) -> int | None:
        """Growth of memory during one forward pass."""
        if self.memory_measure is None:
            forward()
            return None
        if self.trim:
            self.trim(0)
        with self.meter.measure() as peaks:
            before = self.meter.used()
            kept = forward()
        del kept
        return (peaks.allocated if peaks.resident is None else peaks.resident) - before

    def available_bytes(self) -> int | None:
        """Memory that a pass may still take; None on CUDA, whose allocator refuses cleanly, and where it is not known."""
        if self.device.type == "cuda":
            return None
        return min(_host_memory_left(), default=None)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _series(load: Callable, weights: Path, device: torch.device, dtype: torch.dtype) -> Iterator[Series]:
    """The three series of an engine; its weights leave memory with the last."""
    single = tuple((length, 1) for length in LENGTHS)
    tokens = BATCH_TOKENS[device.type]
    full = tuple((length, n) for length in LENGTHS if (n := round(tokens / (length + 2))) > 1)
    for gradients, runs in ((False, (full, single)), (True, (single,))):
        engine, model, forward = load(weights, device, dtype, gradients)
        with torch.no_grad():  # warm-up: libraries set up workspaces that are no part of any point
            forward(_random_tokens(np.random.Generator(np.random.PCG64(SEED)), 1, LENGTHS[0]).to(device))
        for points in runs:
            yield Series(engine, gradients, forward, points)
        del model, forward
        _release(device)


def _load_lengthwise(
    weights: Path, device: torch.device, dtype: torch.dtype, gradients: bool
) -> tuple[str, nn.Module, Callable]:
    model = checkpoint.load_model(weights, device, dtype, pack=not gradients).requires_grad_(gradients)

    def forward(tokens: Tensor) -> object:
        packing = Packing.of([tokens.shape[1]] * tokens.shape[0]).to(device)
        return model(tokens.flatten(), packing, (model.config.num_layers,))  # {layer: [T, D]}

    return LENGTHWISE, model, forward


def _load_fair_esm(
    weights: Path, device: torch.device, dtype: torch.dtype, gradients: bool
) -> tuple[str, nn.Module, Callable]:
    model = checkpoint.reference_model(weights).to(device, dtype).requires_grad_(gradients)
    return FAIR_ESM, model, lambda tokens: model(tokens, repr_layers=[model.num_layers])


def _measure_series(series: Series, config: ModelConfig, probe: Probe, budget: float) -> list[dict]:
    """The rows of a series, in at most about `budget` seconds."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    ends = time.perf_counter() + budget
    costs = [n * config.flops(length) for length, n in series.points]
    rows: list[dict] = []
    # The best rate so far of the two passes that every point needs (one hiccup must not end a series), and the memory of
    # the point before.
    seconds_per_flop, bytes_per_square = np.inf, 0.0
    for index, (length, n) in enumerate(series.points):
        cost, square = costs[index], n * length**2
        row = {"engine": series.engine, "gradients": series.gradients, "length": length, "n_sequences": n}
        row |= {"n_tokens": n * (length + 2), "repeats": 0, "status": OK}
        rows.append(row)
        left, available = ends - time.perf_counter(), probe.available_bytes()
        if left <= 0 or (index and cost * seconds_per_flop > left):
            row["status"] = SKIPPED_TIME
            continue
        if available is not None and square * bytes_per_square > available:
            row["status"] = SKIPPED_MEMORY
            continue
        tokens = _random_tokens(rng, n, length).to(probe.device)  # [N, L + 2]
        began = time.perf_counter()
        try:
            row |= _measure_point(series, tokens, probe, allowance=left * cost / sum(costs[index:]))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row["status"] = OUT_OF_MEMORY
        if row["status"] == OUT_OF_MEMORY:  # outside of the handler, whose traceback keeps the tensors alive
            _release(probe.device)
            break
        repeated = (row["repeats"] - 1) * row["wall_ms"] / 1000
        seconds_per_flop = min(seconds_per_flop, (time.perf_counter() - began - repeated) / cost)
        bytes_per_square = (row["peak_bytes"] or 0) / square
    return rows


def _measure_point(series: Series, tokens: Tensor, probe: Probe, allowance: float) -> dict:
    """Memory, then the median time of as many repeats as the allowance holds, one at least."""

    def forward() -> object:
        # Not inference_mode: fair-esm keeps its rotary tables from call to call, and those of inference_mode would be
        # refused where gradients are wanted.
        with torch.set_grad_enabled(series.gradients):
            return series.forward(tokens)

    began = time.perf_counter()
    peak_bytes = probe.peak_bytes(forward)  # and the warm-up for this shape
    repeats = int(np.clip(allowance / (time.perf_counter() - began) - 1, 1, MAX_REPEATS))
    seconds = statistics.median(probe.seconds(forward) for _ in range(repeats))
    residues = tokens.shape[0] * (tokens.shape[1] - 2)
    return {
        "repeats": repeats,
        "wall_ms": seconds * 1000,
        "residues_per_second": residues / seconds,
        "peak_bytes": peak_bytes,
    }


def _random_tokens(rng: np.random.Generator, n: int, length: int) -> Tensor:
    """[N, L + 2] int64: random proteins of one length."""
    sequences = [rng.choice(STANDARD_RESIDUES, length).tobytes() for _ in range(n)]
    return torch.from_numpy(np.stack([alphabet.tokenize(sequence) for sequence in sequences])).long()


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _host_memory_left() -> Iterator[int]:
    """What the machine, and this process's control group, still have; nothing where that is not known."""
    try:
        with open("/proc/meminfo") as file:
            yield next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        with open("/proc/self/cgroup") as file:
            group = next(line.strip().removeprefix("0::/") for line in file if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup") / group
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            yield int(limit) - int((folder / "memory.current").read_text())
    except (OSError, StopIteration):
        return
