"""The manifest of a dataset. A dataset is complete if and only if it has one. Reading checks the type of every value."""

import re
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.store.settings import find_fault
from lengthwise.system.files import read_json

# The version of a dataset's files. Raise it when an older Lengthwise cannot read them.
SCHEMA = 1
_TYPES = {
    "schema": int,
    "model": str,
    "random_weights": bool,
    "records": int,
    "accepted": int,
    "duplicate": int,
    "rejected": int,
    "settings": dict,
    "jobs": list,
    "shards": dict,
}

# Names become paths, so nothing else may pass.
_SHARD_OR_JOB_NAME = re.compile("[0-9a-f]{16}|[0-9a-f]{32}")


class NewerError(LengthwiseError):
    """A newer Lengthwise wrote this file."""


def read_manifest(path: Path) -> dict:
    """Read a dataset's manifest.

    Raises
    ------
    FileNotFoundError
        There is no manifest: the dataset is not complete.
    NewerError
        A newer Lengthwise wrote it.
    LengthwiseError
        It is damaged.
    """
    manifest = read_json(path, *_TYPES)
    if type(manifest["schema"]) is int and manifest["schema"] > SCHEMA:
        raise NewerError(f"{path}: written by a newer Lengthwise (schema {manifest['schema']}); update this one")
    if what := _find_fault(manifest):
        raise LengthwiseError(f"{path}: damaged ({what}); remove it and run snakemake again")
    return manifest


def _find_fault(manifest: dict) -> str:
    """What is wrong with a manifest, in a few words; empty if nothing is."""
    for key, expected in _TYPES.items():
        if type(manifest[key]) is not expected or (expected is int and manifest[key] < 0):
            return f"{key} is {str(manifest[key])[:40]!r}"
    sizes, checksums = manifest["shards"], manifest.get("checksums", {})  # earlier versions had no checksums
    if not all(_SHARD_OR_JOB_NAME.fullmatch(name) and type(size) is int and size > 0 for name, size in sizes.items()):
        return "shards are not names with sizes in bytes"
    if not all(isinstance(job, str) and _SHARD_OR_JOB_NAME.fullmatch(job) for job in manifest["jobs"]):
        return "jobs are not names"
    if not isinstance(checksums, dict) or (checksums and checksums.keys() != sizes.keys()):
        return "checksums and shards do not match"
    if not all(type(entry) is dict and type(entry.get("bytes")) is int for entry in manifest.get("files", {}).values()):
        return "files are not names with sizes"
    settings_fault = find_fault(manifest["settings"])
    return f"settings: {settings_fault}" if settings_fault else ""
