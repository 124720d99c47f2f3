"""Names of the measures of memory and of reasons of rejection, for the page and the figures."""

import pandas as pd

MEASURES = {"allocated": "allocated GPU memory", "resident": "resident memory"}

REASONS = {
    "invalid_byte": "a letter that is no residue",
    "empty": "no residues",
    "all_x": "nothing but X",
    "no_id": "no name after >",
    "too_long": "longer than long_sequences allows",
    "non_finite": "a number overflowed the precision or the storage type",
    "does_not_fit": "too long for the device's memory",
}


def measures_in_words(rows: pd.DataFrame) -> list[str]:
    """The measures of memory in a table, in words."""
    return [MEASURES[name] for name in sorted(rows["memory_measure"].dropna().unique())]
