"""What a run has to make (again), by what the store itself says of its files.

Snakemake compares times, and parameters where its folder `.snakemake` has notes of them. Another working folder has none, and
times may go back. So the main process asks the store, and has Snakemake make again what is stale.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.ingest import identity
from lengthwise.maintain.cleanup import broken_job_records
from lengthwise.plan.record import (
    is_adoptable,
    plan_record_path,
    read_plan_record,
    why_planned_again,
    write_plan_record,
)
from lengthwise.store.manifest import NewerError, read_manifest
from lengthwise.store.paths import export_path
from lengthwise.store.receipts import damaged_by_receipt, reported_datasets, why_exported_again
from lengthwise.store.settings import guard
from lengthwise.system.files import damaged_files, read_json, write_json
from lengthwise.system.locks import run_lock_holder

Reasons = dict[Path, str]
OTHER_SETTINGS = "no embedding is stored yet, and the config has other settings"


@dataclass(frozen=True)
class Wanted:
    """What a config asks of a store, as far as the store's files say what they were made with."""

    stamps: dict[str, list[dict]]  # {dataset: `identity.input_stamp` of each of its files}
    policy: dict  # `identity.policy_of`
    retry_rejected: bool
    exports: list[str]
    scaling: bool
    model_sha256: str


def stale_outputs(store: Path, wanted: Wanted, settings: dict | None) -> Reasons:
    """Find the outputs that have to be made again. Reads small files and compares sizes, no more.

    Parameters
    ----------
    store, wanted
        The store, and what the config asks of it.
    settings
        The store's settings; None if they are not bound yet and the config has others, or if there is no store.

    Returns
    -------
    {output: why, in a few words}. The outputs of a dataset without a folder are new, and left out.

    Raises
    ------
    LengthwiseError
        A dataset belongs to other files; or a newer Lengthwise wrote a file.
    """
    found: Reasons = {store / "weights.json": _why_weights(store, wanted, settings), **broken_job_records(store)}
    summaries = {name: identity.read_summary(store / "inputs" / name) for name in wanted.stamps}
    found[store / "plan" / "jobs.tsv"] = why_planned_again(store, summaries, wanted.retry_rejected, settings)
    for name, summary in summaries.items():
        tables, dataset = store / "inputs" / name, store / "datasets" / name
        found[tables / identity.TABLES[0]] = identity.why_read_again(
            tables, summary, wanted.stamps[name], wanted.policy
        )
        found[dataset / "manifest.json"] = why = why_assembled_again(dataset, summary, settings)
        if not why:
            found |= _stale_exports(store, dataset, wanted.exports)
    found |= _stale_report(store / "report", wanted)
    return {path: why for path, why in found.items() if why and path.parent.exists()}


def _why_weights(store: Path, wanted: Wanted, settings: dict | None) -> str:
    try:
        receipt = read_json(store / "weights.json", "path", "bytes", "sha256")
    except (OSError, LengthwiseError):
        return "it is damaged"
    if wanted.model_sha256 and receipt["sha256"] != wanted.model_sha256.lower():
        return "it has another SHA-256 than model_sha256 in the config"
    return "" if settings else OTHER_SETTINGS


def why_assembled_again(folder: Path, summary: dict | None, settings: dict | None) -> str:
    """Why a dataset has to be assembled (again), in a few words; empty if it is whole and of its tables.

    Parameters
    ----------
    folder, summary
        The dataset's folder ``datasets/<dataset>``, and `lengthwise.ingest.identity.read_summary` of its tables.
    settings
        As for `stale_outputs`.

    Raises
    ------
    LengthwiseError
        A newer Lengthwise wrote the manifest.
    """
    try:
        manifest = read_manifest(folder / "manifest.json")
    except FileNotFoundError:
        return "it does not exist"
    except NewerError:
        raise
    except LengthwiseError:
        return "it is damaged"
    if summary and manifest.get("input_sha256") != summary["input_sha256"]:
        return "it is of an earlier content of the FASTA file"
    if summary and (manifest.get("policy") or summary.get("policy")) != summary.get("policy"):
        return "it was made with another policy for records"
    if settings and manifest["settings"] != settings:
        return "it has other settings than the store"
    if "files" in manifest:
        damaged = damaged_files(folder, manifest["files"])
    else:  # of an earlier version, which noted no sizes
        damaged = [name for name in ("index.parquet", "lookup.arrow") if not (folder / name).exists()]
    return f"{damaged[0]} is missing or has another size" if damaged else ""


def _stale_exports(store: Path, dataset: Path, kinds: list[str]) -> Reasons:
    if not kinds:
        return {}
    index = read_manifest(dataset / "manifest.json").get("files", {}).get("index.parquet", {}).get("sha256")
    return {
        Path(export_path(dataset, kind, store.name)): why_exported_again(dataset / "exports" / kind, index)
        for kind in kinds
    }


def _stale_report(folder: Path, wanted: Wanted) -> Reasons:
    if not (page := folder / "index.html").exists():
        return {}
    damaged = damaged_by_receipt(folder)
    found = {page: f"{damaged[0]} is missing, damaged or of another size" if damaged else ""}
    if (reported := reported_datasets(folder)) is not None and sorted(reported) != sorted(wanted.stamps):
        found[page] = "it is of other datasets"
    study = folder / "scaling.tsv"
    if wanted.scaling and (study.name in damaged or not study.exists() or not study.stat().st_size):
        found[study] = "it is missing, damaged or of another size"
    windows = folder / "windows.tsv"
    if wanted.policy["long_policy"] == "window" and (windows.name in damaged or not windows.exists()):
        found[windows] = "it is missing, damaged or of another size"
    return found


def without_settings(stale: Reasons) -> Reasons:
    """Stale outputs without those of settings that are not bound yet: these follow a run, not a forecast.

    In a dry run weights.json would hide the plan, which depends on it by an `ancient` file alone.
    """
    return {path: why for path, why in stale.items() if why != OTHER_SETTINGS}


def require_free_tables(store: Path, stale: Reasons) -> None:
    """Refuse a forecast that would read a FASTA again while a run is at work.

    Raises
    ------
    LengthwiseError
        The run needs the tables that are there.
    """
    tables = [path for path in stale if path.name == identity.TABLES[0] and path.exists()]
    if tables and (run := run_lock_holder(store)):
        raise LengthwiseError(
            f"{tables[0]}: {stale[tables[0]]}; a forecast would make it again, and the run of {run['began']} on {run['host']} "
            f"(process {run['process']}, folder {run['folder']}) needs it as it is: wait until that run is done"
        )


def restore(store: Path, wanted: Wanted, config: dict) -> None:
    """Before a run: mend what needs no job, for a run that holds the store's lock.

    Settings that are not bound yet and differ from the config go, with the work orders made for them. Lost settings come back
    from a copy. Summaries and the plan of an earlier version get their stamps, which reads the FASTA files once.
    """
    settings = guard(store, config)
    if settings is None:
        for path in (store / "settings.json", plan_record_path(store), *(store / "plan" / "jobs").glob("*.parquet")):
            path.unlink(missing_ok=True)
    elif not _is_good(store / "settings.json"):
        write_json(store / "settings.json", settings)
    _adopt(store, wanted, settings)


def discard_stale(store: Path, stale: Collection[Path]) -> None:
    """Remove stale files that would be taken for good: job records, weights.json, the plan, work orders that are cut short.

    The plan judges what is finished by job records and work orders. Snakemake begins with the jobs of the plan that is there, and
    leaves out what depends on a forced job by `ancient` files alone.
    """
    if store / "plan" / "jobs.tsv" in stale and (record := read_plan_record(store)):
        for name in damaged_files(store / "plan", record["files"]):
            (store / "plan" / name).unlink(missing_ok=True)
    for path in stale:
        if path.parent == store / "jobs" or path in (store / "weights.json", store / "plan" / "jobs.tsv"):
            path.unlink(missing_ok=True)


def _is_good(path: Path) -> bool:
    try:
        read_json(path)
    except (OSError, LengthwiseError):
        return False
    return True


def _adopt(store: Path, wanted: Wanted, settings: dict | None) -> None:
    """Give summaries and the plan of an earlier version their stamps, where everything is still as they say."""
    complete = True
    for name, stamps in wanted.stamps.items():
        folder = store / "inputs" / name
        summary = identity.read_summary(folder)
        if summary is None:
            complete = False
        elif "inputs" not in summary:
            complete &= identity.adopt(folder, stamps)
    if complete and settings and read_plan_record(store) is None and is_adoptable(store, list(wanted.stamps)):
        sequences = {name: store / "inputs" / name / "sequences.parquet" for name in wanted.stamps}
        write_plan_record(store, sequences, wanted.retry_rejected, settings)
