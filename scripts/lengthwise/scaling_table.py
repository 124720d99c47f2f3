"""The scaling study's table: its columns and words, for those who read it and need no torch."""

from pathlib import Path

import pandas as pd

LENGTHWISE, FAIR_ESM = "lengthwise", "fair-esm"
OK, SKIPPED_TIME, SKIPPED_MEMORY, OUT_OF_MEMORY = "ok", "skipped_time", "skipped_memory", "out_of_memory"

# What does not exist is null: every column that a skipped point has no value for is of a nullable type.
COLUMNS = {
    "engine": "string",
    "gradients": "bool",
    "length": "int64",
    "n_sequences": "int64",
    "n_tokens": "int64",
    "repeats": "int64",
    "wall_ms": "Float64",
    "residues_per_second": "Float64",
    "peak_bytes": "Int64",
    "memory_measure": "string",
    "device": "string",
    "precision": "string",
    "status": "string",
}


def read_scaling(table: Path) -> pd.DataFrame:
    """The table that `scaling` wrote."""
    return pd.read_csv(table, sep="\t", dtype=COLUMNS)
