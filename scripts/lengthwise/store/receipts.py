"""Receipts: `receipt.json`, in the folder of an export and in report/, has size and checksum of each file there and its origin.

The main process compares sizes whenever the workflow is parsed, so this module imports no library.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.store.paths import quarantined
from lengthwise.system.files import damaged_files, facts, read_json, write_json

RECEIPT = "receipt.json"
# A pt export has a file for each protein. Its files.tsv has their sizes and checksums, the receipt their number.
PROTEIN_ENDING = ".pt"


def write_receipt(folder: Path, names: Iterable[str], **origin: object) -> None:
    """Write the receipt of these files of a folder, and what they were made from."""
    write_json(folder / RECEIPT, {**origin, "files": {name: facts(folder / name) for name in sorted(names)}})


def add_to_receipt(folder: Path, name: str) -> None:
    """Add a file to the receipt of a folder whose other files another rule writes."""
    try:
        receipt = read_receipt(folder) or {"files": {}}
    except LengthwiseError:  # the other rule writes it again
        receipt = {"files": {}}
    receipt["files"][name] = facts(folder / name)
    write_json(folder / RECEIPT, receipt)


def read_receipt(folder: Path) -> dict | None:
    """The receipt of a folder; None where there is none: an earlier version made the folder, or nothing is there yet.

    Raises
    ------
    LengthwiseError
        It is damaged, or in quarantine.
    """
    path = folder / RECEIPT
    try:
        return read_json(path, "files")
    except FileNotFoundError:
        if quarantined(path).exists():
            raise LengthwiseError(f"{path}: is in quarantine; run snakemake: it is made again") from None
        return None


def checksums_of(folder: Path) -> dict[str, str]:
    """{file: SHA-256} from the receipt of a folder; empty where it says none."""
    try:
        return {name: each["sha256"] for name, each in (read_receipt(folder) or {"files": {}})["files"].items()}
    except LengthwiseError:
        return {}


def damaged_by_receipt(folder: Path) -> list[str]:
    """The files of a folder that are missing or have another size than its receipt says; or the receipt itself.

    Empty where there is no receipt. The proteins of a pt export are not among them.
    """
    try:
        receipt = read_receipt(folder) or {"files": {}}
    except LengthwiseError:
        return [RECEIPT]
    return damaged_files(folder, receipt["files"])


def reported_datasets(folder: Path) -> list[str] | None:
    """The datasets of the report in this folder; None where no receipt says it."""
    try:
        return (read_receipt(folder) or {}).get("datasets")
    except LengthwiseError:
        return None


def why_exported_again(folder: Path, index_sha256: str | None) -> str:
    """Why an export has to be made again, in a few words; empty if it is whole, or of an earlier version without receipts.

    Parameters
    ----------
    folder
        The folder ``datasets/<dataset>/exports/<kind>``.
    index_sha256
        The checksum of the dataset's index.parquet, from the manifest; None where it says none.
    """
    if damaged := damaged_by_receipt(folder):
        return f"{damaged[0]} is missing, damaged or of another size"
    receipt = read_receipt(folder)
    if receipt is None:
        return "its receipt is missing" if index_sha256 and folder.is_dir() else ""
    if index_sha256 and receipt["index_sha256"] != index_sha256:
        return "it was made from another index"
    if "proteins" in receipt and len(protein_files(folder)) != receipt["proteins"]["files"]:
        return f"it has another number of {PROTEIN_ENDING} files"
    return ""


def protein_files(folder: Path) -> list[os.DirEntry[str]]:
    """The files of a pt export, without files.tsv."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.name.endswith(PROTEIN_ENDING)]
