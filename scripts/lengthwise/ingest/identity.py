"""Which files a dataset belongs to: the stamps of its FASTA in `summary.json`, compared whenever the workflow is parsed.

A stamp is a configured path, made absolute with its symlinks kept, and the file's size and mtime. A dataset of several files has
a list of stamps. A summary has stamps for all paths from which this content was read: several working folders may share a store.
The same path with other content is read again, and so are several files if one of their paths is known, whatever was added or
taken away. Other paths are accepted for the same content (SHA-256) and refused for another.
"""

import hashlib
import os
import shlex
from collections.abc import Iterable, Sequence
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


def expected_stamps(folder: Path, entries: list[dict]) -> list[dict]:
    """The `input_stamp` of each file of a dataset as a run found it.

    A file that is not there is as it was when it was last read: another workflow has yet to make it, or has removed it.

    Parameters
    ----------
    folder
        The folder ``inputs/<dataset>``.
    entries
        ``path`` of each file; ``bytes`` and ``mtime_ns`` where the file is there.
    """
    known = {stamp["path"]: stamp for reading in readings(read_summary(folder) or {}) for stamp in reading}
    absent = {"bytes": -1, "mtime_ns": -1}
    return [
        input_stamp(entry["path"], entry)
        if "bytes" in entry
        else known.get(os.path.abspath(entry["path"]), input_stamp(entry["path"], absent))
        for entry in entries
    ]


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


def why_read_again(folder: Path, summary: dict | None, stamps: list[dict], policy: dict) -> str:
    """Why FASTA files have to be read (again), in a few words; empty if the tables are there and belong to them.

    Parameters
    ----------
    folder, summary
        The folder ``inputs/<dataset>``, and its `read_summary`.
    stamps, policy
        The `input_stamp` of each file in order, and `policy_of` the config.

    Raises
    ------
    LengthwiseError
        The tables belong to other files under other paths.
    """
    if summary is None:
        return "it has no summary, or a damaged one"
    known, size = readings(summary), sum(stamp["bytes"] for stamp in stamps)
    if known and not _share_a_path(stamps, known) and size != summary["input_bytes"]:
        raise other_file(folder, summary, stamps)
    if known and stamps not in known:
        return _difference(stamps, known)
    if not known and size != summary["input_bytes"]:  # a summary of an earlier version
        return f"{in_words(_paths(stamps))} has another size than the file that was read"
    known_policy = summary.get("policy") or {}
    if changed := [key for key in policy if known_policy.get(key, policy[key]) != policy[key]]:
        return f"the config has another {changed[0]}"
    damaged = damaged_files(folder, summary.get("files", {}))
    return f"{damaged[0]} is missing or has another size" if damaged else ""


def readings(summary: dict) -> list[list[dict]]:
    """The stamps of all files for each set of paths from which this content was read, the last one last."""
    return [known if isinstance(known, list) else [known] for known in summary.get("inputs", [])]


def _difference(stamps: list[dict], known: list[list[dict]]) -> str:
    """How files differ from those that were read."""
    seen = {stamp["path"]: stamp for reading in known for stamp in reading}
    for stamp in stamps:
        if seen.get(stamp["path"]) != stamp:
            return f"{stamp['path']} is another path, or has another size or time, than the file that was read"
    asked = {*_paths(stamps)}
    if gone := [path for path in _paths(known[-1]) if path not in asked]:
        return f"{gone[0]} is no longer among the dataset's files"
    return "the dataset's files are in another order"


def _paths(stamps: list[dict]) -> list[str]:
    return [stamp["path"] for stamp in stamps]


def _share_a_path(stamps: list[dict], known: list[list[dict]]) -> bool:
    return not {path for reading in known for path in _paths(reading)}.isdisjoint(_paths(stamps))


def require_same_content(folder: Path, stamps: list[dict]) -> None:
    """Refuse files under new paths unless they have the content that the dataset was read from.

    Raises
    ------
    LengthwiseError
        They have another content.
    """
    summary = read_summary(folder)
    if summary is None or not (known := readings(summary)) or _share_a_path(stamps, known):
        return
    if _content_sha256(stamps) != summary["input_sha256"]:
        raise other_file(folder, summary, stamps)


def _content_sha256(stamps: list[dict]) -> str:
    return joint_sha256(sha256(Path(path)) for path in _paths(stamps))


def stamps_with(folder: Path, stamps: list[dict], input_sha256: str) -> list:
    """The stamps of a dataset, as `summary.json` has them, after files of this content were read."""
    summary = read_summary(folder)
    same = summary is not None and summary["input_sha256"] == input_sha256
    others = [known for known in readings(summary) if _paths(known) != _paths(stamps)] if summary and same else []
    return [known[0] if len(known) == 1 else known for known in [*others, stamps]]


def adopt(folder: Path, stamps: list[dict]) -> bool:
    """Add the stamps to a summary of an earlier version, if the file has the content that the summary names and the tables are
    whole; else remove it.

    Returns
    -------
    False if the files have to be read.
    """
    summary = read_summary(folder)
    if summary is None:
        return False
    if not _are_whole(folder, summary) or _content_sha256(stamps) != summary["input_sha256"]:
        (folder / "summary.json").unlink()
        return False
    inputs = stamps_with(folder, stamps, summary["input_sha256"])
    write_json(folder / "summary.json", {**summary, "inputs": inputs, "files": table_facts(folder)})
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


def other_file(folder: Path, summary: dict, stamps: list[dict]) -> LengthwiseError:
    """The refusal of other files under other paths."""
    asked, known = _paths(stamps), _paths(readings(summary)[-1])
    another = "another file" if len(known) == 1 else f"{len(known)} other files"
    value = asked[0] if len(asked) == 1 else "[...]"
    return LengthwiseError(
        f"{in_words(asked)}: the dataset {folder.name!r} in {folder.parent.parent} was read from {another}, "
        f"{in_words(known)}. Name this one's dataset in the config (inputs: {{another_name: {value}}}), or let it "
        f"take the place of that one with rm -r {shlex.quote(os.path.abspath(folder))}"
    )


def joint_sha256(checksums: Iterable[str]) -> str:
    """The SHA-256 of a dataset's content: of its only file; or of a text with the SHA-256 of each file, a line each.

    >>> joint_sha256(["ab"])
    'ab'
    """
    lines = list(checksums)
    return lines[0] if len(lines) == 1 else hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def in_words(paths: Sequence[str | Path]) -> str:
    """The files of a dataset, in one line.

    >>> in_words(["a.fasta"]), in_words(["a.fasta", "b.fasta", "c.fasta"])
    ('a.fasta', 'a.fasta and 2 more')
    """
    return str(paths[0]) + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
