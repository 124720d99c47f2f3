"""Reading: a finished dataset as ids and arrays."""

import errno
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.read.ids import Ids, NoRecordError
from lengthwise.store.layout import REMAKE, is_laid_out
from lengthwise.store.lookup import LOOKUP, Index
from lengthwise.store.manifest import read_manifest
from lengthwise.store.paths import shard_path
from lengthwise.store.shard import Shard
from lengthwise.system.files import stamp
from lengthwise.system.text import count

if TYPE_CHECKING:
    import pandas as pd

    from lengthwise.read.torch import TorchDataset
# Shards that stay mapped: before Python 3.13 each takes a file descriptor, of which a process often has but 1,024.
OPEN_SHARDS = 128

_NO_KEY = (
    "records are asked for by an id or a number, a slice, a list of these, or a mask of bools; {!r} is none of them"
)


class Dataset:
    """The embeddings of one FASTA file, or of a selection of its records.

    Its records are those that can be read, accepted and duplicate, in the file's order; `records` lists the rejected ones too.

    Parameters
    ----------
    path
        The folder ``results/<model>/datasets/<dataset>``.

    Attributes
    ----------
    ids
        The ids of the records: a sequence of str.
    layers
        The stored layers; the first is the one that is read, see `layer`.
    manifest
        What the dataset was made of and with.

    Raises
    ------
    LengthwiseError
        The dataset is not complete, is damaged, or was written by a newer Lengthwise.

    Examples
    --------
    >>> ds = lengthwise.open("results/demo/datasets/example")
    >>> ds["sp|P02135|HBB_LITCT"].shape  # one row per residue
    (140, 320)
    >>> len(ds), ds.ids[0]
    (79, 'sp|P02135|HBB_LITCT')
    >>> [rows.shape for rows in ds[:2]]  # a slice, or a list of ids, is a dataset too
    [(140, 320), (338, 320)]
    """

    def __init__(self, path: str | Path):
        self._load(Path(path))
        if self.manifest["random_weights"]:
            warnings.warn(
                f"{path}: RANDOM WEIGHTS: these embeddings come from the model {self.manifest['model']!r} and mean nothing",
                stacklevel=3,
            )

    def _load(self, path: Path) -> None:
        self.path = path
        self.manifest, made = _read_manifest(path)
        settings = self.manifest["settings"]
        self.store = path.resolve().parent.parent
        self.layers: list[int] = settings["layers"]
        self._layer = self.layers[0]
        try:
            self._index = Index(path.absolute(), self.manifest["accepted"] + self.manifest["duplicate"])
            if not self.manifest["shards"].keys() >= set(self._index.shard_names):
                raise self._index.damaged()
        except LengthwiseError as error:
            if made == _stamp(path / "manifest.json"):
                raise
            raise LengthwiseError(_unfinished(path)) from error
        self.ids = Ids(self._index, range(len(self._index)))
        self._open = partial(_open_numbered, path, self.store, settings, self._index.shard_names)
        self._shard = lru_cache(OPEN_SHARDS)(self._open)

    @property
    def records(self) -> "pd.DataFrame":
        """Every record of the FASTA file, in its order, with its status and where its rows are; of a selection, its own."""
        frame = self._index.frame
        if isinstance(self.ids.places, range) and self.ids.places == range(len(self._index)):
            return frame
        return frame.iloc[np.searchsorted(frame["record_no"], self._index.record_no[self.ids.array()])]

    def where(self, condition: str) -> "Dataset":
        """The records for which a SQL condition holds.

        Parameters
        ----------
        condition
            As DuckDB understands it, over the columns of `records`. It can reach nothing else: no file, no network.

        Raises
        ------
        LengthwiseError
            It is no such condition.

        Examples
        --------
        >>> ds = lengthwise.open("results/demo/datasets/example")
        >>> short = ds.where("length < 100 AND id LIKE 'sp|%'")
        >>> short.pooled("mean").shape
        (26, 320)
        """
        places = self.ids.array()
        return self._view(places[self._index.where(condition)[places]], self._layer)

    def layer(self, layer: int) -> "Dataset":
        """The same records, reading another stored layer, by resolved or negative index.

        Raises
        ------
        LengthwiseError
            The model does not have this layer, or it was not stored.
        """
        last = self.manifest["settings"]["num_layers"]
        if layer not in range(-last - 1, last + 1) or (resolved := layer % (last + 1)) not in self.layers:
            raise LengthwiseError(
                f"{self.path}: layer {layer} was not stored; stored are {self.layers}, of the model's 0 to {last}"
            )
        return self._view(self.ids.places, resolved)

    def __repr__(self) -> str:
        name, model = self.path.resolve().name, self.manifest["model"]
        return (
            f"<lengthwise.Dataset {name}: {count(len(self), 'record')}, {model}, layer {self._layer} of {self.layers}>"
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, record_id: object) -> bool:
        return record_id in self.ids

    @overload
    def __getitem__(self, key: str | int) -> np.ndarray: ...

    @overload
    def __getitem__(self, key: slice | list[str] | list[int] | np.ndarray) -> "Dataset": ...

    def __getitem__(self, key: str | int | slice | list[str] | list[int] | np.ndarray) -> "np.ndarray | Dataset":
        """A record's (L, D) array, by its id or its number in `ids`; by a slice or a list of these or of bools, a selection.

        The arrays are the file itself, memory-mapped copy-on-write: what is written into one never reaches the file, but
        whoever reads the same rows again in this process may see it. ``np.array(ds[...])`` is a copy.

        Raises
        ------
        KeyError
            No such id, with those near it; or the record was rejected, with its reason.
        IndexError
            No such number.
        LengthwiseError
            Residues were not stored; a shard is missing, damaged, or another than the dataset was made of.
        """
        if isinstance(key, str | int | np.integer) and not isinstance(key, bool):
            return self._read(self._place(key))
        if isinstance(key, slice):
            return self._view(self.ids.places[key], self._layer)
        if isinstance(key, bytes | bool) or not isinstance(key, Iterable):
            raise TypeError(_NO_KEY.format(key))
        keys = list(key)
        if keys and all(isinstance(one, bool | np.bool_) for one in keys):
            if len(keys) != len(self):
                raise IndexError(f"a mask of {len(keys):,} bools for {count(len(self), 'record')}")
            return self._view(self.ids.array()[np.array(keys)], self._layer)
        return self._view(np.array([self._place(one) for one in keys], np.int64), self._layer)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The (L, D) arrays in the order of `ids`; `in_storage_order` is faster."""
        return (self._read(int(place)) for place in self.ids.places)

    def in_storage_order(self) -> Iterator[tuple[str, np.ndarray]]:
        """(id, (L, D) array) of each record, shard by shard from front to back: the fastest way to see all.

        Examples
        --------
        >>> ds = lengthwise.open("results/demo/datasets/example")
        >>> for record_id, rows in ds[:3].in_storage_order():
        ...     print(record_id, len(rows))
        sp|P02135|HBB_LITCT 140
        sp|Q1RIB3|DHAS_RICBR 338
        sp|P63739|CARB_STAAM 1057
        """
        places = self.ids.array()
        for numbers in self._by_shard():
            here = places[numbers].tolist()
            shard = self._open(self._index.shard.item(here[0]))
            for place in here:
                start, stop = self._span(shard, place)
                yield self._index.id(place), shard[f"layer_{self._layer}"][start:stop]

    def pooled(self, kind: str = "mean") -> np.ndarray:
        """(N, D) float32, a row for each of `ids`: `mean` over residues, or `bos`.

        Raises
        ------
        LengthwiseError
            It was not stored; a shard is missing, damaged, or another than the dataset was made of.
        """
        if kind not in self.manifest["settings"]["outputs"]:
            raise LengthwiseError(f"{self.path}: {kind!r} was not stored; 'outputs' in the config says what is")
        if kind == "residue":
            raise LengthwiseError(f"{self.path}: 'residue' is not pooled; read it by id")
        out = np.empty((len(self), self.manifest["settings"]["embed_dim"]), np.float32)
        places = self.ids.array()
        for numbers in self._by_shard():
            here = places[numbers]
            shard, rows = self._open(self._index.shard.item(here[0])), self._index.sequence_no[here]
            if not shard.holds_all(rows, self._index.digest[here]):
                raise another(self.path, shard)
            out[numbers] = shard[f"{kind}_{self._layer}"][rows]
        return out

    def torch(self) -> "TorchDataset":
        """A map-style torch Dataset of (id, (L, D) tensor), which can `pad` or `pack` a batch of them.

        Examples
        --------
        >>> from torch.utils.data import DataLoader
        >>> data = lengthwise.open("results/demo/datasets/example").torch()
        >>> batch = next(iter(DataLoader(data, batch_size=2, collate_fn=data.pad)))
        >>> batch.rows.shape, batch.mask.sum(dim=1).tolist()
        (torch.Size([2, 338, 320]), [140, 338])
        >>> batch = next(iter(DataLoader(data, batch_size=2, collate_fn=data.pack)))
        >>> batch.rows.shape, batch.cu_seqlens.tolist()
        (torch.Size([478, 320]), [0, 140, 478])
        """
        from lengthwise.read.torch import TorchDataset

        return TorchDataset(self)

    def verify(self, good: set[str] | None = None) -> int:
        """Check the index, and sizes and checksums of every shard that the dataset uses; returns its number of records.

        Parameters
        ----------
        good
            Names of shards that were checked already; this adds to them. Datasets share shards.

        Raises
        ------
        LengthwiseError
            The index or a shard is missing or damaged; the first damaged sequence is named.
        """
        good = set() if good is None else good
        records = self._index.check()
        if records != self.manifest["records"]:
            raise LengthwiseError(f"{self.path / 'index.parquet'}: has {records} records, not as the manifest says")
        for name, size in self.manifest["shards"].items():
            if name in good:
                continue
            shard = Shard(shard_path(self.store, name))
            if shard.path.stat().st_size != size:
                raise LengthwiseError(
                    f"{shard.path}: has another size than the manifest says ({size:,} bytes); {REMAKE}"
                )
            if bad := shard.damaged():
                raise LengthwiseError(
                    f"{shard.path}: {len(bad)} sequences are damaged, number {bad[0]} the first; {REMAKE}"
                )
            good.add(name)
        return records

    def _view(self, places: range | np.ndarray, layer: int) -> "Dataset":
        """Some of the records, or another layer, over the same open files."""
        other = object.__new__(Dataset)
        other.__dict__.update({**self.__dict__, "ids": Ids(self._index, places), "_layer": layer})
        return other

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens the files itself.
        return {"path": self.path, "places": self.ids.places, "layer": self._layer, "index_bytes": self._index.bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._load(state["path"])
        if self._index.bytes != state["index_bytes"]:
            raise LengthwiseError(f"{self.path}: was made again in the meantime; open it again")
        self.ids, self._layer = Ids(self._index, state["places"]), state["layer"]

    def _place(self, key: str | int) -> int:
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            return self.ids.place_of(key)
        if not isinstance(key, str):
            raise TypeError(_NO_KEY.format(key))
        place = self.ids.place(key)
        if place is None:
            raise NoRecordError(key, self._explain)
        return place

    def _explain(self, record_id: str) -> str:
        """Why there is nothing to read under this id."""
        if next(self._index.find(record_id), None) is not None:
            return f"{record_id!r} is not among the {len(self):,} records that were selected"
        try:
            return self._index.explain(record_id)
        except LengthwiseError:
            return f"no record {record_id!r}"

    def _read(self, place: int) -> np.ndarray:
        shard = self._shard(self._index.shard.item(place))
        return shard.rows(f"layer_{self._layer}", *self._span(shard, place))

    def _span(self, shard: Shard, place: int) -> tuple[int, int]:
        """Where a record's rows are, if its shard agrees with the index about that and what they are of."""
        if "residue" not in self.manifest["settings"]["outputs"]:
            raise LengthwiseError(f"{self.path}: residues are not among the stored outputs; use pooled()")
        index = self._index
        number, start = index.sequence_no.item(place), index.row_start.item(place)
        length = index.length.item(place)
        if not shard.holds(number, index.digest[place].tobytes(), start, length):
            raise another(self.path, shard)
        return start, start + length

    def _by_shard(self) -> Iterator[np.ndarray]:
        """Numbers in `ids` of the records of one shard after the other, each in its order."""
        places = self.ids.array()
        shards = self._index.shard[places]
        order = np.lexsort((self._index.sequence_no[places], shards))
        if len(order):
            yield from np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)


def _open_numbered(dataset: Path, store: Path, settings: dict[str, Any], names: list[str], number: int) -> Shard:
    """One of the shards that a dataset's lookup names."""
    if not 0 <= number < len(names):
        raise LengthwiseError(f"{dataset / LOOKUP}: damaged; remove it and run snakemake again")
    return open_shard(dataset, store, settings, names[number])


def open_shard(dataset: Path, store: Path, settings: dict[str, Any], name: str) -> Shard:
    """A shard that a dataset names, if it is what a store of these settings has.

    Raises
    ------
    LengthwiseError
        It is missing, damaged, or another.
    """
    try:
        shard = Shard(shard_path(store, name))
    except LengthwiseError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        advice = "too many arrays of different shards are held; keep copies instead, np.array(ds[...])"
        raise LengthwiseError(f"{error}: {advice}") from error
    same = shard.metadata.get("fingerprint") == settings["fingerprint"]
    if not same or not is_laid_out(shard.tensors, np.diff(shard["offsets"]), settings):
        raise another(dataset, shard)
    return shard


def another(dataset: Path, shard: Shard) -> LengthwiseError:
    """The error that a shard has not what the index says."""
    return LengthwiseError(
        f"{shard.path}: does not hold what the index of {dataset} says; if python -m lengthwise verify finds no damage in "
        f"the index, {REMAKE}"
    )


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, int] | None]:
    """A dataset's manifest, if it is whole and this version's, and the stamp of its file."""
    path = folder / "manifest.json"
    try:
        made = _stamp(path)
        return read_manifest(path), made
    except FileNotFoundError:
        raise LengthwiseError(_no_dataset(folder)) from None


def _stamp(path: Path) -> dict[str, int] | None:
    """What a file that is made again has another of; None where there is none."""
    try:
        return stamp(path)
    except OSError:
        return None


def _unfinished(path: Path) -> str:
    return f"{path}: is being made again, or was not finished: wait for the run that is at work, or run snakemake"


def _no_dataset(path: Path) -> str:
    """Why this folder cannot be opened."""
    if not path.is_dir():
        return f"{path}: no such folder"
    if (path / "settings.json").exists() and (found := sorted(path.glob("datasets/*/manifest.json"))):
        return f"{path}: is a store; open one of its datasets: {', '.join(str(manifest.parent) for manifest in found)}"
    if any((path / name).exists() for name in ("index.parquet", "README.md")):
        return _unfinished(path)
    return f"{path}: no finished dataset here (no manifest.json); run snakemake to make it"
