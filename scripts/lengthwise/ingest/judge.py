"""Judging: whether a record is accepted or rejected, with the reason and the changes made to its letters."""

import string
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lengthwise.esm2.tokens import STANDARD, is_tokens
from lengthwise.ingest.digests import digest_all
from lengthwise.ingest.fasta import joined, joined_lines, refuse_another_file, split_headers, split_records
from lengthwise.ingest.normalize import ALL_X, Letters, normalize
from lengthwise.ingest.nucleotides import look_alike, suspects
from lengthwise.ingest.tables import RECORDS, SEQUENCES, STATUS, mostly_empty

NO_ID = "no_id"
TOO_LONG = "too_long"
TRUNCATED = "truncated"
LIKE_NUCLEOTIDES = "like_nucleotides"
_NON_LETTERS = bytes(set(range(256)) - set(string.ascii_letters.encode()))
_OTHER_CAPITALS = set(range(ord("A"), ord("Z") + 1)) - set(STANDARD)


@dataclass(frozen=True)
class Policy:
    """The policy for records that are not plain proteins; the config's keys of the same names explain the values."""

    letters: Letters = field(default_factory=Letters)
    long_policy: str = "full"
    max_residues: int = 1022  # of `skip` and `truncate`
    window_residues: int = 1022  # of `window`, and so is `overlap`
    overlap: int = 255
    duplicate_ids: str = "error"
    nucleotides: str = "refuse"
    strict: bool = False


@dataclass
class Judged:
    """The n records of a chunk, after judgement; a record rejected for its letters has an empty sequence."""

    ids: pa.Array
    descriptions: pa.Array
    residues: bytes  # all sequences, end to end
    bounds: np.ndarray  # [n + 1] of each sequence in `residues`
    digests: np.ndarray  # [n, 24] uint8
    lengths: np.ndarray  # [n] int32
    reasons: dict[int, str]  # of rejected records, by index
    changed: dict[int, list[str]]  # the changes, by index
    rare: Counter[int]  # rare residues
    letters: int  # ASCII letters of all records
    like_nucleotides: dict[int, int]  # letters of the records that look like nucleotides, by index
    full_lengths: dict[int, int]  # residues of the truncated records, by index

    def __post_init__(self) -> None:
        self.good = np.ones(len(self.ids), bool)
        self.good[list(self.reasons)] = False

    def records(self, first_no: int, accepted: np.ndarray) -> pa.RecordBatch:
        """Rows of `RECORDS`; good records that are not accepted are duplicates."""
        n = len(self.ids)
        status = np.where(self.good, np.where(accepted, 0, 1), 2).astype(np.int8)
        changes = {i: ",".join(names) for i, names in self.changed.items()}
        columns = [
            pa.array(np.arange(first_no, first_no + n)),
            self.ids,
            self.descriptions,
            self._digest_column(self.good),
            pa.array(self.lengths),
            pa.DictionaryArray.from_arrays(status, pa.array(STATUS)).cast(pa.string()),
            mostly_empty(self.reasons, n),
            mostly_empty(changes, n),
            pa.array(map(self.full_lengths.get, range(n)), pa.int32())
            if self.full_lengths
            else pa.nulls(n, pa.int32()),
        ]
        return pa.record_batch(columns, schema=RECORDS)

    def sequences(self) -> pa.RecordBatch:
        """Rows of `SEQUENCES`, one for each record."""
        bounds, residues = pa.py_buffer(self.bounds.astype(np.int32)), pa.py_buffer(self.residues)
        column = pa.Array.from_buffers(pa.binary(), len(self.ids), [None, bounds, residues])
        return pa.record_batch([self._digest_column(None), pa.array(self.lengths), column], schema=SEQUENCES)

    def _digest_column(self, valid: np.ndarray | None) -> pa.Array:
        bits = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
        return pa.Array.from_buffers(pa.binary(24), len(self.ids), [bits, pa.py_buffer(self.digests)])


def judge_chunk(fasta: Path, chunk: bytes, first_no: int, policy: Policy) -> Judged:
    """Decide which records of a chunk are accepted, and why the others are rejected.

    The rules in order: letters (`normalize`), length, a missing id. Records that look like nucleotides are counted and flagged.
    Only records with an unusual byte go through a Python loop.

    Parameters
    ----------
    fasta
        The file, named in errors.
    chunk
        Whole records, as `read_chunks` yields them.
    first_no
        The number of the first record.
    policy
        The policy for records that are not plain proteins.

    Raises
    ------
    LengthwiseError
        Another file seems to begin inside a record.
    """
    headers, lines, first = split_records(chunk)
    ids, descriptions = split_headers(headers)
    residues, line_bounds = joined(lines)
    bounds = line_bounds[first]
    lengths = np.diff(bounds).astype(np.int32)
    letters_of = {i: residues[bounds[i] : bounds[i + 1]] for i in suspects(residues, bounds)}
    normalized: dict[int, bytes] = {}
    reasons: dict[int, str] = {}
    changed: dict[int, list[str]] = {}
    rare: Counter[int] = Counter()
    letters = len(residues)
    for i in _with_unusual_bytes(residues, bounds):
        own_lines = lines[first[i] : first[i + 1]].to_pylist()
        raw = joined_lines(own_lines)
        sequence, changes, reason = normalize(raw, policy.letters)
        letters -= int(lengths[i])
        letters_of[i] = raw.translate(None, _NON_LETTERS)
        letters += len(letters_of[i])
        lengths[i], normalized[i] = len(sequence), b"" if reason else sequence
        if reason:
            reasons[i] = reason
            refuse_another_file(fasta, partial(int, first_no + i), b"\n" + b"\n".join(own_lines))
        if changes:
            changed[i] = changes
    like: dict[int, int] = {}
    if policy.nucleotides == "refuse":
        like = {i: len(own) for i, own in letters_of.items() if look_alike(own)}
    if policy.long_policy == "skip":
        for i in np.flatnonzero(lengths > policy.max_residues).tolist():
            reasons.setdefault(i, f"{TOO_LONG}: {lengths[i]} residues, more than max_residues = {policy.max_residues}")
    full_lengths: dict[int, int] = {}
    if policy.long_policy == "truncate":
        for i in sorted({*np.flatnonzero(lengths > policy.max_residues).tolist()} - reasons.keys()):
            sequence = normalized.get(i, residues[bounds[i] : bounds[i + 1]])[: policy.max_residues]
            if not sequence.strip(b"X"):
                reasons[i] = f"{ALL_X}: its first {policy.max_residues} residues are"
                continue
            full_lengths[i], lengths[i], normalized[i] = int(lengths[i]), len(sequence), sequence
            changed.setdefault(i, []).append(TRUNCATED)
    for i in np.flatnonzero(pc.binary_length(ids).to_numpy() == 0).tolist():
        reasons[i] = NO_ID
    for i in normalized:
        if i in reasons:
            changed.pop(i, None)
            full_lengths.pop(i, None)
        else:
            rare.update(normalized[i].translate(None, STANDARD))
    residues, bounds = _replaced(residues, bounds, normalized)
    digests = digest_all(residues, bounds)
    for i in like.keys() - reasons.keys():
        changed.setdefault(i, []).append(LIKE_NUCLEOTIDES)
    judged = Judged(
        ids, descriptions, residues, bounds, digests, lengths, reasons, changed, rare, letters, like, full_lengths
    )
    if not is_tokens(residues) or (np.diff(bounds) != lengths)[judged.good].any():
        raise RuntimeError("a residue would have no token of its own; please report this file")
    return judged


def _with_unusual_bytes(residues: bytes, bounds: np.ndarray) -> list[int]:
    """Indices of the records that are empty or hold a byte other than the twenty amino acids."""
    no_capitals = (np.frombuffer(residues, np.uint8) - ord("A") > ord("Z") - ord("A")).tobytes()
    found, edges = set(np.flatnonzero(np.diff(bounds) == 0).tolist()), bounds.tolist()
    for text, byte in [(no_capitals, 1), *((residues, letter) for letter in _OTHER_CAPITALS)]:
        at = text.find(byte)
        while at >= 0:
            i = bisect_right(edges, at) - 1
            found.add(i)
            at = text.find(byte, edges[i + 1])
    return sorted(found)


def _replaced(residues: bytes, bounds: np.ndarray, sequences: dict[int, bytes]) -> tuple[bytes, np.ndarray]:
    """Replace the sequences of some records; returns all residues and their new bounds."""
    parts, end, lengths = [], 0, np.diff(bounds)
    for i, sequence in sorted(sequences.items()):
        parts += [residues[end : bounds[i]], sequence]
        end, lengths[i] = bounds[i + 1], len(sequence)
    return b"".join([*parts, residues[end:]]), np.concatenate([[0], np.cumsum(lengths)])
