"""Verify: is all that a store's datasets use there, and is it what was made?

What a run can make again is taken out of service on request: renamed, so that nothing reads it and nothing is lost.
"""

import errno
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.status import Status
from lengthwise.ingest.digests import digest_name
from lengthwise.store import weights
from lengthwise.store.layout import is_laid_out, shard_name
from lengthwise.store.lookup import LOOKUP, Index, read_pages
from lengthwise.store.manifest import NewerError, read_manifest
from lengthwise.store.paths import find_metrics, job_record_path, shard_path
from lengthwise.store.provenance import content_sha256
from lengthwise.store.settings import require
from lengthwise.store.shard import Shard
from lengthwise.system.files import fsync_folder, read_json
from lengthwise.system.text import count

log = logging.getLogger("lengthwise")

PROGRESS_SECONDS = 10.0

# Ends the name of what was taken out of service.
QUARANTINED = ".damaged"

# So many of the records that read a damaged sequence are named.
NAMED = 5

# What weights.json says of the settings, and under which key.
_OF_WEIGHTS = {"weights_sha256": "sha256"} | {
    key: key for key in ("num_layers", "embed_dim", "attention_heads", "random_weights")
}

# Refusals that are about a file itself, and not about all files.
_OF_A_FILE = {None, errno.EIO, errno.ENOENT}


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and the file that a run makes again once it is gone, if there is one."""

    line: str
    path: Path | None


@dataclass(frozen=True)
class Checked:
    """What was found about the weights or a dataset."""

    name: str
    problems: list[Problem]
    note: str = ""


def verify(store: Path, quick: bool = False) -> Iterator[Checked]:
    """Check a store's weights and all that its datasets use, one after the other.

    Parameters
    ----------
    store
        The store.
    quick
        Leave out the bytes of embeddings and weights: sizes, headers and tables alone.

    Raises
    ------
    LengthwiseError
        There is no store, or its settings are damaged or contradict its weights or every manifest.
    """
    if not (store / "weights.json").exists():
        raise LengthwiseError(f"{store}: no store here (no weights.json); give results/<model>")
    settings, manifests = require(store), sorted(store.glob("datasets/*/manifest.json"))
    _require_agreement(store, settings, manifests)
    shards = _Shards(store, settings, quick)
    yield Checked("weights", _problems_of(lambda: weights.verify(store, quick), None))
    if problems := [problem for path in sorted(store.glob("parity/*.json")) for problem in _check_parity(path)]:
        yield Checked("parity", problems)
    for manifest in manifests:
        yield _check_dataset(manifest, shards)


def quarantine(problems: list[Problem]) -> list[Path]:
    """Take damaged files out of service, so that the next run makes them again; returns where they are now."""
    moved = []
    for path in sorted({problem.path for problem in problems if problem.path and problem.path.exists()}):
        moved.append(path.with_name(path.name + QUARANTINED))
        os.replace(path, moved[-1])
        fsync_folder(path.parent)
    return moved


def _require_agreement(store: Path, settings: dict, manifests: list[Path]) -> None:
    """With wrong settings every shard would look damaged."""
    receipt = read_json(store / "weights.json")
    others = {"weights.json": {key: receipt[name] for key, name in _OF_WEIGHTS.items() if name in receipt}}
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
                f"{store}/settings.json: contradicts {name} there: {'; '.join(differences)}; restore what is wrong, every "
                "manifest.json has a copy of the settings. No shard was looked at"
            )


class _Shards:
    """The shards of a store, each checked once, however many datasets use it."""

    def __init__(self, store: Path, settings: dict, quick: bool):
        self.store, self.settings, self.quick = store, settings, quick
        self.known: dict[str, Shard | LengthwiseError] = {}
        self.bad: dict[str, list[int]] = {}
        self.bytes, self.said = 0, time.monotonic()

    def check(self, name: str, size: int) -> Shard | LengthwiseError:
        """The shard, or what is wrong with all of it; `bad` has the numbers of its sequences that are damaged."""
        if name not in self.known:
            try:
                self.known[name] = shard = whole_shard(shard_path(self.store, name), self.settings)
                self.bad[name] = [] if self.quick else shard.damaged()
            except LengthwiseError as error:
                self.known[name] = error
            self.bytes += size
            if time.monotonic() - self.said > PROGRESS_SECONDS:
                self.said = time.monotonic()
                log.info("%s of %.2f GB checked so far", count(len(self.known), "shard"), self.bytes / 1e9)
        return self.known[name]


def whole_shard(path: Path, settings: dict) -> Shard:
    """A shard that is what its name and the settings promise; its data are not read.

    Raises
    ------
    LengthwiseError
        It is not.
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


def _check_dataset(path: Path, shards: _Shards) -> Checked:
    name, index = f"dataset {path.parent.name}", path.with_name("index.parquet")
    try:
        manifest = read_manifest(path)
    except LengthwiseError as error:
        return Checked(name, [Problem(str(error), None if isinstance(error, NewerError) else _mendable(error, path))])
    if manifest["settings"] != shards.settings:
        return Checked(name, [Problem(f"{path}: has other settings than settings.json", path)])
    problems, good = [], {}
    for shard_id, size in manifest["shards"].items():
        shard = shards.check(shard_id, size)
        if isinstance(shard, LengthwiseError):
            problems.append(Problem(str(shard), _mendable(shard, shard_path(shards.store, shard_id))))
        elif bad := shards.bad[shard_id]:
            problems += _damaged(index, shard, bad, "is damaged")
        else:
            good[shard_id] = shard
            if (found := shard.path.stat().st_size) != size:  # which its header confirms
                problems.append(Problem(f"{path}: says {size:,} bytes of {shard.path}, which has {found:,}", path))
    if not shards.quick:
        problems += _other_checksums(path, manifest, good)
    try:
        with _records(index) as database:
            _check_counts(database, index, manifest)
            for shard_id, numbers in _check_rows(database, index, good).items():
                problems += _damaged(index, good[shard_id], numbers, "has other rows or another status in the index")
    except LengthwiseError as error:
        problems.append(Problem(str(error), _mendable(error, index)))
    else:
        problems += _problems_of(lambda: read_pages(index), index) or _problems_of(
            lambda: _check_lookup(path.parent, manifest["accepted"] + manifest["duplicate"]), index.with_name(LOOKUP)
        )
    sizes = {name: shard.path.stat().st_size for name, shard in good.items()}
    for job in manifest["jobs"]:
        job_record = job_record_path(shards.store, job)
        problems += _problems_of(lambda job_record=job_record: _check_job_record(job_record, sizes), job_record)
    metrics = [path for shard_id in manifest["shards"] if (path := find_metrics(shards.store, shard_id))]
    for each in metrics:
        read = pq.read_metadata if shards.quick else read_pages
        problems += _problems_of(lambda read=read, each=each: read(each), each)
    lost = len(manifest["shards"]) - len(metrics)
    return Checked(name, problems, count(manifest["records"], "record") + (f", {lost} without metrics" if lost else ""))


def _mendable(error: Exception, path: Path) -> Path | None:
    """The file, if a run would do better without it: not where this process may not read it, or has too many open."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return path if getattr(cause, "errno", None) in _OF_A_FILE else None


def _check_lookup(folder: Path, readable: int) -> None:
    """Of an index that is whole."""
    try:
        Index(folder, readable).check_lookup()
    except LengthwiseError as error:
        raise LengthwiseError(f"{folder / LOOKUP}: damaged; remove it and run snakemake again") from error.__cause__


def _check_parity(path: Path) -> list[Problem]:
    return _problems_of(lambda: read_json(path, "device", "versions", "parity"), path)


def _check_job_record(path: Path, sizes: dict[str, int]) -> None:
    """A commit's sizes are those of its shards, as far as these are known."""
    shards = read_json(path, "job", "device", "shards")["shards"]
    if not isinstance(shards, dict) or any(sizes.get(name, size) != size for name, size in shards.items()):
        raise LengthwiseError(f"{path}: damaged (its shards have other sizes); remove it and run snakemake again")


def _problems_of(check: Callable, path: Path | None) -> list[Problem]:
    try:
        check()
    except LengthwiseError as error:
        return [Problem(str(error), path and _mendable(error, path))]
    except (OSError, pa.ArrowException) as error:
        return [Problem(f"{path}: missing or damaged ({_first_line(error)})", path and _mendable(error, path))]
    return []


@contextmanager
def _records(index: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """An index as the table `records`.

    Raises
    ------
    LengthwiseError
        It is missing or damaged.
    """
    try:
        with tempfile.TemporaryDirectory() as spill, duckdb.connect(config={"temp_directory": spill}) as database:
            database.register("records", pyarrow.dataset.dataset(index, format="parquet"))
            yield database
    except (OSError, pa.ArrowException, duckdb.Error, ValueError, IndexError, TypeError) as error:
        raise LengthwiseError(f"{index}: missing or damaged ({_first_line(error)})") from error


def _check_counts(database: duckdb.DuckDBPyConnection, index: Path, manifest: dict) -> None:
    found = dict(database.execute("SELECT status, count(*) FROM records GROUP BY status ORDER BY status").fetchall())
    said = {status: n for status in ("accepted", "duplicate", "rejected") if (n := manifest[status])}
    if found != said or sum(found.values()) != manifest["records"]:
        raise LengthwiseError(f"{index}: has other records ({found}) than the manifest says ({said})")
    shards = database.execute("SELECT DISTINCT shard FROM records WHERE shard IS NOT NULL").fetchall()
    if {shard for (shard,) in shards} != set(manifest["shards"]):
        raise LengthwiseError(f"{index}: names other shards than the manifest")


def _check_rows(database: duckdb.DuckDBPyConnection, index: Path, shards: dict[str, Shard]) -> dict[str, list[int]]:
    """{shard: the numbers of its sequences whose rows or status are not what the index says}."""
    wrong: dict[str, list[int]] = {}
    batches = database.sql(
        "SELECT shard, sequence_no, row_start, length, digest, status = 'rejected' AS rejected FROM records"
        " WHERE shard IN (SELECT unnest(?::VARCHAR[])) ORDER BY shard",
        params=[list(shards)],
    ).to_arrow_reader(100_000)
    current, digests, offsets, status = "", None, None, None
    for batch in batches:
        names = batch["shard"].to_numpy(zero_copy_only=False)
        columns = {name: batch[name].to_numpy(zero_copy_only=False) for name in ("sequence_no", "row_start", "length")}
        given = np.frombuffer(b"".join(batch["digest"].to_pylist()), np.uint8).reshape(-1, 24)
        rejected = batch["rejected"].to_numpy(zero_copy_only=False)
        starts = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1]])).tolist()
        for start, stop in itertools.pairwise([*starts, len(names)]):
            if names[start] != current:
                current = names[start]
                digests, offsets, status = (shards[current].read(name) for name in ("digests", "offsets", "status"))
            numbers, first, length = (column[start:stop] for column in columns.values())
            if numbers.min() < 0 or numbers.max() >= len(status) or (digests[numbers] != given[start:stop]).any():
                raise LengthwiseError(
                    f"{index}: its places in {shards[current].path.name} are not those of its sequences"
                )
            off = (offsets[numbers] != first) | (np.diff(offsets)[numbers] != length)
            off |= (status[numbers] != Status.GOOD) != rejected[start:stop]
            if off.any():
                wrong[current] = sorted({*wrong.get(current, []), *numbers[off].tolist()})
    return wrong


def _other_checksums(path: Path, manifest: dict, shards: dict[str, Shard]) -> list[Problem]:
    """Shards that are whole, but not those that the manifest was written of."""
    said = manifest.get("checksums", {})
    return [
        Problem(f"{path}: has another checksum of {shard.path} than that has, which is whole", path)
        for name, shard in shards.items()
        if name in said and said[name] != content_sha256(shard)
    ]


def _damaged(index: Path, shard: Shard, numbers: list[int], what: str) -> list[Problem]:
    """One line for each of these sequences, with the records that read it."""
    digests = shard.read("digests")
    readers: dict[int, list[str]] = {}
    with suppress(LengthwiseError), _records(index) as database:
        readers = dict(
            database.execute(
                "SELECT sequence_no, list(id ORDER BY record_no) FROM records"
                " WHERE shard = ? AND sequence_no IN (SELECT unnest(?::INTEGER[])) GROUP BY sequence_no",
                [shard.path.stem, numbers],
            ).fetchall()
        )
    problems = []
    for number in numbers:
        ids = readers.get(number, [])
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        records = f"it is {', '.join(ids[:NAMED])}{more}" if ids else "no record here reads it"
        line = f"{shard.path}: sequence {number}, {digest_name(digests[number].tobytes())}, {what}; {records}"
        problems.append(Problem(line, shard.path))
    return problems


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
