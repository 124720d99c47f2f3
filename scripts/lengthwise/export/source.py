"""The input of an export: a dataset's records and their stored tensors, a few at a time."""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.esm2.tensors import POOLED
from lengthwise.ingest.tables import WINDOWS
from lengthwise.read.shards import mismatch, open_shard
from lengthwise.store.layout import REMAKE
from lengthwise.store.lookup import read_pages
from lengthwise.store.manifest import read_manifest
from lengthwise.store.shard import Shard
from lengthwise.store.sizes import export_bytes
from lengthwise.store.windows import Windows
from lengthwise.system.files import checked_sha256, read_json
from lengthwise.system.text import size

_POOLED = tuple(f"{output}_" for output in POOLED)
# The size of a batch of pooled vectors.
_GATHERED_BYTES = 64 << 20
_OPEN_SHARDS = 128


@dataclass(frozen=True)
class Protein:
    """The stored tensors of one id."""

    id: str
    key: str | None  # biotrainer's key of its sequence
    stored: dict[
        str, np.ndarray
    ]  # layer_<n> [L, D]; mean_<n> and bos_<n> [D] float32; contacts [P], none if it is too long


class Source:
    """A dataset's records and their stored tensors. Use as a context manager.

    Parameters
    ----------
    dataset
        The dataset's folder.
    spill
        A folder for DuckDB's temporary files.
    memory_bytes
        The limit of DuckDB's memory; beyond it sorting spills to `spill`.

    Attributes
    ----------
    index_sha256
        The checksum of the index.

    Raises
    ------
    LengthwiseError
        The manifest is missing or damaged, or the index is damaged.
    OSError
        The index is damaged.
    """

    def __init__(self, dataset: Path, spill: Path, memory_bytes: int):
        self.dataset = dataset
        self.manifest = read_manifest(dataset / "manifest.json")
        self.settings = self.manifest["settings"]
        self.layer = self.settings["layers"][0]
        self.store = dataset.resolve().parent.parent
        self.sequences = self.store / "inputs" / self.manifest["dataset"] / "sequences.parquet"
        self.database = duckdb.connect(
            config={"memory_limit": f"{memory_bytes}B", "temp_directory": str(spill), "threads": 1}
        )
        self.index_sha256 = checked_sha256(dataset / "index.parquet", self.manifest)
        if "files" not in self.manifest:  # of an earlier version
            read_pages(dataset / "index.parquet")  # DuckDB does not check the checksums of pages
        self._windows = Windows(dataset)
        self._window_shard = lru_cache(_OPEN_SHARDS)(self._open_shard)
        index = str(dataset / "index.parquet").replace("'", "''")  # CREATE VIEW takes no parameters
        self.database.execute(
            f"CREATE VIEW records AS SELECT * FROM read_parquet('{index}') WHERE status <> 'rejected'"
        )

    @property
    def origin(self) -> dict[str, str | bool]:
        """Model, weights and input, as attributes of an exported file: it may be moved away from the store."""
        return {
            "model": self.settings["model"],
            "weights_sha256": self.settings["weights_sha256"],
            "random_weights": self.settings["random_weights"],
            "input_sha256": self.manifest["input_sha256"],
            "made_with": f"lengthwise {__version__}",
        }

    def require_space(self, folder: Path, kind: str) -> None:
        """Check that an export fits on the disk.

        Raises
        ------
        LengthwiseError
            It does not.
        """
        needed_bytes = export_bytes(kind, self.settings, self.dataset / "index.parquet")
        free_bytes = shutil.disk_usage(folder).free
        if needed_bytes > free_bytes:
            raise LengthwiseError(
                f"{folder.parents[1]}: this export takes about {size(needed_bytes)} and {size(free_bytes)} are free; "
                "free some space, or remove it from 'exports'"
            )

    def ids_sharing(self, expression: str) -> set[str]:
        """The ids for which a SQL expression of `id` has the same value as for another id."""
        query = f"SELECT {expression} FROM records GROUP BY ALL HAVING min(id) <> max(id)"
        found = self.database.execute(f"SELECT DISTINCT id FROM records WHERE {expression} IN ({query})")
        return {record_id for (record_id,) in found.fetchall()}

    def _checked_sequences(self) -> list[str]:
        """The tables that have every sequence of the dataset, whole."""
        summary = read_json(self.sequences.with_name("summary.json"))
        tables = [self.sequences, *(self.sequences.with_name(name) for name in [WINDOWS] if len(self._windows))]
        for table in tables:
            checked_sha256(table, summary)
        return [str(table) for table in tables]

    def _open_shard(self, name: str | None) -> Shard:
        if name is None or name not in self.manifest["shards"]:
            raise LengthwiseError(f"{self.dataset / 'index.parquet'}: damaged; remove it and run snakemake again")
        return open_shard(self.dataset, self.store, self.settings, name)

    def proteins(self, names: list[str], with_key: bool = False) -> Iterator[Protein]:
        """Yield each id once, in the order of storage.

        Parameters
        ----------
        names
            The tensors to read.
        with_key
            Whether to compute `Protein.key`.

        Raises
        ------
        LengthwiseError
            A shard is missing, damaged, or does not match the index.
        """
        key, join, parameters = "NULL", "", []
        if with_key:
            key, parameters = "key", [self._checked_sequences()]
            join = (
                " JOIN (SELECT digest, sha256(decode(sequence) || '_' || length) AS key"
                " FROM read_parquet(?, union_by_name = true)) USING (digest)"
            )
        reader = self.database.sql(
            f"SELECT id, {key} AS key, digest, shard, sequence_no, row_start, length, min(record_no) AS record_no"
            f" FROM records{join} GROUP BY ALL ORDER BY shard, sequence_no, record_no",
            params=parameters,
        ).to_arrow_reader(10_000)
        records = (record for batch in reader for record in batch.to_pylist())
        for name, group in itertools.groupby(records, key=lambda record: record["shard"]):
            shard = self._open_shard(name)
            for record in group:
                row = self._windows.row(np.frombuffer(record["digest"], np.uint8))
                if row is not None:
                    yield Protein(record["id"], record["key"], self._joined(row, names))
                    continue
                number, start = record["sequence_no"], record["row_start"]
                if not shard.holds(number, record["digest"], start, record["length"]):
                    raise mismatch(self.dataset, shard)
                if not shard.is_intact(number):
                    raise LengthwiseError(
                        f"{shard.path}: sequence {number}, which is {record['id']}, is damaged; {REMAKE}"
                    )
                stored = {name: _own(shard, name, number) for name in names}
                yield Protein(record["id"], record["key"], stored)

    def _joined(self, row: int, names: list[str]) -> dict[str, np.ndarray]:
        """The stored tensors of a protein in windows."""
        for piece in self._windows.pieces(row):
            shard = self._window_shard(piece["shard"])
            if not shard.is_intact(piece["sequence_no"]):
                raise LengthwiseError(f"{shard.path}: sequence {piece['sequence_no']}, a window, is damaged; {REMAKE}")
        return {
            name: self._windows.rows(row, name, self._window_shard)
            if name.startswith("layer_")
            else self._windows.pooled(name, np.array([row]), self._window_shard)[0]
            for name in names
        }

    def pooled(self, names: list[str]) -> Iterator[tuple[pa.RecordBatch, dict[str, np.ndarray]]]:
        """Yield batches of records in the input's order: their ids, digests and lengths, and these tensors [n, D] float32.

        Raises
        ------
        LengthwiseError
            A shard is missing, damaged, or does not match the index.
        """
        width = self.settings["embed_dim"]
        reader = self.database.sql(
            "SELECT id, digest, length, shard, sequence_no FROM records ORDER BY record_no"
        ).to_arrow_reader(max(1, _GATHERED_BYTES // (4 * width * len(names))))
        for batch in reader:
            gathered = {name: np.empty((len(batch), width), np.float32) for name in names}
            places = batch.select(["digest", "shard", "sequence_no"]).to_pandas()
            digests = np.frombuffer(b"".join(places["digest"]), np.uint8).reshape(-1, 24)
            rows = self._windows.find(digests)
            for tensor, vectors in gathered.items() if (rows >= 0).any() else ():
                vectors[rows >= 0] = self._windows.pooled(tensor, rows[rows >= 0], self._window_shard)
            for name, group in places[rows < 0].groupby("shard", dropna=False):
                shard, numbers = self._open_shard(name), group["sequence_no"].to_numpy()
                if not shard.holds_all(numbers, digests[group.index]):
                    raise mismatch(self.dataset, shard)
                for tensor, vectors in gathered.items():
                    vectors[group.index] = shard[tensor][numbers]
            yield batch, gathered

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()


def _own(shard: Shard, name: str, number: int) -> np.ndarray:
    """What a tensor has of a sequence."""
    own = shard[name][shard.entries(name, number)]
    return own[0] if name.startswith(_POOLED) else own
