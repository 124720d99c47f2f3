"""The version of the code."""

import functools
import os
import subprocess
from pathlib import Path


@functools.cache
def git_commit() -> str | None:
    """Return the git commit of the package's checkout, with `-dirty` if its code was edited; None without a checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    # Not of the config, which users edit.
    return commit and commit + ("-dirty" if _git(root, "status", "--porcelain", "-uno", "--", "scripts") else "")


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails."""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        git = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() if git.returncode == 0 else None
