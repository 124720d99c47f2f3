"""Index: which rows of which shard are a record's, in microseconds, whatever the number of records.

`index.parquet` holds all that is known of every record. Beside it `lookup.arrow` (Arrow IPC, uncompressed, so that it is
memory-mapped without a copy) holds what reading needs of those that are not rejected, in the file's order: `id`, `record_no`,
`shard`, `sequence_no`, `row_start`, `length`, `digest`; and, as a table of its own in the last two columns, `hash`, ascending,
with the `place` of the record that has it. A hash is the first eight bytes of the id's MD5 as a little-endian number.
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
from lengthwise.system.files import atomic

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
LOOKUP = "lookup.arrow"

# Of a dataset's files; raised when an older Lengthwise could not read them.
SCHEMA = 1

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

_LOOKUP = pa.schema(
    [
        *((name, pa.dictionary(pa.int32(), kind) if name == "shard" else kind) for name, kind in _COLUMNS.items()),
        ("hash", pa.uint64()),
        ("place", pa.int64()),
    ]
)

_REJECTED = "SELECT reason FROM records WHERE id = $asked AND status = 'rejected' LIMIT 1"

# Ids that are most like one that is asked for: a part of it between bars is its accession, perhaps with a version, or name.
_NEAR = r"""
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


def write_lookup(index: Path) -> None:
    """Write `lookup.arrow` beside an index; its size goes into the lookup, so that another index's is not taken for it."""
    table = _lookup(index).replace_schema_metadata({"index_bytes": str(index.stat().st_size)})
    with atomic(index.with_name(LOOKUP)) as part, pa.ipc.new_file(part, table.schema) as file:
        file.write_table(table)


def _lookup(index: Path) -> pa.Table:
    """What `lookup.arrow` holds of an index: about 100 bytes a record, and half as much again while it is made."""
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
            found = database.sql(f"SELECT (md5_number(id) & {2**64 - 1})::UBIGINT AS hash FROM ids")
            hashes.append(found.fetchnumpy()["hash"])
    whole = {name: _one(pa.chunked_array(columns.pop(name), _LOOKUP.field(name).type)) for name in _COLUMNS}
    hashed = np.concatenate(hashes)
    place = np.argsort(hashed, kind="stable")
    return pa.table({**whole, "hash": hashed[place], "place": place}, _LOOKUP)


def _one(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; without a copy if it is."""
    return column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()


def _array(column: pa.Array, dtype: type, per_row: int = 1) -> np.ndarray:
    """A column over its own memory; Arrow's `to_numpy` would import pandas."""
    return np.frombuffer(column.buffers()[1] or b"", dtype, len(column) * per_row)


def hash_id(record_id: str) -> np.uint64:
    """The hash that `lookup.arrow` has for an id."""
    digest = hashlib.md5(record_id.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def read_pages(path: Path) -> int:
    """Read every page of a table and compare it with its checksum, if it has one; returns the number of rows."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return sum(len(batch) for batch in file.iter_batches())


class Index:
    """What a finished dataset knows of its records. A `place` counts those that are not rejected, from 0.

    Parameters
    ----------
    folder
        The dataset's folder.
    readable
        How many records are not rejected.

    Raises
    ------
    LengthwiseError
        A file of it is missing or damaged.
    """

    def __init__(self, folder: Path, readable: int):
        self.path = folder / "index.parquet"
        try:
            self.bytes = self.path.stat().st_size
            self._table = _mapped(folder / LOOKUP, self.bytes)
            if self._table is None:  # the store was made before there was one, or it is another index's
                self._table = _lookup(self.path)
            columns = {name: _one(self._table[name]) for name in _LOOKUP.names}
            names = columns["shard"].dictionary
            names.validate(full=True)
            self.shard_names: list[str] = names.to_pylist()
            self.shard = _array(columns["shard"].indices, np.int32)
            self.record_no, self.row_start = (_array(columns[name], np.int64) for name in ("record_no", "row_start"))
            self.sequence_no, self.length = (_array(columns[name], np.int32) for name in ("sequence_no", "length"))
            self.digest = _array(columns["digest"], np.uint8, 24).reshape(-1, 24)
            self._hash, self._place = _array(columns["hash"], np.uint64), _array(columns["place"], np.int64)
            _, ends, text = columns["id"].buffers()
            self._ends, self._text = np.frombuffer(ends or bytes(8), np.int64), memoryview(text or b"")
        except _UNREADABLE as error:
            raise self.damaged() from error
        if len(self) != readable:
            raise LengthwiseError(
                f"{self.path}: has {len(self):,} records that are not rejected, and the manifest says {readable:,}; "
                "remove it and run snakemake again"
            )

    def __len__(self) -> int:
        return len(self.length)

    def id(self, place: int) -> str:
        return str(self._text[self._ends.item(place) : self._ends.item(place + 1)], "utf-8", "replace")

    def find(self, record_id: str) -> Iterator[int]:
        """The places of the records with this id, the first first; only repeats of one sequence share an id."""
        wanted = hash_id(record_id)
        at = int(self._hash.searchsorted(wanted))
        while at < len(self) and self._hash[at] == wanted:
            place = self._place.item(at)
            if 0 <= place < len(self) and self.id(place) == record_id:  # and not only its hash
                yield place
            at += 1

    @cached_property
    def frame(self) -> "pd.DataFrame":
        """Every record, in the file's order."""
        import pandas as pd

        self._require_unchanged()
        try:
            return pd.read_parquet(self.path)
        except _UNREADABLE as error:
            raise self.damaged() from error

    def check(self) -> int:
        """Read the whole index, and compare the lookup with it; returns the number of records.

        Raises
        ------
        LengthwiseError
            One of them is damaged.
        """
        try:
            records = read_pages(self.path)
        except _UNREADABLE as error:
            raise self.damaged() from error
        self.check_lookup()
        return records

    def check_lookup(self) -> None:
        """Compare the lookup with an index that is whole.

        Raises
        ------
        LengthwiseError
            It is damaged.
        """
        try:
            same = _lookup(self.path).equals(self._table)
        except _UNREADABLE as error:
            raise self.damaged() from error
        if not same:
            raise LengthwiseError(f"{self.path.with_name(LOOKUP)}: damaged; remove it and run snakemake again")

    def where(self, condition: str) -> np.ndarray:
        """Whether a SQL condition over the columns of `frame` holds for the record at each place.

        Raises
        ------
        LengthwiseError
            It is no condition over these columns, or is after something else than these records.
        """
        import duckdb

        records = self._sealed().view("records")
        try:
            chosen = records.project(f"record_no, ({condition}\n) AS chosen")
            if chosen.columns != ["record_no", "chosen"] or chosen.types[1] != "BOOLEAN":
                raise LengthwiseError(f"where({condition!r}): is no condition; one is: length < 512 AND id LIKE 'sp|%'")
            numbers = chosen.filter("chosen").project("record_no").fetchnumpy()["record_no"]
        except duckdb.Error as error:
            what = str(error).splitlines()[0]
            raise LengthwiseError(
                f"where({condition!r}): {what}; the columns are {', '.join(records.columns)}"
            ) from error
        return np.isin(self.record_no, numbers)

    def explain(self, record_id: str) -> str:
        """Why there is nothing to read under this id: the reason of its rejection, or which ids are near it."""
        import duckdb

        asked = {"asked": record_id.encode("utf-8", "replace").decode()}
        database = self._sealed()
        try:
            rejected, near = (database.execute(query, asked).fetchall() for query in (_REJECTED, _NEAR))
        except duckdb.Error as error:
            raise self.damaged() from error
        if rejected:
            return f"{record_id!r} was rejected: {rejected[0][0]}"
        names = list(dict.fromkeys(name for (name,) in near))[:3]
        return f"no record {record_id!r}" + (f"; near it: {', '.join(names)}" if names else "")

    def _sealed(self) -> "duckdb.DuckDBPyConnection":
        """A database of these records, as the view `records`, that can reach nothing else."""
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
            raise LengthwiseError(f"{self.path}: is gone, or another since it was opened; open the dataset again")

    def damaged(self) -> LengthwiseError:
        return LengthwiseError(f"{self.path}: missing or damaged, or {LOOKUP} is; remove both and run snakemake again")


def _mapped(path: Path, index_bytes: int) -> pa.Table | None:
    """The lookup of an index of this size, memory-mapped; None where there is none."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError:
        return None
    table.validate()
    if not table.schema.equals(_LOOKUP):
        raise ValueError("other columns")
    return table if table.schema.metadata == {b"index_bytes": b"%d" % index_bytes} else None
