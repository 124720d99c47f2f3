"""Assemble: join a dataset's records to the rows of its shards, check that none is missing, write the manifest last."""

import re
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.status import Status, overflow_reason
from lengthwise.esm2.tensors import PERPLEXITY
from lengthwise.ingest.tables import FILE
from lengthwise.ingest.tables import WINDOWS as WINDOWED_TABLE
from lengthwise.jobs.join_windows import place_windowed, windowed_proteins
from lengthwise.store.lookup import LOOKUP, write_lookup
from lengthwise.store.manifest import SCHEMA
from lengthwise.store.paths import job_record_path, shard_path
from lengthwise.store.provenance import content_sha256, makers, readme
from lengthwise.store.settings import require, shape_of
from lengthwise.store.shard import Shard, open_named
from lengthwise.store.weights import provenance
from lengthwise.store.windows import WINDOWS, write_windows
from lengthwise.system.database import out_of_core
from lengthwise.system.files import atomic, checked_sha256, facts, read_json, scratch_folder, write_json

_BATCH_ROWS = 1 << 17
_OPEN_SHARDS = 128

# {gigabytes} is the memory that a sequence's length needs.
_DOES_NOT_FIT = (
    "does_not_fit: needs about {gigabytes} GB of memory beside the weights; set retry_rejected: true"
    " to embed it on a device with more"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_JOIN = """
    SELECT record_no, id, description, digest, length,
        CASE WHEN why IS NULL THEN status ELSE 'rejected' END AS status,
        coalesce(replace(why, '{gigabytes}', printf('%.1f', (least(length, $longest) + 2) * $bytes_per_token / 1e9)), reason)
            AS reason, changes, {full_length} AS full_length,
        spot.shard AS shard, spot.sequence_no AS sequence_no, spot.row_start AS row_start{more}
    FROM read_parquet($records) LEFT JOIN place USING (digest) LEFT JOIN reasons ON spot.verdict = reasons.verdict
    ORDER BY record_no
"""


def assemble(
    store: Path,
    dataset: str,
    jobs: list[str],
    index: Path,
    rejected: Path,
    manifest: Path,
    strict: bool = False,
    memory_bytes: int = 1 << 30,
) -> dict:
    """Write a dataset's index, its rejected records, a README.md beside them, and its manifest last.

    Parameters
    ----------
    store
        The store.
    dataset
        The dataset's name.
    jobs
        The finished jobs that hold its sequences.
    index, rejected, manifest
        The files to write; ``lookup.arrow`` is written beside the index.
    strict
        Whether a rejected record is an error. Ingest checks its own; this checks those that embedding rejected too.
    memory_bytes
        Memory for joining records to rows; what does not fit is spilled to disk.

    Returns
    -------
    The manifest.

    Raises
    ------
    LengthwiseError
        A record is not accounted for, or the table of records or a shard is missing or damaged.
    """
    settings, summary = require(store), read_json(store / "inputs" / dataset / "summary.json")
    checked_sha256(store / "inputs" / dataset / "records.parquet", summary)
    rows, folder = _RowChecks(dataset), manifest.parent
    with (
        scratch_folder(index.with_name(f".{index.name}.spill")) as scratch,
        out_of_core("assemble", memory_bytes, scratch, threads=1) as database,
        ExitStack() as replaced,  # at its end the files of an earlier index are replaced, one right after the other
    ):
        _find_places(database, store, jobs, settings)
        windowed = store / "inputs" / dataset / WINDOWED_TABLE if WINDOWED_TABLE in summary.get("files", {}) else None
        if windowed:
            checked_sha256(windowed, summary)
            place_windowed(database, windowed)
        joined = _join_records(database, store, dataset, settings, summary)
        others = [folder / WINDOWS] if windowed else []
        parts = {
            path: replaced.enter_context(atomic(path))
            for path in (folder / "README.md", rejected, *others, folder / LOOKUP, index)
        }
        with (
            open(parts[rejected], "w", encoding="utf-8", newline="") as rejected_file,
            pq.ParquetWriter(parts[index], joined.schema, compression="zstd", write_page_checksum=True) as index_file,
        ):
            for batch in joined:
                table = pa.Table.from_batches([batch])
                rows.count(table)
                rows.list_rejected(table, rejected_file)
                index_file.write_table(table)
            counts = rows.checked_counts(summary["records"])
            if strict and counts["rejected"]:
                raise LengthwiseError(
                    f"dataset {dataset}: {counts['rejected']} records are rejected ({counts['reasons']}), and strict is true; "
                    "take them out, or set strict: false"
                )
        if windowed:
            proteins = windowed_proteins(database, summary["policy"]["window_residues"])
            opened = lru_cache(_OPEN_SHARDS)(lambda name: Shard(shard_path(store, name)))
            rows.shards |= write_windows(parts[folder / WINDOWS], proteins, settings, opened)
        write_lookup(parts[index], parts[folder / LOOKUP])
        result = _manifest(store, dataset, jobs, settings, summary, counts, sorted(rows.shards))
        parts[folder / "README.md"].write_text(readme(result))
        result["files"] = {path.name: facts(part) for path, part in parts.items()}
    if not windowed:
        (folder / WINDOWS).unlink(missing_ok=True)  # of an earlier policy
    write_json(manifest, result)
    return result


def _manifest(
    store: Path, dataset: str, jobs: list[str], settings: dict, summary: dict, counts: dict, shards: list[str]
) -> dict:
    """The manifest of a dataset whose records are all accounted for."""
    job_records = [read_json(job_record_path(store, job)) for job in jobs]
    return {
        "schema": SCHEMA,
        "dataset": dataset,
        "model": settings["model"],
        "random_weights": settings["random_weights"],
        **{key: summary[key] for key in ("input", "input_bytes", "input_sha256", "records")},
        **({"sources": summary["sources"]} if "sources" in summary else {}),
        **counts,
        "residues": summary["residues"],
        **{key: summary.get(key) for key in ("changes", "rare_residues", "policy")},
        "settings": settings,
        "weights": {"sha256": settings["weights_sha256"], **provenance(store)},
        "devices": sorted({job_record["device"] for job_record in job_records}),
        "made_by": makers(job_records),
        "jobs": jobs,
        "shards": {shard: shard_path(store, shard).stat().st_size for shard in shards},
        "checksums": {shard: content_sha256(Shard(shard_path(store, shard))) for shard in shards},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _join_records(
    database: duckdb.DuckDBPyConnection, store: Path, dataset: str, settings: dict, summary: dict
) -> pa.RecordBatchReader:
    """The rows of the index: every record in the input's order, with the place of its embedding."""
    itemsize = 4 if settings["precision"] == "float32" else 2
    records, policy = store / "inputs" / dataset / "records.parquet", summary.get("policy") or {}
    columns = pq.read_schema(records).names
    full_length = "full_length" if "full_length" in columns else "NULL::INTEGER"  # tables of earlier versions have none
    more = f", {FILE.name}" if FILE.name in columns else ""  # of a dataset of several files
    more += "".join(f", CASE WHEN why IS NULL THEN spot.{name} END AS {name}" for name in _more_columns(settings))
    values = {
        "records": str(records),
        "bytes_per_token": shape_of(settings).bytes_per_token(itemsize),
        # least() ignores NULL
        "longest": policy.get("window_residues") if policy.get("long_policy") == "window" else None,
    }
    query = _JOIN.replace("{full_length}", full_length).replace("{more}", more)
    return database.sql(query, params=values).to_arrow_reader(_BATCH_ROWS)


def _more_columns(settings: dict) -> list[str]:
    """The tensors with one number of each sequence that are columns of the index too."""
    return [PERPLEXITY] if "logits" in settings["outputs"] else []


def _find_places(database: duckdb.DuckDBPyConnection, store: Path, jobs: list[str], settings: dict) -> None:
    """Create the table `place`: where each sequence of these jobs is, and its numbers in the tensors that are columns too."""
    more = _more_columns(settings)
    extra = "".join(f", {name}" for name in more)
    database.execute("CREATE TABLE reasons (verdict UTINYINT, why VARCHAR)")
    overflow = overflow_reason(settings["precision"], settings["storage_dtype"], "storage_dtype", settings["outputs"])
    reasons = [[Status.NON_FINITE, overflow], [Status.DOES_NOT_FIT, _DOES_NOT_FIT]]
    database.executemany("INSERT INTO reasons VALUES (?, ?)", reasons)
    database.execute(
        "CREATE TABLE held (digest BLOB, shard VARCHAR, sequence_no INTEGER, row_start BIGINT, verdict UTINYINT"
        f"{''.join(f', {name} FLOAT' for name in more)})"
    )
    for job in jobs:
        for name in read_json(job_record_path(store, job), "shards")["shards"]:
            shard = open_named(shard_path(store, name), settings["fingerprint"])
            n, digests = len(shard["status"]), pa.py_buffer(shard["digests"].tobytes())
            columns = {
                "digest": pa.FixedSizeBinaryArray.from_buffers(pa.binary(24), n, [None, digests]),
                "sequence_no": np.arange(n, dtype=np.int32),
                "row_start": shard["offsets"][:-1],
                "verdict": shard["status"],
                **{name: shard[name] for name in more},
            }
            database.register("part", pa.table(columns))
            database.execute(
                f"INSERT INTO held SELECT digest, ?, sequence_no, row_start, verdict{extra} FROM part", [name]
            )
    # Several jobs may hold a sequence: a good one comes first, then the order of shard names decides.
    database.execute(
        "CREATE TABLE place AS SELECT digest,"
        f" min_by(struct_pack(shard, sequence_no, row_start, verdict{extra}), (verdict, shard)) AS spot"
        " FROM held GROUP BY digest"
    )
    database.execute("DROP TABLE held")


class _RowChecks:
    """Counts the index's rows by status, and finds records without an embedding; one table at a time."""

    def __init__(self, dataset: str):
        self.dataset = dataset
        self.status: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.shards: set[str] = set()
        self.missing, self.first_missing = 0, ""

    def count(self, rows: pa.Table) -> None:
        self.status.update(_counts(rows["status"]))
        reasons = pc.list_element(pc.split_pattern(rows["reason"], ":", max_splits=1), 0)
        self.reasons.update({reason: n for reason, n in _counts(reasons).items() if reason})
        self.shards.update(_counts(rows["shard"]).keys() - {None})
        missing = rows.filter(pc.is_null(pc.field("shard")) & (pc.field("status") != "rejected"))
        if len(missing) and not self.missing:
            self.first_missing = missing["id"][0].as_py()
        self.missing += len(missing)

    def list_rejected(self, rows: pa.Table, file: TextIO) -> None:
        """Append rejected records to the TSV file."""
        rejected = rows.filter(pc.field("status") == "rejected").select(["record_no", "id", "length", "reason"])
        rejected = rejected.to_pandas()
        # Control characters in an id would act on the terminal that shows the table.
        rejected["id"] = rejected["id"].str.replace(_CONTROL, lambda found: f"\\x{ord(found[0]):02x}", regex=True)
        rejected.to_csv(file, sep="\t", index=False, header=file.tell() == 0)

    def checked_counts(self, records: int) -> dict:
        """The counts by status and by reason.

        Parameters
        ----------
        records
            Records that ingest read.

        Raises
        ------
        LengthwiseError
            They do not add up, or an accepted record has no embedding.
        """
        counts = {status: self.status[status] for status in ("accepted", "duplicate", "rejected")}
        total = self.status.total()
        if total != records or sum(counts.values()) != total:
            raise LengthwiseError(
                f"dataset {self.dataset}: {records} records were read and {total} are accounted for ({dict(self.status)})"
            )
        if self.missing:
            raise LengthwiseError(
                f"dataset {self.dataset}: {self.missing} records have no embedding, {self.first_missing!r} the first; "
                "run snakemake --forcerun plan"
            )
        return {**counts, "reasons": dict(self.reasons)}


def _counts(column: pa.ChunkedArray) -> dict:
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}
