"""Checks of files by their records.

A record is a JSON file. It has a checksum of its own, and size and SHA-256 of the files that it vouches for:

| record | vouches for |
|---|---|
| inputs/<dataset>/summary.json | the tables beside it |
| plan/inputs.json | jobs.tsv and the work orders |
| jobs/<job>.json | the metrics of its shards |
| datasets/<dataset>/manifest.json | the files beside it |
| datasets/<dataset>/exports/<kind>/receipt.json | the files beside it; files.tsv of a pt export vouches for the others |
| report/receipt.json | the files beside it |
| settings.json, weights.json, parity/*.json | nothing else |

Shards have checksums inside. Records of earlier versions vouch for nothing.
"""

import csv
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from crc32c import crc32c

from lengthwise.errors import LengthwiseError
from lengthwise.maintain.quarantine import Problem, problems_of, repairable_path
from lengthwise.store.paths import find_metrics
from lengthwise.system.files import facts, read_json

# Names become paths, and files with them may be renamed: they stay in the record's folder.
_NAME = re.compile(r"(jobs/)?[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHARD_NAME = re.compile("[0-9a-f]{32}")
_REMAKE = "remove it and run snakemake again"
_MADE_ONCE = "no run makes it again: it counts as missing once --repair has moved it"


def check_record(
    record: Path, quick: bool, *keys: str, is_wanted: Callable[[Path], bool] = lambda _: True
) -> list[Problem]:
    """Check a record and the files that it vouches for; no problem if it is missing.

    Parameters
    ----------
    record, keys
        The record, and keys that it must have.
    quick
        Compare sizes alone.
    is_wanted
        Whether to compare a file.
    """
    try:
        content = read_json(record, *keys)
        files = _vouched_files(record, content)
    except FileNotFoundError:
        return []
    except (OSError, LengthwiseError) as error:
        return [Problem(str(error), repairable_path(record, error))]
    problems = [
        problem
        for path, expected in files.items()
        if is_wanted(path)
        for problem in problems_of(partial(_compare, path, expected, record, quick), path)
    ]
    if content.get("kind") == "pt" and not problems:
        problems += _check_proteins(record.with_name("files.tsv"), quick)
    return problems


def _vouched_files(record: Path, content: dict) -> dict[Path, dict]:
    """{file: its size and checksum}. Metrics that are missing are left out: they are no damage.

    Raises
    ------
    LengthwiseError
        An entry is not a file of the record.
    """
    named, metrics = content.get("files", {}), content.get("metrics", {})
    sound = all(_NAME.fullmatch(name) for name in named) and all(_SHARD_NAME.fullmatch(name) for name in metrics)
    if not sound or any({"bytes", "sha256"} - each.keys() for each in (*named.values(), *metrics.values())):
        raise LengthwiseError(f"{record}: damaged (its files are not names with checksums); {_REMAKE}")
    found = {record.parent / name: each for name, each in named.items()}
    return found | {path: each for name, each in metrics.items() if (path := find_metrics(record.parents[1], name))}


def _compare(path: Path, expected: dict, record: Path, quick: bool) -> None:
    """Compare a file with its entry in a record."""
    advice = _MADE_ONCE if record.parent.name == "jobs" else _REMAKE
    if record.parents[1].name == "exports":
        advice += f" with {record.parent.name} in 'exports'"
    try:
        found = {"bytes": path.stat().st_size} if quick else facts(path)
    except FileNotFoundError as error:
        raise LengthwiseError(f"{path}: is missing; {advice.removeprefix('remove it and ')}") from error
    for name, what in {"bytes": "size", "sha256": "checksum"}.items():
        if name in found and found[name] != expected[name]:
            raise LengthwiseError(f"{path}: damaged (another {what} than {record.name} says); {advice}")


def _check_proteins(table: Path, quick: bool) -> list[Problem]:
    """Compare the files of a pt export with its undamaged files.tsv."""
    problems = []
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            path = table.with_name(row["file"])
            problems += problems_of(partial(_compare_protein, path, row, quick), path)
    return problems


def _compare_protein(path: Path, row: dict[str, str], quick: bool) -> None:
    advice = "remove it and run snakemake again with pt in 'exports'"
    try:
        size_bytes = path.stat().st_size
        same = str(size_bytes) == row["bytes"]
        same = same and (quick or f"{crc32c(path.read_bytes()):08x}" == row["crc32c"])
    except FileNotFoundError as error:
        raise LengthwiseError(f"{path}: is missing; run snakemake again with pt in 'exports'") from error
    if not same:
        raise LengthwiseError(f"{path}: damaged (another size or checksum than files.tsv says); {advice}")
