"""Errors of this engine and of fair-esm's own, by compute type and storage type: the table of docs/accuracy.md.

``python tests/accuracy_table.py MODEL [--fasta FILE] [--residues N] [--kind KIND ...]``
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from Bio import SeqIO

import checkpoints
from lengthwise.esm2.accuracy import Reference, rms
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.reference import reference_rows
from lengthwise.esm2.shapes import MODELS

CPU = torch.device("cpu")
SHOWN = ("flat", "q,k x 4", "q,k x 6, others x 3, massive 3,000")
STANDARD = set("ACDEFGHIKLMNPQRSTVWY")


def choose(fasta: Path, residues: int) -> list[bytes]:
    """Proteins of standard residues, in the file's order, cut so that there are so many residues in all."""
    found: list[bytes] = []
    for record in SeqIO.parse(fasta, "fasta"):
        sequence = str(record.seq).upper()[: residues - sum(map(len, found))]
        if len(sequence) >= 10 and set(sequence) <= STANDARD:
            found.append(sequence.encode())
    return sorted(found, key=len)


def table_rows(path: Path, layer: int, sequences: list[bytes]) -> Iterator[list[str]]:
    """Compute type; the typical channel's error as a share of its spread: fair-esm, and this engine by storage type."""
    truth = reference_rows(path, CPU, torch.float64, sequences, [layer])[layer]
    reference = Reference.of(truth, None, 1.0)
    right = reference.right("residue")

    def share(rows: np.ndarray) -> str:
        percent = 100 * reference.share(rms(rows - right))
        return f"{float(f'{percent:.2g}'):g} %"

    for precision, dtype in DTYPES.items():
        theirs = reference_rows(path, CPU, dtype, sequences, [layer])[layer]
        (ours,) = Engine(path, CPU, precision, Output((layer,), ("residue",), "float32")).embed([sequences])
        rows = torch.from_numpy(ours.arrays[f"layer_{layer}"])
        stored = [share(rows.to(stored_dtype).double().numpy()) for stored_dtype in DTYPES.values()]
        yield [precision, share(np.concatenate([one[1:-1] for one in theirs])), *stored]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--fasta", type=Path, default=Path("config/example.fasta"))
    parser.add_argument("--residues", type=int, default=1_000)
    parser.add_argument("--kind", nargs="+", choices=checkpoints.KINDS, default=SHOWN)
    args = parser.parse_args()
    sequences, shape = choose(args.fasta, args.residues), MODELS[args.model]
    print(f"{args.model}, {' + '.join(str(len(one)) for one in sequences)} residues of {args.fasta}\n")
    print("| checkpoint | computed in | fair-esm | stored as " + " | stored as ".join(DTYPES) + " |")
    print("|---|---|" + "--:|" * (1 + len(DTYPES)))
    for kind in args.kind:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            checkpoints.write(path, shape, kind)
            for row in table_rows(path, shape.num_layers, sequences):
                print("| " + " | ".join([kind, *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
