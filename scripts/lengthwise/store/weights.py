"""A store's record of its weights."""

from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.sources import DEMO, record_path
from lengthwise.system.files import read_json, sha256, stamp, write_json


def location(store: Path) -> tuple[Path, dict]:
    """Where a store's checkpoint is, and its receipt; a path in it that is not absolute begins at the store."""
    receipt = read_json(store / "weights.json", "path", "bytes", "sha256")
    path = store / receipt["path"]
    if not path.exists():
        raise LengthwiseError(f"{path}: the checkpoint is gone; put it back, or run snakemake --forcerun fetch_model")
    return path, receipt


def origin(store: Path) -> str:
    """Where a store's checkpoint came from: an address, a path, or the workflow itself."""
    receipt = read_json(store / "weights.json", "path", "model")
    record = record_path(store / receipt["path"])
    if record.exists():
        return read_json(record, "url")["url"]
    if receipt["model"] == DEMO:
        return "made on the spot, seeded and random"
    return receipt["model"] if receipt["model"].endswith(".pt") else receipt["path"]


def require_unchanged(store: Path, expected_sha256: str) -> Path:
    """The store's checkpoint, if it is the one that the store was made with; hashed only if its size or time changed.

    Raises
    ------
    LengthwiseError
        It is gone or another one.
    """
    path, receipt = location(store)
    same = stamp(path).items() <= receipt.items()
    if (receipt["sha256"] if same else sha256(path)) != expected_sha256:
        raise _other_checkpoint(path, expected_sha256)
    return path


def verify(store: Path, quick: bool = False) -> None:
    """Read a store's checkpoint again and compare it with its receipt; `quick`: its size alone.

    Raises
    ------
    LengthwiseError
        It is gone or has other bytes.
    """
    path, receipt = location(store)
    if path.stat().st_size != receipt["bytes"] or (not quick and sha256(path) != receipt["sha256"]):
        raise _other_checkpoint(path, receipt["sha256"])


def note_new_time(store: Path) -> None:
    """Take up the time of a checkpoint that was touched or copied and has the same bytes, so that it is not hashed again."""
    if not (store / "weights.json").exists():
        return
    path, receipt = location(store)
    now = stamp(path)
    if not now.items() <= receipt.items() and sha256(path) == receipt["sha256"]:
        write_json(store / "weights.json", receipt | now)


def _other_checkpoint(path: Path, expected_sha256: str) -> LengthwiseError:
    return LengthwiseError(
        f"{path}: is not the checkpoint that this store was made with (SHA-256 {expected_sha256[:12]}...); restore that one, "
        "or give another 'results'"
    )
