"""What is done to the letters of a record before it is embedded; each byte that is no residue is judged here."""

from dataclasses import dataclass
from functools import cached_property

from lengthwise.esm2.tokens import RESIDUES

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
