"""The plan: which sequences no finished shard holds, cut into shards and jobs.

1. `existing_jobs` selects the work orders that still count; the sequences outside them are new work. Other work orders go.
2. `external_sort` sorts the new work by length and digest.
3. `new_jobs` writes a work order per job, cut by `cuts`.
4. `job_requests` says what each job asks a scheduler for.

Planning the same inputs again gives the same work orders; a new FASTA adds work orders for its new sequences alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.costs import forecast_seconds
from lengthwise.ingest.identity import read_summary
from lengthwise.plan.cuts import Sizes
from lengthwise.plan.existing_jobs import ExistingJobs, remove_rivals
from lengthwise.plan.external_sort import SortedSequences
from lengthwise.plan.job_requests import job_requests
from lengthwise.plan.new_jobs import write_new_jobs
from lengthwise.plan.record import write_plan_record
from lengthwise.store.paths import job_record_path
from lengthwise.store.settings import require, shape_of
from lengthwise.store.sizes import bytes_per_sequence
from lengthwise.system.database import out_of_core
from lengthwise.system.files import atomic, checked_sha256, read_json, scratch_folder

JOBS_COLUMNS = ["job", "datasets", "shards", "sequences", "residues", "longest", "forecast_bytes", "forecast_seconds"]

JOBS_COLUMNS += ["mem_mb", "disk_mb", "runtime_minutes"]

# A part of the external sort takes a few times its size in memory.
_SORT_MEMORY_SHARE = 1 / 8


def plan(
    store: Path,
    sequences: dict[str, Path],
    sizes: Sizes,
    jobs_tsv: Path,
    memory_bytes: int = 1 << 30,
    retry_rejected: bool = False,
    residency: str = "auto",
) -> pd.DataFrame:
    """Write the work orders of new work, the table of all jobs that the datasets need, and the plan's record.

    Parameters
    ----------
    store
        The store, with its settings.json and weights.json.
    sequences
        {dataset: its sequences.parquet}.
    sizes
        Caps of new jobs and shards; existing work orders keep theirs.
    jobs_tsv
        The table to write.
    memory_bytes
        Memory for joins and sorts; what does not fit is spilled to disk.
    retry_rejected
        Whether to plan again the sequences that fitted into no device's memory so far.
    residency
        As the config has it: streamed weights take less memory.

    Returns
    -------
    The table of jobs, with the columns `JOBS_COLUMNS`.

    Raises
    ------
    LengthwiseError
        Damaged: the settings, a table of sequences, a job record, or a shard of a finished job whose work order is lost.
    """
    settings, sequence_tables = require(store), list(sequences.values())
    for table in sequence_tables:
        checked_sha256(table, read_summary(table.parent) or {})
    with scratch_folder(jobs_tsv.parent / ".spill") as scratch:
        with _existing_jobs(store, sequence_tables, scratch, memory_bytes) as existing:
            datasets_of_job, is_new = existing.select(retry_rejected)
        new_work = SortedSequences(sequence_tables, is_new, scratch, int(memory_bytes * _SORT_MEMORY_SHARE))
        for job, datasets in write_new_jobs(store, settings, sizes, new_work):
            job_record_path(store, job).unlink(missing_ok=True)  # of an earlier try of these sequences
            datasets_of_job[job] |= datasets
        with _existing_jobs(store, sequence_tables, scratch, memory_bytes) as existing:
            table = _jobs_table(existing, datasets_of_job, list(sequences), settings, sizes.slowdown)
    checkpoint_bytes = read_json(store / "weights.json", "bytes")["bytes"]
    table = table.join(job_requests(table, settings, checkpoint_bytes, residency))[JOBS_COLUMNS]
    with atomic(jobs_tsv) as part:
        table.to_csv(part, sep="\t", index=False)
    remove_rivals(store, table["job"])
    write_plan_record(store, sequences, retry_rejected, settings)
    return table


def read_jobs(jobs_tsv: Path) -> pd.DataFrame:
    """The table that `plan` wrote."""
    return pd.read_csv(jobs_tsv, sep="\t", dtype={"job": str, "datasets": str}, keep_default_na=False)


@contextmanager
def _existing_jobs(
    store: Path, sequence_tables: list[Path], scratch: Path, memory_bytes: int
) -> Iterator[ExistingJobs]:
    """The store's work orders in a DuckDB session of this memory."""
    with out_of_core("plan", memory_bytes, scratch / "duckdb", threads=2) as database:
        try:
            yield ExistingJobs(store, sequence_tables, database, scratch)
        except (duckdb.InvalidInputException, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0]
            raise LengthwiseError(f"{store}: a damaged file ({reason}); remove that file and run again") from error


def _jobs_table(
    existing: ExistingJobs, datasets_of_job: dict[str, set[int]], datasets: list[str], settings: dict, slowdown: float
) -> pd.DataFrame:
    """One row for each job, with its forecast."""
    jobs = sorted(datasets_of_job)
    table, by_length = existing.job_sizes(jobs)
    table["job"] = jobs
    table["datasets"] = [",".join(sorted(datasets[i] for i in datasets_of_job[job])) for job in jobs]
    lengths, counts = by_length["length"].to_numpy(), by_length["sequences"].to_numpy()
    by_length["forecast_bytes"] = bytes_per_sequence(lengths, settings) * counts
    by_length["forecast_seconds"] = (
        slowdown * forecast_seconds(lengths, shape_of(settings), settings["device"]) * counts
    )
    forecast = by_length.groupby("job").agg({"length": "max", "forecast_bytes": "sum", "forecast_seconds": "sum"})
    return table.join(forecast.rename(columns={"length": "longest"}).round({"forecast_seconds": 3}))
