"""Commands beside the workflow: `python -m lengthwise verify results/demo`, `python -m lengthwise benchmark`."""

import argparse
import math
import os
import sys
from pathlib import Path

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import MODELS
from lengthwise.system.extras import named_extras
from lengthwise.system.logging import error_line


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code, 1 after an error.

    Parameters
    ----------
    arguments
        The command line without the program's name; None takes `sys.argv`.
    """
    options = _parser().parse_args(arguments)
    try:
        with named_extras():
            return options.run(options)
    except (LengthwiseError, OSError) as error:
        print(error_line(error), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lengthwise", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check a store's weights, and every byte that its datasets use")
    verify.add_argument("store", type=Path, help="results/<model>")
    depth = verify.add_mutually_exclusive_group()
    depth.add_argument("--full", action="store_false", dest="quick", help="read every byte (default)")
    depth.add_argument("--quick", action="store_true", help="check sizes, headers and tables, but read no embeddings")
    verify.add_argument(
        "--repair", action="store_true", help="move damaged files aside, so that the next run makes them again"
    )
    verify.set_defaults(quick=False, run=_verify)
    prune = commands.add_parser("prune", help="list the files of a store that no dataset uses")
    prune.add_argument("store", type=Path, help="results/<model>")
    prune.add_argument("--delete", action="store_true", help="delete these files")
    prune.set_defaults(run=_prune)
    progress = commands.add_parser("progress", help="show the progress of a run over all its jobs and machines")
    progress.add_argument("store", type=Path, help="results/<model>")
    progress.add_argument("--once", action="store_true", help="print it once; without this, until the run is complete")
    progress.set_defaults(run=_progress)
    info = commands.add_parser("info", help="print versions, device and a store's state, to report a problem with")
    info.add_argument("store", type=Path, nargs="?", help="results/<model>")
    info.set_defaults(run=_info)
    bench = commands.add_parser("benchmark", help="time this engine beside fair-esm, transformers and esm-cpp")
    model_help = "model sizes to time, with random weights"
    bench.add_argument("--model", nargs="+", default=["esm2_t6_8M_UR50D"], choices=MODELS, help=model_help)
    bench.add_argument("--checkpoint", type=Path, help="a fair-esm .pt file with real weights, instead of --model")
    bench.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    bench.add_argument("--fasta", type=Path, help="real sequences; without it, random sequences of --length residues")
    length_help = "lengths of random sequences; at the first, every engine and precision is measured"
    bench.add_argument("--length", type=int, nargs="+", default=[300], help=length_help)
    residues_help = "most residues that an engine embeds at each length (default: 100,000, on a GPU 20,000,000)"
    bench.add_argument("--residues", type=int, help=residues_help)
    seconds_help = "most seconds of an engine at each length: it embeds fewer residues (default: no limit)"
    bench.add_argument("--seconds", type=float, default=math.inf, help=seconds_help)
    minutes_help = "most minutes of the whole run: what would begin later is left out (default: no limit)"
    bench.add_argument("--minutes", type=float, default=math.inf, help=minutes_help)
    bench.add_argument("--rounds", type=int, default=5)
    bench.add_argument("--threads", type=int, default=os.cpu_count())
    bench.add_argument(
        "--out", type=Path, default=Path("benchmark"), help="folder for tables and figures; rows too, for a while"
    )
    emulated_help = "time types too that the device has no instructions for (slower than float32)"
    bench.add_argument("--emulated", action="store_true", help=emulated_help)
    esm_cpp_help = "virtual environment with esm-cpp (default: benchmark/esm-cpp); the command says how to make it"
    bench.add_argument("--esm-cpp", type=Path, default=Path("benchmark/esm-cpp"), help=esm_cpp_help)
    bench.set_defaults(run=_benchmark)
    return parser


# Each command imports its room itself: torch and DuckDB take seconds to import.


def _verify(options: argparse.Namespace) -> int:
    from lengthwise.maintain.verify_command import run

    return run(options.store, options.quick, options.repair)


def _prune(options: argparse.Namespace) -> int:
    from lengthwise.maintain.prune import run

    return run(options.store, options.delete)


def _progress(options: argparse.Namespace) -> int:
    from lengthwise.maintain.progress_command import run

    return run(options.store, options.once)


def _info(options: argparse.Namespace) -> int:
    from lengthwise.maintain.info import run

    return run(options.store)


def _benchmark(options: argparse.Namespace) -> int:
    from lengthwise.benchmark.command import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
