"""The table and the figure of the benchmark."""

import csv
from collections.abc import Sequence
from pathlib import Path

from lengthwise.benchmark.cell import Row, Value
from lengthwise.system.files import atomic

COLUMNS = (
    "engine",
    "precision",
    "sample",  # the length of random sequences in residues, or the name of the FASTA file
    "compiled",  # whether torch compiled the layers of this package's engine
    "batch_tokens",  # tokens of its largest batch
    "residues",  # embedded in the timed passes
    "seconds",  # of these
    "residues_per_second",  # without load and warm-up
    "times_extract",  # speed-up over fair-esm's extract.py, median of the rounds
    "matmul_flops",  # FLOP/s of plain matrix products in the same precision, median of the rounds
    "share_of_matmul",  # FLOP/s over these
    "load_seconds",  # of load, compilation and warm-up
    "peak_bytes",  # allocated GPU memory beside resident weights; empty on a CPU, whose memory the engines share
    "share_of_formula",  # that memory over what the engine expects of its largest batch
    "clock_mhz",  # of a GPU while it worked, median of the rounds
    "watts",  # its power, likewise
    "max_error",  # largest difference from fair-esm in float32, over the root mean square of the layer
    "rms_error",  # root mean square of the difference, over the same
    "min_cosine",  # smallest cosine of a residue's row with fair-esm's
    "status",  # why there are no numbers; empty where there are
)


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as TSV, in the place of an earlier table."""
    with atomic(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the title and the rows as Markdown, in the place of an earlier table."""
    with atomic(path) as part:
        part.write_text(f"{title}\n\n{markdown(rows)}\n")


_SHOWN = {
    "sample": ("length", "{}"),
    "engine": ("engine", "{}"),
    "precision": ("precision", "{}"),
    "compiled": ("compiled", "{}"),
    "residues_per_second": ("residues/s", "{:,.0f}"),
    "times_extract": ("x extract.py", "{:.2f}"),
    "share_of_matmul": ("share of matmul", "{:.0%}"),
    "matmul_flops": ("matmul TFLOP/s", "{:.4g}"),
    "batch_tokens": ("tokens a batch", "{:,}"),
    "peak_bytes": ("peak GB", "{:.2f}"),
    "share_of_formula": ("of the formula", "{:.0%}"),
    "clock_mhz": ("MHz", "{:.0f}"),
    "watts": ("W", "{:.0f}"),
    "max_error": ("max error", "{:.0e}"),
    "rms_error": ("rms error", "{:.0e}"),
    "min_cosine": ("min cosine", "{:.6f}"),
    "status": ("", "{}"),
}
_UNITS = {"matmul_flops": 1e12, "peak_bytes": 1e9}


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, without columns that are empty in all of them."""
    shown = {name: how for name, how in _SHOWN.items() if any(row.get(name) not in (None, "") for row in rows)}
    lines = [
        f"| {' | '.join(title for title, _ in shown.values())} |",
        f"|{'|'.join('---' if form == '{}' else '--:' for _, form in shown.values())}|",
    ]
    lines += [
        f"| {' | '.join(_text(name, form, row.get(name)) for name, (_, form) in shown.items())} |" for row in rows
    ]
    return "\n".join(lines)


def _text(name: str, form: str, value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return form.format(value / _UNITS[name] if name in _UNITS and not isinstance(value, str) else value)


def said(row: Row) -> str:
    """A measured row in a line, for the log."""
    times = f", {row['times_extract']:.2f} times fair-esm's extract.py" if row["times_extract"] is not None else ""
    rate = f"{row['residues_per_second']:,.0f} residues/s"
    return f"{row['sample']}: {row['engine']}, {row['precision']}: {rate}{times}"


def write_figure(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a bar of residues per second for each row of the first sample; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [row for row in rows if row["sample"] == rows[0]["sample"] and not row["status"]][::-1]
    names = [f"{row['engine']}, {row['precision']}" for row in rows]
    colours = ["#0072b2" if name.startswith("Lengthwise") else "#999999" for name in names]
    figure = Figure(figsize=(7.5, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, [float(row["residues_per_second"] or 0) for row in rows], color=colours)
    axes.bar_label(bars, [_text("times_extract", "{:.1f}x", row["times_extract"]) for row in rows], padding=4)
    axes.set_xlabel("residues per second (labels: times fair-esm's extract.py)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
