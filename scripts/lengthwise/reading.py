"""Reading: a finished dataset as ids and arrays."""

import difflib
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from lengthwise.errors import LengthwiseError
from lengthwise.files import read_json
from lengthwise.settings import resolve_layers
from lengthwise.store import REMAKE, Shard, shard_path


class Dataset:
    """The embeddings of one FASTA file.

    Parameters
    ----------
    path
        The folder ``results/<model>/datasets/<dataset>``.

    Raises
    ------
    LengthwiseError
        The dataset is not complete, or is damaged.

    Examples
    --------
    >>> ds = lengthwise.open("results/demo/datasets/example")  # doctest: +SKIP
    >>> ds["sp|P69905|HBA_HUMAN"].shape  # one row per residue  # doctest: +SKIP
    (142, 320)
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "manifest.json").exists():
            raise LengthwiseError(f"{path}: no finished dataset here (no manifest.json); run snakemake to make it")
        self.manifest = read_json(self.path / "manifest.json")
        self.store = self.path.resolve().parent.parent
        settings = self.manifest["settings"]
        self.layers: list[int] = settings["layers"]
        self._layer = self.layers[0]
        self._shards: dict[str, Shard] = {}
        if self.manifest["random_weights"]:
            warnings.warn(
                f"{path}: RANDOM WEIGHTS: these embeddings come from the model {self.manifest['model']!r} and mean nothing",
                stacklevel=3,
            )

    @cached_property
    def records(self) -> pd.DataFrame:
        """Every record of the FASTA file, in its order, with its status and where its rows are."""
        try:
            return pd.read_parquet(self.path / "index.parquet")
        except (OSError, ValueError) as error:
            raise LengthwiseError(
                f"{self.path / 'index.parquet'}: missing or damaged; remove it and run snakemake again"
            ) from error

    @cached_property
    def ids(self) -> list[str]:
        """The ids of accepted and duplicate records, in the file's order."""
        return self._readable["id"].tolist()

    def layer(self, layer: int) -> "Dataset":
        """The same dataset, reading another stored layer, by resolved or negative index."""
        resolved = resolve_layers([layer], self.manifest["settings"]["num_layers"])[0]
        if resolved not in self.layers:
            raise LengthwiseError(f"{self.path}: layer {layer} was not stored; stored are {self.layers}")
        other = object.__new__(Dataset)
        other.__dict__.update(self.__dict__, _layer=resolved)
        return other

    def __len__(self) -> int:
        return len(self._readable)

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._numbers

    def __getitem__(self, key: str | int) -> np.ndarray:
        """A protein's (L, D) array, by its id or its place in `ids`; memory-mapped, copy-on-write.

        Raises
        ------
        KeyError
            No such id, or the record was rejected: with its reason.
        """
        row = self._readable.iloc[self._number(key)]
        shard, start = self._shard(row["shard"]), int(row["row_start"])
        name = f"layer_{self._layer}"
        if name not in shard.tensors:
            raise LengthwiseError(f"{self.path}: residues are not among the stored outputs; use pooled()")
        return shard[name][start : start + int(row["length"])]

    def pooled(self, kind: str = "mean") -> np.ndarray:
        """(N, D) float32: `mean` over residues or `bos`, one row for each of `ids`."""
        name = f"{kind}_{self._layer}"
        if kind not in self.manifest["settings"]["outputs"]:
            raise LengthwiseError(f"{self.path}: {kind!r} was not stored; 'outputs' in the config says what is")
        if kind == "residue":
            raise LengthwiseError(f"{self.path}: 'residue' is not pooled; read it by id")
        out = np.empty((len(self), self.manifest["settings"]["embed_dim"]), np.float32)
        rows = self._readable.reset_index(drop=True)
        for shard, group in rows.groupby("shard"):
            out[group.index] = self._shard(shard)[name][group["sequence_no"].to_numpy(np.int64)]
        return out

    def torch(self):
        """A map-style torch Dataset of (id, (L, D) tensor)."""
        return _TorchDataset(self)

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
        if len(self.records) != self.manifest["records"]:
            raise LengthwiseError(
                f"{self.path / 'index.parquet'}: has {len(self.records)} records, not as the manifest says"
            )
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
        return len(self.records)

    @cached_property
    def _readable(self) -> pd.DataFrame:
        return self.records[self.records["status"] != "rejected"]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for number, record_id in enumerate(self.ids):
            numbers.setdefault(record_id, number)  # a repeated id stands for the same sequence
        return numbers

    def _number(self, key: str | int) -> int:
        if isinstance(key, int | np.integer):
            return int(key)
        if key in self._numbers:
            return self._numbers[key]
        same = self.records[self.records["id"] == key]
        if len(same):
            raise KeyError(f"{key!r} was rejected: {same['reason'].iloc[0]}")
        near = difflib.get_close_matches(key, self.ids, n=3)
        raise KeyError(f"no record {key!r}" + (f"; near it: {', '.join(near)}" if near else ""))

    def _shard(self, name: str) -> Shard:
        if name not in self._shards:
            self._shards[name] = Shard(shard_path(self.store, name))
        return self._shards[name]


class _TorchDataset:
    """Map-style: (id, tensor) by number."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int):
        import torch

        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self.dataset.ids[number], torch.from_numpy(np.array(self.dataset[number]))
