"""Normalisation: each byte of a raw sequence is kept, changed, removed, or rejects its record (`Letters`)."""

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
    """The policy for bytes that are not residues of ESM-2: the change that the key's value names, or `reject`."""

    lowercase: str = "uppercase"
    j: str = "to_x"
    stop: str = REJECT  # inside a sequence; or to_x
    gaps: str = REJECT  # or remove
    spaces: str = "remove"
    digits: str = REJECT  # or remove

    @cached_property
    def changed_bytes(self) -> dict[str, bytes]:
        """{change: the bytes it applies to}, in the order in which a record lists its changes."""
        rules = {
            "uppercased": (self.lowercase, _LOWER if self.j != REJECT else _LOWER.replace(b"j", b"")),
            "j_to_x": (self.j, b"Jj" if self.lowercase != REJECT else b"J"),
            "stop_to_x": (self.stop, b"*"),
            "gaps_removed": (self.gaps, b"-."),
            "spaces_removed": (self.spaces, b" "),
            "digits_removed": (self.digits, b"0123456789"),
        }
        return {change: affected for change, (rule, affected) in rules.items() if rule != REJECT}

    @cached_property
    def removed(self) -> bytes:
        return b"".join(affected for change, affected in self.changed_bytes.items() if change.endswith("_removed"))

    @cached_property
    def kept(self) -> bytes:
        """Every byte that does not reject its record."""
        return RESIDUES + b"".join(self.changed_bytes.values())


# From a kept byte to the embedded residue.
_TO_RESIDUE = bytes.maketrans(_LOWER + b"J*", _LOWER.upper().replace(b"J", b"X") + b"XX")


def normalize(raw: bytes, letters: Letters = Letters()) -> tuple[bytes, list[str], str]:
    """Turn a raw sequence into the residues that are embedded, or say why it is rejected.

    Parameters
    ----------
    raw
        The sequence without its line ends.
    letters
        The policy for bytes that are not residues.

    Returns
    -------
    (sequence, changes, reason)
        `changes` lists the changes made: `stop_stripped` (one trailing ``*``) and the names in `Letters.changed_bytes`.
        `reason` is empty, or says why the record is rejected: `empty`, `all_x`, or `invalid_byte` with the byte and its
        1-based position in the raw sequence. A rejected record has no changes.
    """
    end = len(raw.rstrip(letters.removed))  # a space that is removed anyway may stand after the stop
    stopped = raw[:end].endswith(b"*")
    if stopped:
        raw = raw[: end - 1] + raw[end:]
    if invalid := first_invalid_byte(raw, letters):
        return raw, [], invalid
    sequence = raw.translate(_TO_RESIDUE, letters.removed)
    if not sequence:
        return sequence, [], EMPTY
    if not sequence.strip(b"X"):
        return sequence, [], ALL_X
    changes = [
        change for change, affected in letters.changed_bytes.items() if len(raw.translate(None, affected)) < len(raw)
    ]
    if stopped:
        changes.insert(changes[:1] == ["uppercased"], STOP_STRIPPED)
    return sequence, changes, ""


def first_invalid_byte(raw: bytes, letters: Letters) -> str:
    """The reason that names the first byte which rejects a record, with its 1-based position; empty if there is none."""
    rest = raw.lstrip(letters.kept)
    if not rest:
        return ""
    byte = rest[0]
    printable = f"'{chr(byte)}' " if 32 < byte < 127 else ""
    return f"{INVALID_BYTE}: {printable}(0x{byte:02X}) at position {len(raw) - len(rest) + 1}"
