"""Plan: which sequences no finished shard holds yet, cut into shards and jobs.

A job's spec is an immutable Parquet file named by its content. Planning again with the same inputs gives the same specs; a
new FASTA adds specs for its new sequences only.
"""

import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.files import atomic, emptied, read_json
from lengthwise.settings import require
from lengthwise.shapes import ModelConfig
from lengthwise.status import DOES_NOT_FIT
from lengthwise.store import Shard, bytes_per_sequence, commit_path, layout, shard_name, shard_path, spec_path

SPEC = pa.schema(
    [
        ("shard", pa.string()),
        ("row_start", pa.int64()),
        ("digest", pa.binary(24)),
        ("length", pa.int32()),
        ("sequence", pa.binary()),
    ]
)
JOBS_COLUMNS = ["job", "datasets", "shards", "sequences", "residues", "forecast_bytes", "forecast_seconds"]

# Floating-point operations per second assumed before anything was measured: two cores of a 2023 server in float32, and a
# third of an A100's dense float16 peak (https://www.nvidia.com/en-us/data-center/a100/).
ASSUMED_FLOPS = {"cpu": 60e9, "cuda": 100e12}
# A kill costs at most one shard, so none is forecast to take longer than this.
SHARD_SECONDS = 120.0
# A job's spec is made and read whole; this bounds the memory for it.
JOB_RESIDUES = 1 << 27
# Snakemake looks at every job of a plan; jobs grow rather than become more.
MAX_JOBS = 5_000


@dataclass(frozen=True)
class Sizes:
    """How large jobs and shards may be; jobs are larger where there would be more than `MAX_JOBS` new ones."""

    job_seconds: float
    shard_bytes: int


def plan(
    store: Path,
    sequences: dict[str, Path],
    sizes: Sizes,
    jobs_tsv: Path,
    memory_bytes: int = 1 << 30,
    retry_rejected: bool = False,
) -> pd.DataFrame:
    """Write the specs of the work that is left, and the table of all jobs that the datasets stand on.

    Parameters
    ----------
    store
        The store, with its settings.json.
    sequences
        {dataset: its sequences.parquet}.
    sizes
        Caps of new jobs and shards; specs that exist keep theirs.
    jobs_tsv
        The table to write; its rows are what this returns.
    memory_bytes
        What joins and sorts may take before they spill to disk.
    retry_rejected
        Whether sequences that no device's memory held so far are work again.

    Raises
    ------
    LengthwiseError
        Settings, or a shard of a commit whose spec is gone, are damaged.
    """
    settings = require(store)
    with emptied(jobs_tsv.parent / ".spill") as spill:
        config = {"memory_limit": f"{memory_bytes}B", "temp_directory": str(spill), "threads": 2}
        with duckdb.connect(config=config | {"preserve_insertion_order": "false"}) as database:
            _load_wanted(database, sequences)
            _load_specs(database, store)
            _load_unfit(database, store)
            _choose_specs(database, store, settings)
            if retry_rejected:
                database.execute("DELETE FROM held WHERE digest IN (SELECT digest FROM unfit)")
            for job in _write_specs(database, store, settings, sizes, _todo(database)):
                _withdraw(database, store, job)
                database.execute("INSERT INTO chosen VALUES (?, 3, 0)", [job])
            table = _jobs_table(database, settings)
    with atomic(jobs_tsv) as part:
        table.to_csv(part, sep="\t", index=False)
    return table


def read_jobs(jobs_tsv: Path) -> pd.DataFrame:
    """The table that `plan` wrote."""
    return pd.read_csv(jobs_tsv, sep="\t", dtype={"job": str, "datasets": str}, keep_default_na=False)


def cut(costs: np.ndarray, cap: float) -> np.ndarray:
    """Greedy cuts of consecutive items into runs that each cost at most `cap`; one item alone may cost more.

    Returns
    -------
    The bounds of the runs, from 0 to len(costs).
    """
    total = np.zeros(len(costs) + 1)
    np.cumsum(costs, out=total[1:])
    bounds = [0]
    while bounds[-1] < len(costs):
        start = bounds[-1]
        stop = int(np.searchsorted(total, total[start] + cap * (1 + 1e-12), side="right")) - 1
        bounds.append(max(stop, start + 1))
    return np.array(bounds)


def forecast_seconds(lengths: np.ndarray, settings: dict) -> np.ndarray:
    """Seconds that sequences of these lengths are expected to take on the store's device."""
    shape = ModelConfig(settings["num_layers"], settings["embed_dim"], settings["attention_heads"])
    return shape.flops(lengths.astype(np.float64)) / ASSUMED_FLOPS[settings["device"]]


def _load_wanted(database: duckdb.DuckDBPyConnection, sequences: dict[str, Path]) -> None:
    """The view inputs(dataset, digest, length, sequence), and wanted(digest, length, dataset): one that has the sequence."""
    database.execute("CREATE TABLE input_files (path VARCHAR, dataset VARCHAR)")
    database.executemany("INSERT INTO input_files VALUES (?, ?)", [[str(p), name] for name, p in sequences.items()])
    paths = [str(path) for path in sequences.values()]
    database.execute("SET VARIABLE paths = ?", [paths])
    database.execute(
        "CREATE VIEW inputs AS SELECT dataset, digest, length, sequence"
        " FROM read_parquet(getvariable('paths'), filename = true) JOIN input_files ON filename = path"
    )
    database.execute(
        "CREATE TABLE wanted AS SELECT digest, any_value(length) AS length, min(dataset) AS dataset FROM inputs GROUP BY digest"
    )


def _load_specs(database: duckdb.DuckDBPyConnection, store: Path) -> None:
    """specs(job, shard, digest, length) of every spec there is, and commits(job, finished) of the committed ones."""
    commits = {entry.name.removesuffix(".json"): entry.stat().st_mtime_ns for entry in _scan(store / "jobs", ".json")}
    specs = {entry.name.removesuffix(".parquet") for entry in _scan(store / "plan" / "jobs", ".parquet")}
    for job in sorted(commits.keys() - specs):
        _restore_spec(database, store, job)
        specs.add(job)
    database.execute("CREATE TABLE commits (job VARCHAR, finished BIGINT)")
    database.execute("CREATE TABLE specs (job VARCHAR, shard VARCHAR, digest BLOB, length INTEGER)")
    if commits:
        database.executemany("INSERT INTO commits VALUES (?, ?)", [list(item) for item in commits.items()])
    _add_specs(database, store, sorted(specs))


def _load_unfit(database: duckdb.DuckDBPyConnection, store: Path) -> None:
    """unfit_in(job, digest) of the sequences that did not fit into the memory of a job's device; unfit: fit nowhere else."""
    database.execute("CREATE TABLE unfit_in (job VARCHAR, digest BLOB)")
    for (job,) in database.execute("SELECT job FROM commits ORDER BY job").fetchall():
        for name in read_json(commit_path(store, job)).get("does_not_fit", []):
            shard = Shard(shard_path(store, name))
            rows = [[job, shard["digests"][i].tobytes()] for i in np.flatnonzero(shard["status"] == DOES_NOT_FIT)]
            if rows:  # none where a later try of the same shard fit
                database.executemany("INSERT INTO unfit_in VALUES (?, ?)", rows)
    database.execute(
        "CREATE TABLE unfit AS SELECT DISTINCT digest FROM unfit_in WHERE digest NOT IN (SELECT digest FROM specs"
        " JOIN commits USING (job) ANTI JOIN unfit_in USING (job, digest))"
    )


def _withdraw(database: duckdb.DuckDBPyConnection, store: Path, job: str) -> None:
    """Take back the commit of an earlier try of the same sequences; its shards stay until the next try replaces them."""
    commit = commit_path(store, job)
    if commit.exists():
        commit.unlink()
        database.execute("DELETE FROM unfit_in WHERE job = ?", [job])
        database.execute("DELETE FROM chosen WHERE job = ?", [job])


def _choose_specs(database: duckdb.DuckDBPyConnection, store: Path, settings: dict) -> None:
    """chosen(job, rank, finished): the specs that count, the best (lowest rank) first where two hold one sequence.

    Committed ones count; an unfinished one does if all of it is wanted and nothing else holds any of it. Of the others, the
    shards that were finished are taken over by a new job, which has nothing left to compute.
    """
    database.execute("CREATE TABLE chosen (job VARCHAR, rank INTEGER, finished BIGINT)")
    database.execute("INSERT INTO chosen SELECT job, 1, finished FROM commits")
    database.execute("CREATE TABLE held AS SELECT DISTINCT digest FROM specs WHERE job IN (SELECT job FROM chosen)")
    unfinished = database.execute(
        "SELECT job, bool_and(digest IN (SELECT digest FROM wanted) AND digest NOT IN (SELECT digest FROM held))"
        " FROM specs WHERE job NOT IN (SELECT job FROM commits) GROUP BY job ORDER BY job"
    ).fetchall()
    ignored = []
    for job, fits in unfinished:
        overlap = (
            fits
            and database.execute(
                "SELECT count(*) FROM specs SEMI JOIN held USING (digest) WHERE job = ?", [job]
            ).fetchone()
        )
        if fits and overlap == (0,):
            _hold(database, job, rank=2)
        else:
            ignored.append(job)
    salvaged = []
    found = database.execute(
        "SELECT shard, min(job) FROM specs WHERE list_contains(?::VARCHAR[], job) GROUP BY shard ORDER BY shard",
        [ignored],
    ).fetchall()
    for shard, job in found:  # in the order of their names, so that planning again takes over the same ones
        if not shard_path(store, shard).exists():
            continue
        new = database.execute(
            "SELECT count(*) FROM specs SEMI JOIN wanted USING (digest) ANTI JOIN held USING (digest)"
            " WHERE job = ? AND shard = ?",
            [job, shard],
        ).fetchone()
        if new != (0,):
            database.execute("INSERT INTO held SELECT digest FROM specs WHERE job = ? AND shard = ?", [job, shard])
            salvaged.append((job, shard))
    if salvaged:
        rows = [
            pq.read_table(spec_path(store, job), filters=[("shard", "=", shard)]).cast(SPEC) for job, shard in salvaged
        ]
        name = job_name([shard for _, shard in salvaged])
        _write_spec(spec_path(store, name), pa.concat_tables(rows))
        database.execute("INSERT INTO chosen VALUES (?, 2, 0)", [name])
        if name not in ignored:
            _add_specs(database, store, [name])


def _hold(database: duckdb.DuckDBPyConnection, job: str, rank: int) -> None:
    database.execute("INSERT INTO chosen VALUES (?, ?, 0)", [job, rank])
    database.execute("INSERT INTO held SELECT digest FROM specs WHERE job = ?", [job])


def _todo(database: duckdb.DuckDBPyConnection) -> tuple[np.ndarray, np.ndarray]:
    """todo(digest, length, dataset), and the lengths in it, ascending, with how many sequences have each."""
    database.execute("CREATE TABLE todo AS SELECT digest, length, dataset FROM wanted ANTI JOIN held USING (digest)")
    found = database.execute("SELECT length, count(*) AS n FROM todo GROUP BY length ORDER BY length").fetchnumpy()
    return found["length"], found["n"]


def _cut_work(lengths: np.ndarray, counts: np.ndarray, settings: dict, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of shards and of jobs, in sequences sorted by length; so many sequences have each length."""
    seconds = forecast_seconds(lengths, settings)
    most = np.broadcast_to(lengths[-1], counts.sum())
    overhead = len(layout(most, settings)[0]) + 8  # the header, and the end of the last sequence in offsets
    cost = np.maximum(
        seconds / min(SHARD_SECONDS, sizes.job_seconds),
        bytes_per_sequence(lengths, settings) / (sizes.shard_bytes - overhead),
    )
    shards = cut(np.repeat(cost, counts), 1.0)

    def per_shard(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(values * counts)])  # piecewise linear in the number of sequences
        return np.diff(np.interp(shards, np.concatenate([[0], np.cumsum(counts)]), sums))

    job_cost = np.maximum(per_shard(seconds) / sizes.job_seconds, per_shard(lengths) / JOB_RESIDUES)
    jobs = cut(job_cost, 1.0)
    if len(jobs) - 1 > MAX_JOBS:
        jobs = cut(job_cost, job_cost.sum() / MAX_JOBS + job_cost.max())
    return shards, shards[jobs]


def _write_specs(
    database: duckdb.DuckDBPyConnection, store: Path, settings: dict, sizes: Sizes, work: tuple[np.ndarray, np.ndarray]
) -> list[str]:
    """Cut what is to do into shards and jobs, write one spec per job, and return the jobs' names."""
    lengths, counts = work
    if not len(lengths):
        return []
    shards, jobs = _cut_work(lengths, counts, settings, sizes)
    rows = _Rows(
        database.sql(
            "SELECT digest, inputs.length, sequence FROM inputs SEMI JOIN todo USING (dataset, digest) ORDER BY length, digest"
        ).to_arrow_reader(10_000)
    )
    names = []
    for start, stop in itertools.pairwise(jobs):
        inner = shards[(shards >= start) & (shards <= stop)] - start
        spec = _spec_table(rows.take(stop - start), inner, settings)
        name = job_name(pc.unique(spec.column("shard")).to_pylist())
        _write_spec(spec_path(store, name), spec)
        names.append(name)
    del rows  # its result must be closed before the next statement
    known = {job for (job,) in database.execute("SELECT DISTINCT job FROM specs").fetchall()}
    _add_specs(database, store, [name for name in names if name not in known])
    return names


def _restore_spec(database: duckdb.DuckDBPyConnection, store: Path, job: str) -> None:
    """Write the lost spec of a committed job again, from its shards; sequences that no input has any more stay empty."""
    names, starts, digests, lengths = [], [], [], []
    for name in read_json(commit_path(store, job))["shards"]:
        shard = Shard(shard_path(store, name))
        bounds = shard["offsets"]
        names += [name] * (len(bounds) - 1)
        starts += bounds[:-1].tolist()
        lengths += np.diff(bounds).tolist()
        digests += [digest.tobytes() for digest in shard["digests"]]
    known = dict(
        database.execute(
            "SELECT digest, any_value(sequence) FROM inputs WHERE digest IN (SELECT unnest(?::BLOB[])) GROUP BY digest",
            [digests],
        ).fetchall()
    )
    columns = [names, starts, digests, lengths, [known.get(digest) for digest in digests]]
    spec = pa.table([pa.array(c, f.type) for c, f in zip(columns, SPEC, strict=True)], schema=SPEC)
    _write_spec(spec_path(store, job), spec)


def _add_specs(database: duckdb.DuckDBPyConnection, store: Path, jobs: list[str]) -> None:
    if not jobs:
        return
    try:
        database.execute(
            "INSERT INTO specs SELECT parse_filename(filename, true), shard, digest, length"
            " FROM read_parquet(?, filename = true)",
            [[str(spec_path(store, job)) for job in jobs]],
        )
    except duckdb.Error as error:
        what = str(error).splitlines()[0]
        raise LengthwiseError(f"{store}/plan/jobs: a damaged file ({what}); remove that file and run again") from error


class _Rows:
    """Takes any number of rows at a time from a reader of record batches."""

    def __init__(self, reader: pa.RecordBatchReader):
        self.reader = reader
        self.rest = reader.schema.empty_table()

    def take(self, n: int) -> pa.Table:
        parts = [self.rest]
        have = len(self.rest)
        while have < n:
            batch = pa.table(self.reader.read_next_batch())
            parts.append(batch)
            have += len(batch)
        table = pa.concat_tables(parts)
        self.rest = table.slice(n)
        return table.slice(0, n)


def _spec_table(work: pa.Table, shards: np.ndarray, settings: dict) -> pa.Table:
    """The spec of one job; `shards` are the bounds of its shards in rows of `work`."""
    work = work.cast(pa.schema([SPEC.field(name) for name in work.schema.names])).combine_chunks()
    digests = b"".join(work.column("digest").to_pylist())
    lengths = work.column("length").to_numpy()
    names, row_starts = [], []
    for start, stop in itertools.pairwise(shards):
        names.append(shard_name(settings["fingerprint"], [digests[24 * start : 24 * stop]]))
        row_starts.append(np.concatenate([[0], np.cumsum(lengths[start : stop - 1], dtype=np.int64)]))
    shard_of = pa.array(np.repeat(np.arange(len(names)), np.diff(shards)))
    columns = [pa.array(names).take(shard_of), pa.array(np.concatenate(row_starts)), *work.columns]
    return pa.table(columns, schema=SPEC)


def job_name(shards) -> str:
    """A job is named by its shards, in order."""
    return hashlib.sha256("".join(shards).encode()).hexdigest()[:16]


def _write_spec(path: Path, spec: pa.Table) -> None:
    if not path.exists():
        with atomic(path) as part:
            pq.write_table(spec, part, compression="zstd")


def _jobs_table(database: duckdb.DuckDBPyConnection, settings: dict) -> pd.DataFrame:
    """One row for each job that some dataset stands on; the first committed job that holds a sequence gives it."""
    database.execute(
        "CREATE TABLE given AS SELECT digest, arg_min(job, ((job, digest) IN (SELECT (job, digest) FROM unfit_in), rank,"
        " finished, job)) AS job FROM specs JOIN chosen USING (job) SEMI JOIN wanted USING (digest) GROUP BY digest"
    )
    table = database.execute(
        "WITH users AS (SELECT job, string_agg(DISTINCT dataset, ',' ORDER BY dataset) AS datasets"
        "   FROM inputs JOIN given USING (digest) GROUP BY job),"
        " sizes AS (SELECT job, count(DISTINCT shard) AS shards, count(*) AS sequences, sum(length)::BIGINT AS residues"
        "   FROM specs GROUP BY job)"
        " SELECT job, datasets, shards, sequences, residues FROM users JOIN sizes USING (job) ORDER BY job"
    ).df()
    # Work is sorted, so a job's sequences have few lengths.
    sizes = database.execute("SELECT job, length, count(*) AS sequences FROM specs GROUP BY ALL").df()
    lengths, counts = sizes["length"].to_numpy(), sizes["sequences"].to_numpy()
    sizes["forecast_bytes"] = bytes_per_sequence(lengths, settings) * counts
    sizes["forecast_seconds"] = forecast_seconds(lengths, settings) * counts
    forecast = (
        sizes.groupby("job")[["forecast_bytes", "forecast_seconds"]].sum().reindex(table["job"]).reset_index(drop=True)
    )
    return pd.concat([table, forecast.round({"forecast_seconds": 3})], axis=1)[JOBS_COLUMNS]


def _scan(folder: Path, ending: str) -> list[os.DirEntry]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.name.endswith(ending) and not entry.name.startswith(".")]
