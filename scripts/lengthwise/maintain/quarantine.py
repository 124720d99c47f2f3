"""Quarantine: a damaged file is renamed, so that nothing reads it, nothing is lost, and a run makes it again."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lengthwise.errors import LengthwiseError
from lengthwise.store.paths import quarantined
from lengthwise.system.descriptors import flush_folder

# Causes in the file itself (None: its content). Others, such as a missing permission, say nothing about the file.
_FILE_ERRORS = {None, errno.EIO, errno.ENOENT}


@dataclass(frozen=True)
class Problem:
    """What is wrong, in one line, and the file to quarantine; None where a run could not make it again."""

    message: str
    path: Path | None


def quarantine(problems: list[Problem]) -> list[Path]:
    """Rename the files of the problems, so that the next run makes them again; returns their new paths."""
    moved = []
    for path in sorted({problem.path for problem in problems if problem.path and problem.path.exists()}):
        moved.append(quarantined(path))
        os.replace(path, moved[-1])
        flush_folder(path.parent)
    return moved


def repairable_path(path: Path, error: Exception) -> Path | None:
    """The path, if the error is about the file itself, so that making it again helps; else None."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return path if getattr(cause, "errno", None) in _FILE_ERRORS else None


def problems_of(check: Callable[[], object], path: Path | None) -> list[Problem]:
    """Run a check of a file; returns its error as a problem. `path` is None where a run cannot make the file again."""
    try:
        check()
    except LengthwiseError as error:
        return [Problem(str(error), path and repairable_path(path, error))]
    except (OSError, pa.ArrowException) as error:
        message = f"{path}: missing or damaged ({first_line(error)})"
        return [Problem(message, path and repairable_path(path, error))]
    return []


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
