"""The receipt of a store's checkpoint (`weights.json`): where its files are, their size, times and SHA-256."""

from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.sources import DEMO, file_sha256, identity, is_path, record_path, weights_stamp
from lengthwise.system.files import read_json, write_json


def location(store: Path) -> tuple[Path, dict]:
    """The path of a store's checkpoint, and its receipt. A relative path in the receipt begins at the store.

    Raises
    ------
    LengthwiseError
        The checkpoint is gone.
    """
    receipt = read_json(store / "weights.json", "path", "bytes", "sha256")
    path = store / receipt["path"]
    if not path.exists():
        raise LengthwiseError(f"{path}: the checkpoint is gone; put it back, or run snakemake --forcerun fetch_model")
    return path, receipt


def origin(store: Path) -> str:
    """The source of a store's checkpoint, for people: a URL, a path, or the random seed."""
    receipt = read_json(store / "weights.json", "path", "model")
    if hub := receipt.get("hub"):
        return f"{hub['address']}/{hub['id']} at {hub['commit']}"
    record = record_path(store / receipt["path"])
    if record.name.endswith(".pt.json") and record.exists():
        return read_json(record, "url")["url"]
    if receipt["model"] == DEMO:
        return "made on the spot, seeded and random"
    return receipt["model"] if is_path(receipt["model"]) else receipt["path"]


def provenance(store: Path) -> dict:
    """What a manifest says of the checkpoint besides its SHA-256: `origin`, and of a model of the hub its place there."""
    receipt = read_json(store / "weights.json")
    return {"origin": origin(store), **{key: receipt[key] for key in ("hub",) if key in receipt}}


def require_unchanged(store: Path, expected_sha256: str) -> Path:
    """The path of a store's checkpoint, after a check that the file is still the same.

    The file is hashed only if its size or times differ from the receipt.

    Raises
    ------
    LengthwiseError
        The checkpoint is gone, or has another hash.
    """
    path, receipt = location(store)
    unchanged = weights_stamp(path).items() <= receipt.items()
    if (receipt["sha256"] if unchanged else identity(file_sha256(path))) != expected_sha256:
        raise _wrong_checkpoint(path, expected_sha256)
    return path


def verify(store: Path, quick: bool = False) -> None:
    """Compare a store's checkpoint with its receipt: size and SHA-256, or with `quick` the size alone.

    Raises
    ------
    LengthwiseError
        The checkpoint is gone or differs.
    """
    path, receipt = location(store)
    if weights_stamp(path)["bytes"] != receipt["bytes"] or (
        not quick and identity(file_sha256(path)) != receipt["sha256"]
    ):
        raise _wrong_checkpoint(path, receipt["sha256"])


def note_new_time(store: Path) -> None:
    """Update the times in the receipt if the checkpoint was touched or copied and has the same bytes.

    Without this update every check would hash the file again.
    """
    if not (store / "weights.json").exists():
        return
    path, receipt = location(store)
    current = weights_stamp(path)
    if not current.items() <= receipt.items() and identity(file_sha256(path)) == receipt["sha256"]:
        write_json(store / "weights.json", receipt | current)


def _wrong_checkpoint(path: Path, expected_sha256: str) -> LengthwiseError:
    return LengthwiseError(
        f"{path}: is not the checkpoint that this store was made with (SHA-256 {expected_sha256[:12]}...); restore that file, "
        "or use another 'results'"
    )
