"""Residues: ESM-2's tokens, what is done to a sequence before it is embedded, and its digest."""

import base64
import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

# The order of fair-esm's "ESM-1b" alphabet, which ESM-2 uses: four specials, then these letters. Its last two letters,
# '.' and '-', are alignment gaps, which no protein has, and are left out on purpose.
BOS, PAD, EOS, UNK = 0, 1, 2, 3
RESIDUES = b"LAGVSERTIDPKQNFYMHWCXBUZO"
VOCABULARY_SIZE = 33

STANDARD = b"ACDEFGHIKLMNPQRSTVWY"
# ESM-2's own tokens, kept and counted: any, aspartate or asparagine, selenocysteine, glutamate or glutamine, pyrrolysine.
RARE = b"XBUZO"

_TOKEN_OF_BYTE = np.full(256, 255, dtype=np.uint8)
_TOKEN_OF_BYTE[np.frombuffer(RESIDUES, dtype=np.uint8)] = np.arange(4, 4 + len(RESIDUES), dtype=np.uint8)

STOP_STRIPPED = "stop_stripped"

EMPTY = "empty"
ALL_X = "all_x"
INVALID_BYTE = "invalid_byte"

REJECT = "reject"
_LOWER = RESIDUES.lower() + b"j"


@dataclass(frozen=True)
class Letters:
    """What happens to letters that are no residue of ESM-2: each is mended as its first value here says, or `reject`."""

    lowercase: str = "uppercase"
    j: str = "to_x"
    stop: str = REJECT  # inside a sequence; or to_x
    gaps: str = REJECT  # or remove
    spaces: str = "remove"
    digits: str = REJECT  # or remove

    @cached_property
    def mended(self) -> dict[str, bytes]:
        """{change: the bytes that it mends}, in the order in which changes are listed."""
        rules = {
            "uppercased": (self.lowercase, _LOWER if self.j != REJECT else _LOWER.replace(b"j", b"")),
            "j_to_x": (self.j, b"Jj" if self.lowercase != REJECT else b"J"),
            "stop_to_x": (self.stop, b"*"),
            "gaps_removed": (self.gaps, b"-."),
            "spaces_removed": (self.spaces, b" "),
            "digits_removed": (self.digits, b"0123456789"),
        }
        return {change: taken for change, (rule, taken) in rules.items() if rule != REJECT}

    @cached_property
    def removed(self) -> bytes:
        return b"".join(taken for change, taken in self.mended.items() if change.endswith("_removed"))

    @cached_property
    def kept(self) -> bytes:
        """Every byte that rejects no record."""
        return RESIDUES + b"".join(self.mended.values())


# From what is kept to what is embedded.
_MENDING = bytes.maketrans(_LOWER + b"J*", _LOWER.upper().replace(b"J", b"X") + b"XX")


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


def is_tokens(residues: bytes) -> bool:
    """Whether each byte is a residue, and so exactly one token: L of them are then L + 2 tokens."""
    codes = np.frombuffer(residues or RESIDUES, np.uint8)
    return codes.min() >= ord("A") and codes.max() <= ord("Z") and b"J" not in residues  # every other capital is one


def normalize(raw: bytes, letters: Letters = Letters()) -> tuple[bytes, list[str], str]:
    """Bring a raw sequence into the form that is embedded.

    Parameters
    ----------
    raw
        The sequence without its line ends.
    letters
        What is mended, and what rejects the record.

    Returns
    -------
    (sequence, changes, reason)
        `changes` lists what was mended: `stop_stripped` (one trailing ``*``) and the names in `Letters.mended`. `reason` is
        empty, or says why the record is rejected: `empty`, `all_x`, or `invalid_byte` with the byte and its 1-based
        position in the raw sequence; such a record has no changes.
    """
    end = len(raw.rstrip(letters.removed))  # a space that is removed anyway may stand after the stop
    stopped = raw[:end].endswith(b"*")
    if stopped:
        raw = raw[: end - 1] + raw[end:]
    if rest := raw.lstrip(letters.kept):
        byte = rest[0]
        shown = f"'{chr(byte)}' " if 32 < byte < 127 else ""
        return raw, [], f"{INVALID_BYTE}: {shown}(0x{byte:02X}) at position {len(raw) - len(rest) + 1}"
    sequence = raw.translate(_MENDING, letters.removed)
    if not sequence:
        return sequence, [], EMPTY
    if not sequence.strip(b"X"):
        return sequence, [], ALL_X
    changes = [change for change, taken in letters.mended.items() if len(raw.translate(None, taken)) < len(raw)]
    if stopped:
        changes.insert(changes[:1] == ["uppercased"], STOP_STRIPPED)
    return sequence, changes, ""


def digest(sequence: bytes) -> bytes:
    """GA4GH refget's sha512t24u of an uppercase sequence: the first 24 bytes of its SHA-512.

    Source: GA4GH refget v2, https://samtools.github.io/hts-specs/refget.html
    """
    return hashlib.sha512(sequence).digest()[:24]


def digests(residues: bytes, bounds: np.ndarray) -> np.ndarray:
    """The digests of sequences that lie end to end between these bounds, as uint8 of n rows and 24 columns."""
    new, long = hashlib.sha512().copy, []  # a copy of what is there is made faster than a new one
    for start, stop in pairwise(bounds.tolist()):
        sha512 = new()
        sha512.update(residues[start:stop])
        long.append(sha512.digest())
    long = b"".join(long)
    return np.ascontiguousarray(np.frombuffer(long, np.uint8).reshape(-1, 64)[:, :24])


def digest_name(raw: bytes) -> str:
    """A digest as people write it: ``SQ.`` and base64url."""
    return "SQ." + base64.urlsafe_b64encode(raw).decode()
