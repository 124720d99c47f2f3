"""The index of a dataset: find the shard and rows of a record by its id in microseconds.

`index.parquet` has a row for every record. `lookup.arrow` beside it serves reading. It is an uncompressed Arrow IPC file, so that
it can be memory-mapped. Its rows are the records that are not rejected, in the FASTA file's order: `id`, `record_no`, `shard`,
`sequence_no`, `row_start`, `length`, `digest`. The row number is the record's place.

The last two columns, `hash` and `place`, are a separate table to search by id: `hash` ascends, `place` is the record with that
hash. A hash is the first eight bytes of the id's MD5, little-endian.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.digests import digest_names
from lengthwise.store.accessions import ACCESSION, accession
from lengthwise.store.conditions import chosen, explain, names_sequence, sandbox

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

LOOKUP = "lookup.arrow"
_UNREADABLE = (OSError, ValueError, KeyError, pa.ArrowException)

_COLUMNS = {
    "id": pa.large_string(),
    "record_no": pa.int64(),
    "shard": pa.string(),
    "sequence_no": pa.int32(),
    "row_start": pa.int64(),
    "length": pa.int32(),
    "digest": pa.binary(24),
}

_LOOKUP_SCHEMA = pa.schema(
    [
        *((name, pa.dictionary(pa.int32(), kind) if name == "shard" else kind) for name, kind in _COLUMNS.items()),
        ("hash", pa.uint64()),
        ("place", pa.int64()),
    ]
)


def write_lookup(index: Path, lookup: Path) -> None:
    """Write the lookup of an index.

    The lookup records the size of the index, so that the lookup of another index is not used.
    """
    table = _build_lookup(index).replace_schema_metadata({"index_bytes": str(index.stat().st_size)})
    with pa.ipc.new_file(lookup, table.schema) as file:
        file.write_table(table)


def _build_lookup(index: Path) -> pa.Table:
    """The table in `lookup.arrow`: about 100 bytes per record, 150 while it is built."""
    import duckdb
    import pyarrow.parquet as pq

    columns: dict[str, list[pa.Array]] = {name: [] for name in _COLUMNS}
    hashes = [np.empty(0, np.uint64)]
    with (
        duckdb.connect(config={"threads": 1}) as database,
        pq.ParquetFile(index) as file,
    ):
        for batch in file.iter_batches(1 << 17, columns=[*_COLUMNS, "status"]):
            rows = batch.filter(pc.not_equal(batch["status"], "rejected"))
            for name, kind in _COLUMNS.items():
                column = rows[name].cast(kind)
                columns[name].append(column.dictionary_encode() if name == "shard" else column)
            hashes.append(_hash_all(database, columns["id"][-1]))
    records = {
        name: _one_chunk(pa.chunked_array(columns.pop(name), _LOOKUP_SCHEMA.field(name).type)) for name in _COLUMNS
    }
    all_hashes = np.concatenate(hashes)
    place = np.argsort(all_hashes, kind="stable")
    return pa.table({**records, "hash": all_hashes[place], "place": place}, _LOOKUP_SCHEMA)


def _hash_all(database: "duckdb.DuckDBPyConnection", texts: pa.Array) -> np.ndarray:
    """`hash_id` of each text: [n] uint64."""
    database.register("texts", pa.table({"text": texts}))
    query = f"SELECT (md5_number(text) & {2**64 - 1})::UBIGINT AS hash FROM texts"
    return np.asarray(database.sql(query).fetchnumpy()["hash"], np.uint64)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column as one chunk, without a copy if it has one."""
    return column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()


def _as_numpy(column: pa.Array, dtype: type, per_row: int = 1) -> np.ndarray:
    """A column as a numpy array without a copy. (Arrow's `to_numpy` imports pandas.)"""
    return np.frombuffer(column.buffers()[1] or b"", dtype, len(column) * per_row)


def hash_id(record_id: str) -> np.uint64:
    """The hash of an id in `lookup.arrow`."""
    digest = hashlib.md5(record_id.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def read_pages(path: Path) -> int:
    """Read a whole Parquet file and check the pages that have a checksum. Returns the number of rows.

    Raises
    ------
    OSError
        A page does not match its checksum, or the disk cannot read it.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return sum(len(batch) for batch in file.iter_batches())


class Index:
    """The records of a finished dataset. A `place` is a record's number among those that are not rejected, from 0.

    Parameters
    ----------
    folder
        The dataset's folder.
    readable
        The number of records that are not rejected, from the manifest.
    file
        The dataset's FASTA file. Only an index of several files has the column `file`; for others it is added when read.

    Attributes
    ----------
    shard_names
        The names of the dataset's shards.
    shard, sequence_no, row_start, length, record_no
        [N] by place: the record's shard (an index into `shard_names`), the number of its sequence in the shard, its first row,
        its residues, its number in the FASTA file.
    digest
        [N, 24] uint8 by place.

    Raises
    ------
    LengthwiseError
        The index or the lookup is missing or damaged.
    """

    def __init__(self, folder: Path, readable: int, file: str | None = None):
        self.path, self.file = folder / "index.parquet", file
        try:
            self.bytes = self.path.stat().st_size
            mapped = _map_lookup(folder / LOOKUP, self.bytes)
            self._table = mapped if mapped is not None else _build_lookup(self.path)  # an earlier version wrote none
            columns = {name: _one_chunk(self._table[name]) for name in _LOOKUP_SCHEMA.names}
            names = columns["shard"].dictionary
            names.validate(full=True)
            self.shard_names: list[str] = names.to_pylist()
            self.shard = _as_numpy(columns["shard"].indices, np.int32)
            self.record_no, self.row_start = (_as_numpy(columns[name], np.int64) for name in ("record_no", "row_start"))
            self.sequence_no, self.length = (_as_numpy(columns[name], np.int32) for name in ("sequence_no", "length"))
            self.digest = _as_numpy(columns["digest"], np.uint8, 24).reshape(-1, 24)
            self._hash, self._place = _as_numpy(columns["hash"], np.uint64), _as_numpy(columns["place"], np.int64)
            _, ends, text = columns["id"].buffers()
            self._ends, self._text = np.frombuffer(ends or bytes(8), np.int64), memoryview(text or b"")
        except _UNREADABLE as error:
            raise self.damaged() from error
        if len(self) != readable:
            raise LengthwiseError(
                f"{self.path}: has {len(self):,} records that are not rejected; the manifest says {readable:,}; "
                "remove it and run snakemake again"
            )

    def __len__(self) -> int:
        return len(self.length)

    def id(self, place: int) -> str:
        """The id of the record at a place."""
        return str(self._text[self._ends.item(place) : self._ends.item(place + 1)], "utf-8", "replace")

    def find(self, record_id: str) -> Iterator[int]:
        """The places of the records with this id, ascending. Records with one id all have the same sequence."""
        wanted = hash_id(record_id)
        row = int(self._hash.searchsorted(wanted))
        while row < len(self) and self._hash[row] == wanted:
            place = self._place.item(row)
            if 0 <= place < len(self) and self.id(place) == record_id:  # different ids may share a hash
                yield place
            row += 1

    def find_accession(self, wanted: str) -> Iterator[int]:
        """The places of the records whose id has this accession, ascending."""
        hashes, places = self._by_accession
        first, end = (hashes.searchsorted(hash_id(wanted), side) for side in ("left", "right"))
        yield from (place for place in places[first:end].tolist() if accession(self.id(place)) == wanted)

    @cached_property
    def _by_accession(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of all accessions in ascending order, and the place of each. Takes some seconds for ten million records."""
        import duckdb

        query = f"SELECT regexp_extract(id, '{ACCESSION}', 1) AS text FROM ids"
        with duckdb.connect(config={"threads": 1}) as database:
            database.register("ids", pa.table({"id": _one_chunk(self._table["id"])}))
            texts = database.sql(query).to_arrow_table()["text"]
            places = np.flatnonzero(pc.not_equal(texts, "").to_numpy())
            hashes = _hash_all(database, texts.take(places))
        order = np.argsort(hashes, kind="stable")
        return hashes[order], places[order]

    def hashes(self) -> np.ndarray:
        """[N] by place: the hash of the record's id."""
        hashes = np.empty_like(self._hash)
        hashes[self._place] = self._hash
        return hashes

    @cached_property
    def frame(self) -> "pd.DataFrame":
        """All records, rejected ones too, in the FASTA file's order. Digests are text."""
        import pyarrow.parquet as pq

        self._require_unchanged()
        try:
            table = pq.read_table(self.path)
            number = table.schema.get_field_index("digest")
            frame = table.set_column(number, "digest", digest_names(table["digest"])).to_pandas()
        except _UNREADABLE as error:
            raise self.damaged() from error
        if self.file is not None and "file" not in frame:
            frame["file"] = self.file
        return frame

    def check(self) -> int:
        """Read the whole index and compare the lookup with it. Returns the number of records.

        Raises
        ------
        LengthwiseError
            The index or the lookup is damaged.
        """
        try:
            records = read_pages(self.path)
        except _UNREADABLE as error:
            raise self.damaged() from error
        self.check_lookup()
        return records

    def check_lookup(self) -> None:
        """Build the lookup from the index again and compare.

        Raises
        ------
        LengthwiseError
            The lookup is damaged.
        """
        try:
            same = _build_lookup(self.path).equals(self._table)
        except _UNREADABLE as error:
            raise self.damaged() from error
        if not same:
            raise LengthwiseError(f"{self.path.with_name(LOOKUP)}: damaged; remove it and run snakemake again")

    def where(self, condition: str, sequences: Path) -> np.ndarray:
        """Evaluate a SQL condition: see `lengthwise.store.conditions.chosen`.

        Returns
        -------
        [N] bool by place: whether the condition holds.

        Raises
        ------
        LengthwiseError
            It is not a condition over the records, or it reads anything else.
        """
        database = self._database(sequences if names_sequence(condition) else None)
        return np.isin(self.record_no, chosen(database, condition))

    def explain(self, record_id: str) -> str:
        """Why there is no embedding under this id: the reason of its rejection, or similar ids."""
        import duckdb

        try:
            return explain(self._database(), record_id)
        except duckdb.Error as error:
            raise self.damaged() from error

    def _database(self, sequences: Path | None = None) -> "duckdb.DuckDBPyConnection":
        import duckdb

        self._require_unchanged()
        try:
            return sandbox(self.path, self.file, sequences)
        except duckdb.Error as error:
            raise self.damaged() from error

    def _require_unchanged(self) -> None:
        if not self.path.exists() or self.path.stat().st_size != self.bytes:
            raise LengthwiseError(f"{self.path}: was removed or replaced after it was opened; open the dataset again")

    def damaged(self) -> LengthwiseError:
        """The error of a damaged index or lookup."""
        return LengthwiseError(f"{self.path}: missing or damaged, or {LOOKUP} is; remove both and run snakemake again")


def _map_lookup(path: Path, index_bytes: int) -> pa.Table | None:
    """The lookup of an index of this size, memory-mapped; None if it does not exist or belongs to another index."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError:
        return None
    table.validate()
    if not table.schema.equals(_LOOKUP_SCHEMA):
        raise ValueError("unexpected columns")
    return table if table.schema.metadata == {b"index_bytes": b"%d" % index_bytes} else None
