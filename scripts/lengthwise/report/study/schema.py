"""The scaling study's table: its columns and words, for those who read it and need no torch."""

from pathlib import Path

import pandas as pd

LENGTHWISE, FAIR_ESM = "lengthwise", "fair-esm"

OK, SKIPPED_TIME, SKIPPED_MEMORY, OUT_OF_MEMORY = "ok", "skipped_time", "skipped_memory", "out_of_memory"

# What does not exist is null: every column that a skipped point has no value for is of a nullable type.
COLUMNS = {
    "engine": "string",
    "precision": "string",
    "gradients": "bool",
    "batch_tokens": "Int64",
    "length": "int64",
    "n_sequences": "int64",
    "n_tokens": "int64",
    "product_flops": "Int64",
    "attention_flops": "Int64",
    "repeats": "int64",
    "wall_ms": "Float64",
    "wall_ms_min": "Float64",
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
    "status": "string",
}

SERIES = ["engine", "precision", "gradients", "batch_tokens"]  # the columns that tell series apart


def no_study() -> pd.DataFrame:
    """A study of no points."""
    return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)


def read_scaling(table: Path) -> pd.DataFrame:
    """The table that `scaling` wrote; what an earlier version did not write is null."""
    found = pd.read_csv(table, sep="\t")
    if "batch_tokens" not in found:
        full = found["n_sequences"] > 1
        found.loc[full, "batch_tokens"] = found.loc[full, "n_tokens"].max()
    return found.reindex(columns=list(COLUMNS)).astype(COLUMNS)
