"""Which file a dataset belongs to: the stamps of its FASTA in `summary.json`, compared whenever the workflow is parsed.

A stamp is a configured path, made absolute with its symlinks kept, and the file's size and mtime. A summary has a stamp for each
path from which this content was read: several working folders may share a store. The same path with other content is read again;
another path is accepted for the same content (SHA-256) and refused for another.
"""

import os
import shlex
from pathlib import Path
from typing import Any

from lengthwise.errors import LengthwiseError
from lengthwise.system.files import damaged_files, facts, read_json, sha256, write_json
from lengthwise.system.files import stamp as file_stamp

TABLES = ("records.parquet", "sequences.parquet")
Summaries = dict[str, dict | None]  # {dataset: `read_summary`}


def input_stamp(path: str | Path, found: dict | None = None) -> dict[str, Any]:
    """The stamp of a FASTA file.

    Parameters
    ----------
    path
        The configured path.
    found
        Its size and mtime (``bytes``, ``mtime_ns``) as a run found them; None takes them now.

    Raises
    ------
    LengthwiseError
        There is no such file, or it cannot be reached.
    """
    if found is None:
        try:
            found = file_stamp(Path(path))
        except OSError as error:
            raise LengthwiseError(f"{path}: cannot be read: {error.strerror}") from error
    return {"path": os.path.abspath(path), "bytes": found["bytes"], "mtime_ns": found["mtime_ns"]}


def policy_of(config: dict) -> dict:
    """The policy for records that a checked config asks for, as `summary.json` has it."""
    long_sequences = dict(config["long_sequences"])
    return {
        "letters": config["letters"],
        "long_policy": long_sequences.pop("policy"),
        **long_sequences,
        "duplicate_ids": config["duplicate_ids"],
        "nucleotides": config["nucleotides"],
        "strict": config["strict"],
    }


def read_summary(folder: Path) -> dict | None:
    """The summary in a dataset's folder ``inputs/<dataset>``; None if it is missing or damaged: the file is read again."""
    try:
        return read_json(folder / "summary.json", "records", "input_bytes", "input_sha256")
    except (OSError, LengthwiseError):
        return None


def why_read_again(folder: Path, summary: dict | None, stamp: dict, policy: dict) -> str:
    """Why a FASTA has to be read (again), in a few words; empty if its tables are there and belong to it.

    Parameters
    ----------
    folder, summary
        The folder ``inputs/<dataset>``, and its `read_summary`.
    stamp, policy
        The file's `input_stamp`, and `policy_of` the config.

    Raises
    ------
    LengthwiseError
        The tables belong to another file under another path.
    """
    if summary is None:
        return "it has no summary, or a damaged one"
    stamps = summary.get("inputs", [])
    if stamps and stamp["path"] not in paths_of(summary) and stamp["bytes"] != summary["input_bytes"]:
        raise other_file(folder, summary, stamp["path"])
    if stamps and stamp not in stamps:
        return f"{stamp['path']} is another path, or has another size or time, than the file that was read"
    if not stamps and stamp["bytes"] != summary["input_bytes"]:  # a summary of an earlier version
        return f"{stamp['path']} has another size than the file that was read"
    known = summary.get("policy") or {}
    if changed := [key for key in policy if known.get(key, policy[key]) != policy[key]]:
        return f"the config has another {changed[0]}"
    damaged = damaged_files(folder, summary.get("files", {}))
    return f"{damaged[0]} is missing or has another size" if damaged else ""


def paths_of(summary: dict) -> list[str]:
    return [stamp["path"] for stamp in summary.get("inputs", [])]


def require_same_content(folder: Path, stamp: dict) -> None:
    """Refuse a file under a new path unless it has the content that the dataset was read from.

    Raises
    ------
    LengthwiseError
        It has another content.
    """
    summary = read_summary(folder)
    if summary is None or not summary.get("inputs") or stamp["path"] in paths_of(summary):
        return
    if sha256(Path(stamp["path"])) != summary["input_sha256"]:
        raise other_file(folder, summary, stamp["path"])


def stamps_with(folder: Path, stamp: dict, input_sha256: str) -> list[dict]:
    """The stamps of a dataset after a file of this content was read."""
    summary = read_summary(folder)
    same = summary is not None and summary["input_sha256"] == input_sha256
    others = (
        [known for known in summary.get("inputs", []) if known["path"] != stamp["path"]] if summary and same else []
    )
    return [*others, stamp]


def adopt(folder: Path, stamp: dict) -> bool:
    """Add the stamp to a summary of an earlier version, if the file has the content that the summary names and the tables are
    whole; else remove it.

    Returns
    -------
    False if the file has to be read again.
    """
    summary = read_summary(folder)
    if summary is None:
        return False
    if not _are_whole(folder, summary) or sha256(Path(stamp["path"])) != summary["input_sha256"]:
        (folder / "summary.json").unlink()
        return False
    write_json(folder / "summary.json", {**summary, "inputs": [stamp], "files": table_facts(folder)})
    return True


def _are_whole(folder: Path, summary: dict) -> bool:
    """Whether a dataset's tables have as many rows as its summary counts. An earlier version noted no sizes."""
    import pyarrow.parquet as pq  # parsing the workflow imports this module, and has no need of it

    try:
        rows = [pq.read_metadata(folder / name).num_rows for name in TABLES]
    except (OSError, ValueError):
        return False
    return rows == [summary["records"], summary.get("accepted")]


def table_facts(folder: Path) -> dict[str, dict]:
    """Size and checksum of a dataset's tables."""
    return {name: facts(folder / name) for name in TABLES}


def other_file(folder: Path, summary: dict, path: str) -> LengthwiseError:
    """The refusal of another file under another path."""
    known = paths_of(summary)
    return LengthwiseError(
        f"{path}: the dataset {folder.name!r} in {folder.parent.parent} was read from another file, {known[-1]}. Name this one's "
        f"dataset in the config (inputs: {{another_name: {path}}}), or let it take the place of that one with "
        f"rm -r {shlex.quote(os.path.abspath(folder))}"
    )
