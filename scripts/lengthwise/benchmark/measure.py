"""The measurement: contenders embed parts of the same sequences, and their rows are compared with fair-esm's.

On a CPU all contenders are loaded and take turns, so that a slow moment of the machine does not fall on one alone. On a GPU one
is loaded at a time: a large model leaves no room for a second.
"""

import gc
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lengthwise.benchmark.cell import Cell, Row, errors_of, most_tokens, stride_of
from lengthwise.benchmark.contenders import EXTRACT, STREAMED, Choice, Contender, Loaded, contenders_of
from lengthwise.benchmark.matmul import matmul_rate, synchronize
from lengthwise.benchmark.peers import reference
from lengthwise.benchmark.tables import said
from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.devices import DTYPES, is_out_of_memory
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, ModelConfig

COMPARED_SEQUENCES = 24  # spread over the lengths
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Limits:
    """How much is measured."""

    rounds: int = 5
    seconds: float = math.inf  # of a contender's passes over one sample
    deadline: float = math.inf  # in seconds of the epoch


@dataclass(frozen=True)
class _Run:
    """A way to run a loaded contender."""

    name: str
    contender: Contender
    loaded: Loaded
    facts: Row


class Benchmark:
    """The measurement of one model; `rows` is the table so far.

    Parameters
    ----------
    weights
        A fair-esm checkpoint.
    samples
        Normalised residues, by the name of the sample. Of the first, every contender is measured, and its errors.
    device
        Where to run.
    limits
        How much is measured.
    folder
        Rows are written there for a while.
    choice
        Who takes part.
    write
        Takes the rows so far, after each round.
    log
        Takes lines of progress.

    Raises
    ------
    LengthwiseError
        The checkpoint cannot be read.
    """

    def __init__(
        self,
        weights: Path,
        samples: Mapping[str, Sequence[bytes]],
        device: torch.device,
        limits: Limits,
        folder: Path,
        choice: Choice,
        write: Callable[[list[Row]], None],
        log: Callable[[str], None] = print,
    ):
        self.weights, self.device, self.limits = weights, device, limits
        self.folder, self.choice, self.write, self.log = folder, choice, write, log
        self.config: ModelConfig = checkpoint.read(weights)[0]
        self.samples = {name: sorted(sequences, key=len) for name, sequences in samples.items()}
        self.cells: list[Cell] = []
        self.extract_rates: dict[str, list[float]] = {}  # by sample

    def run(self) -> list[Row]:
        """Measure everything that the time suffices for; returns the rows."""
        first = next(iter(self.samples.values()))
        compared = first[:: max(1, len(first) // COMPARED_SEQUENCES)][:COMPARED_SEQUENCES]
        expected: list[np.ndarray] = []
        what = "fair-esm's rows"
        if self._has_time(what):
            self._or_status(what, lambda: expected.extend(reference(self.weights, compared, self.device)))
        chosen = contenders_of(self.weights, self.config, self.device, self.folder, self.choice, self.log)
        contenders = list(chosen)
        for group in [[each] for each in contenders] if self.device.type == "cuda" else [contenders]:
            self._measure_group(group, compared, expected)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self.rows

    @property
    def rows(self) -> list[Row]:
        """A row for each cell so far, by sample."""
        samples = list(self.samples)
        cells = sorted(self.cells, key=lambda cell: samples.index(cell.sample))
        return [cell.row(self.extract_rates.get(cell.sample, [])) for cell in cells]

    def _measure_group(self, group: list[Contender], compared: list[bytes], expected: list[np.ndarray]) -> None:
        """Load contenders, and let them take turns."""
        runs = [run for contender in group for run in self._load(contender, compared, expected)]
        for number, (sample, sequences) in enumerate(self.samples.items()):
            chosen = [run for run in runs if number == 0 or run.contender.every_length]
            pairs = [(run, Cell(run.facts, sample)) for run in chosen if self._has_time(f"{run.name}, {sample}")]
            self.cells += [cell for _, cell in pairs]
            if not pairs:
                continue
            strides = {cell: self._stride(run, cell, sequences) for run, cell in pairs}
            for part in range(self.limits.rounds):
                self._measure_round(part, sample, sequences, pairs, strides)
                self.write(self.rows)

    def _measure_round(
        self,
        part: int,
        sample: str,
        sequences: list[bytes],
        pairs: list[tuple[_Run, Cell]],
        strides: Mapping[Cell, int],
    ) -> None:
        """A pass of each contender that has time left; says the rate of those that are done."""
        matmul_rates: dict[tuple[str, int], float] = {}
        for run, cell in pairs:
            if cell.status or sum(cell.seconds) > self.limits.seconds:
                continue
            some = sequences[part % min(strides[cell], len(sequences)) :: strides[cell]]
            cell.status = self._or_status(f"{run.name}, {sample}", partial(self._pass, run, cell, some, matmul_rates))
            if run.name == EXTRACT:
                self.extract_rates[sample] = cell.rates
            is_last = part + 1 == self.limits.rounds or sum(cell.seconds) > self.limits.seconds
            if is_last and cell.seconds:
                self.log(said(cell.row(self.extract_rates.get(sample, []))))
        times = [
            f"{run.name} {run.contender.precision} {cell.seconds[part]:.2f} s"
            for run, cell in pairs
            if len(cell.seconds) > part
        ]
        self.log(f"{sample}, round {part + 1} of {self.limits.rounds}: {', '.join(times)}")

    def _load(self, contender: Contender, compared: list[bytes], expected: list[np.ndarray]) -> list[_Run]:
        """Load a contender and compare its rows, which warms it up too; no runs if that fails."""
        what = f"{', '.join(contender.names)}, {contender.precision}"
        runs: list[_Run] = []

        def load() -> None:
            began = time.perf_counter()
            loaded = contender.load()
            synchronize(self.device)
            for name, embed in loaded.ways.items():
                facts: Row = {"engine": name, "precision": contender.precision, "compiled": loaded.is_compiled}
                rows = [array for part in embed(compared) for array in part.rows]
                facts["load_seconds"] = time.perf_counter() - began
                if loaded.engine is not None and name != STREAMED:  # by now it has the outputs of this way
                    facts["bytes_per_token"] = loaded.engine.bytes_per_token
                if expected:
                    facts |= errors_of(rows, expected)
                runs.append(_Run(name, contender, loaded, facts))

        if not self._has_time(what):
            return []
        self.log(f"loading {what}")
        if status := self._or_status(what, load):
            failed = contender.names[len(runs) :]
            sample = next(iter(self.samples))
            self.cells += [Cell({"engine": name, "precision": contender.precision}, sample, status) for name in failed]
            self.write(self.rows)
        return runs

    def _stride(self, run: _Run, cell: Cell, sequences: list[bytes]) -> int:
        found = [self.limits.rounds]

        def choose() -> None:
            rounds, seconds = self.limits.rounds, self.limits.seconds
            found[0] = stride_of(run.loaded, run.loaded.ways[run.name], sequences, self.device, rounds, seconds)

        cell.status = self._or_status(f"{run.name}, {cell.sample}", choose)
        return found[0]

    def _pass(self, run: _Run, cell: Cell, part: list[bytes], matmul_rates: dict[tuple[str, int], float]) -> None:
        """A timed pass, and the rate of products beside it, which contenders of one type and batch share in a round."""
        batch_tokens = run.loaded.batch_tokens
        tokens = most_tokens(part, batch_tokens or AUTO_BATCH_TOKENS[self.device.type])
        if batch_tokens is not None:
            cell.batch_tokens = max(cell.batch_tokens or 0, tokens)
        key = run.contender.precision, tokens
        if key not in matmul_rates:
            matmul_rates[key] = matmul_rate(self.config, self.device, DTYPES[key[0]], tokens)
        cell.measure(run.loaded.ways[run.name], part, self.config, self.device)
        cell.matmul_rates.append(matmul_rates[key])

    def _has_time(self, what: str) -> bool:
        if time.time() < self.limits.deadline:
            return True
        self.log(f"no time left for {what}")
        return False

    def _or_status(self, what: str, work: Callable[[], object]) -> str:
        """Do some of the work; what failed in a few words, so that the rest is measured all the same."""
        try:
            work()
        except LengthwiseError as error:
            status = str(error)
            self.log(f"{what}: {status}")
        except Exception as error:
            status = OUT_OF_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0]
            self.log(f"{what}: {status}")
            if status != OUT_OF_MEMORY:
                self.log(traceback.format_exc())
        else:
            return ""
        gc.collect()  # outside of the handler, whose traceback keeps tensors alive
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return status
