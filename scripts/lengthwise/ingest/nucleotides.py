"""Does a file look like nucleotides? All its records say so together, whatever their order, line widths and compression."""

from pathlib import Path

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.fasta import place

# A record looks like nucleotides if at most one letter in twenty is another one, of some that are spread over it at most one,
# and three bases are there: some proteins are little but two amino acids in turn.
_NUCLEOTIDES, _BASES, _ONE_IN, _SPREAD = b"ACGTUNacgtun", set(b"ACGTU"), 20, 6

# A file is refused if such records have most of its letters, and so many; or of however many letters, as many as this, which
# is known before a large file is read to its end.
_FEWEST_NUCLEOTIDES, _MOST_NUCLEOTIDES = 60, 10**7

_IS_NUCLEOTIDE = np.isin(np.arange(256), list(_NUCLEOTIDES)).astype(np.int8)


def suspects(residues: bytes, bounds: np.ndarray) -> list[int]:
    """The records of which some letters do not rule out that they look like nucleotides."""
    lengths = np.diff(bounds)
    long = np.flatnonzero(lengths >= _ONE_IN)
    codes, begin, lengths = np.frombuffer(residues, np.uint8), bounds[long], lengths[long]
    found = sum(_IS_NUCLEOTIDE[codes[begin + lengths * k // (_SPREAD + 1)]] for k in range(1, _SPREAD + 1))
    return long[found >= _SPREAD - 1].tolist()


def look_alike(letters: bytes) -> bool:
    """Whether a record of these letters looks like nucleotides."""
    n = len(letters)
    return (
        n >= _ONE_IN
        and sum(letters[n * k // (_SPREAD + 1)] in _NUCLEOTIDES for k in range(1, _SPREAD + 1)) >= _SPREAD - 1
        and len(letters.translate(None, _NUCLEOTIDES)) * _ONE_IN <= n
        and len(_BASES.intersection(letters.upper())) >= 3
    )


class Nucleotides:
    """The letters of a file, and of those of its records that look like nucleotides: wherever they are, the same counts."""

    def __init__(self, fasta: Path):
        self.fasta, self.first, self.letters, self.like = fasta, 0, 0, 0

    def count(self, letters: int, like: dict[int, int], first_no: int) -> None:
        """Of the next records, from this number on, all letters, and {place: letters} of those that look like nucleotides."""
        self.letters += letters
        self.like += sum(like.values())
        if like and not self.first:
            self.first = first_no + min(like)
        if self.like >= _MOST_NUCLEOTIDES:
            self._refuse()

    def decide(self) -> None:
        """After the last record: raise if the file looks like nucleotides."""
        if self.like >= _FEWEST_NUCLEOTIDES and 2 * self.like > self.letters:
            self._refuse()

    def _refuse(self) -> None:
        raise LengthwiseError(
            f"{self.fasta}: looks like nucleotides: {self.like:,} of {self.letters:,} letters are in records of almost nothing "
            f"but A, C, G, T, U and N, the first at {place(self.fasta, self.first)}; translate it to proteins, or set "
            "nucleotides: allow"
        )
