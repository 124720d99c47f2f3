"""Verify: check that everything that a store's datasets and its plan use is there and is undamaged."""

import logging
import time
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.maintain.quarantine import Problem, problems_of, repairable_path
from lengthwise.maintain.verify_files import check_record
from lengthwise.maintain.verify_index import (
    check_counts,
    index_database,
    problems_of_sequences,
    sequences_that_differ,
)
from lengthwise.plan.jobs_table import Rows, job_rows
from lengthwise.store import weights
from lengthwise.store.layout import is_laid_out, shard_name
from lengthwise.store.lookup import LOOKUP, Index, read_pages
from lengthwise.store.manifest import NewerError, read_manifest
from lengthwise.store.paths import find_metrics, job_record_path, shard_path
from lengthwise.store.provenance import content_sha256
from lengthwise.store.receipts import RECEIPT, read_receipt
from lengthwise.store.settings import find_fault, load, require
from lengthwise.store.shard import Shard
from lengthwise.system.files import read_json
from lengthwise.system.text import count

log = logging.getLogger("lengthwise")
PROGRESS_SECONDS = 10.0

# The keys of a job record.
_JOB_KEYS = ("job", "device", "shards")
# {setting: the key of weights.json with the same value}
_WEIGHTS_KEYS = {"weights_sha256": "sha256"} | {
    key: key for key in ("num_layers", "embed_dim", "attention_heads", "random_weights")
}


@dataclass(frozen=True)
class CheckResult:
    """The problems of the weights, of a dataset or of another part of the store; none where it is good."""

    name: str
    problems: list[Problem]
    note: str = ""


def verify(store: Path, quick: bool = False) -> Iterator[CheckResult]:
    """Check everything that a store has and that its datasets or its plan use, see `lengthwise.maintain.verify_files`.

    Not checked are logs, heartbeats, forecasts, the run lock, and what `prune` calls unused.

    Parameters
    ----------
    store
        The store.
    quick
        Check sizes, headers and tables, but not the bytes of embeddings, weights and other files.

    Yields
    ------
    CheckResult
        Of the weights and of each dataset; of the rest of the store only where something is wrong.

    Raises
    ------
    LengthwiseError
        There is no store; or its settings are damaged without a copy, or contradict its weights or every manifest.
    """
    if not (store / "weights.json").exists() and load(store) is None:
        raise LengthwiseError(f"{store}: no store here (no weights.json); give results/<model>")
    settings, manifests = require(store), sorted(store.glob("datasets/*/manifest.json"))
    record = problems_of(partial(_check_weights_record, store / "weights.json"), store / "weights.json")
    _require_agreement(store, settings, manifests, {} if record else read_json(store / "weights.json"))
    shards, of_manifests = _ShardChecks(store, settings, manifests, quick), _jobs_of(manifests)
    jobs = of_manifests | _planned(store).keys()
    yield from _if_wrong("settings", problems_of(partial(_check_settings, store), store / "settings.json"))
    yield CheckResult("weights", record or problems_of(lambda: weights.verify(store, quick), None))
    receipts = sorted(store.glob("parity/*.json"))
    yield from _if_wrong("parity", _check_records(receipts, quick, "device", "versions", "parity"))
    plan = check_record(store / "plan" / "inputs.json", quick, is_wanted=lambda path: _is_used(path, jobs))
    yield from _if_wrong("plan", plan)
    for name in _datasets_in_use(store):
        yield from _check_dataset(name, shards)
    yield from _if_wrong("jobs", _check_jobs(sorted(jobs), of_manifests, shards))
    yield from _if_wrong("report", check_record(store / "report" / RECEIPT, quick))


def _if_wrong(name: str, problems: list[Problem]) -> list[CheckResult]:
    return [CheckResult(name, problems)] if problems else []


def _check_records(records: Iterable[Path], quick: bool, *keys: str) -> list[Problem]:
    return [problem for record in records for problem in check_record(record, quick, *keys)]


def _check_settings(store: Path) -> None:
    """Refuse a damaged settings.json; the settings are then those of a copy."""
    path = store / "settings.json"
    fault = find_fault(read_json(path)) if path.exists() else "is missing"
    if fault:
        raise LengthwiseError(f"{path}: {fault}; remove it and run snakemake again: it comes back from a copy")


def _check_weights_record(path: Path) -> None:
    if not path.exists():
        raise LengthwiseError(f"{path}: is missing; run snakemake")
    read_json(path, "path", "bytes", "sha256")


def _planned(store: Path) -> Rows:
    """The rows of the plan; none if it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return job_rows(store / "plan" / "jobs.tsv")
    return {}


def _jobs_of(manifests: list[Path]) -> set[str]:
    """The jobs of undamaged manifests."""
    jobs: set[str] = set()
    for path in manifests:
        with suppress(LengthwiseError):
            jobs |= set(read_manifest(path)["jobs"])
    return jobs


def _is_used(path: Path, jobs: set[str]) -> bool:
    """Whether a file of the plan is not a work order that `prune` would delete."""
    return path.parent.name != "jobs" or path.stem in jobs


def _datasets_in_use(store: Path) -> list[str]:
    """The datasets that have a folder or are planned."""
    planned = {name for row in _planned(store).values() for name in row["datasets"].split(",")}
    return sorted(planned | {path.name for path in store.glob("datasets/*") if path.is_dir()})


def _require_agreement(store: Path, settings: dict, manifests: list[Path], receipt: dict) -> None:
    """Refuse wrong settings: with them every shard would look damaged."""
    others = {"weights.json": {key: receipt[name] for key, name in _WEIGHTS_KEYS.items() if name in receipt}}
    copies = {}
    for path in manifests:
        with suppress(LengthwiseError):
            copies[f"datasets/{path.parent.name}/manifest.json"] = read_manifest(path)["settings"]
    if settings not in copies.values():
        others |= copies
    for name, other in others.items():
        if differences := [
            f"{key} is {settings[key]} and {other[key]}" for key in other if other[key] != settings.get(key)
        ]:
            raise LengthwiseError(
                f"{store}/settings.json: contradicts {name} there: {'; '.join(differences)}; restore the wrong one (every "
                "manifest.json has a copy of the settings). No shard was checked"
            )


class _ShardChecks:
    """Checks each shard once, however many datasets use it."""

    def __init__(self, store: Path, settings: dict, manifests: list[Path], quick: bool):
        self.store, self.settings, self.manifests, self.quick = store, settings, manifests, quick
        self.checked: dict[str, Shard | LengthwiseError] = {}
        self.damaged_sequences: dict[str, list[int]] = {}
        self.checked_bytes, self.logged = 0, time.monotonic()

    def check(self, name: str, size_bytes: int) -> Shard | LengthwiseError:
        """The shard, or why it cannot be read. `damaged_sequences` then has the numbers of its damaged sequences."""
        if name not in self.checked:
            try:
                self.checked[name] = shard = check_shard_header(shard_path(self.store, name), self.settings)
                self.damaged_sequences[name] = [] if self.quick else shard.damaged()
            except LengthwiseError as error:
                self.checked[name] = error
            self.checked_bytes += size_bytes
            if time.monotonic() - self.logged > PROGRESS_SECONDS:
                self.logged = time.monotonic()
                log.info("%s of %.2f GB checked so far", count(len(self.checked), "shard"), self.checked_bytes / 1e9)
        return self.checked[name]

    @cached_property
    def indexes(self) -> dict[str, list[Path]]:
        """{shard: the indexes of the datasets that use it}, of undamaged manifests."""
        found: dict[str, list[Path]] = {}
        for path in self.manifests:
            with suppress(LengthwiseError):
                for name in read_manifest(path)["shards"]:
                    found.setdefault(name, []).append(path.with_name("index.parquet"))
        return found


def check_shard_header(path: Path, settings: dict) -> Shard:
    """Open a shard and compare its header with its name and the settings; embeddings are not read.

    Raises
    ------
    LengthwiseError
        The shard cannot be read, or its header differs.
    """
    shard = Shard(path)
    shard.unmap()
    if shard.metadata.get("fingerprint") != settings["fingerprint"]:
        raise LengthwiseError(f"{path}: was made with other settings than this store's")
    if shard_name(settings["fingerprint"], [shard.read("digests").tobytes()]) != path.stem:
        raise LengthwiseError(f"{path}: has other sequences than its name says")
    if not is_laid_out(shard.tensors, np.diff(shard.read("offsets")), settings):
        raise LengthwiseError(f"{path}: its header is not the one of its sequences")
    return shard


def _check_dataset(name: str, shards: _ShardChecks) -> list[CheckResult]:
    """The result of a dataset with its tables of inputs and its exports; of an incomplete one only what is wrong."""
    manifest = shards.store / "datasets" / name / "manifest.json"
    receipts = sorted(manifest.parent.glob(f"exports/*/{RECEIPT}"))
    keys = ("records", "input_bytes", "input_sha256")
    others = check_record(shards.store / "inputs" / name / "summary.json", shards.quick, *keys)
    others += _check_records(receipts, shards.quick, "kind", "index_sha256", "files")
    if not manifest.exists():
        return _if_wrong(f"dataset {name}", others)
    found = _check_manifest(manifest, shards)
    return [CheckResult(f"dataset {name}", [*found.problems, *others], found.note)]


def _check_manifest(path: Path, shards: _ShardChecks) -> CheckResult:
    """Check a manifest, the files beside it, and its jobs with their shards and metrics."""
    name, index = f"dataset {path.parent.name}", path.with_name("index.parquet")
    try:
        manifest = read_manifest(path)
    except LengthwiseError as error:
        repairable = None if isinstance(error, NewerError) else repairable_path(path, error)
        return CheckResult(name, [Problem(str(error), repairable)])
    if manifest["settings"] != shards.settings:
        return CheckResult(name, [Problem(f"{path}: has other settings than settings.json", path)])
    problems, intact = _check_shards(path, manifest, shards)
    problems += check_record(path, shards.quick)
    problems += _check_index(index, manifest, intact, {problem.path for problem in problems})
    sizes = {name: shard.path.stat().st_size for name, shard in intact.items()}
    for job in manifest["jobs"]:
        job_record = job_record_path(shards.store, job)
        problems += problems_of(partial(_check_job_record, job_record, sizes), job_record) or check_record(
            job_record, shards.quick
        )
    damaged = {problem.path for problem in problems}
    metrics = [file for shard_id in manifest["shards"] if (file := find_metrics(shards.store, shard_id))]
    for file in (file for file in metrics if file not in damaged):
        problems += problems_of(partial(pq.read_metadata if shards.quick else read_pages, file), file)
    missing = len(manifest["shards"]) - len(metrics)
    note = count(manifest["records"], "record") + (f", {missing} without metrics" if missing else "")
    note += _stale_exports(path, manifest.get("files", {}).get(index.name))
    return CheckResult(name, problems, note)


def _stale_exports(manifest: Path, index: dict | None) -> str:
    """Which exports were made from an earlier index, as a part of a note; `index` is the manifest's entry of the index."""
    stale = []
    for folder in sorted(manifest.parent.glob("exports/*")):
        with suppress(LengthwiseError):
            if index and (receipt := read_receipt(folder)) and receipt.get("index_sha256") != index["sha256"]:
                stale.append(folder.name)
    return f", {' and '.join(stale)} exported from an earlier index" if stale else ""


def _check_jobs(jobs: list[str], of_manifests: set[str], shards: _ShardChecks) -> list[Problem]:
    """Problems of what no manifest has: finished jobs of incomplete datasets, and shards that no dataset reads any more."""
    problems = []
    for job in jobs:
        record = job_record_path(shards.store, job)
        if job not in of_manifests:
            problems += check_record(record, shards.quick, *_JOB_KEYS)
        with suppress(OSError, LengthwiseError):  # an unfinished job, or a damaged record
            listed = read_json(record, *_JOB_KEYS)["shards"]
            rest = {name: size for name, size in listed.items() if name not in shards.checked}
            problems += _check_shards(record, {"shards": rest}, shards)[0]
    return problems


def _check_shards(path: Path, manifest: dict, shards: _ShardChecks) -> tuple[list[Problem], dict[str, Shard]]:
    """Problems of the shards of a manifest, and the shards without damage."""
    problems, intact = [], {}
    for shard_id, size_bytes in manifest["shards"].items():
        shard = shards.check(shard_id, size_bytes)
        if isinstance(shard, LengthwiseError):
            problems.append(Problem(str(shard), repairable_path(shard_path(shards.store, shard_id), shard)))
        elif damaged := shards.damaged_sequences[shard_id]:
            problems += problems_of_sequences(shards.indexes.get(shard_id, []), shard, damaged, "is damaged")
        else:
            intact[shard_id] = shard
            # The shard's header has confirmed its size, so the manifest is wrong.
            if (found := shard.path.stat().st_size) != size_bytes:
                message = f"{path}: says {size_bytes:,} bytes of {shard.path}, which has {found:,}"
                problems.append(Problem(message, path))
    if not shards.quick:
        checksums = manifest.get("checksums", {})
        problems += [
            Problem(f"{path}: has another checksum than {shard.path}, which is undamaged", path)
            for name, shard in intact.items()
            if name in checksums and checksums[name] != content_sha256(shard)
        ]
    return problems, intact


def _check_index(index: Path, manifest: dict, shards: dict[str, Shard], damaged: Set[Path | None]) -> list[Problem]:
    """Problems of the index and the lookup of a dataset, unless these are known as damaged; `shards` are undamaged."""
    if index in damaged:
        return []
    if unreadable := problems_of(lambda: read_pages(index), index):  # first: else shards would get the blame
        return unreadable
    problems = []
    try:
        with index_database(index) as database:
            check_counts(database, index, manifest)
            for shard_id, numbers in sequences_that_differ(database, index, shards).items():
                what = "has other rows or another status in the index"
                problems += problems_of_sequences([index], shards[shard_id], numbers, what)
    except LengthwiseError as error:
        return [*problems, Problem(str(error), repairable_path(index, error))]
    readable, lookup = manifest["accepted"] + manifest["duplicate"], index.with_name(LOOKUP)
    if lookup not in damaged:
        problems += problems_of(lambda: _check_lookup(index.parent, readable), lookup)
    return problems


def _check_lookup(folder: Path, readable: int) -> None:
    """Compare the lookup of a dataset with its index, which is undamaged."""
    try:
        Index(folder, readable).check_lookup()
    except LengthwiseError as error:
        raise LengthwiseError(f"{folder / LOOKUP}: damaged; remove it and run snakemake again") from error.__cause__


def _check_job_record(path: Path, size_bytes: dict[str, int]) -> None:
    """Compare the sizes in a job record with those of the undamaged shards."""
    shards = read_json(path, *_JOB_KEYS)["shards"]
    if not isinstance(shards, dict) or any(size_bytes.get(name, size) != size for name, size in shards.items()):
        raise LengthwiseError(f"{path}: damaged (its shards have other sizes); remove it and run snakemake again")
