"""What exports are made of: the records of a dataset and what is stored of them."""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.read.dataset import another, open_shard
from lengthwise.store.layout import REMAKE
from lengthwise.store.lookup import read_pages
from lengthwise.store.manifest import read_manifest
from lengthwise.store.shard import Shard
from lengthwise.store.sizes import export_bytes
from lengthwise.system.text import size

# Pooled vectors are gathered so many bytes at a time.
_GATHERED_BYTES = 64 << 20


@dataclass(frozen=True)
class Protein:
    """What is stored of one id."""

    id: str
    key: str | None  # what biotrainer calls its sequence
    stored: dict[str, np.ndarray]  # layer_<n> [L, D]; mean_<n> and bos_<n> [D] float32


class Source:
    """A dataset's records and what is stored of them, a few at a time. Use as a context manager."""

    def __init__(self, dataset: Path, spill: Path, memory_bytes: int):
        self.dataset = dataset
        self.manifest = read_manifest(dataset / "manifest.json")
        self.settings = self.manifest["settings"]
        self.layer = self.settings["layers"][0]
        self.store = dataset.resolve().parent.parent
        self.sequences = str(self.store / "inputs" / self.manifest["dataset"] / "sequences.parquet")
        config = {"memory_limit": f"{memory_bytes}B", "temp_directory": str(spill), "threads": 1}
        self.database = duckdb.connect(config=config)
        read_pages(dataset / "index.parquet")  # DuckDB compares no checksums
        index = str(dataset / "index.parquet").replace("'", "''")  # a view takes no parameters
        self.database.execute(
            f"CREATE VIEW records AS SELECT * FROM read_parquet('{index}') WHERE status <> 'rejected'"
        )

    @property
    def origin(self) -> dict[str, str | bool]:
        """What made the numbers, in short: for the head of a file that will be moved away from here."""
        return {
            "model": self.settings["model"],
            "weights_sha256": self.settings["weights_sha256"],
            "random_weights": self.settings["random_weights"],
            "input_sha256": self.manifest["input_sha256"],
            "made_with": f"lengthwise {__version__}",
        }

    def require_space(self, folder: Path, kind: str) -> None:
        """Raise if an export does not fit on the disk."""
        needed, free = export_bytes(kind, self.settings, self.dataset / "index.parquet"), shutil.disk_usage(folder).free
        if needed > free:
            raise LengthwiseError(
                f"{folder.parents[1]}: this export takes about {size(needed)} and {size(free)} are free; free some space, or "
                "take it out of 'exports'"
            )

    def shared(self, short: str) -> set[str]:
        """The ids that another id shares this SQL expression of them with."""
        query = f"SELECT {short} FROM records GROUP BY ALL HAVING min(id) <> max(id)"
        found = self.database.execute(f"SELECT DISTINCT id FROM records WHERE {short} IN ({query})")
        return {record_id for (record_id,) in found.fetchall()}

    def shard(self, name: str | None) -> Shard:
        if name not in self.manifest["shards"]:
            raise LengthwiseError(f"{self.dataset / 'index.parquet'}: damaged; remove it and run snakemake again")
        return open_shard(self.dataset, self.store, self.settings, name)

    def proteins(self, names: list[str], with_key: bool = False) -> Iterator[Protein]:
        """Each id once, in the order of storage, with these tensors of its sequence."""
        key, join, params = "NULL", "", []
        if with_key:
            key, params = "key", [self.sequences]
            join = " JOIN (SELECT digest, sha256(decode(sequence) || '_' || length) AS key FROM read_parquet(?)) USING (digest)"
        reader = self.database.sql(
            f"SELECT id, {key} AS key, digest, shard, sequence_no, row_start, length, min(record_no) AS record_no"
            f" FROM records{join} GROUP BY ALL ORDER BY shard, sequence_no, record_no",
            params=params,
        ).to_arrow_reader(10_000)
        rows = (row for batch in reader for row in batch.to_pylist())
        for name, group in itertools.groupby(rows, key=lambda row: row["shard"]):
            shard = self.shard(name)
            for row in group:
                number = row["sequence_no"]
                if not shard.holds(number, row["digest"], row["row_start"], row["length"]):
                    raise another(self.dataset, shard)
                if not shard.is_intact(number):
                    raise LengthwiseError(
                        f"{shard.path}: sequence {number}, which is {row['id']}, is damaged; {REMAKE}"
                    )
                lines = slice(row["row_start"], row["row_start"] + row["length"])
                stored = {n: shard[n][lines if n.startswith("layer_") else number] for n in names}
                yield Protein(row["id"], row["key"], stored)

    def pooled(self, names: list[str]) -> Iterator[tuple[pa.RecordBatch, dict[str, np.ndarray]]]:
        """Some records at a time, in the input's order, with these tensors [n, D] of them."""
        width = self.settings["embed_dim"]
        reader = self.database.sql(
            "SELECT id, digest, length, shard, sequence_no FROM records ORDER BY record_no"
        ).to_arrow_reader(max(1, _GATHERED_BYTES // (4 * width * len(names))))
        for batch in reader:
            gathered = {name: np.empty((len(batch), width), np.float32) for name in names}
            places = batch.select(["digest", "shard", "sequence_no"]).to_pandas()
            for name, group in places.groupby("shard", dropna=False):
                shard, numbers = self.shard(name), group["sequence_no"].to_numpy()
                digests = np.frombuffer(b"".join(group["digest"]), np.uint8).reshape(-1, 24)
                if not shard.holds_all(numbers, digests):
                    raise another(self.dataset, shard)
                for tensor, vectors in gathered.items():
                    vectors[group.index] = shard[tensor][numbers]
            yield batch, gathered

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_):
        self.database.close()
