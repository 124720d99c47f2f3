"""The ids of a dataset or of a selection, as a sequence; and the error of an unknown id."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol, overload

import numpy as np


class Records(Protocol):
    """The part of `lengthwise.store.lookup.Index` that ids are read from."""

    def __len__(self) -> int: ...
    def id(self, place: int) -> str: ...
    def find(self, record_id: str) -> Iterator[int]: ...
    def find_accession(self, accession: str) -> Iterator[int]: ...
    def explain(self, record_id: str) -> str: ...


class Ids(Sequence[str]):
    """A sequence of ids, read from the index on access: a list of ten million would take a gigabyte.

    Parameters
    ----------
    table
        Where the ids are read: a dataset's index.
    places
        The records' places in it, see `lengthwise.store.lookup.Index`.
    """

    def __init__(self, table: Records, places: range | np.ndarray):
        self.table, self.places = table, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> "Ids": ...

    def __getitem__(self, number: int | slice) -> "str | Ids":
        if isinstance(number, slice):
            return Ids(self.table, self.places[number])
        return self.table.id(self.place_of(number))

    def __iter__(self) -> Iterator[str]:
        return (self.table.id(int(place)) for place in self.places)

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
        return list, (list(self),)  # the map of the index cannot be pickled

    def place_of(self, number: int) -> int:
        """The place of a record by its number. A negative number counts from the end.

        Raises
        ------
        TypeError, IndexError
            It is not a number, or there is no such record.
        """
        if not isinstance(number, int | np.integer):
            raise TypeError(f"select by a number; {number!r} is not a number")
        if not -len(self) <= number < len(self):
            raise IndexError(f"no record {number:,}: there are {len(self):,}, counted from 0")
        return int(self.places[number])

    def place(self, record_id: str) -> int | None:
        """The place of the first record with this id in this sequence, or None."""
        return next((place for place in self.table.find(record_id) if self.has(place)), None)

    def has(self, place: int) -> bool:
        """Whether the record at a place is in this sequence."""
        if isinstance(self.places, range):
            return place in self.places
        return place in self._sorted[(at := self._sorted.searchsorted(place)) : at + 1]

    def numbers(self, places: Iterable[int], start: int = 0) -> list[int]:
        """The numbers in this sequence, ascending and counted from `start`, of the records at these places."""
        found: list[int] = []
        for place in places:
            if isinstance(self.places, range):
                found += [self.places.index(place)] if place in self.places else []
            else:
                first, end = (self._sorted.searchsorted(place, side) for side in ("left", "right"))
                found += self._order[first:end].tolist()
        return [start + number for number in sorted(found)]

    def array(self) -> np.ndarray:
        """The places [N], int64."""
        places = self.places
        return np.arange(places.start, places.stop, places.step) if isinstance(places, range) else places

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.array(), kind="stable")

    @cached_property
    def _sorted(self) -> np.ndarray:
        return self.array()[self._order]


class NoRecordError(KeyError):
    """There is no embedding under this id.

    The message is made only when it is shown: finding similar ids among ten million takes seconds.
    """

    def __init__(self, record_id: str, explain: Callable[[str], str]):
        super().__init__(record_id)
        self.explain = explain

    def __str__(self) -> str:
        return self.explain(self.args[0])

    def __reduce__(self) -> tuple[type[KeyError], tuple[str]]:
        return KeyError, (str(self),)
