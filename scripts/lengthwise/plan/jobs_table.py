"""The plan as the workflow reads it: each job's row in plan/jobs.tsv, the job records of a dataset, whole work orders."""

import csv
import functools
import os
from pathlib import Path

Rows = dict[str, dict[str, str]]


def job_rows(path: Path | str) -> Rows:
    """Return {job: its row} of plan/jobs.tsv, columns as text. The file is read again only after a change.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    return _read_if_changed(path)[0]


def planned_job_records(store: str, dataset: str | None = None) -> list[str]:
    """Return the paths of the job records that a dataset needs, or of all planned jobs, in the order of plan/jobs.tsv.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    rows, jobs_of_dataset = _read_if_changed(f"{store}/plan/jobs.tsv")
    jobs = rows if dataset is None else jobs_of_dataset.get(dataset, [])
    return [f"{store}/jobs/{job}.json" for job in jobs]


def _read_if_changed(path: Path | str) -> tuple[Rows, dict[str, list[str]]]:
    stat = os.stat(path)
    return _read(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read(path: str, size: int, mtime_ns: int) -> tuple[Rows, dict[str, list[str]]]:
    """{job: its row} and {dataset: its jobs}; size and mtime are the cache's key."""
    with open(path, newline="") as table:
        rows = {row["job"]: row for row in csv.DictReader(table, delimiter="\t")}
    jobs_of_dataset: dict[str, list[str]] = {}
    for job, row in rows.items():
        for dataset in row["datasets"].split(","):
            jobs_of_dataset.setdefault(dataset, []).append(job)
    return rows, jobs_of_dataset
