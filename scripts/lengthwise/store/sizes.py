"""How many bytes stored embeddings and exports take."""

from pathlib import Path

import duckdb
import numpy as np

# What an entry takes beside its numbers, measured and rounded up.
_ENTRY_BYTES = {"h5": 900, "pt": 2048, "biotrainer": 1300, "parquet": 64}


def tensors_of(kind: str, settings: dict) -> list[str]:
    """The stored tensors that an export takes."""
    first = settings["layers"][0]
    if kind in ("h5", "biotrainer"):
        return [f"layer_{first}", f"mean_{first}"]
    names = {"residue": "layer", "mean": "mean", "bos": "bos"}
    taken = [output for output in names if output in settings["outputs"] and (kind == "pt" or output != "residue")]
    return [f"{names[output]}_{layer}" for output in taken for layer in settings["layers"]]


def export_bytes(kind: str, settings: dict, records: Path) -> int:
    """What an export takes, about and at most.

    Parameters
    ----------
    kind, settings
        The export's name and the store's settings.
    records
        The table of a dataset's records: its index, or what ingest wrote.
    """
    query = "SELECT count(*), coalesce(sum(length), 0)::BIGINT FROM read_parquet(?) WHERE status <> 'rejected'"
    with duckdb.connect(config={"threads": 1}) as database:
        ((n, residues),) = database.execute(query, [str(records)]).fetchall()
    total = n * _ENTRY_BYTES[kind]
    for name in tensors_of(kind, settings):
        of_residues = name.startswith("layer_")
        # biotrainer's files have residues as they are stored.
        half = kind == "h5" or (kind == "biotrainer" and of_residues and settings["storage_dtype"] == "float16")
        total += (residues if of_residues else n) * settings["embed_dim"] * (2 if half else 4)
    return total


def missing_bytes(store: Path, settings: dict, datasets: list[str], kinds: list[str]) -> int:
    """What those of these exports take that are not there yet."""
    missing = [(n, k) for n in datasets for k in kinds if not (store / "datasets" / n / "exports" / k).exists()]
    return sum(export_bytes(kind, settings, store / "inputs" / name / "records.parquet") for name, kind in missing)


# The outputs that each export is made of.
EXPORT_OUTPUTS = {"h5": ("residue", "mean"), "pt": (), "biotrainer": ("residue", "mean"), "parquet": ("mean",)}


def bytes_per_sequence(lengths: np.ndarray, settings: dict) -> np.ndarray:
    """Bytes that sequences of these lengths take in a shard, its header aside."""
    layers, d = len(settings["layers"]), settings["embed_dim"]
    itemsize = np.dtype(settings["storage_dtype"]).itemsize
    per_residue = layers * d * itemsize if "residue" in settings["outputs"] else 0
    pooled = sum(4 * d * layers for output in settings["outputs"] if output != "residue")
    return lengths.astype(np.int64) * per_residue + pooled + 8 + 4 + 24 + 1
