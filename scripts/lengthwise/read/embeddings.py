"""`Embeddings`: a mapping of ids to arrays that also takes numbers, slices, lists and masks."""

from abc import abstractmethod
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.read.ids import Ids, NoRecordError
from lengthwise.read.predictions import Predictions
from lengthwise.store.accessions import is_accession
from lengthwise.system.extras import named_extras
from lengthwise.system.text import count

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch

    from lengthwise.read.torch import TorchDataset

_WRONG_KEY = "select records by an id, a number, a slice, a list of these, or a mask of bools; {!r} is none of them"


class Embeddings(Predictions, Mapping[str, np.ndarray]):
    """What `Dataset` and `Joined` have in common: records in an order, each with an id and an (L, D) array.

    A record's place is its number in the index behind the selection.

    Attributes
    ----------
    ids
        The ids of the records: a sequence of str.
    settings
        The settings of the store: see `lengthwise.store.settings`.
    layers
        The stored layers. The first is read unless `layer` chooses another.
    """

    ids: Ids
    settings: dict[str, Any]
    layers: list[int]
    _layer: int

    @property
    @abstractmethod
    def records(self) -> "pd.DataFrame":
        """All records, the rejected ones too. Of a selection, its own records."""

    @abstractmethod
    def layer(self, layer: int) -> Self:
        """The same records, read from another stored layer."""

    @abstractmethod
    def in_storage_order(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (id, (L, D) array) of each record in the fastest order."""

    @abstractmethod
    def pooled(self, kind: str = "mean") -> np.ndarray:
        """One vector per record, in the order of `ids`: (N, D) float32."""

    @abstractmethod
    def verify(self) -> int:
        """Check all files. Returns the number of records."""

    @abstractmethod
    def _read(self, place: int) -> np.ndarray:
        """The (L, D) array of the record at a place."""

    @abstractmethod
    def _sequences_at(self, places: np.ndarray) -> "pa.LargeStringArray":
        """The sequences of the records at these places [n]."""

    @abstractmethod
    def _matches(self, condition: str) -> np.ndarray:
        """Whether a SQL condition holds, for each record: [N] bool by number."""

    @abstractmethod
    def _select(self, places: range | np.ndarray) -> Self:
        """A selection over the same open files."""

    @abstractmethod
    def _listed(self) -> int:
        """The number of rows of `records`."""

    @abstractmethod
    def _identities(self) -> tuple[np.ndarray, np.ndarray]:
        """By number, the hash of each record's id [N] and the digest of its sequence [N, 24]."""

    def where(self, condition: str) -> Self:
        """The records for which a SQL condition holds.

        Parameters
        ----------
        condition
            In DuckDB's SQL, over the columns of `records` and `sequence`, the residues that were embedded, which are read only
            if the condition names them. It has no access to files, the network or variables. In what `concat` joins, a
            subquery sees the records of one dataset at a time.

        Raises
        ------
        LengthwiseError
            It is not a condition over these columns; or it names `sequence`, and the store's table of sequences is gone.

        Examples
        --------
        >>> ds = lengthwise.open("results/demo/datasets/example")
        >>> short = ds.where("length < 100 AND id LIKE 'sp|%'")
        >>> short.pooled("mean").shape
        (26, 320)
        >>> len(ds.where("sequence LIKE '%RGD%'"))  # a motif
        8
        """
        return self._select(self.ids.array()[self._matches(condition)])

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        """The ids. `items`, `values` and `in_storage_order` give arrays."""
        return iter(self.ids)

    def items(self) -> ItemsView[str, np.ndarray]:
        """(id, (L, D) array) of each record, in the order of `ids`. `in_storage_order` is faster."""
        return _Items(self)

    def values(self) -> ValuesView[np.ndarray]:
        """The (L, D) arrays in the order of `ids`. `in_storage_order` is faster."""
        return _Values(self)

    def __contains__(self, key: object) -> bool:
        """Whether a record can be asked for by this id or accession."""
        if not isinstance(key, str):
            return False
        return self.ids.place(key) is not None or len(self._named_by(key)) == 1

    # A mapping is equal to another with the same items: that would read everything.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @overload
    def __getitem__(self, key: str | int) -> np.ndarray: ...

    @overload
    def __getitem__(self, key: slice | list[str] | list[int] | np.ndarray) -> Self: ...

    def __getitem__(self, key: str | int | slice | list[str] | list[int] | np.ndarray) -> "np.ndarray | Self":
        """The (L, D) array of one record, by its id or its number in `ids`; or a selection.

        A slice, a list of ids or numbers, or a mask of bools selects records. In the place of an id like ``sp|P69905|HBA_HUMAN``
        its accession will do, if no other id here has the same one.

        Arrays are memory-mapped copy-on-write. Writing into one never changes the file, but later reads of the same rows in this
        process may show it. ``np.array(ds[...])`` is a copy.

        Raises
        ------
        KeyError
            There is no such id (the error names similar ids), several ids have this accession, or the record was rejected
            (the error gives the reason).
        IndexError
            There is no such number, or a mask has another length.
        LengthwiseError
            Residues were not stored; or a shard is missing, damaged, or does not match the index.
        """
        if isinstance(key, str | int | np.integer) and not isinstance(key, bool):
            return self._read(self._place(key))
        if isinstance(key, slice):
            return self._select(self.ids.places[key])
        if isinstance(key, bytes | bool) or not isinstance(key, Iterable):
            raise TypeError(_WRONG_KEY.format(key))
        keys = list(key)
        if keys and all(isinstance(item, bool | np.bool_) for item in keys):
            return self._select(self.ids.array()[self._mask(keys)])
        return self._select(np.array([self._place(item) for item in keys], np.int64))

    def sequence(self, key: str | int) -> str:
        """The residues of a record as they were embedded, by its id or number: residue ``i`` belongs to row ``i``.

        Raises
        ------
        KeyError, IndexError
            As for reading an array.
        LengthwiseError
            The store's table of sequences is missing, damaged, or of another content of the FASTA file.

        Examples
        --------
        >>> ds = lengthwise.open("results/demo/datasets/example")
        >>> ds.sequence("P02135")[:10]
        'GGSDVSAFLA'
        """
        return self._sequences_at(np.array([self._place(key)]))[0].as_py()

    @property
    def sequences(self) -> "pd.Series":
        """The residues of all records as they were embedded, read now: a Series of str with the ids as index.

        Raises
        ------
        LengthwiseError
            As for `sequence`.
        """
        import pandas as pd

        values = self._sequences_at(self.ids.array()).to_pandas()
        return pd.Series(values.array, index=self._pandas_ids(), name="sequence")

    def frame(self, kind: str = "mean") -> "pd.DataFrame":
        """The vectors of `pooled` as a frame: a row for each record with its id as index, a column for each of D channels.

        Raises
        ------
        LengthwiseError
            As for `pooled`.

        Examples
        --------
        >>> ds = lengthwise.open("results/demo/datasets/example")
        >>> ds.frame("mean").loc["sp|P02135|HBB_LITCT"].shape
        (320,)
        """
        import pandas as pd

        return pd.DataFrame(self.pooled(kind), index=self._pandas_ids())

    def torch(self, dtype: "torch.dtype | None" = None) -> "TorchDataset":
        """A map-style torch Dataset of (id, (L, D) tensor). Its `pad` and `pack` collate a batch.

        Parameters
        ----------
        dtype
            The type of the tensors; None leaves the stored one, which is float16 by default. Most modules want float32.

        Examples
        --------
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> data = lengthwise.open("results/demo/datasets/example").torch(dtype=torch.float32)
        >>> batch = next(iter(DataLoader(data, batch_size=2, collate_fn=data.pad)))
        >>> batch.rows.shape, batch.mask.sum(dim=1).tolist()
        (torch.Size([2, 338, 320]), [140, 338])
        >>> batch = next(iter(DataLoader(data, batch_size=2, collate_fn=data.pack)))
        >>> batch.rows.shape, batch.cu_seqlens.tolist()
        (torch.Size([478, 320]), [0, 140, 478])
        """
        with named_extras():
            from lengthwise.read.torch import TorchDataset

        return TorchDataset(self, dtype)

    def _pandas_ids(self) -> "pd.Index":
        import pandas as pd

        return pd.Index(list(self.ids), name="id", dtype=None if len(self) else object)

    def _mask(self, bools: list[bool]) -> np.ndarray:
        if len(bools) == len(self):
            return np.array(bools)
        problem = f"the mask has {len(bools):,} bools for {count(len(self), 'record')}"
        if len(bools) == self._listed():
            problem += (
                ": ds.records lists the rejected ones too, which have no embedding; mask what is left without them, "
                "ds.records[ds.records['status'] != 'rejected'], or use ds.where(...)"
            )
        raise IndexError(problem)

    def _place(self, key: str | int) -> int:
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            return self.ids.place_of(key)
        if not isinstance(key, str):
            raise TypeError(_WRONG_KEY.format(key))
        place = self.ids.place(key)
        if place is None:
            named = self._named_by(key)
            if len(named) != 1:
                raise NoRecordError(key, self._explain)
            (place,) = named.values()
        return place

    def _named_by(self, accession: str) -> dict[str, int]:
        """The ids in this selection that have this accession, each with its first place."""
        if not is_accession(accession):
            return {}
        found: dict[str, int] = {}
        for place in self.ids.table.find_accession(accession):
            if self.ids.has(place):
                found.setdefault(self.ids.table.id(place), place)
        return found

    def _explain(self, key: str) -> str:
        """Why nothing can be read under this id here."""
        index = self.ids.table
        if len(named := self._named_by(key)) > 1:
            shown = ", ".join(list(named)[:3]) + (", ..." if len(named) > 3 else "")
            return f"{key!r} is the accession of {len(named)} ids: {shown}; ask for one of these"
        if next(index.find(key), None) is not None or (
            is_accession(key) and next(index.find_accession(key), None) is not None
        ):
            return f"{key!r} is not among the {len(self):,} selected records"
        try:
            return index.explain(key)
        except LengthwiseError:
            return f"no record {key!r}"


class _Items(ItemsView[str, np.ndarray]):
    """Reads by number: an id would be looked up first."""

    _mapping: Embeddings

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return ((record_id, self._mapping[number]) for number, record_id in enumerate(self._mapping.ids))


class _Values(ValuesView[np.ndarray]):
    _mapping: Embeddings

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._mapping[number] for number in range(len(self._mapping)))
