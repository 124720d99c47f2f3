"""Assemble: join a dataset's records to the rows of its shards, check that none is missing, and only then say so."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.files import atomic, read_json, write_json
from lengthwise.index import SCHEMA, write_lookup
from lengthwise.provenance import content_sha256, makers, readme
from lengthwise.settings import require
from lengthwise.shapes import ModelConfig
from lengthwise.status import REASONS
from lengthwise.store import REMAKE, Shard, commit_path, shard_path, spec_path
from lengthwise.weights import origin


def assemble(
    store: Path, dataset: str, jobs: list[str], index: Path, rejected: Path, manifest: Path, strict: bool = False
) -> dict:
    """Write a dataset's index, its rejected records, a README.md beside them, and its manifest last.

    Parameters
    ----------
    store
        The store.
    dataset
        The dataset's name.
    jobs
        The committed jobs that it stands on.
    index, rejected, manifest
        The files to write; ``lookup.arrow`` is written beside the index.
    strict
        Whether a single rejected record is an error; ingest knows of most, but not of those that embedding rejects.

    Returns
    -------
    The manifest.

    Raises
    ------
    LengthwiseError
        A record is not accounted for, or a shard lacks what its job promised.
    """
    settings, summary = require(store), read_json(store / "inputs" / dataset / "summary.json")
    places = _places(store, jobs, settings["fingerprint"])
    database = duckdb.connect()
    database.register("places", places)
    database.execute(
        "CREATE TABLE place AS SELECT digest,"
        " min_by(struct_pack(shard, sequence_no, row_start, verdict), (verdict, shard)) AS spot"
        " FROM places GROUP BY digest"
    )
    database.execute("CREATE TABLE reasons (verdict UTINYINT, why VARCHAR)")
    database.executemany("INSERT INTO reasons VALUES (?, ?)", [list(item) for item in REASONS.items()])
    shape = ModelConfig(settings["num_layers"], settings["embed_dim"], settings["attention_heads"])
    per_token = shape.bytes_per_token(4 if settings["precision"] == "float32" else 2)
    rows = database.sql(
        "SELECT record_no, id, description, digest, length,"
        "   CASE WHEN why IS NULL THEN status ELSE 'rejected' END AS status,"
        "   coalesce(replace(why, '{gigabytes}', printf('%.1f', (length + 2) * ? / 1e9)), reason) AS reason, changes,"
        "   spot.shard AS shard, spot.sequence_no AS sequence_no, spot.row_start AS row_start"
        " FROM read_parquet(?) LEFT JOIN place USING (digest) LEFT JOIN reasons ON spot.verdict = reasons.verdict"
        " ORDER BY record_no",
        params=[per_token, str(store / "inputs" / dataset / "records.parquet")],
    ).to_arrow_table()
    counts = _check(dataset, rows, summary)
    if strict and counts["rejected"]:
        raise LengthwiseError(
            f"dataset {dataset}: {counts['rejected']} records are rejected ({counts['reasons']}), and strict is true; "
            "take them out, or set strict: false"
        )
    shards = sorted(set(rows.column("shard").to_pylist()) - {None})
    with atomic(index) as part:
        pq.write_table(rows, part, compression="zstd", write_page_checksum=True)
    write_lookup(rows, index)
    with atomic(rejected) as part:
        _write_rejected(rows, part)
    commits = [read_json(commit_path(store, job)) for job in jobs]
    result = {
        "schema": SCHEMA,
        "dataset": dataset,
        "model": settings["model"],
        "random_weights": settings["random_weights"],
        **{key: summary[key] for key in ("input", "input_bytes", "input_sha256", "records")},
        **counts,
        "residues": summary["residues"],
        **{key: summary.get(key) for key in ("changes", "rare_residues", "policy")},
        "settings": settings,
        "weights": {"sha256": settings["weights_sha256"], "origin": origin(store)},
        "devices": sorted({commit["device"] for commit in commits}),
        "made_by": makers(commits),
        "jobs": jobs,
        "shards": {shard: shard_path(store, shard).stat().st_size for shard in shards},
        "checksums": {shard: content_sha256(Shard(shard_path(store, shard))) for shard in shards},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with atomic(manifest.with_name("README.md")) as part:
        part.write_text(readme(result))
    write_json(manifest, result)
    return result


def _places(store: Path, jobs: list[str], fingerprint: str) -> pa.Table:
    """(digest, shard, sequence_no, row_start, verdict) of every sequence of these jobs, checked against the shards."""
    tables = []
    for job in jobs:
        spec = pq.read_table(spec_path(store, job), columns=["shard", "row_start", "digest"])
        names = spec.column("shard").to_pylist()
        start = 0
        while start < len(names):
            stop = start + names.count(names[start])
            rows = spec.slice(start, stop - start)
            shard = Shard(shard_path(store, names[start]))
            if shard.metadata.get("fingerprint") != fingerprint:
                raise LengthwiseError(f"{shard.path}: was made with other settings than this store's; {REMAKE}")
            if shard["digests"].tobytes() != b"".join(rows.column("digest").to_pylist()):
                raise LengthwiseError(f"{shard.path}: holds other sequences than {job} promised; {REMAKE}")
            tables.append(
                rows.append_column("sequence_no", pa.array(range(len(rows)), pa.int32())).append_column(
                    "verdict", pa.array(shard["status"])
                )
            )
            start = stop
    if tables:
        return pa.concat_tables(tables)
    return pa.schema(
        [
            ("shard", "string"),
            ("row_start", "int64"),
            ("digest", pa.binary(24)),
            ("sequence_no", "int32"),
            ("verdict", "uint8"),
        ]
    ).empty_table()


def _check(dataset: str, rows: pa.Table, summary: dict) -> dict:
    """Every record has one fate, and every one that is not rejected has its rows; returns the counts."""
    status, shards = rows.column("status").to_pylist(), rows.column("shard").to_pylist()
    counts = Counter(status)
    if len(rows) != summary["records"] or sum(counts[s] for s in ("accepted", "duplicate", "rejected")) != len(rows):
        raise LengthwiseError(
            f"dataset {dataset}: {summary['records']} records were read and {len(rows)} are accounted for ({dict(counts)})"
        )
    missing = [i for i, (s, shard) in enumerate(zip(status, shards, strict=True)) if s != "rejected" and shard is None]
    if missing:
        record_id = rows.column("id")[missing[0]].as_py()
        raise LengthwiseError(
            f"dataset {dataset}: {len(missing)} records have no embedding, {record_id!r} the first; "
            "run snakemake --forcerun plan"
        )
    reasons = Counter(reason.split(":")[0] for reason in rows.column("reason").to_pylist() if reason)
    return {**{s: counts[s] for s in ("accepted", "duplicate", "rejected")}, "reasons": dict(reasons)}


def _write_rejected(rows: pa.Table, path: Path) -> None:
    """The rejected records as a table for people."""
    table = rows.select(["record_no", "id", "length", "reason", "status"]).to_pandas()
    table = table[table.pop("status") == "rejected"]
    table.to_csv(path, sep="\t", index=False)
