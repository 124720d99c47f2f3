"""`python -m lengthwise benchmark`: time every installed engine on the same sequences."""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch

from lengthwise.benchmark.measure import benchmark
from lengthwise.benchmark.sequences import random_sequences, read_fasta
from lengthwise.benchmark.tables import markdown, write_figure, write_table
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.devices import device_name, resolve_device, set_threads
from lengthwise.esm2.shapes import MODELS


def run(given: argparse.Namespace) -> int:
    """Print the table of each model, and write it as TSV with a figure to the folder `given.out`; returns the exit code."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = resolve_device(auto if given.device == "auto" else given.device)
    set_threads(given.threads)
    sequences = read_fasta(given.fasta) if given.fasta else []
    sequences = sequences or random_sequences(given.length, given.residues)
    totals = itertools.accumulate(map(len, sequences))
    sequences = [sequence for sequence, total in zip(sequences, totals, strict=True) if total <= given.residues]
    given.out.mkdir(parents=True, exist_ok=True)
    for model in ["the checkpoint"] if given.checkpoint else given.model:
        with tempfile.TemporaryDirectory() as folder:
            weights = given.checkpoint or Path(folder) / f"{model}.pt"
            if given.checkpoint is None:
                write_random(weights, MODELS[model])
            rows = benchmark(weights, sequences, device, given.rounds)
        name = weights.stem
        title = (
            f"{name} on {device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
            f"{sum(map(len, sequences)):,} residues in {len(sequences):,} sequences"
        )
        print(f"\n{title}\n\n{markdown(rows)}\n", flush=True)
        write_table(rows, given.out / f"{name}.tsv")
        write_figure(rows, title, given.out / f"{name}.png")
    return 0
