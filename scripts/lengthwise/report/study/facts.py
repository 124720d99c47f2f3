"""Facts about the scaling study for the page."""

import pandas as pd

from lengthwise.esm2.shapes import MEMORY_MARGIN
from lengthwise.report import figures
from lengthwise.report.study.fits import (
    MIN_POINTS,
    MIN_R_SQUARED,
    Fit,
    choose,
    longest,
    longest_table,
)
from lengthwise.report.study.schema import FAIR_ESM, LENGTHWISE, OK, SERIES, SKIPPED_MEMORY, SKIPPED_TIME
from lengthwise.report.words import measures_in_words
from lengthwise.store.settings import shape_of
from lengthwise.system.text import count

STATUS_WORDS = {
    "skipped_time": "no time left",
    "skipped_memory": "would not have fitted in memory",
    "out_of_memory": "out of memory",
}

SHORT, LONG = 50, 500  # residues, for the ratio of memory


def study_facts(study: pd.DataFrame, found: list[Fit], settings: dict) -> dict:
    """The values that page.html prints about the study, under the name `study`."""
    sized, config, precision = study[study["peak_bytes"].notna()], shape_of(settings), settings["precision"]
    itemsize = 4 if precision == "float32" else 2
    row = study.iloc[0] if len(study) else None
    device_bytes = None if row is None or pd.isna(row["device_bytes"]) else int(row["device_bytes"])
    sizes = {engine: choose(found, "memory", engine, precision) for engine in (LENGTHWISE, FAIR_ESM)}
    reach = {}
    if device_bytes is not None:
        free = MEMORY_MARGIN * device_bytes - config.parameters * itemsize
        reach = {engine: longest(fit, free) for engine, fit in sizes.items() if fit}
    table = longest_table(device_bytes, itemsize)
    clocks, warmth = study["clock_mhz"].dropna(), study["temperature_c"].dropna()
    return {
        "device": "no device" if row is None else row["device"],
        "device_bytes": device_bytes and figures.bytes_text(device_bytes),
        "threads": "all cores" if row is None or pd.isna(row["threads"]) else count(int(row["threads"]), "core"),
        "measures": measures_in_words(sized),
        "ratios": _ratios(sized[sized["precision"] == precision]),
        "precisions": _precisions(study),
        "copies": _copies(study),
        "stops": _stops(study),
        "fits": found,
        "least_points": MIN_POINTS,
        "least_r_squared": MIN_R_SQUARED,
        "reach": reach,
        "longest": {"columns": list(table.columns[1:]), "rows": table.to_dict("records")},
        "clock": _range(clocks),
        "temperature": _range(warmth),
    }


def why_skipped(study: pd.DataFrame) -> str:
    """Why no point was measured, and the command that measures them; empty where one was."""
    if not len(study) or (study["status"] == OK).any():
        return ""
    first = study.iloc[0]
    if first["status"] == SKIPPED_MEMORY and pd.notna(first["needed_bytes"]):
        needed, free = (figures.bytes_text(first[column]) for column in ("needed_bytes", "free_bytes"))
        reason = f"Lengthwise and fair-esm side by side take {needed}, and {free} were free"
        return f"The scaling study was skipped: {reason}. With more memory, snakemake --forcerun scaling measures it."
    if first["status"] == SKIPPED_TIME:
        command = "snakemake --config scaling_seconds=120 --forcerun scaling"
        return f"The scaling study was skipped: loading the models took its time. {command} gives it more."
    return f"The scaling study was skipped: {STATUS_WORDS[first['status']]}. snakemake --forcerun scaling tries again."


def _range(values: pd.Series) -> str:
    """Lowest to highest value as text; one number where they print alike, empty where there is none."""
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (values.min(), values.max()))) if len(values) else ""


def _ratios(sized: pd.DataFrame) -> list[dict]:
    """Memory of one sequence at `LONG` over `SHORT` residues, for each engine and mode."""
    single = sized[sized["batch_tokens"].isna()].set_index(["engine", "gradients", "length"])["peak_bytes"]
    ratios = []
    for engine in (LENGTHWISE, FAIR_ESM):
        for gradients in (False, True):
            short, long = (single.get((engine, gradients, length)) for length in (SHORT, LONG))
            if short and long:
                row = {"engine": engine, "gradients": gradients, "ratio": long / short, "bytes": int(long)}
                ratios.append(row | {"short": figures.bytes_text(short), "long": figures.bytes_text(long)})
    return ratios


def _precisions(study: pd.DataFrame) -> list[dict]:
    """Weights, memory and speed of Lengthwise's full batches in each precision, at the longest length that all reached."""
    rows = study[(study["engine"] == LENGTHWISE) & ~study["gradients"] & study["wall_ms"].notna()]
    rows = rows[(rows["batch_tokens"] == rows["batch_tokens"].max()).fillna(False).astype(bool)]
    reached = rows.groupby("length")["precision"].nunique()
    common = reached[reached == rows["precision"].nunique()].index
    if not len(common):
        return []
    rows = rows[rows["length"] == common.max()]
    bytes_text = figures.bytes_text
    return [
        {
            "precision": row.precision,
            "length": row.length,
            "weights": None if pd.isna(row.weights_bytes) else bytes_text(row.weights_bytes),
            "peak": None if pd.isna(row.peak_bytes) else bytes_text(row.peak_bytes),
            "residues_per_second": row.residues_per_second,
        }
        for row in rows.itertuples()
    ]


def _copies(study: pd.DataFrame) -> float | None:
    """The copies' largest share of the pass that they go with, in full batches; None where nothing is copied."""
    rows = study[study["copy_out_ms"].notna() & study["batch_tokens"].notna()]
    rows = rows[rows["batch_tokens"] == rows["batch_tokens"].max()]  # as in the figure
    return float(((rows["copy_in_ms"] + rows["copy_out_ms"]) / rows["wall_ms"]).max()) if len(rows) else None


def _stops(study: pd.DataFrame) -> list[dict]:
    """Where series of the scaling study ended early, and why."""
    first = (
        study[study["status"] != OK]
        .sort_values("length", kind="stable")
        .groupby(SERIES, dropna=False, sort=False)
        .head(1)
    )
    return [
        {
            "series": f"{row.engine}, {row.precision}, {'with' if row.gradients else 'without'} gradients",
            "batches": "one at a time" if pd.isna(row.batch_tokens) else f"batches of {row.batch_tokens:,} tokens",
            "from": row.length,
            "why": STATUS_WORDS[row.status],
        }
        for row in first.itertuples()
    ]
