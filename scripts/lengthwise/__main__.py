"""What runs beside the workflow: `python -m lengthwise verify results/demo`, `python -m lengthwise benchmark`."""

import argparse
import os
import sys
from pathlib import Path

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.esm2.config import MODELS


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code, 1 where something is wrong."""
    given = _parser().parse_args(arguments)
    try:
        return given.run(given)
    except (LengthwiseError, OSError) as error:
        print(f"lengthwise: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lengthwise", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check a store's weights, and every byte that its datasets use")
    verify.add_argument("store", type=Path, help="results/<model>")
    depth = verify.add_mutually_exclusive_group()
    depth.add_argument("--full", action="store_false", dest="quick", help="every byte (as without it)")
    depth.add_argument("--quick", action="store_true", help="sizes, headers and tables; no embeddings are read")
    verify.add_argument("--repair", action="store_true", help="take damaged files out of service for the next run")
    verify.set_defaults(quick=False, run=_verify)
    prune = commands.add_parser("prune", help="list what no dataset of a store uses any more")
    prune.add_argument("store", type=Path, help="results/<model>")
    prune.add_argument("--delete", action="store_true", help="delete it")
    prune.set_defaults(run=_prune)
    progress = commands.add_parser(
        "progress", help="how far a run is, over all its jobs, on whatever machines they are"
    )
    progress.add_argument("store", type=Path, help="results/<model>")
    progress.add_argument("--once", action="store_true", help="say it once; otherwise until the run is complete")
    progress.set_defaults(run=_progress)
    bench = commands.add_parser("benchmark", help="time this engine beside fair-esm, transformers and esm-cpp")
    shapes = "shapes, with random weights"
    bench.add_argument("--model", nargs="+", default=["esm2_t6_8M_UR50D"], choices=MODELS, help=shapes)
    bench.add_argument("--checkpoint", type=Path, help="a fair-esm .pt with real weights, instead of --model")
    bench.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    bench.add_argument("--fasta", type=Path, help="real sequences; without it, random ones of --length")
    bench.add_argument("--length", type=int, default=300)
    bench.add_argument("--residues", type=int, default=100_000, help="how many residues, at most")
    bench.add_argument("--rounds", type=int, default=5)
    bench.add_argument("--threads", type=int, default=os.cpu_count())
    bench.add_argument("--out", type=Path, default=Path("benchmark"), help="folder for the table and the figure")
    bench.set_defaults(run=_benchmark)
    return parser


# Each command's room is imported only once it is asked for: torch and DuckDB take seconds.


def _verify(given: argparse.Namespace) -> int:
    from lengthwise.maintain.verify_command import run

    return run(given.store, given.quick, given.repair)


def _prune(given: argparse.Namespace) -> int:
    from lengthwise.maintain.prune import run

    return run(given.store, given.delete)


def _progress(given: argparse.Namespace) -> int:
    from lengthwise.maintain.progress_command import run

    return run(given.store, given.once)


def _benchmark(given: argparse.Namespace) -> int:
    from lengthwise.benchmark.command import run

    return run(given)


if __name__ == "__main__":
    sys.exit(main())
