"""What runs beside the workflow: `python -m lengthwise verify results/demo`."""

import argparse
import sys
import warnings
from pathlib import Path

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code, 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m lengthwise", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify_parser = commands.add_parser("verify", help="check a store's weights, and every byte that its datasets use")
    verify_parser.add_argument("store", type=Path, help="results/<model>")
    return verify(parser.parse_args(arguments).store)


def verify(store: Path) -> int:
    """Check the checkpoint against its receipt, and each dataset's shards; everything that is wrong gets a line."""
    from lengthwise import weights
    from lengthwise.files import read_json
    from lengthwise.reading import Dataset

    if not (store / "weights.json").exists():
        print(f"lengthwise: error: {store}: no store here (no weights.json); give results/<model>", file=sys.stderr)
        return 1
    checks = {"weights": lambda: weights.verify(read_json(store / "weights.json"))}
    for manifest in sorted(store.glob("datasets/*/manifest.json")):
        checks[f"dataset {manifest.parent.name}"] = lambda folder=manifest.parent: Dataset(folder).verify()
    wrong = 0
    for name, check in checks.items():
        try:
            with warnings.catch_warnings(action="ignore"):  # random weights are no damage
                sequences = check()
        except LengthwiseError as error:
            print(f"lengthwise: error: {error}", file=sys.stderr)
            wrong += 1
        else:
            print(f"{name}: good" + (f", {sequences:,} sequences" if sequences is not None else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
