"""`python -m lengthwise benchmark`: time every installed engine on the same sequences."""

import argparse
import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lengthwise.benchmark.card import description
from lengthwise.benchmark.cell import Row
from lengthwise.benchmark.contenders import Choice
from lengthwise.benchmark.measure import OUT_OF_MEMORY, Benchmark, Limits
from lengthwise.benchmark.sequences import random_sequences, read_fasta
from lengthwise.benchmark.tables import markdown, write_figure, write_markdown, write_table
from lengthwise.benchmark.weights import write_weights
from lengthwise.errors import LengthwiseError
from lengthwise.esm2.devices import resolve_device, set_threads
from lengthwise.esm2.shapes import MODELS
from lengthwise.system.gpus import leased
from lengthwise.system.logging import error_line

# Sequences must outlast the fastest engine's time on a GPU; on a CPU all of them are embedded.
RESIDUES = {"cpu": 100_000, "cuda": 20_000_000}


@dataclass(frozen=True)
class Request:
    """The benchmark of one model, for a process of its own."""

    name: str
    checkpoint: Path | None  # None: random weights
    device: torch.device
    fasta: Path | None
    lengths: tuple[int, ...]
    residues: int
    limits: Limits
    threads: int
    out: Path
    choice: Choice


def run(given: argparse.Namespace, measure: Callable[[Request], tuple[list[Row], str]] | None = None) -> int:
    """Measure the models one after the other and print their tables; returns the exit code.

    Each has a process of its own: torch compiles the layers only so many times in one, and runs them uncompiled after that.
    Whenever the run ends, what it measured is in the folder `given.out`, as TSV and Markdown.
    """
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = resolve_device(auto if given.device == "auto" else given.device)
    deadline = time.time() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in [given.checkpoint.stem] if given.checkpoint else given.model:
        if time.time() >= deadline:
            print(f"no time left for {name}", flush=True)
            continue
        request = Request(
            name,
            given.checkpoint,
            device,
            given.fasta,
            tuple(given.length),
            given.residues or RESIDUES[device.type],
            Limits(given.rounds, given.seconds, deadline),
            given.threads,
            given.out,
            Choice(given.esm_cpp, given.emulated),
        )
        try:
            spawn = multiprocessing.get_context("spawn")
            with (
                ProcessPoolExecutor(1, spawn, _end_with_parent, (_work_folder(given.out),)) as pool,
                _ended_if_interrupted(),
            ):
                rows, title = pool.submit(measure or measure_model, request).result()
        except (LengthwiseError, OSError, BrokenProcessPool) as error:
            print(error_line(f"{name}: {error}"), file=sys.stderr, flush=True)
            failed = True
        except KeyboardInterrupt:
            print(error_line(f"interrupted; what was measured is in {given.out}"), file=sys.stderr, flush=True)
            return 128 + signal.SIGINT
        else:
            print(f"\n{title}\n\n{markdown(rows)}\n", flush=True)
            failed |= any(row["status"] not in ("", OUT_OF_MEMORY) for row in rows)
        finally:
            shutil.rmtree(_work_folder(given.out), ignore_errors=True)  # of a process that crashed
    return int(failed)


@contextmanager
def _ended_if_interrupted() -> Iterator[None]:
    """Do not wait for the end of a measurement that is not wanted any more."""
    try:
        yield
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.kill()
        raise


def measure_model(request: Request) -> tuple[list[Row], str]:
    """Measure one model, and write the table after each round; returns the rows and the table's title.

    As a job it leases a GPU, and has the job's settings of torch's allocator.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("lengthwise").setLevel(logging.INFO)
    with leased(request.device.type):
        return _measure_model(request)


def _measure_model(request: Request) -> tuple[list[Row], str]:
    set_threads(request.threads)
    samples = _samples(request)
    title = f"{request.name} on {description(request.device)}"
    print(f"{title}: {_in_words(samples)}, {request.limits.rounds} rounds; tables in {request.out}", flush=True)

    def write(rows: list[Row]) -> None:
        write_table(rows, request.out / f"{request.name}.tsv")
        write_markdown(rows, title, request.out / f"{request.name}.md")

    work = _work_folder(request.out)
    shutil.rmtree(work, ignore_errors=True)  # of a run whose machine went away
    work.mkdir()
    try:
        weights = request.checkpoint or work / f"{request.name}.pt"
        if request.checkpoint is None:
            write_weights(weights, MODELS[request.name])
        log = partial(print, flush=True)
        rows = Benchmark(weights, samples, request.device, request.limits, work, request.choice, write, log).run()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if rows:
        write_figure(rows, title, request.out / f"{request.name}.png")
    return rows, title


def _samples(request: Request) -> dict[str, list[bytes]]:
    if request.fasta is None:
        return {str(length): random_sequences(length, request.residues) for length in request.lengths}
    sequences = read_fasta(request.fasta)
    totals = itertools.accumulate(map(len, sequences))
    return {
        request.fasta.stem: [
            sequence for sequence, total in zip(sequences, totals, strict=True) if total <= request.residues
        ]
    }


def _in_words(samples: dict[str, list[bytes]]) -> str:
    return "; ".join(
        f"{name}: {len(sequences):,} sequences, {sum(map(len, sequences)):,} residues"
        for name, sequences in samples.items()
    )


def _work_folder(out: Path) -> Path:
    """Weights and rows lie there for a while: gigabytes."""
    return out / "work"


def _end_with_parent(work: Path) -> None:
    """End this process with the command, also when that was killed: it would keep the GPU."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both, and the command ends this process

    def wait() -> None:
        parent.join()
        shutil.rmtree(work, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
