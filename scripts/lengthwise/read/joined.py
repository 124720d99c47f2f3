"""`Joined`: several datasets, one after the other, read as one. `lengthwise.concat` makes it."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.read.dataset import Dataset
from lengthwise.read.embeddings import Embeddings
from lengthwise.read.ids import Ids
from lengthwise.store.settings import comparable
from lengthwise.system.text import count

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


class _JoinedIndex:
    """The records of several datasets. A place counts on from dataset to dataset."""

    def __init__(self, parts: Sequence[Embeddings]):
        self.parts = parts
        self.starts: list[int] = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, place: int) -> tuple[Embeddings, int]:
        """The dataset that has a place, and the record's number in it."""
        part = bisect_right(self.starts, place) - 1
        return self.parts[part], place - self.starts[part]

    def id(self, place: int) -> str:
        part, number = self.locate(place)
        return part.ids[number]

    def find(self, record_id: str) -> Iterator[int]:
        for start, part in zip(self.starts, self.parts, strict=False):
            yield from part.ids.numbers(part.ids.table.find(record_id), start)

    def find_accession(self, accession: str) -> Iterator[int]:
        for start, part in zip(self.starts, self.parts, strict=False):
            yield from part.ids.numbers(part.ids.table.find_accession(accession), start)

    def explain(self, record_id: str) -> str:
        """The reason of a rejection if there is one, else the longest list of similar ids."""
        answers = [part.ids.table.explain(record_id) for part in self.parts]
        return next((text for text in answers if " was rejected: " in text), max(answers, key=len))


class Joined(Embeddings):
    """Several datasets, or selections of them, one after the other: it reads like a `lengthwise.read.dataset.Dataset`.

    `records` has the column `dataset` too. The datasets may be of several stores with the same settings.

    Parameters
    ----------
    parts
        The datasets: see `Joined.of`.
    places
        The selected records; None selects all.
    """

    def __init__(self, parts: Sequence[Embeddings], places: range | np.ndarray | None = None):
        self.parts = parts
        self.settings, self.layers, self._layer = parts[0].settings, parts[0].layers, parts[0]._layer
        index = _JoinedIndex(parts)
        self._starts = np.array(index.starts)
        self.ids = Ids(index, range(len(index)) if places is None else places)

    @classmethod
    def of(cls, datasets: Iterable[Embeddings]) -> "Joined":
        """Join datasets after a check that they belong together: see `lengthwise.concat`."""
        parts = list(datasets)
        if wrong := [part for part in parts if not isinstance(part, Embeddings)]:
            raise TypeError(f"concat takes a list of datasets; {wrong[0]!r} is none: lengthwise.open gives them")
        if not parts:
            raise LengthwiseError("concat: there is no dataset to join")
        for part in parts[1:]:
            _require_comparable(parts[0], part)
        joined = cls(parts)
        joined._require_distinct_ids()
        return joined

    @property
    def records(self) -> "pd.DataFrame":
        """All records of the datasets, the rejected ones too, and the name of each one's `dataset`. Of a selection, its own."""
        import pandas as pd

        if self._is_whole():
            return pd.concat([_named_records(part) for part in self.parts], ignore_index=True)
        numbers, frames = [np.empty(0, np.int64)], [_named_records(self.parts[0]).iloc[:0]]
        for own, selection in self._by_part(self.ids.array()):
            numbers.append(own)
            frames.append(_named_records(selection))
        back = np.argsort(np.concatenate(numbers), kind="stable")
        return pd.concat(frames, ignore_index=True).iloc[back].reset_index(drop=True)

    def layer(self, layer: int) -> "Joined":
        """The same records, read from another stored layer: see `lengthwise.read.dataset.Dataset.layer`."""
        return Joined([part.layer(layer) for part in self.parts], self.ids.places)

    def in_storage_order(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (id, (L, D) array) of each record, dataset by dataset and shard by shard: the fastest way to read many."""
        for _, selection in self._by_part(self.ids.array()):
            yield from selection.in_storage_order()

    def pooled(self, kind: str = "mean") -> np.ndarray:
        """One vector per record, in the order of `ids`: see `lengthwise.read.dataset.Dataset.pooled`."""
        self.parts[0][:0].pooled(kind)  # refuses an unknown kind, whatever is selected
        out = np.empty((len(self), self.settings["embed_dim"]), np.float32)
        for numbers, selection in self._by_part(self.ids.array()):
            out[numbers] = selection.pooled(kind)
        return out

    def verify(self) -> int:
        """Check index and shards of every dataset. Returns the number of records."""
        return sum(part.verify() for part in self.parts)

    def __repr__(self) -> str:
        of = f"{count(len(self), 'record')} of {count(len(self.parts), 'dataset')}"
        return f"<lengthwise.Joined: {of}, {self.settings['model']}, layer {self._layer} of {self.layers}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts, "places": self.ids.places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _is_whole(self) -> bool:
        return isinstance(self.ids.places, range) and self.ids.places == range(int(self._starts[-1]))

    def _select(self, places: range | np.ndarray) -> "Joined":
        return Joined(self.parts, places)

    def _read(self, place: int) -> np.ndarray:
        part, number = self._index.locate(place)
        return part._read(int(part.ids.places[number]))

    def _result(self, place: int, name: str) -> np.ndarray:
        part, number = self._index.locate(place)
        return part._result(int(part.ids.places[number]), name)

    def _sequences_at(self, places: np.ndarray) -> "pa.LargeStringArray":
        import pyarrow as pa

        numbers, found = [np.empty(0, np.int64)], [pa.array([], pa.large_string())]
        for own, selection in self._by_part(places):
            numbers.append(own)
            found.append(selection._sequences_at(selection.ids.array()))
        back = np.argsort(np.concatenate(numbers), kind="stable")
        return pa.concat_arrays(found).take(pa.array(back))

    def _matches(self, condition: str) -> np.ndarray:
        return np.concatenate([part._matches(condition) for part in self.parts])[self.ids.array()]

    def _listed(self) -> int:
        return sum(part._listed() for part in self.parts) if self._is_whole() else len(self)

    def _identities(self) -> tuple[np.ndarray, np.ndarray]:
        hashes, digests = zip(*(part._identities() for part in self.parts), strict=True)
        places = self.ids.array()
        return np.concatenate(hashes)[places], np.concatenate(digests)[places]

    @property
    def _index(self) -> _JoinedIndex:
        assert isinstance(self.ids.table, _JoinedIndex)
        return self.ids.table

    def _by_part(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, Embeddings]]:
        """Places [n] grouped by dataset: their positions in `places`, and the selection of the dataset's records."""
        part_of = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(part_of).tolist():
            part, positions = self.parts[number], np.flatnonzero(part_of == number)
            yield positions, part._select(part.ids.array()[places[positions] - self._starts[number]])

    def _require_distinct_ids(self) -> None:
        """Refuse one id for two sequences, as a FASTA file may not have it: reading by id could not tell them apart."""
        hashes, digests = self._identities()
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        differ = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
        for at in np.flatnonzero(same & differ).tolist():
            one, other = int(order[at]), int(order[at + 1])
            if self.ids[one] == self.ids[other]:  # else two ids share a hash
                (first, _), (second, _) = self._index.locate(one), self._index.locate(other)
                raise LengthwiseError(
                    f"concat: {self.ids[one]!r} names two different sequences, in {first!r} and in {second!r}; leave one out, "
                    "or rename it in its FASTA file"
                )


def _named_records(part: Embeddings) -> "pd.DataFrame":
    return part.records.assign(dataset=part.name) if isinstance(part, Dataset) else part.records


def _require_comparable(one: Embeddings, other: Embeddings) -> None:
    if one.settings["fingerprint"] != other.settings["fingerprint"]:
        differences = [
            f"{key} is {one.settings[key]} in one and {other.settings.get(key)} in the other"
            for key in comparable(one.settings)
            if one.settings[key] != other.settings.get(key)
        ]
        raise LengthwiseError(f"concat: {one!r} and {other!r} are not comparable: {'; '.join(differences)}")
    if one._layer != other._layer:
        raise LengthwiseError(f"concat: {one!r} and {other!r} read different layers; choose one with layer(n) for both")
