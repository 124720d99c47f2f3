"""Residues: ESM-2's tokens, what is done to a sequence before it is embedded, and its digest."""

import base64
import hashlib

import numpy as np

# The order of fair-esm's "ESM-1b" alphabet, which ESM-2 uses: four specials, then these letters. Its last two letters,
# '.' and '-', are alignment gaps, which no protein has, and are left out on purpose.
BOS, PAD, EOS, UNK = 0, 1, 2, 3
RESIDUES = b"LAGVSERTIDPKQNFYMHWCXBUZO"
VOCABULARY_SIZE = 33

_TOKEN_OF_BYTE = np.full(256, 255, dtype=np.uint8)
_TOKEN_OF_BYTE[np.frombuffer(RESIDUES, dtype=np.uint8)] = np.arange(4, 4 + len(RESIDUES), dtype=np.uint8)

UPPERCASED = "uppercased"
STOP_STRIPPED = "stop_stripped"
J_TO_X = "j_to_x"

EMPTY = "empty"
INVALID_BYTE = "invalid_byte"


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
        A byte that is no residue: `normalize` was skipped.
    """
    tokens = np.empty(len(sequence) + 2, dtype=np.uint8)
    tokens[0], tokens[-1] = BOS, EOS
    tokens[1:-1] = _TOKEN_OF_BYTE[np.frombuffer(sequence, dtype=np.uint8)]
    if tokens.max() == 255:
        raise ValueError(f"not residues: {sequence.translate(None, RESIDUES)[:20]!r}")
    return tokens


def normalize(raw: bytes) -> tuple[bytes, list[str], str]:
    """Bring a raw sequence into the form that is embedded.

    Returns
    -------
    (sequence, changes, reason)
        `changes` lists what was done: `uppercased`, `stop_stripped` (one trailing ``*``), `j_to_x` (J, leucine or
        isoleucine, has no ESM-2 token). `reason` is empty, or says why the record is rejected: `empty`, or
        `invalid_byte` with the 1-based position in the raw sequence.
    """
    changes = []
    sequence = raw.upper()
    if sequence != raw:
        changes.append(UPPERCASED)
    if sequence.endswith(b"*"):
        sequence = sequence[:-1]
        changes.append(STOP_STRIPPED)
    if b"J" in sequence:
        sequence = sequence.replace(b"J", b"X")
        changes.append(J_TO_X)
    if not sequence:
        return sequence, changes, EMPTY
    if strangers := sequence.translate(None, RESIDUES):
        byte = strangers[0]
        shown = f"'{chr(byte)}' " if 32 < byte < 127 else ""
        return sequence, changes, f"{INVALID_BYTE}: {shown}(0x{byte:02X}) at position {sequence.index(byte) + 1}"
    return sequence, changes, ""


def digest(sequence: bytes) -> bytes:
    """GA4GH refget's sha512t24u of an uppercase sequence: the first 24 bytes of its SHA-512.

    Source: GA4GH refget v2, https://samtools.github.io/hts-specs/refget.html
    """
    return hashlib.sha512(sequence).digest()[:24]


def digest_name(raw: bytes) -> str:
    """A digest as people write it: ``SQ.`` and base64url."""
    return "SQ." + base64.urlsafe_b64encode(raw).decode()
