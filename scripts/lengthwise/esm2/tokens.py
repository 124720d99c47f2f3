"""Tokens: the numbers that ESM-2 reads for residues and for BOS and EOS."""

import numpy as np

# The order of fair-esm's "ESM-1b" alphabet, which ESM-2 uses: four specials, then these letters. Its last two
# letters, '.' and '-', are alignment gaps, which no protein has: they are left out.
BOS, PAD, EOS, UNK = 0, 1, 2, 3
RESIDUES = b"LAGVSERTIDPKQNFYMHWCXBUZO"
VOCABULARY_SIZE = 33
STANDARD = b"ACDEFGHIKLMNPQRSTVWY"
_TOKEN_OF_BYTE = np.full(256, 255, dtype=np.uint8)
_TOKEN_OF_BYTE[np.frombuffer(RESIDUES, dtype=np.uint8)] = np.arange(4, 4 + len(RESIDUES), dtype=np.uint8)


def tokenize(sequence: bytes) -> np.ndarray:
    """The tokens of one sequence, BOS and EOS included.

    Parameters
    ----------
    sequence
        L residues, normalised.

    Returns
    -------
    uint8 array of L + 2 tokens: exactly one per residue, never a special in between.

    Raises
    ------
    ValueError
        A byte is not a residue: the sequence was not normalised.
    """
    tokens = np.empty(len(sequence) + 2, dtype=np.uint8)
    tokens[0], tokens[-1] = BOS, EOS
    tokens[1:-1] = _TOKEN_OF_BYTE[np.frombuffer(sequence, dtype=np.uint8)]
    if tokens.max() == 255:
        raise ValueError(f"not residues: {sequence.translate(None, RESIDUES)[:20]!r}")
    return tokens


def is_tokens(residues: bytes) -> bool:
    """Whether each byte is a residue, and so exactly one token."""
    codes = np.frombuffer(residues or RESIDUES, np.uint8)
    return (
        codes.min() >= ord("A") and codes.max() <= ord("Z") and b"J" not in residues
    )  # every capital but J is a residue
