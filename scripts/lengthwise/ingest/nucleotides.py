"""Nucleotides: refuse a file of DNA or RNA, whatever the order, line widths and compression of its records."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lengthwise.errors import LengthwiseError

# A record looks like nucleotides if at most one letter in _ONE_IN is another one, at most one of _SPREAD evenly spaced letters
# is another one, and it has three different bases (some proteins alternate two amino acids).
_NUCLEOTIDES, _BASES, _ONE_IN, _SPREAD = b"ACGTUNacgtun", set(b"ACGTU"), 20, 6
# A file is refused if such records hold most of its letters, and at least the first number; or as soon as they hold the
# second number, so that a large file is refused early.
_MIN_NUCLEOTIDES, _MOST_NUCLEOTIDES = 60, 10**7
_IS_NUCLEOTIDE = np.isin(np.arange(256), list(_NUCLEOTIDES)).astype(np.int8)


def suspects(residues: bytes, bounds: np.ndarray) -> list[int]:
    """Indices of the records whose evenly spaced letters look like nucleotides: a quick first test."""
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


class NucleotideCounter:
    """Counts the letters of a file, or of other records, and those in records that look like nucleotides.

    Parameters
    ----------
    source
        The file, or a word for the records, named in the error.
    place
        Returns in words where a record is, from its number, for the error.
    """

    def __init__(self, source: Path | str, place: Callable[[int], str]) -> None:
        self.source, self.place = source, place
        self.first, self.letters, self.like = 0, 0, 0

    def count(self, letters: int, like: dict[int, int], first_no: int) -> None:
        """Add a chunk of records.

        Parameters
        ----------
        letters
            All letters of the chunk.
        like
            {index in the chunk: letters} of the records that look like nucleotides.
        first_no
            The number of the chunk's first record.
        """
        self.letters += letters
        self.like += sum(like.values())
        if like and not self.first:
            self.first = first_no + min(like)
        if self.like >= _MOST_NUCLEOTIDES:
            self._refuse()

    def decide(self) -> None:
        """Raise LengthwiseError if the file looks like nucleotides; called after the last record."""
        if self.like >= _MIN_NUCLEOTIDES and 2 * self.like > self.letters:
            self._refuse()

    def _refuse(self) -> None:
        raise LengthwiseError(
            f"{self.source}: looks like nucleotides: {self.like:,} of {self.letters:,} letters are in records of almost nothing "
            f"but A, C, G, T, U and N, the first at {self.place(self.first)}; translate it to proteins, or set "
            "nucleotides: allow"
        )
