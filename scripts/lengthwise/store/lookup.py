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

_REJECTION_QUERY = "SELECT reason FROM records WHERE id = $asked AND status = 'rejected' LIMIT 1"

# The ids most similar to an unknown id. Parts between bars (`sp|P69905|HBA_HUMAN`) match alone, with or without a version.
_SIMILAR_QUERY = r"""
    WITH asked AS (SELECT lower($asked) AS whole, regexp_replace(lower($asked), '\.[0-9]+$', '') AS short)
    SELECT id FROM (
        SELECT id, record_no, CASE
            WHEN contains(concat('|', lower(id), '|'), concat('|', whole, '|')) THEN 2
            WHEN contains(concat('|', lower(id), '|'), concat('|', short, '|')) THEN 2
            WHEN contains(concat('|', whole, '|'), concat('|', lower(id), '|')) THEN 2
            ELSE jaro_winkler_similarity(lower(id), whole) END AS likeness
        FROM records, asked WHERE status != 'rejected')
    WHERE likeness > 0.85 ORDER BY likeness DESC, record_no LIMIT 8
"""


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
            database.register("ids", pa.table({"id": columns["id"][-1]}))
            batch_hashes = database.sql(f"SELECT (md5_number(id) & {2**64 - 1})::UBIGINT AS hash FROM ids")
            hashes.append(batch_hashes.fetchnumpy()["hash"])
    records = {
        name: _one_chunk(pa.chunked_array(columns.pop(name), _LOOKUP_SCHEMA.field(name).type)) for name in _COLUMNS
    }
    all_hashes = np.concatenate(hashes)
    place = np.argsort(all_hashes, kind="stable")
    return pa.table({**records, "hash": all_hashes[place], "place": place}, _LOOKUP_SCHEMA)


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

    def __init__(self, folder: Path, readable: int):
        self.path = folder / "index.parquet"
        try:
            self.bytes = self.path.stat().st_size
            self._table = _map_lookup(folder / LOOKUP, self.bytes)
            if self._table is None:  # a store of an earlier version has none
                self._table = _build_lookup(self.path)
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

    @cached_property
    def frame(self) -> "pd.DataFrame":
        """All records, rejected ones too, in the FASTA file's order."""
        import pandas as pd

        self._require_unchanged()
        try:
            return pd.read_parquet(self.path)
        except _UNREADABLE as error:
            raise self.damaged() from error

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

    def where(self, condition: str) -> np.ndarray:
        """Evaluate a SQL condition over the columns of `frame`.

        Returns
        -------
        [N] bool by place: whether the condition holds.

        Raises
        ------
        LengthwiseError
            It is not a condition over these columns, or it reads anything other than these records.
        """
        import duckdb

        records = self._sandboxed_database().view("records")
        try:
            chosen = records.project(f"record_no, ({condition}\n) AS chosen")
            if chosen.columns != ["record_no", "chosen"] or chosen.types[1] != "BOOLEAN":
                raise LengthwiseError(
                    f"where({condition!r}): is not a condition; write one such as: length < 512 AND id LIKE 'sp|%'"
                )
            numbers = chosen.filter("chosen").project("record_no").fetchnumpy()["record_no"]
        except duckdb.Error as error:
            what = str(error).splitlines()[0]
            raise LengthwiseError(
                f"where({condition!r}): {what}; the columns are {', '.join(records.columns)}"
            ) from error
        return np.isin(self.record_no, numbers)

    def explain(self, record_id: str) -> str:
        """Why there is no embedding under this id: the reason of its rejection, or similar ids."""
        import duckdb

        asked = {"asked": record_id.encode("utf-8", "replace").decode()}
        database = self._sandboxed_database()
        try:
            rejected, similar = (
                database.execute(query, asked).fetchall() for query in (_REJECTION_QUERY, _SIMILAR_QUERY)
            )
        except duckdb.Error as error:
            raise self.damaged() from error
        if rejected:
            return f"{record_id!r} was rejected: {rejected[0][0]}"
        names = list(dict.fromkeys(name for (name,) in similar))[:3]
        return f"no record {record_id!r}" + (f"; near it: {', '.join(names)}" if names else "")

    def _sandboxed_database(self) -> "duckdb.DuckDBPyConnection":
        """A database with the view `records` and no access to other files, the network or Python variables."""
        import duckdb

        self._require_unchanged()
        database = duckdb.connect(config={"python_enable_replacements": "false"})
        database.execute("SET allowed_paths = ?", [[str(self.path)]])
        database.execute("SET enable_external_access = false")
        try:
            database.read_parquet(str(self.path)).create_view("records")
        except duckdb.Error as error:
            raise self.damaged() from error
        database.execute("SET lock_configuration = true")
        return database

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
