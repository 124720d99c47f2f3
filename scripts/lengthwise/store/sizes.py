"""Sizes in bytes of stored embeddings and of exports."""

from pathlib import Path

import duckdb
import numpy as np

from lengthwise.esm2 import tensors
from lengthwise.store.layout import layout

# Bytes of an entry apart from its numbers, measured and rounded up.
_ENTRY_BYTES = {"h5": 900, "pt": 2048, "biotrainer": 1300, "parquet": 64}


def tensors_of(kind: str, settings: dict) -> list[str]:
    """Names of the stored tensors that an export reads."""
    first = settings["layers"][0]
    if kind in ("h5", "biotrainer"):
        return [f"layer_{first}", f"mean_{first}"]
    kinds = tensors.POOLED if kind == "parquet" else ("residue", "mean", "bos")
    outputs = [output for output in kinds if output in settings["outputs"]]
    contacts = ["contacts"] if kind == "pt" and "contacts" in settings["outputs"] else []
    return tensors.names(outputs, settings["layers"]) + contacts


def export_bytes(kind: str, settings: dict, records: Path) -> int:
    """The size of an export in bytes: an estimate, rounded up.

    Parameters
    ----------
    kind, settings
        The export's name and the store's settings.
    records
        A dataset's `index.parquet` or `records.parquet`.
    """
    query = (
        "SELECT count(*), coalesce(sum(length), 0)::BIGINT,"
        " coalesce(sum(length * length::BIGINT) FILTER (length <= ?), 0)::BIGINT"
        " FROM read_parquet(?) WHERE status <> 'rejected'"
    )
    with duckdb.connect(config={"threads": 1}) as database:
        most = settings.get("contacts_max_residues", 0)
        ((n, residues, pairs),) = database.execute(query, [most, str(records)]).fetchall()
    total = n * _ENTRY_BYTES[kind]
    for name in tensors_of(kind, settings):
        if name == "contacts":
            total += 4 * pairs  # whole maps
            continue
        by_residue = name.startswith("layer_")
        # biotrainer's files keep the storage type of rows.
        half = kind == "h5" or (kind == "biotrainer" and by_residue and settings["storage_dtype"] == "float16")
        total += (residues if by_residue else n) * settings["embed_dim"] * (2 if half else 4)
    return total


def missing_bytes(store: Path, settings: dict, datasets: list[str], kinds: list[str]) -> int:
    """The size in bytes of those exports of the datasets that do not exist yet."""
    return sum(
        export_bytes(kind, settings, store / "inputs" / name / "records.parquet")
        for name in datasets
        for kind in kinds
        if not (store / "datasets" / name / "exports" / kind).exists()
    )


def bytes_per_sequence(lengths: np.ndarray, settings: dict) -> np.ndarray:
    """Bytes [n] of sequences of these lengths [n] in a shard, without its header."""
    one = np.ones(1, np.int64)
    _, planned = layout(one, settings)  # of one sequence of one residue
    total = np.full(len(lengths), sum(tensor.nbytes for tensor in planned.values()), np.int64)
    total -= 8 * sum(name.endswith("offsets") for name in planned)  # these have one entry more than sequences
    for name, tensor in planned.items():
        if tensors.is_result(name):
            more = tensors.entries(name, lengths, settings) - tensors.entries(name, one, settings)
            total += more * tensor.entry_bytes
    return total
