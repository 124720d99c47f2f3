"""Words that several parts of the report use."""

import pandas as pd

MEASURES = {"allocated": "allocated GPU memory", "resident": "resident memory"}


def measures_in_words(rows: pd.DataFrame) -> list[str]:
    """How memory was measured, in words."""
    return [MEASURES[name] for name in sorted(rows["memory_measure"].dropna().unique())]
