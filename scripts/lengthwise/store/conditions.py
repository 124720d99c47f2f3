"""SQL over the records of a dataset, in a database that reaches nothing else."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.tables import WINDOWS
from lengthwise.store.accessions import ACCESSION

if TYPE_CHECKING:
    import duckdb

# The form in which people read digests: see `lengthwise.ingest.digests.digest_name`.
_DIGEST_NAME = "'SQ.' || translate(to_base64(digest), '+/', '-_')"
_NAMES_SEQUENCE = re.compile(r"\bsequence\b", re.IGNORECASE)

_REJECTION_QUERY = f"""
    SELECT reason FROM records
    WHERE status = 'rejected' AND (id = $asked OR nullif(regexp_extract(id, '{ACCESSION}', 1), '') = $asked) LIMIT 1
"""

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


def names_sequence(condition: str) -> bool:
    """Whether a condition names the column `sequence`."""
    return _NAMES_SEQUENCE.search(condition) is not None


def sandbox(index: Path, file: str | None = None, sequences: Path | None = None) -> "duckdb.DuckDBPyConnection":
    """A database with the view `records` and no access to other files, the network or Python variables.

    Parameters
    ----------
    index
        `index.parquet`. In the view, digests are text.
    file
        The value of the column `file`, if the index has none.
    sequences
        The dataset's table of sequences; with it, the view has the column `sequence`.

    Raises
    ------
    LengthwiseError
        The table of sequences is missing or damaged, or lacks the sequence of a record.
    duckdb.Error
        The index is damaged.
    """
    import duckdb

    database = duckdb.connect(config={"python_enable_replacements": "false"})
    tables = [path for path in (sequences, sequences.with_name(WINDOWS)) if path.exists()] if sequences else []
    database.execute("SET allowed_paths = ?", [[str(path) for path in (index, *tables)]])
    database.execute("SET enable_external_access = false")
    records = database.read_parquet(str(index))
    if file is not None and "file" not in records.columns:
        records = records.project("*, '{}' AS file".format(file.replace("'", "''")))
    if sequences:
        records = _with_sequences(database, records, sequences, tables)
    records.project(f"* REPLACE ({_DIGEST_NAME} AS digest)").create_view("records")
    database.execute("SET lock_configuration = true")
    return database


def _with_sequences(
    database: "duckdb.DuckDBPyConnection", records: "duckdb.DuckDBPyRelation", sequences: Path, tables: list[Path]
) -> "duckdb.DuckDBPyRelation":
    """The records with the column `sequence`, null where a record is rejected."""
    import duckdb

    what = "is missing or damaged"
    try:
        table = database.read_parquet([str(path) for path in tables], union_by_name=True)
        table = table.project("digest AS of, decode(sequence) AS sequence")
        joined = records.join(table, "digest = of", how="left").project("* EXCLUDE (of)")
        if not len(joined.filter("status <> 'rejected' AND sequence IS NULL").project("1").limit(1)):
            return joined
        what = "is of another content of the FASTA file"
    except duckdb.Error as error:
        raise LengthwiseError(f"{sequences}: {what}; run snakemake, which reads the FASTA file again") from error
    raise LengthwiseError(f"{sequences}: {what}; run snakemake, which reads the FASTA file again")


def chosen(database: "duckdb.DuckDBPyConnection", condition: str) -> np.ndarray:
    """The numbers of the records in a `sandbox` for which a condition holds.

    Raises
    ------
    LengthwiseError
        It is not a condition over the columns, or it reads anything other than these records.
    """
    import duckdb

    records = database.view("records")
    try:
        found = records.project(f"record_no, ({condition}\n) AS chosen")
        if found.columns != ["record_no", "chosen"] or found.types[1] != "BOOLEAN":
            raise LengthwiseError(
                f"where({condition!r}): is not a condition; write one such as: length < 512 AND id LIKE 'sp|%'"
            )
        return found.filter("chosen").project("record_no").fetchnumpy()["record_no"]
    except duckdb.Error as error:
        what = str(error).splitlines()[0]
        columns = ", ".join(dict.fromkeys([*records.columns, "sequence"]))
        raise LengthwiseError(f"where({condition!r}): {what}; the columns are {columns}") from error


def explain(database: "duckdb.DuckDBPyConnection", record_id: str) -> str:
    """Why a `sandbox` has no embedding under this id: the reason of its rejection, or similar ids."""
    asked = {"asked": record_id.encode("utf-8", "replace").decode()}
    rejected, similar = (database.execute(query, asked).fetchall() for query in (_REJECTION_QUERY, _SIMILAR_QUERY))
    if rejected:
        return f"{record_id!r} was rejected: {rejected[0][0]}"
    names = list(dict.fromkeys(name for (name,) in similar))[:3]
    return f"no record {record_id!r}" + (f"; near it: {', '.join(names)}" if names else "")
