"""`Dataset`: the embeddings of a finished dataset by id, number, slice, mask or SQL condition."""

import warnings
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.tensors import OF_ROWS, OUTPUTS, POOLED, over_rows
from lengthwise.ingest.tables import WINDOWS as WINDOWED_SEQUENCES
from lengthwise.read.completeness import read_complete, unless_replaced
from lengthwise.read.embeddings import Embeddings
from lengthwise.read.ids import Ids
from lengthwise.read.sequences import Sequences
from lengthwise.read.shards import mismatch, open_shard
from lengthwise.store.layout import REMAKE
from lengthwise.store.lookup import LOOKUP, Index
from lengthwise.store.paths import shard_path
from lengthwise.store.shard import Shard
from lengthwise.store.windows import Windows
from lengthwise.system.text import count

if TYPE_CHECKING:
    import pandas as pd

# The number of shards that stay mapped. Before Python 3.13 each map takes a file descriptor, and the usual limit is 1,024.
OPEN_SHARDS = 128


class Dataset(Embeddings):
    """The embeddings of a dataset, or of a selection of its records: a mapping of ids to (L, D) arrays.

    It has the accepted and the duplicate records, in the file's order. `records` lists the rejected ones too. It also takes
    numbers, slices, lists and masks.

    Parameters
    ----------
    path
        The folder ``results/<model>/datasets/<dataset>``.

    Attributes
    ----------
    ids
        The ids of the records: a sequence of str.
    layers
        The stored layers. The first is read unless `layer` chooses another.
    manifest
        The dataset's manifest.json: counts, settings, inputs, devices and versions.

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
    >>> [(record_id, rows.shape) for record_id, rows in ds[:2].items()]  # a slice, or a list of ids, is a dataset too
    [('sp|P02135|HBB_LITCT', (140, 320)), ('sp|Q1RIB3|DHAS_RICBR', (338, 320))]
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
        self.manifest, manifest_stamp = read_complete(path)
        self.settings = self.manifest["settings"]
        self.store = path.resolve().parent.parent
        self.layers = self.settings["layers"]
        self._layer = self.layers[0]
        with unless_replaced(path, manifest_stamp):
            readable = self.manifest["accepted"] + self.manifest["duplicate"]
            self._index = Index(path.absolute(), readable, self.manifest.get("input"))
            if not self.manifest["shards"].keys() >= set(self._index.shard_names):
                raise self._index.damaged()
            self._windows = Windows(path)
        self.ids = Ids(self._index, range(len(self._index)))
        # A partial, not a method: a cache that refers to this object would keep the maps alive after its last use.
        self._open_shard = partial(_open_shard_number, path, self.store, self.settings, self._index.shard_names)
        self._cached_shard = lru_cache(OPEN_SHARDS)(self._open_shard)
        self._named_shard = lru_cache(OPEN_SHARDS)(partial(open_shard, path, self.store, self.settings))
        inputs = self.store / "inputs" / self.manifest.get("dataset", path.resolve().name)
        self._sequences = Sequences(inputs / "sequences.parquet")
        self._windowed_sequences = Sequences(inputs / WINDOWED_SEQUENCES)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.path.resolve().name

    @property
    def records(self) -> "pd.DataFrame":
        """All records of the FASTA file, in its order: status, and shard and rows of each. Of a selection, its own records."""
        frame = self._index.frame
        if isinstance(self.ids.places, range) and self.ids.places == range(len(self._index)):
            return frame
        return frame.iloc[np.searchsorted(frame["record_no"], self._index.record_no[self.ids.array()])]

    def layer(self, layer: int) -> "Dataset":
        """The same records, read from another stored layer. A negative index counts from the model's last layer.

        Raises
        ------
        LengthwiseError
            The model does not have this layer, or it was not stored.
        """
        last = self.settings["num_layers"]
        if layer not in range(-last - 1, last + 1) or (resolved := layer % (last + 1)) not in self.layers:
            raise LengthwiseError(
                f"{self.path}: layer {layer} was not stored; stored are {self.layers}, of the model's 0 to {last}"
            )
        return self._view(self.ids.places, resolved)

    def __repr__(self) -> str:
        of = f"{self.name}: {count(len(self), 'record')}, {self.manifest['model']}"
        return f"<lengthwise.Dataset {of}, layer {self._layer} of {self.layers}>"

    def in_storage_order(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (id, (L, D) array) of each record, shard by shard from front to back: the fastest way to read many.

        Raises
        ------
        LengthwiseError
            As for reading by id.

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
            in_shard = places[numbers].tolist()
            shard = self._open_shard(self._index.shard.item(in_shard[0]))
            for place in in_shard:
                if (joined := self._joined(place)) is not None:
                    yield self._index.id(place), joined
                    continue
                start, stop = self._checked_rows(shard, place)
                yield self._index.id(place), shard[f"layer_{self._layer}"][start:stop]

    def pooled(self, kind: str = "mean") -> np.ndarray:
        """One vector per record, in the order of `ids`.

        Parameters
        ----------
        kind
            ``mean``, ``max``, ``std``: over residues, in each channel; ``bos``: the BOS token's vector. What was not stored is
            computed from stored rows, if these were: all but ``bos``. ``std`` is the population's.

        Returns
        -------
        (N, D) float32.

        Raises
        ------
        LengthwiseError
            The output was not stored, nor what it is computed from; or a shard is missing, damaged, or does not match the index.
        """
        stored = self.settings["outputs"]
        if kind in OUTPUTS and kind not in POOLED:
            raise LengthwiseError(f"{self.path}: {kind!r} is not pooled; read it by id")
        if kind not in stored and not (kind in OF_ROWS and "residue" in stored):
            rows = ", and to compute it needs rows (residue), which this store does not have" if kind in OF_ROWS else ""
            raise LengthwiseError(f"{self.path}: {kind!r} was not stored{rows}; 'outputs' in the config lists what is")
        out = np.empty((len(self), self.settings["embed_dim"]), np.float32)
        places = self.ids.array()
        in_windows = self._in_windows(places)
        for numbers in self._by_shard():
            numbers = numbers[in_windows[numbers] < 0]
            if not len(numbers):
                continue
            in_shard = places[numbers]
            shard = self._open_shard(self._index.shard.item(in_shard[0]))
            rows = self._index.sequence_no[in_shard]
            if not shard.holds_all(rows, self._index.digest[in_shard]):
                raise mismatch(self.path, shard)
            if kind in stored:
                out[numbers] = shard[f"{kind}_{self._layer}"][rows]
                continue
            for number, place in zip(numbers.tolist(), in_shard.tolist(), strict=True):
                start, stop = self._checked_rows(shard, place)
                out[number] = over_rows(shard[f"layer_{self._layer}"][start:stop], kind)
        joined = np.flatnonzero(in_windows >= 0)
        if len(joined):
            out[joined] = self._windows.pooled(f"{kind}_{self._layer}", in_windows[joined], self._named_shard)
        return out

    def verify(self, good: set[str] | None = None) -> int:
        """Check the index, and size and checksums of every shard of the dataset. Returns the number of records.

        Parameters
        ----------
        good
            Names of shards that need no check. The shards checked here are added. (Datasets share shards.)

        Raises
        ------
        LengthwiseError
            The index or a shard is missing or damaged. The error names the first damaged sequence.
        """
        good = set() if good is None else good
        records = self._index.check()
        if records != self.manifest["records"]:
            raise LengthwiseError(f"{self.path / 'index.parquet'}: has {records} records, unlike the manifest")
        for name, size in self.manifest["shards"].items():
            if name in good:
                continue
            shard = Shard(shard_path(self.store, name))
            if shard.path.stat().st_size != size:
                raise LengthwiseError(
                    f"{shard.path}: does not have the size in the manifest ({size:,} bytes); {REMAKE}"
                )
            if bad := shard.damaged():
                raise LengthwiseError(
                    f"{shard.path}: {len(bad)} sequences are damaged, number {bad[0]} the first; {REMAKE}"
                )
            good.add(name)
        return records

    def _view(self, places: range | np.ndarray, layer: int) -> "Dataset":
        """A selection of records, or another layer, over the same open files."""
        view = object.__new__(Dataset)
        view.__dict__.update({**self.__dict__, "ids": Ids(self._index, places), "_layer": layer})
        return view

    def __getstate__(self) -> dict[str, Any]:
        # Maps cannot be pickled: a worker process opens the files itself.
        return {"path": self.path, "places": self.ids.places, "layer": self._layer, "index_bytes": self._index.bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._load(state["path"])
        if self._index.bytes != state["index_bytes"]:
            raise LengthwiseError(f"{self.path}: was made again since it was opened; open it again")
        self.ids, self._layer = Ids(self._index, state["places"]), state["layer"]

    def _select(self, places: range | np.ndarray) -> "Dataset":
        return self._view(places, self._layer)

    def _matches(self, condition: str) -> np.ndarray:
        return self._index.where(condition, self._sequences.path)[self.ids.array()]

    def _sequences_at(self, places: np.ndarray) -> "pa.LargeStringArray":
        digests, in_windows = self._index.digest[places], self._in_windows(places) >= 0
        if not in_windows.any():
            return self._sequences.at(digests)
        parts = [self._sequences.at(digests[~in_windows]), self._windowed_sequences.at(digests[in_windows])]
        order = np.argsort(np.concatenate([np.flatnonzero(~in_windows), np.flatnonzero(in_windows)]))
        return pa.concat_arrays(parts).take(pa.array(order))

    def _identities(self) -> tuple[np.ndarray, np.ndarray]:
        places = self.ids.array()
        return self._index.hashes()[places], self._index.digest[places]

    def _listed(self) -> int:
        return self.manifest["records"] if len(self) == len(self._index) else len(self)

    def _in_windows(self, places: np.ndarray) -> np.ndarray:
        """The rows of the table of windows [n] for the records at these places [n]; -1 where a record is whole in its shard."""
        if not len(self._windows):  # else the digests of all places would be copied for nothing
            return np.full(len(places), -1)
        return self._windows.find(self._index.digest[places])

    def _joined(self, place: int) -> np.ndarray | None:
        """The rows of a protein in windows, copied together; None if it is whole in its shard."""
        row = self._windows.row(self._index.digest[place]) if len(self._windows) else None
        return None if row is None else self._windows.rows(row, f"layer_{self._layer}", self._named_shard)

    def _read(self, place: int) -> np.ndarray:
        if (joined := self._joined(place)) is not None:
            return joined
        shard = self._cached_shard(self._index.shard.item(place))
        return shard.rows(f"layer_{self._layer}", *self._checked_rows(shard, place))

    def _checked_rows(self, shard: Shard, place: int) -> tuple[int, int]:
        """Start and stop of a record's rows, after a check that shard and index agree on them."""
        if "residue" not in self.settings["outputs"]:
            raise LengthwiseError(f"{self.path}: residues are not among the stored outputs; use pooled()")
        return self._checked_bounds(shard, place)

    def _checked_bounds(self, shard: Shard, place: int) -> tuple[int, int]:
        """Where a record's residues begin and end in a shard, after a check that shard and index agree."""
        index = self._index
        number, start = index.sequence_no.item(place), index.row_start.item(place)
        length = index.length.item(place)
        if not shard.holds(number, index.digest[place].tobytes(), start, length):
            raise mismatch(self.path, shard)
        return start, start + length

    def _result(self, place: int, name: str) -> np.ndarray:
        """What is stored of the record at a place: logits (L, 33); contacts, the (L (L + 1) / 2,) upper triangle."""
        if name not in self.settings["outputs"]:
            raise LengthwiseError(f"{self.path}: {name!r} was not stored; 'outputs' in the config lists what is")
        shard = self._cached_shard(self._index.shard.item(place))
        start, stop = self._checked_bounds(shard, place)
        own = shard.entries(name, self._index.sequence_no.item(place))
        if own.start == own.stop:
            raise LengthwiseError(
                f"{self.path}: {self._index.id(place)!r} has {stop - start:,} residues; {name} were stored of proteins of "
                f"at most {self.settings['contacts_max_residues']:,} (contacts_max_residues in the config)"
            )
        return shard.rows(name, own.start, own.stop)

    def _by_shard(self) -> Iterator[np.ndarray]:
        """The records grouped by shard: numbers in `ids`, each group in its shard's order."""
        places = self.ids.array()
        shards = self._index.shard[places]
        order = np.lexsort((self._index.sequence_no[places], shards))
        if len(order):
            yield from np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)


def _open_shard_number(dataset: Path, store: Path, settings: dict[str, Any], names: list[str], number: int) -> Shard:
    """Open the shard with this number in the lookup's list of names."""
    if not 0 <= number < len(names):
        raise LengthwiseError(f"{dataset / LOOKUP}: damaged; remove it and run snakemake again")
    return open_shard(dataset, store, settings, names[number])
