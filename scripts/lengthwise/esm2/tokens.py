"""Tokens: the numbers that ESM-2 reads for residues and for BOS and EOS."""

import numpy as np

# The order of fair-esm's "ESM-1b" alphabet, which ESM-2 uses: four specials, then these letters. Its last two
# letters, '.' and '-', are alignment gaps, which no protein has: they are left out.
BOS, PAD, EOS, UNK = 0, 1, 2, 3
RESIDUES = b"LAGVSERTIDPKQNFYMHWCXBUZO"
VOCABULARY_SIZE = 33
STANDARD = b"ACDEFGHIKLMNPQRSTVWY"
VOCABULARY = ("<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES.decode(), ".", "-", "<null_1>", "<mask>")
_FIRST_RESIDUE, _NO_TOKEN = 4, 255
_BOS, _EOS = bytes([BOS]), bytes([EOS])  # as bytes between sequences: no residues, and tokens of themselves
_TOKEN_OF_BYTE = bytes(
    {BOS: BOS, EOS: EOS, **{residue: _FIRST_RESIDUE + i for i, residue in enumerate(RESIDUES)}}.get(byte, _NO_TOKEN)
    for byte in range(256)
)


def tokenize(*sequences: bytes) -> np.ndarray:
    """The tokens of sequences end to end, BOS and EOS of each included.

    Parameters
    ----------
    sequences
        Residues, normalised; L of them in each.

    Returns
    -------
    uint8 array of L + 2 tokens for each sequence: exactly one per residue, never a special in between.

    Raises
    ------
    ValueError
        A byte is not a residue: a sequence was not normalised.
    """
    joined = bytearray(_BOS + (_EOS + _BOS).join(sequences) + _EOS)
    tokens = np.frombuffer(joined.translate(_TOKEN_OF_BYTE), dtype=np.uint8)
    n_specials = np.count_nonzero(tokens < _FIRST_RESIDUE)
    if tokens.max() == _NO_TOKEN or n_specials > 2 * len(sequences):
        not_residues = filter(None, (sequence.translate(None, RESIDUES) for sequence in sequences))
        raise ValueError(f"not residues: {next(not_residues)[:20]!r}")
    return tokens


def is_tokens(residues: bytes) -> bool:
    """Whether each byte is a residue, and so exactly one token."""
    codes = np.frombuffer(residues or RESIDUES, np.uint8)
    return (
        codes.min() >= ord("A") and codes.max() <= ord("Z") and b"J" not in residues
    )  # every capital but J is a residue
