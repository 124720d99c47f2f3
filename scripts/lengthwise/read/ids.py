"""Ids: a dataset's, or those of a selection of its records, as a sequence; and the error of one that is not there."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from lengthwise.store.lookup import Index


class Ids(Sequence[str]):
    """Ids that are read when they are asked for: a list of ten million would take a gigabyte.

    Parameters
    ----------
    index
        The dataset's index.
    places
        The records' places in it.
    """

    def __init__(self, index: Index, places: range | np.ndarray):
        self._index, self.places = index, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> "Ids": ...

    def __getitem__(self, number: int | slice) -> "str | Ids":
        if isinstance(number, slice):
            return Ids(self._index, self.places[number])
        return self._index.id(self.place_of(number))

    def __iter__(self) -> Iterator[str]:
        return (self._index.id(int(place)) for place in self.places)

    def __contains__(self, record_id: object) -> bool:
        return isinstance(record_id, str) and self.place(record_id) is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        first = [repr(record_id) for record_id in self[:5]]
        return f"[{', '.join(first)}{', ...' if len(self) > 5 else ''}]"

    def __reduce__(self) -> tuple[type[list[str]], tuple[list[str]]]:
        return list, (list(self),)  # another process has no map of the index

    def place_of(self, number: int) -> int:
        """The place of the record of this number, from the end if it is negative."""
        if not isinstance(number, int | np.integer):
            raise TypeError(f"these are asked for by a number, and {number!r} is none")
        if not -len(self) <= number < len(self):
            raise IndexError(f"no record {number:,}: there are {len(self):,}, counted from 0")
        return int(self.places[number])

    def place(self, record_id: str) -> int | None:
        """The place of the first of these records with this id."""
        for place in self._index.find(record_id):
            if isinstance(self.places, range):
                if place in self.places:
                    return place
            elif place in self._sorted[(at := self._sorted.searchsorted(place)) : at + 1]:
                return place
        return None

    def array(self) -> np.ndarray:
        """The places as an array."""
        places = self.places
        return np.arange(places.start, places.stop, places.step) if isinstance(places, range) else places

    @cached_property
    def _sorted(self) -> np.ndarray:
        return np.sort(self.array())


class NoRecordError(KeyError):
    """Nothing to read under this id. Why is looked for when it is shown: among ten million ids that takes seconds."""

    def __init__(self, record_id: str, explain: Callable[[str], str]):
        super().__init__(record_id)
        self.explain = explain

    def __str__(self) -> str:
        return self.explain(self.args[0])

    def __reduce__(self) -> tuple[type[KeyError], tuple[str]]:
        return KeyError, (str(self),)
