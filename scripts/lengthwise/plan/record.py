"""`plan/inputs.json`: what a plan was made from, and the files that it made. The plan job writes it last.

The main process compares it with the config and the files' sizes; a plan of other datasets, or a damaged one, is made again.
"""

from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.identity import Summaries, read_summary
from lengthwise.plan.jobs_table import planned_job_records
from lengthwise.store.manifest import read_manifest
from lengthwise.system.files import damaged_files, facts, has_size, read_json, sha256, write_json


def plan_record_path(store: Path) -> Path:
    return store / "plan" / "inputs.json"


def read_plan_record(store: Path) -> dict | None:
    """The record; None if it is missing, damaged, or of an earlier version."""
    try:
        return read_json(plan_record_path(store), "datasets", "files", "settings")
    except (OSError, LengthwiseError):
        return None


def write_plan_record(store: Path, sequences: dict[str, Path], retry_rejected: bool, settings: dict) -> None:
    """Write the record of the plan that is there.

    Parameters
    ----------
    store
        The store, with plan/jobs.tsv, its work orders and the tables of the datasets.
    sequences
        {dataset: its sequences.parquet} of the datasets that were planned.
    retry_rejected
        As the config had it.
    settings
        The store's settings. The record is a copy of them too.
    """
    known = (read_plan_record(store) or {"files": {}})["files"]
    orders = sorted(path for path in (store / "plan" / "jobs").glob("*.parquet") if not path.name.startswith("."))
    files = {"jobs.tsv": facts(store / "plan" / "jobs.tsv")}
    for path in orders:  # immutable: hashed once
        name = f"jobs/{path.name}"
        files[name] = known[name] if name in known and has_size(path, known[name]) else facts(path)
    record = {
        "datasets": {name: _checksum(path) for name, path in sequences.items()},
        "retry_rejected": retry_rejected,
        "settings": settings,
        "files": files,
    }
    write_json(plan_record_path(store), record)


def why_planned_again(store: Path, summaries: Summaries, retry_rejected: bool, settings: dict | None) -> str:
    """Why the plan has to be made (again), in a few words; empty if it is whole and of these datasets.

    Parameters
    ----------
    store, summaries
        The store, and the summaries of the config's datasets.
    retry_rejected
        As the config has it.
    settings
        The store's settings, None if they are not bound yet.
    """
    record = read_plan_record(store)
    if record is None:
        return "" if is_adoptable(store, list(summaries)) else "its record is missing or damaged"
    if record["datasets"].keys() != summaries.keys():
        return "it is of other datasets"
    if record["retry_rejected"] != retry_rejected:
        return "retry_rejected has changed"
    if settings is None or record["settings"]["fingerprint"] != settings["fingerprint"]:
        return "it is of other settings"
    if damaged := damaged_files(store / "plan", record["files"]):
        return f"{damaged[0]} is missing or has another size"
    for name, planned in record["datasets"].items():
        tables = (summaries[name] or {}).get("files", {})
        if tables.get("sequences.parquet", {}).get("sha256", planned) != planned:
            return f"the dataset {name!r} has other sequences"
    return ""


def is_adoptable(store: Path, datasets: list[str]) -> bool:
    """Whether the plan of an earlier version, whose record is {dataset: stamp}, is whole and of these datasets."""
    try:
        planned = read_json(plan_record_path(store))
    except (OSError, LengthwiseError):
        return False
    return planned.keys() == set(datasets) and all(_plan_has_jobs(store, name) for name in datasets)


def _plan_has_jobs(store: Path, dataset: str) -> bool:
    """Whether plan/jobs.tsv has the jobs that a dataset's manifest names. An earlier version noted no size of the table."""
    jobs_tsv = store / "plan" / "jobs.tsv"
    try:
        planned = planned_job_records(str(store), dataset)
        named = read_manifest(store / "datasets" / dataset / "manifest.json")["jobs"]
        is_whole = jobs_tsv.read_bytes().endswith(b"\n")
    except (OSError, KeyError, AttributeError, LengthwiseError):  # cut short within a row, or not assembled yet
        return False
    return is_whole and {Path(path).stem for path in planned} >= set(named)


def _checksum(sequences: Path) -> str:
    """The checksum of a dataset's sequences: its summary's, or for one of an earlier version the file's."""
    table = (read_summary(sequences.parent) or {}).get("files", {}).get(sequences.name)
    return table["sha256"] if table else sha256(sequences)
