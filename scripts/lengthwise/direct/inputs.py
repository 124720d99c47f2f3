"""What may be embedded: strings, pairs, mappings, Biopython's records, a FASTA file. All become records, accepted or rejected."""

import os
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.digests import digest
from lengthwise.ingest.fasta import joined_lines, place, read_chunks
from lengthwise.ingest.judge import LIKE_NUCLEOTIDES, Policy, judge_chunk
from lengthwise.ingest.normalize import normalize
from lengthwise.ingest.nucleotides import NucleotideCounter, look_alike
from lengthwise.ingest.repeats import RepeatFinder, quoted

Item = TypeVar("Item")
# Records that are judged at once.
_AT_ONCE = 1_000
_NON_LETTERS = bytes(set(range(256)) - set(string.ascii_letters.encode()))
_ACCEPTED = "a list of strings, a mapping of ids to strings, pairs (id, string), Biopython's records, or the path of a FASTA file"


@dataclass(frozen=True, slots=True)
class Record:
    """One sequence that was given. It is accepted if it has no reason."""

    number: int  # from 0
    id: str
    residues: bytes  # normalised; empty if rejected
    changes: tuple[str, ...] = ()  # of `lengthwise.ingest.normalize`
    reason: str = ""


class Input:
    """The sequences that were given, as records, by the workflow's rules.

    Parameters
    ----------
    given
        As for `lengthwise.embed`.
    nucleotides
        What sequences that look like nucleotides do: ``refuse`` raises, ``allow`` embeds them.

    Raises
    ------
    LengthwiseError
        It is nothing that has sequences.
    """

    def __init__(self, given: Any, nucleotides: str = "refuse"):
        self.policy, self.fasta = Policy(nucleotides=nucleotides), _fasta_path(given)
        if self.fasta is None and not isinstance(given, Iterable):
            raise LengthwiseError(f"{type(given).__name__} is nothing to embed; give {_ACCEPTED}")
        self.given = given
        self.can_repeat = self.fasta is not None or not isinstance(given, Iterator)

    def chunks(self) -> Iterator[list[Record]]:
        """The records in order, some at a time.

        Raises
        ------
        LengthwiseError
            The file cannot be read or is not FASTA; an item has no sequence; one id has two different sequences; most letters
            are in sequences that look like nucleotides (raised after the last record, or after ten million such letters).
        """
        variants = _Variants(self.describe)
        for chunk in self._of_fasta(self.fasta) if self.fasta else self._of_items():
            variants.check(chunk)
            yield chunk

    def describe(self, record: Record) -> str:
        """Where a record is, in words."""
        if self.fasta:
            where = f"{self.fasta}: record {record.number + 1} ({place(self.fasta, record.number + 1)})"
        else:
            where = f"sequence {record.number} (counted from 0)"
        return where if record.id == str(record.number) else f"{where}, {quoted(record.id)}"

    def _of_fasta(self, fasta: Path) -> Iterator[list[Record]]:
        before, nucleotides = 0, NucleotideCounter(fasta, partial(place, fasta))
        for chunk in read_chunks(fasta):
            judged = judge_chunk(fasta, chunk, before + 1, self.policy)
            nucleotides.count(judged.letters, judged.like_nucleotides, before + 1)
            bounds, ids = judged.bounds.tolist(), judged.ids.to_pylist()
            yield [
                Record(
                    before + i,
                    record_id,
                    b"" if i in judged.reasons else judged.residues[bounds[i] : bounds[i + 1]],
                    tuple(judged.changed.get(i, ())),
                    judged.reasons.get(i, ""),
                )
                for i, record_id in enumerate(ids)
            ]
            before += len(ids)
        nucleotides.decide()

    def _of_items(self) -> Iterator[list[Record]]:
        nucleotides = NucleotideCounter("the sequences", lambda number: f"sequence {number - 1}")
        for chunk in _some(enumerate(_named(self.given))):
            records, letters, like = [], 0, {}
            for i, (number, (record_id, text)) in enumerate(chunk):
                raw = joined_lines(text.encode(errors="backslashreplace").split(b"\n"))
                residues, changes, reason = normalize(raw, self.policy.letters)
                own = raw.translate(None, _NON_LETTERS)
                letters += len(own)
                if self.policy.nucleotides == "refuse" and look_alike(own):
                    like[i] = len(own)
                    changes = changes if reason else [*changes, LIKE_NUCLEOTIDES]
                records.append(Record(number, record_id, b"" if reason else residues, tuple(changes), reason))
            nucleotides.count(letters, like, records[0].number + 1)
            yield records
        nucleotides.decide()


class _Variants:
    """Refuses one id for two different sequences, at sixteen bytes a record."""

    def __init__(self, describe: Callable[[Record], str]):
        self.describe, self.ids, self.pairs = describe, RepeatFinder(), RepeatFinder()

    def check(self, records: Sequence[Record]) -> None:
        ids = [digest(record.id.encode(errors="backslashreplace")) for record in records]
        pairs = [digest(name + digest(record.residues)) for name, record in zip(ids, records, strict=True)]
        conflicts = self.ids.find(_words(ids)) & ~self.pairs.find(_words(pairs))
        for i in np.flatnonzero(conflicts)[:1].tolist():
            raise LengthwiseError(
                f"{self.describe(records[i])}: an earlier one has the same id and another sequence; rename one of them"
            )


def _words(digests: list[bytes]) -> np.ndarray:
    """The first eight bytes of digests [n] uint64."""
    return np.frombuffer(b"".join(one[:8] for one in digests), np.uint64)


def _fasta_path(given: Any) -> Path | None:
    """The path of a FASTA file, if that is what was given.

    Raises
    ------
    LengthwiseError
        There is no such file.
    """
    if not isinstance(given, str | os.PathLike):
        return None
    path = Path(os.path.expanduser(given))
    if isinstance(given, str) and not os.path.exists(path):
        shown = given if len(given) <= 40 else f"{given[:37]}..."
        raise LengthwiseError(f"there is no file {shown!r}; if it is one sequence, give it in a list: [{shown!r}]")
    if path.is_dir():
        raise LengthwiseError(f"{path} is a folder; give one FASTA file")
    return path


def _some(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(islice(items, _AT_ONCE)):
        yield chunk


def _named(given: Any) -> Iterator[tuple[str, str]]:
    """(id, raw sequence) of each item. A string alone has its number for an id."""
    if hasattr(given, "items"):  # a mapping, or a pandas Series
        for number, (record_id, item) in enumerate(given.items()):
            yield str(record_id), _text(number, item)
        return
    for number, item in enumerate(given):
        if hasattr(item, "seq"):  # Biopython's SeqRecord
            yield str(item.id), _text(number, item.seq)
        elif isinstance(item, tuple | list) and len(item) == 2:
            yield str(item[0]), _text(number, item[1])
        else:
            yield str(number), _text(number, item)


def _text(number: int, item: Any) -> str:
    """The raw sequence of an item."""
    if isinstance(item, str):
        return item
    if type(item).__module__.startswith("Bio."):  # a Seq
        try:
            return str(item)
        except ValueError as error:  # of one whose length alone is known
            raise LengthwiseError(f"sequence {number} (counted from 0): {error}") from error
    raise LengthwiseError(
        f"sequence {number} (counted from 0) is {type(item).__name__}, and no string; give {_ACCEPTED}"
    )
