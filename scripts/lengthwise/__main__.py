"""What runs beside the workflow: `python -m lengthwise verify results/demo`, `python -m lengthwise benchmark`."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.shapes import MODELS

SHOWN = 10  # files of which the same is said


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code, 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m lengthwise", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    verifier = commands.add_parser("verify", help="check a store's weights, and every byte that its datasets use")
    verifier.add_argument("store", type=Path, help="results/<model>")
    depth = verifier.add_mutually_exclusive_group()
    depth.add_argument("--full", action="store_false", dest="quick", help="every byte (as without it)")
    depth.add_argument("--quick", action="store_true", help="sizes, headers and tables; no embeddings are read")
    verifier.add_argument("--repair", action="store_true", help="take damaged files out of service for the next run")
    verifier.set_defaults(quick=False, run=run_verify)
    pruner = commands.add_parser("prune", help="list what no dataset of a store uses any more")
    pruner.add_argument("store", type=Path, help="results/<model>")
    pruner.add_argument("--delete", action="store_true", help="delete it")
    pruner.set_defaults(run=run_prune)
    watcher = commands.add_parser("progress", help="how far a run is, over all its jobs, on whatever machines they are")
    watcher.add_argument("store", type=Path, help="results/<model>")
    watcher.add_argument("--once", action="store_true", help="say it once; otherwise until the run is complete")
    watcher.set_defaults(run=run_progress)
    bench = commands.add_parser("benchmark", help="time this engine beside fair-esm, transformers and esm-cpp")
    bench.add_argument(
        "--model", nargs="+", default=["esm2_t6_8M_UR50D"], choices=MODELS, help="shapes, with random weights"
    )
    bench.add_argument("--checkpoint", type=Path, help="a fair-esm .pt with real weights, instead of --model")
    bench.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    bench.add_argument("--fasta", type=Path, help="real sequences; without it, random ones of --length")
    bench.add_argument("--length", type=int, default=300)
    bench.add_argument("--residues", type=int, default=100_000, help="how many residues, at most")
    bench.add_argument("--rounds", type=int, default=5)
    bench.add_argument("--threads", type=int, default=os.cpu_count())
    bench.add_argument("--out", type=Path, default=Path("benchmark"), help="folder for the table and the figure")
    bench.set_defaults(run=run_benchmark)
    given = parser.parse_args(arguments)
    try:
        return given.run(given)
    except (LengthwiseError, OSError) as error:
        print(f"lengthwise: error: {error}", file=sys.stderr)
        return 1


def run_progress(given: argparse.Namespace) -> int:
    """Show how far a run is; Ctrl-C ends the looking, not the run."""
    import contextlib

    from lengthwise.progress import watch

    with contextlib.suppress(KeyboardInterrupt):
        watch(given.store, given.once)
    return 0


def run_benchmark(given: argparse.Namespace) -> int:
    """Time every engine that is installed; prints the table, and writes it and a figure."""
    import itertools
    import tempfile

    import torch

    from lengthwise import benchmark, checkpoint
    from lengthwise.engine import device_name, resolve_device, set_threads

    device = resolve_device(
        ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    )
    set_threads(given.threads)
    sequences = benchmark.read_fasta(given.fasta) if given.fasta else []
    sequences = sequences or benchmark.random_sequences(given.length, given.residues)
    totals = itertools.accumulate(map(len, sequences))
    sequences = [sequence for sequence, total in zip(sequences, totals, strict=True) if total <= given.residues]
    given.out.mkdir(parents=True, exist_ok=True)
    for model in ["the checkpoint"] if given.checkpoint else given.model:
        with tempfile.TemporaryDirectory() as folder:
            weights = given.checkpoint or Path(folder) / f"{model}.pt"
            if given.checkpoint is None:
                checkpoint.write_random(weights, MODELS[model])
            rows = benchmark.benchmark(weights, sequences, device, given.rounds)
        name = weights.stem
        title = (
            f"{name} on {device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
            f"{sum(map(len, sequences)):,} residues in {len(sequences):,} sequences"
        )
        print(f"\n{title}\n\n{benchmark.markdown(rows)}\n", flush=True)
        benchmark.write_table(rows, given.out / f"{name}.tsv")
        benchmark.figure(rows, title, given.out / f"{name}.png")
    return 0


def run_verify(given: argparse.Namespace) -> int:
    """Check the weights and each dataset; everything that is wrong gets a line."""
    import logging

    from lengthwise.verify import set_aside, verify

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    problems, alike = [], Counter()
    for checked in verify(given.store, given.quick):
        problems += checked.problems
        for problem in checked.problems:
            what = problem.line.partition(": ")[2]
            alike[what] += 1
            if alike[what] <= SHOWN:
                print(f"lengthwise: error: {problem.line}", file=sys.stderr)
        if not checked.problems:
            print(f"{checked.name}: good" + (f", {checked.note}" if checked.note else ""), flush=True)
    for what, n in alike.items():
        if n > SHOWN:
            print(f"lengthwise: error: and {n - SHOWN:,} more files: {what}", file=sys.stderr)
    mendable = all(problem.path for problem in problems)
    if problems and not given.repair and any(problem.path for problem in problems):
        print("--repair takes what is damaged out of service; the next run of snakemake makes it again")
    if given.repair:
        for path in set_aside(problems):
            print(f"out of service: {path}")
        if problems:
            print("run snakemake: it makes again what is gone" + ("" if mendable else "; the rest is yours to mend"))
    return 0 if not problems or (given.repair and mendable) else 1


def run_prune(given: argparse.Namespace) -> int:
    """List or delete what no dataset uses."""
    from lengthwise.prune import prune

    unused = prune(given.store, given.delete)
    for path, size in unused.items():
        print(f"{size:>16,}  {path}")
    what = "deleted" if given.delete else "that no dataset uses" + ("; --delete deletes it" if unused else "")
    print(f"{sum(unused.values()):>16,}  bytes {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
