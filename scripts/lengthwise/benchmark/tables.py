"""The table and the figure of the benchmark."""

import csv
import importlib.util
from pathlib import Path

COLUMNS = (
    "engine",
    "precision",
    "residues_per_second",  # without load and warm-up
    "times_extract",  # speed-up over fair-esm's extract.py, median of the rounds
    "end_to_end_residues_per_second",  # with load and warm-up
    "share_of_matmul",  # FLOP/s over those of plain matrix products in the same precision
    "peak_bytes",  # allocated GPU memory; empty on a CPU, whose memory the engines share
    "max_error",  # largest difference from fair-esm in float32, over the root mean square of the layer
    "rms_error",  # root mean square of the difference, over the same
    "min_cosine",  # smallest cosine of a residue's row with fair-esm's
)


def write_table(rows: list[dict], path: Path) -> None:
    """Write the rows as TSV."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| engine | precision | residues/s | x extract.py | with load | share of matmul | peak GB | max error | rms error "
        "| min cosine |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"| {row['engine']} | {row['precision']} | {row['residues_per_second']:,.0f} | {row['times_extract']:.2f} "
            f"| {row['end_to_end_residues_per_second']:,.0f} | {row['share_of_matmul']:.0%} | {peak} "
            f"| {row['max_error']:.1e} | {row['rms_error']:.1e} | {row['min_cosine']:.6f} |"
        )
    return "\n".join(lines)


def write_figure(rows: list[dict], title: str, path: Path) -> None:
    """Draw a bar of residues per second for each row; nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    names = [f"{row['engine']}, {row['precision']}" for row in rows][::-1]
    rates = [row["residues_per_second"] for row in rows][::-1]
    colours = ["#0072b2" if name.startswith("Lengthwise") else "#999999" for name in names]
    figure = Figure(figsize=(7.5, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, rates, color=colours)
    axes.bar_label(bars, [f"{row['times_extract']:.1f}x" for row in rows][::-1], padding=4)
    axes.set_xlabel("residues per second (labels: times fair-esm's extract.py)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
