"""Sequences for the benchmark."""

from pathlib import Path

import numpy as np

from lengthwise.esm2.tokens import RESIDUES
from lengthwise.ingest.normalize import normalize


def read_fasta(path: Path) -> list[bytes]:
    """Normalised sequences of a FASTA file without rejected ones. fair-esm reads the file: it is always installed here."""
    from esm.data import FastaBatchedDataset

    normalized = (normalize(sequence.encode()) for sequence in FastaBatchedDataset.from_file(path).sequence_strs)
    return [sequence for sequence, _, reason in normalized if not reason]


def random_sequences(length: int, residues: int, seed: int = 0) -> list[bytes]:
    """Random proteins of one length, about `residues` residues in total and one protein at least."""
    letters = np.frombuffer(RESIDUES[:20], np.uint8)
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.choice(letters, (max(1, residues // length), length))
    return [sequence.tobytes() for sequence in drawn]
