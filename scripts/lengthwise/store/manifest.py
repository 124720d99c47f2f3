"""Manifest: what says that a dataset is complete, read back only if everything in it is of its type."""

import re
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.store.lookup import SCHEMA
from lengthwise.store.settings import fault
from lengthwise.system.files import read_json

_KINDS = {
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

_NAME = re.compile("[0-9a-f]{16}|[0-9a-f]{32}")


class NewerError(LengthwiseError):
    """A later version wrote it."""


def read_manifest(path: Path) -> dict:
    """A dataset's manifest, whose names of shards and jobs may become paths.

    Raises
    ------
    NewerError
        It was written by a newer Lengthwise.
    LengthwiseError
        It is damaged.
    """
    manifest = read_json(path, *_KINDS)
    if type(manifest["schema"]) is int and manifest["schema"] > SCHEMA:
        raise NewerError(f"{path}: written by a newer Lengthwise (schema {manifest['schema']}); update this one")
    if what := _fault(manifest):
        raise LengthwiseError(f"{path}: damaged ({what}); remove it and run snakemake again")
    return manifest


def _fault(manifest: dict) -> str:
    """What is wrong with a manifest, in a few words; nothing if it is whole."""
    for key, kind in _KINDS.items():
        if type(manifest[key]) is not kind or (kind is int and manifest[key] < 0):
            return f"{key} is {str(manifest[key])[:40]!r}"
    sizes, checksums = manifest["shards"], manifest.get("checksums", {})  # earlier versions had no checksums
    if not all(_NAME.fullmatch(name) and type(size) is int and size > 0 for name, size in sizes.items()):
        return "shards are no names with their bytes"
    if not all(isinstance(job, str) and _NAME.fullmatch(job) for job in manifest["jobs"]):
        return "jobs are no names"
    if not isinstance(checksums, dict) or (checksums and checksums.keys() != sizes.keys()):
        return "its checksums are not for its shards"
    wrong = fault(manifest["settings"])
    return f"settings: {wrong}" if wrong else ""
