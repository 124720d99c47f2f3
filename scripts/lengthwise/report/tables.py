"""Tables of the report: batches, bins of length, jobs, devices and datasets, as TSV and Parquet."""

from collections.abc import Collection
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MOST_AT_ONCE
from lengthwise.store.metrics import TEXTS
from lengthwise.system.files import atomic

# Bounds of the bins of lengths: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... Batches do not cross powers of two.
BOUNDS = np.unique(np.outer(2 ** np.arange(20), (1.0, 1.5)).astype(int))
QUANTITIES = ("residues_per_second", "peak_bytes", "fill")
SHARES = ("computing", "wait_read", "wait_write", "other")

# The meaning of every column, written to columns.tsv.
COLUMNS = {
    "metrics": {
        "job": "the job that made the batch",
        "shard": "the shard that it is in",
        "batch": "number of the batch in its shard, in the order of the work",
        "n_sequences": "sequences of the batch",
        "n_residues": "residues of the batch",
        "n_tokens": "tokens of the batch: residues, and two specials for each sequence; no padding",
        "min_length": "residues of its shortest sequence",
        "mean_length": "residues of its sequences, mean",
        "max_length": "residues of its longest sequence",
        "wall_ms": "milliseconds of the job since its previous batch; on a CPU, which computes several at once, its share",
        "device_ms": "milliseconds of the forward pass and pooling, by the device's clock; on a CPU, by one core's",
        "gpu_busy": "share of wall_ms in which the GPU surely computed, device_ms without wait_launch_ms, at most 1; of batches"
        " without wait_launch_ms device_ms as a share; empty on a CPU",
        "wait_launch_ms": "the part of device_ms in which the GPU may have waited for the host to launch its work, at the most;"
        " empty on a CPU, and for batches of earlier versions",
        "wait_read_ms": "milliseconds that the engine waited for the batch to be tokenised",
        "wait_write_ms": "milliseconds that the engine waited for earlier batches to be written",
        "peak_allocated_bytes": "the most GPU memory that was allocated, weights with it; empty on a CPU",
        "peak_reserved_bytes": "the most GPU memory that torch kept; empty on a CPU",
        "peak_rss_bytes": "the most memory that the process held; empty on a GPU",
        "oom_splits": "how often the batch, or a part of it, was halved because memory did not hold it",
        "device": "what computed it",
        "precision": "the compute type",
    },
    "by_length": {
        "device": "as in metrics",
        "precision": "as in metrics",
        "memory_measure": "what peak_bytes is: allocated (GPU memory), or resident (of the process, which keeps what"
        " earlier batches freed, so it does not show what length costs); empty if not measured",
        "n_batches": "batches with length_from <= mean_length < length_to",
        "median_length": "median of their mean lengths",
        "length_from": "residues, included",
        "length_to": "residues, not included",
        **{
            f"{quantity}_{part}": f"{what} of a batch: {words}"
            for quantity, what in (
                ("residues_per_second", "n_residues over wall_ms"),
                ("peak_bytes", "peak memory, bytes,"),
                ("fill", "n_tokens over the job's batch_tokens"),
            )
            for part, words in (("q25", "lower quartile"), ("median", "median"), ("q75", "upper quartile"))
        },
    },
    "jobs": {
        "job": "the job",
        "device": "what computed it",
        "precision": "the compute type",
        "shards": "shards that it answers for",
        "shards_made": "shards that it made itself; the others were there before",
        "sequences": "sequences in its shards",
        "residues": "residues in its shards",
        "load_seconds": "reading the weights",
        "embed_seconds": "everything after that, writing included",
        "residues_per_second": "residues of the shards that it made, over embed_seconds; empty if it made none",
        "computing": "share of the batches' time in which the device surely computed (on a CPU: of all its cores' time)",
        "wait_read": "share in which the device idled while the host waited for sequences to be tokenised",
        "wait_write": "share in which the device idled while the host waited for the disk",
        "other": "the rest: copies not overlapped with computing, kernel launches, and idle CPU cores",
        "peak_bytes": "the largest peak of its batches",
        "oom_splits": "as in metrics, of all its shards",
    },
    "devices": {
        "device": "what computed",
        "precision": "the compute type",
        "jobs": "jobs with metrics",
        "batches": "batches",
        "residues": "residues",
        "residues_per_second": "residues over the sum of wall_ms",
        **dict.fromkeys(SHARES, "as in jobs"),
        "peak_bytes": "the largest peak of a batch",
        "oom_splits": "as in metrics",
    },
    "datasets": {
        "dataset": "the dataset",
        "input": "its FASTA file",
        "records": "records of the file",
        "accepted": "embedded",
        "duplicate": "same sequence as an earlier record, whose rows it reads",
        "rejected": "not embedded",
        "reason": "why rejected; one row of the table for each reason",
        "rejected_for_it": "records rejected for that reason",
        "residues": "residues of its distinct sequences",
        "created": "when it was complete",
    },
    "laws": {
        "quantity": "memory (of a pass, weights not counted) or time (of a pass)",
        "engine": "lengthwise or fair-esm",
        "precision": "the compute type",
        "gradients": "whether the pass keeps what gradients need",
        "term": "fixed; tokens (of the batch); squares (tokens times the sequence's tokens); products and attention (FLOPs)",
        "coefficient": "what is added for each unit of the term; 0 where it was not seen",
        "unit": "of the coefficient",
        "r_squared": "share of the measurements' variance that the fit explains",
        "largest_relative_residual": "largest distance of a point from the fit, as a share of the measurement",
        "n_points": "points of the study that were fitted",
    },
    "scaling": {
        "engine": "lengthwise or fair-esm (its own forward pass with the same weights)",
        "precision": "the compute type",
        "gradients": "whether the pass keeps what gradients need; there is no backward pass",
        "compiled": "whether torch compiled the layers of lengthwise, as it does on a GPU for long jobs; empty for fair-esm",
        "batch_tokens": "tokens of a full batch; empty: one sequence per batch",
        "length": "residues of each sequence",
        "n_sequences": "sequences of the batch, all of that length",
        "n_tokens": "tokens of the batch",
        "product_flops": "floating-point operations of the matrix products: 24 d^2 for each token and layer",
        "attention_flops": "of attention: 4 d (L + 2) for each token and layer",
        "repeats": "timed passes, after one that warms up",
        "wall_ms": "milliseconds of the shortest pass: others were slowed down by what else the machine did",
        "wall_ms_median": "of the median pass",
        "wall_ms_max": "of the longest",
        "residues_per_second": "residues of the batch over wall_ms",
        "peak_bytes": "growth of memory during a pass, so weights and libraries are not in it",
        "weights_bytes": "what the engine's weights take",
        "copy_in_ms": "milliseconds of copying the tokens to the device; empty where nothing is copied",
        "copy_out_ms": "of copying the rows from it, in float16; empty where nothing is copied",
        "clock_mhz": "clock of the device at the end of the series; empty if it cannot be read",
        "temperature_c": "its temperature then, degrees Celsius; empty if it cannot be read",
        "memory_measure": "allocated (GPU memory) or resident (of the process); empty if not measured",
        "device": "what computed",
        "device_bytes": "all memory of the device",
        "threads": "CPU threads of a pass: those asked for, or as many as cores were idle",
        "needed_bytes": "where status is skipped_memory: what the point takes, or both engines where none was loaded",
        "free_bytes": "where status is skipped_memory: what was free",
        "status": "ok, skipped_time, skipped_memory (would not have fitted) or out_of_memory",
    },
    "windows": {
        "dataset": "the dataset",
        "id": "a protein that is stored in windows",
        "length": "its residues",
        "windows": "its windows",
        "deviation": "how far its rows are from those that it has whole: RMS over its residues in the typical channel, as a"
        " share of that channel's spread over them",
        "mean_deviation": "the same of the mean over its residues",
    },
    "lengths": {
        "dataset": "the dataset",
        "status": "accepted, duplicate or rejected",
        "length_from": "residues, included",
        "length_to": "residues, not included",
        "records": "its records of that status and length",
    },
    "map": {
        "dataset": "the record's dataset",
        "id": "the record",
        "length": "its residues",
        "pc1": "first principal component of its pooled vector",
        "pc2": "second",
        "umap1": "first coordinate of UMAP; null without umap-learn",
        "umap2": "second",
    },
}


def write(tables: dict[str, pd.DataFrame | pa.Table], out: Path) -> None:
    """Write each table as <name>.tsv and <name>.parquet."""
    for name, table in tables.items():
        arrow = table if isinstance(table, pa.Table) else pa.Table.from_pandas(table, preserve_index=False)
        _write_tsv(arrow, out / f"{name}.tsv")
        _write_parquet(arrow, out / f"{name}.parquet")


def write_columns(out: Path, names: Collection[str]) -> None:
    """Write columns.tsv: the meaning of these tables' columns."""
    meanings = [(name, column, text) for name in names for column, text in COLUMNS[name].items()]
    columns = pd.DataFrame(meanings, columns=["table", "column", "meaning"])
    _write_tsv(pa.Table.from_pandas(columns, preserve_index=False), out / "columns.tsv")


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    _write_parquet(pa.Table.from_pandas(table, preserve_index=False), path)


def _write_parquet(table: pa.Table, path: Path) -> None:
    encoded = any(pa.types.is_dictionary(kind) for kind in table.schema.types)
    with atomic(path) as part:  # a stored schema would make texts read back as dictionaries
        pq.write_table(table, part, compression="zstd", store_schema=not encoded)


def batches(metrics: pa.Table, job_records: list[dict]) -> pd.DataFrame:
    """Metrics with derived columns, one row per batch.

    Added are `residues_per_second`; `peak_bytes` and `memory_measure`; `group` (device and precision as text); `most_tokens`
    (the job's limit for a batch) and `fill` (tokens over that limit); and `busy_ms`, the computing time of the batch
    expressed in time of the whole device.
    """
    table = metrics.drop_columns("peak_reserved_bytes").to_pandas()  # null becomes NaN, texts are categories
    for name in TEXTS:
        table[name] = table[name].cat.reorder_categories(sorted(table[name].cat.categories))
    allocated, resident = table["peak_allocated_bytes"], table["peak_rss_bytes"]
    table["peak_bytes"] = allocated.fillna(resident).astype(float)
    measure = np.where(allocated.notna(), 0, np.where(resident.notna(), 1, -1))
    table["memory_measure"] = pd.Categorical.from_codes(measure, ["allocated", "resident"])
    table["residues_per_second"] = table["n_residues"] / (table["wall_ms"] / 1000)
    groups = table.groupby(["device", "precision"], observed=True)
    names = [f"{device}, {precision}" for device, precision in groups.size().index]
    table["group"] = pd.Categorical.from_codes(groups.ngroup(), names)
    # None for a job whose shards were all there before.
    table["most_tokens"] = _job_values(
        table["job"], {job_record["job"]: job_record.get("batch_tokens") for job_record in job_records}
    )
    table["fill"] = table["n_tokens"] / table["most_tokens"]
    threads = _job_values(
        table["job"], {job_record["job"]: job_record["threads"] for job_record in job_records}
    ).fillna(1)
    # On a CPU a batch takes one core, or all cores if it is a long sequence; on a GPU it takes the whole device.
    batch_threads = (threads // threads.clip(upper=MOST_AT_ONCE)).where(
        table["n_tokens"] <= AUTO_BATCH_TOKENS["cpu"], threads
    )
    computing_ms = table["device_ms"] - table["wait_launch_ms"].fillna(0)
    table["busy_ms"] = computing_ms * (batch_threads / threads).where(table["gpu_busy"].isna(), 1)
    return table


def _job_values(job: pd.Series, values: dict) -> pd.Series:
    """{job: number} spread over the rows; NaN where a job has none."""
    numbers = pd.to_numeric(pd.Series([values.get(name) for name in job.cat.categories], dtype=object), errors="coerce")
    return pd.Series(numbers.to_numpy(float)[job.cat.codes], index=job.index)


def bin_by_length(table: pd.DataFrame) -> pd.DataFrame:
    """Median and quartiles of the quantities for each device, precision, measure of memory and bin of lengths.

    A bin holds the batches with length_from <= mean_length < length_to.
    """
    keys = ["group", "device", "precision", "memory_measure", "bin"]
    bin_of = np.searchsorted(BOUNDS, table["mean_length"], side="right")
    groups = table.assign(bin=bin_of).groupby(keys, dropna=False, sort=True, observed=True)
    found = groups.agg(n_batches=("batch", "size"), median_length=("mean_length", "median")).reset_index()
    found = found.astype(dict.fromkeys(keys[:-1], object))
    for quantity in QUANTITIES:
        for name, quantile in (("q25", 0.25), ("median", 0.5), ("q75", 0.75)):
            found[f"{quantity}_{name}"] = groups[quantity].quantile(quantile).to_numpy()
    number = found.pop("bin").to_numpy(dtype=int)
    found.insert(4, "length_from", BOUNDS[number - 1])
    found.insert(5, "length_to", BOUNDS[number])
    return found


def jobs(job_records: list[dict], table: pd.DataFrame) -> pd.DataFrame:
    """One row per job; its rate counts only the shards that it made itself."""
    by_shard = table.groupby("shard", observed=True).agg(residues=("n_residues", "sum"), splits=("oom_splits", "sum"))
    residues, splits = by_shard["residues"].to_dict(), by_shard["splits"].to_dict()
    used = _time_shares(table, "job").set_index("job")
    rows = []
    for job_record in job_records:
        made, seconds = job_record["made"], job_record["embed_seconds"]
        timed = made and seconds and all(shard in residues for shard in made)
        row = {name: job_record[name] for name in ("job", "device", "precision")}
        row |= {"shards": len(job_record["shards"]), "shards_made": len(made)}
        row |= {name: job_record[name] for name in ("sequences", "residues", "load_seconds", "embed_seconds")}
        row["residues_per_second"] = sum(residues[shard] for shard in made) / seconds if timed else None
        here = used.loc[job_record["job"]].to_dict() if job_record["job"] in used.index else {}
        row |= {name: here.get(name) for name in (*SHARES, "peak_bytes")}
        rows.append(row | {"oom_splits": int(sum(splits.get(shard, 0) for shard in job_record["shards"]))})
    found = pd.DataFrame(rows, columns=list(COLUMNS["jobs"]))
    numbers = ["residues_per_second", *SHARES, "peak_bytes"]
    return found.astype(dict.fromkeys(numbers, float))


def devices(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each device and precision that batches ran on."""
    used = _time_shares(table, ["device", "precision"])
    used["residues_per_second"] = used["residues"] / (used.pop("wall_ms") / 1000)
    kinds = {"device": object, "precision": object, "residues": int, "oom_splits": int}
    return used[list(COLUMNS["devices"])].astype(kinds)


def datasets(ledger: list[dict]) -> pd.DataFrame:
    """Counts of records, one row for each dataset and reason of rejection."""
    names = [name for name in COLUMNS["datasets"] if name not in ("reason", "rejected_for_it")]
    rows = [
        {name: row[name] for name in names} | {"reason": reason, "rejected_for_it": number}
        for row in ledger
        for reason, number in (row["reasons"] or {None: 0}).items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS["datasets"])).astype({"reason": "string"})


def _time_shares(table: pd.DataFrame, keys: str | list[str]) -> pd.DataFrame:
    """Sums and shares of time for each value of `keys`; waits count only while the device idled."""
    sums = {"wall_ms": "sum", "busy_ms": "sum", "wait_read_ms": "sum", "wait_write_ms": "sum", "oom_splits": "sum"}
    used = table.groupby(keys, sort=True, observed=True).agg(
        jobs=("job", "nunique"),
        batches=("batch", "size"),
        residues=("n_residues", "sum"),
        peak_bytes=("peak_bytes", "max"),
        **{name: (name, how) for name, how in sums.items()},
    )
    left = pd.Series(1.0, index=used.index)
    for share, column in zip(SHARES, ("busy_ms", "wait_read_ms", "wait_write_ms"), strict=False):
        used[share] = np.minimum(used.pop(column) / used["wall_ms"], left)
        left = left - used[share]
    return used.assign(other=left).reset_index()


def _write_tsv(table: pa.Table, path: Path) -> None:
    with atomic(path) as part:
        # DuckDB, because pandas takes a minute per million rows
        duckdb.from_arrow(table).write_csv(str(part), sep="\t", header=True)
