"""Exports: a finished dataset in the layouts of other tools, each a folder that is there whole or not at all."""

import csv
import fcntl
import hashlib
import io
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise._version import __version__
from lengthwise.alphabet import digest_name
from lengthwise.config import store_name
from lengthwise.errors import LengthwiseError
from lengthwise.files import fsync_folder, lock, scratch_folder, writing
from lengthwise.index import read_pages
from lengthwise.logs import size
from lengthwise.manifest import read_manifest
from lengthwise.presence import at_work
from lengthwise.reading import another, open_shard
from lengthwise.store import REMAKE, Shard

# UniProt's ids are database|accession|name.
_ACCESSION = r"^(?:sp|tr)\|([^|]+)\|"
# What an HDF5 name cannot hold, and the sign that stands for it.
_UNNAMEABLE = re.compile(r"[/%\0]|^\.$")
# Ids that a file can have for its name as they are, with room for an ending.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._|=+@,-]{0,199}")
# Pooled vectors are gathered so many bytes at a time.
_GATHERED_BYTES = 64 << 20
# What an entry takes beside its numbers, measured and rounded up.
_ENTRY_BYTES = {"h5": 900, "pt": 2048, "biotrainer": 1300, "parquet": 64}


def export(dataset: Path, kind: str, memory_bytes: int = 1 << 30) -> int:
    """Write a finished dataset's folder ``exports/<kind>``, in place of one that is there.

    Rejected records are left out; duplicates are there under their own ids.

    Parameters
    ----------
    dataset
        The folder ``results/<model>/datasets/<dataset>``.
    kind
        ``h5``: UniProt's layout, ``per-residue.h5`` and ``per-protein.h5``, a float16 array for each accession.
        ``pt``: what fair-esm's ``extract.py`` writes, a file for each protein; ``files.tsv`` says which is whose.
        ``biotrainer``: ``embeddings_file_<model>.h5``, and ``reduced_embeddings_file_<model>.h5`` of means.
        ``parquet``: ``pooled.parquet``, a row with all pooled vectors for each record.
    memory_bytes
        What sorting the records may take before it spills to disk.

    Returns
    -------
    The number of entries written.

    Raises
    ------
    LengthwiseError
        The disk is full, a shard is gone, or a number is too large for the layout's type.
    """
    folder = dataset / "exports" / kind
    try:
        with (
            at_work(dataset.resolve().parent.parent),
            _replacing(folder) as part,
            _Source(dataset, part.with_name("spill"), memory_bytes) as source,
        ):
            source.require_space(part, kind)
            return _WRITERS[kind](source, part, tensors_of(kind, source.settings))
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        what = " ".join(str(error).split())[:300]
        raise LengthwiseError(f"{folder}: cannot be made: {what}; mend that and run again") from error


def tensors_of(kind: str, settings: dict) -> list[str]:
    """The stored tensors that an export takes."""
    first = settings["layers"][0]
    if kind in ("h5", "biotrainer"):
        return [f"layer_{first}", f"mean_{first}"]
    names = {"residue": "layer", "mean": "mean", "bos": "bos"}
    taken = [output for output in names if output in settings["outputs"] and (kind == "pt" or output != "residue")]
    return [f"{names[output]}_{layer}" for output in taken for layer in settings["layers"]]


def export_bytes(kind: str, settings: dict, records: Path) -> int:
    """What an export takes, about and at most.

    Parameters
    ----------
    kind, settings
        The export's name and the store's settings.
    records
        The table of a dataset's records: its index, or what ingest wrote.
    """
    query = "SELECT count(*), coalesce(sum(length), 0)::BIGINT FROM read_parquet(?) WHERE status <> 'rejected'"
    with duckdb.connect(config={"threads": 1}) as database:
        ((n, residues),) = database.execute(query, [str(records)]).fetchall()
    total = n * _ENTRY_BYTES[kind]
    for name in tensors_of(kind, settings):
        of_residues = name.startswith("layer_")
        # biotrainer's files have residues as they are stored.
        half = kind == "h5" or (kind == "biotrainer" and of_residues and settings["storage_dtype"] == "float16")
        total += (residues if of_residues else n) * settings["embed_dim"] * (2 if half else 4)
    return total


def missing_bytes(store: Path, settings: dict, datasets: list[str], kinds: list[str]) -> int:
    """What those of these exports take that are not there yet."""
    missing = [(n, k) for n in datasets for k in kinds if not (store / "datasets" / n / "exports" / k).exists()]
    return sum(export_bytes(kind, settings, store / "inputs" / name / "records.parquet") for name, kind in missing)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes this one's place on success, synced; what a killed attempt left goes first."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        _alone(folder.with_name(f".{folder.name}.lock.tmp")),
        scratch_folder(folder.with_name(f".{folder.name}.tmp")) as scratch,
    ):
        part = scratch / "whole"
        part.mkdir()
        yield part
        os.sync()  # all files at once: one after the other would take minutes for thousands
        for path in part.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # nothing is left to write, but an error is told
        with suppress(FileNotFoundError):
            os.rename(folder, scratch / "old")  # never half of it under its name
        os.rename(part, folder)
        fsync_folder(folder.parent)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process has locked this file, which is gone afterwards."""
    while True:
        with open(path, "w") as file:
            lock(file.fileno(), fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # else whoever had it removed it
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


@dataclass(frozen=True)
class _Protein:
    """What is stored of one id."""

    id: str
    key: str | None  # what biotrainer calls its sequence
    stored: dict[str, np.ndarray]  # layer_<n> [L, D]; mean_<n> and bos_<n> [D] float32


class _Source:
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

    def proteins(self, names: list[str], with_key: bool = False) -> Iterator[_Protein]:
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
                yield _Protein(row["id"], row["key"], stored)

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

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_):
        self.database.close()


class _HDF5(io.FileIO):
    """A file for the HDF5 library, which ends the process where a write fails: it hears of none, and `create` raises."""

    def __init__(self, path: Path, attributes: dict):
        import h5py

        super().__init__(path, "w+")
        self.error: OSError | None = None
        self.file = h5py.File(self, "w")
        self.file.attrs.update(attributes)

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        written = len(rest)
        try:
            while len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = self.error or error
        return written

    def truncate(self, length: int | None = None) -> int:
        try:
            return super().truncate(length)
        except OSError as error:
            self.error = self.error or error
            return length or 0

    def create(self, key: str, array: np.ndarray, record_id: str) -> None:
        """Add an array, with the id that it belongs to as its attribute `original_id`."""
        # HDF5's strings end at a NUL; ingest writes other bytes that are no text in this way.
        self.file.create_dataset(key, data=array).attrs["original_id"] = record_id.replace("\0", "\\x00")
        self.check()

    def check(self) -> None:
        if self.error:
            raise self.error

    def close(self) -> None:
        if not self.closed:
            self.file.close()
            super().close()

    def __exit__(self, kind, *_) -> None:
        self.close()
        if kind is None:
            self.check()


def _write_h5(source: _Source, folder: Path, names: list[str]) -> int:
    shared = source.shared(f"coalesce(nullif(regexp_extract(id, '{_ACCESSION}', 1), ''), id)")
    about = {**source.origin, "layer": source.layer}
    n = 0
    with _HDF5(folder / "per-residue.h5", about) as residues, _HDF5(folder / "per-protein.h5", about) as means:
        for protein in source.proteins(names):
            n += 1
            key = h5_key(protein.id, shared)
            for name, file in zip(names, (residues, means), strict=True):
                file.create(key, _half(protein.stored[name], protein.id), protein.id)
    return n


def h5_key(record_id: str, shared: set[str] = frozenset()) -> str:
    """The name of a record's array in the h5 export: its accession; its whole id where that is none, or another id has it too.

    ``/``, ``%`` and NUL, and ``.`` alone, are percent-encoded: `urllib.parse.unquote` gives them back.

    >>> h5_key("sp|P69905|HBA_HUMAN"), h5_key("a/b")
    ('P69905', 'a%2Fb')
    """
    accession = re.match(_ACCESSION, record_id)
    key = accession[1] if accession and record_id not in shared else record_id
    return _UNNAMEABLE.sub(lambda found: f"%{ord(found[0]):02X}", key)


def _half(array: np.ndarray, record_id: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise LengthwiseError(
            f"record {record_id[:100]!r} has numbers beyond float16's range, which is the type of the h5 export; take h5 out of "
            "'exports': biotrainer and parquet keep them as they are"
        )
    return half


def _write_pt(source: _Source, folder: Path, names: list[str]) -> int:
    import torch

    words = {"layer": "representations", "mean": "mean_representations", "bos": "bos_representations"}
    shared = source.shared("lower(id)")
    with open(folder / "files.tsv", "w", newline="") as table:
        rows = csv.writer(table, delimiter="\t", lineterminator="\n")
        rows.writerow(["id", "file"])
        n = 0
        for protein in source.proteins(names):
            n += 1
            result: dict = {"label": protein.id}
            for name, array in protein.stored.items():
                kind, layer = name.split("_")
                result.setdefault(words[kind], {})[int(layer)] = torch.from_numpy(array.astype(np.float32))
            buffer = io.BytesIO()
            torch.save(result, buffer)
            name = file_name(protein.id, shared)
            (folder / name).write_bytes(buffer.getbuffer())
            rows.writerow([protein.id, name])
    return n


def file_name(record_id: str, shared: set[str] = frozenset()) -> str:
    """The name of a record's file in the pt export: its id if that can be one, else what can be kept of it and a checksum.

    >>> file_name("sp|P69905|HBA_HUMAN"), file_name("../a")
    ('sp|P69905|HBA_HUMAN.pt', '_a~61b4c98bfb92bdc9391613020e5b8cbf.pt')
    """
    if _SAFE_NAME.fullmatch(record_id) and record_id not in shared:
        return f"{record_id}.pt"
    kept = re.sub(r"[^A-Za-z0-9._|-]", "_", record_id[:100]).lstrip(".-")
    return f"{kept}~{hashlib.sha256(record_id.encode()).hexdigest()[:32]}.pt"


def _write_biotrainer(source: _Source, folder: Path, names: list[str]) -> int:
    model = store_name(source.settings["model"])
    about = {**source.origin, "layer": source.layer}
    n = 0
    with (
        _HDF5(folder / f"embeddings_file_{model}.h5", about) as residues,
        _HDF5(folder / f"reduced_embeddings_file_{model}.h5", about) as means,
    ):
        for key, same in itertools.groupby(source.proteins(names, with_key=True), key=lambda protein: protein.key):
            # biotrainer looks a sequence up by its key; other ids of it are beside it, for those who look for ids.
            for number, protein in enumerate(same, start=1):
                n += 1
                for name, file in zip(names, (residues, means), strict=True):
                    file.create(key if number == 1 else f"{key}_{number}", protein.stored[name], protein.id)
    return n


def _write_parquet(source: _Source, folder: Path, names: list[str]) -> int:
    width = source.settings["embed_dim"]
    vector = pa.list_(pa.float32(), width)
    schema = pa.schema(
        [("id", pa.string()), ("digest", pa.string()), ("length", pa.int32()), *((name, vector) for name in names)],
        metadata={key: str(value) for key, value in source.origin.items()},
    )
    n = 0
    with pq.ParquetWriter(folder / "pooled.parquet", schema, compression="zstd", use_dictionary=False) as writer:
        for batch, gathered in source.pooled(names):
            n += len(batch)
            digests = pa.array(map(digest_name, batch.column("digest").to_pylist()), pa.string())
            vectors = [pa.FixedSizeListArray.from_arrays(gathered[name].ravel(), width) for name in names]
            columns = [batch.column("id"), digests, batch.column("length"), *vectors]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return n


_WRITERS = {"h5": _write_h5, "pt": _write_pt, "biotrainer": _write_biotrainer, "parquet": _write_parquet}
