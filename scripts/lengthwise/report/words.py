"""Names of the measures of memory, for the page and the figures."""

import pandas as pd

MEASURES = {"allocated": "allocated GPU memory", "resident": "resident memory"}


def measures_in_words(rows: pd.DataFrame) -> list[str]:
    """The measures of memory in a table, in words."""
    return [MEASURES[name] for name in sorted(rows["memory_measure"].dropna().unique())]
