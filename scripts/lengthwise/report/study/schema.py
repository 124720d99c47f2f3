"""The columns and status words of scaling.tsv, without torch."""

from pathlib import Path

import pandas as pd

from lengthwise.errors import LengthwiseError
from lengthwise.store.receipts import checksums_of
from lengthwise.system.files import sha256

# The table in report/.
SCALING = "scaling.tsv"
LENGTHWISE, FAIR_ESM = "lengthwise", "fair-esm"
OK, SKIPPED_TIME, SKIPPED_MEMORY, OUT_OF_MEMORY = "ok", "skipped_time", "skipped_memory", "out_of_memory"
STATUSES = (OK, SKIPPED_TIME, SKIPPED_MEMORY, OUT_OF_MEMORY)

# Nullable types where a skipped point has no value.
COLUMNS = {
    "engine": "string",
    "precision": "string",
    "gradients": "bool",
    "compiled": "boolean",
    "batch_tokens": "Int64",
    "length": "int64",
    "n_sequences": "int64",
    "n_tokens": "int64",
    "product_flops": "Int64",
    "attention_flops": "Int64",
    "repeats": "int64",
    "wall_ms": "Float64",
    "wall_ms_median": "Float64",
    "wall_ms_max": "Float64",
    "residues_per_second": "Float64",
    "peak_bytes": "Int64",
    "weights_bytes": "Int64",
    "copy_in_ms": "Float64",
    "copy_out_ms": "Float64",
    "clock_mhz": "Float64",
    "temperature_c": "Float64",
    "memory_measure": "string",
    "device": "string",
    "device_bytes": "Int64",
    "threads": "Int64",
    "needed_bytes": "Int64",
    "free_bytes": "Int64",
    "status": "string",
}

SERIES = ["engine", "precision", "gradients", "batch_tokens"]  # the key of a series


def no_study() -> pd.DataFrame:
    """A study of no points."""
    return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)


def read_scaling(table: Path) -> pd.DataFrame:
    """Read scaling.tsv; columns that an earlier version did not write are null, and its shortest pass takes the median's place.

    Raises
    ------
    FileNotFoundError
        There is none.
    LengthwiseError
        It is damaged.
    """
    try:
        if table.name in (checksums := checksums_of(table.parent)) and sha256(table) != checksums[table.name]:
            raise ValueError("another checksum")
        study = pd.read_csv(table, sep="\t")
        if "batch_tokens" not in study:
            full = study["n_sequences"] > 1
            study.loc[full, "batch_tokens"] = study.loc[full, "n_tokens"].max()
        if "wall_ms_min" in study:
            study["residues_per_second"] *= study["wall_ms"] / study["wall_ms_min"]
            study = study.rename(columns={"wall_ms": "wall_ms_median", "wall_ms_min": "wall_ms"})
        study = study.reindex(columns=list(COLUMNS)).astype(COLUMNS)
    except (ValueError, KeyError, TypeError) as error:
        raise LengthwiseError(f"{table}: damaged ({str(error).partition(chr(10))[0]})") from error
    if not (study["engine"].isin((LENGTHWISE, FAIR_ESM)) & study["status"].isin(STATUSES)).all():
        raise LengthwiseError(f"{table}: damaged (unknown words)")
    return study
