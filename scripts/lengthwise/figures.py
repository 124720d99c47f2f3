"""Figures of the report: throughput and memory against sequence length, in production and in the scaling study."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lengthwise.files import atomic
from lengthwise.scaling_table import FAIR_ESM, LENGTHWISE

MAX_POINTS = 2_000  # of a figure: more make the page heavy and no clearer
LOG_FROM = 12.0  # largest over smallest value from which on a linear axis hides the small ones

# Okabe and Ito's palette, which colour-blind people can tell apart: https://jfly.uni-koeln.de/color/
BLUE, VERMILION, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
GROUP_COLORS = (BLUE, VERMILION, GREEN, PURPLE, BLACK)
ENGINES = {LENGTHWISE: ("Lengthwise", BLUE), FAIR_ESM: ("fair-esm", VERMILION)}
_STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2,
    "svg.fonttype": "path",  # the same letters everywhere, with no font to fetch
    "svg.hashsalt": "lengthwise",
    "text.parse_math": False,  # a device's name is no formula
}


def production(batches: pd.DataFrame, bins: pd.DataFrame, quantity: str, label: str) -> Figure:
    """Every batch as a point, and the median and middle half of each bin of lengths, one colour per group.

    Parameters
    ----------
    batches
        One row per batch, with `group` (what the legend says), `mean_length` and the quantity.
    bins
        One row per group and bin, with `group`, `median_length` and the quantity's `_median`, `_q25` and `_q75`.
    quantity
        The column to draw.
    label
        What the vertical axis says.
    """
    batches, bins = batches.dropna(subset=[quantity]), bins.dropna(subset=[f"{quantity}_median"])
    shown = batches if len(batches) <= MAX_POINTS else batches.sample(MAX_POINTS, random_state=0)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("Mean length of the batch's sequences (residues)", label)
        for color, (group, here) in zip(_cycle(GROUP_COLORS), bins.groupby("group"), strict=False):
            points = shown[shown["group"] == group]
            few = len(points) <= 200  # many dots shade into a cloud, few should be seen
            axes.scatter(
                points["mean_length"],
                points[quantity],
                s=16 if few else 9,
                color=color,
                alpha=0.6 if few else 0.25,
                linewidths=0,
            )
            quartiles = here[f"{quantity}_q25"], here[f"{quantity}_q75"]
            axes.fill_between(here["median_length"], *quartiles, color=color, alpha=0.2, linewidth=0)
            median = here[f"{quantity}_median"]
            axes.plot(here["median_length"], median, color=color, marker="o", markersize=4, label=f"{group}, median")
        _scale_lengths(axes, batches["mean_length"])
        _scale_values(axes, batches[quantity], quantity)
        _legend(axes, columns=1)
    return figure


def scaling_throughput(table: pd.DataFrame) -> Figure:
    """Residues a second against length, without gradients: full batches and one sequence at a time, both engines."""
    table = table[~table["gradients"] & table["residues_per_second"].notna()]
    single = table[table["n_sequences"] == 1]
    # Where one sequence fills a batch, that point ends both lines.
    fullest = table.loc[table.groupby(["engine", "length"])["n_sequences"].idxmax()]
    lines = [("full batches", fullest, "-", "o"), ("one at a time", single, "--", "s")]
    return _scaling_figure(lines, table, "residues_per_second", "Residues per second")


def scaling_memory(table: pd.DataFrame, measure: str) -> Figure:
    """Memory that the forward pass of one sequence adds, against its length: both engines, with gradients and without."""
    table = table[(table["n_sequences"] == 1) & table["peak_bytes"].notna()]
    kept = table["gradients"]
    lines = [("no gradients", table[~kept], "-", "o"), ("gradients kept", table[kept], "--", "s")]
    return _scaling_figure(lines, table, "peak_bytes", f"Added {measure}", log=True)


def note(text: str) -> Figure:
    """A line of text in place of a figure that has nothing to show."""
    figure = Figure(figsize=(5.8, 0.8), layout="constrained")
    figure.text(0.5, 0.5, text, ha="center", va="center", wrap=True, color="#555555")
    return figure


def save(figure: Figure, out: Path, name: str) -> str:
    """Write `name`.svg and `name`.png; returns the SVG element, fit for an HTML page."""
    with matplotlib.rc_context(_STYLE):
        # No date and no metadata: equal data make equal files.
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with atomic(out / f"{name}.svg") as part:
            figure.savefig(part, format="svg", metadata=empty)
        with atomic(out / f"{name}.png") as part:
            figure.savefig(part, format="png", dpi=160)
    svg = (out / f"{name}.svg").read_text()
    return svg[svg.index("<svg") :]


def bytes_text(count: float) -> str:
    """Bytes in decimal units, as short as an axis wants them.

    >>> bytes_text(1_500_000_000)
    '1.5 GB'
    """
    power = next((power for power in range(4) if abs(count) < 999.5 * 1000**power), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _scaling_figure(lines: list, table: pd.DataFrame, quantity: str, label: str, log: bool = False) -> Figure:
    """Both engines' lines of (what, rows, line style, marker)."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("Sequence length (residues)", label)
        for engine, (name, color) in ENGINES.items():
            for what, rows, style, marker in lines:
                here = rows[rows["engine"] == engine].sort_values("length")
                values = here[quantity].astype(float)
                axes.plot(here["length"], values, style, color=color, marker=marker, ms=5, label=f"{name}, {what}")
        _scale_lengths(axes, table["length"])
        _scale_values(axes, table[quantity].astype(float), quantity, log)
        _legend(axes, columns=2)
    return figure


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_axisbelow(True)
    return figure, axes


def _scale_lengths(axes: Axes, lengths: pd.Series) -> None:
    low, high = lengths.min(), lengths.max()
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _scale_values(axes: Axes, values: pd.Series, quantity: str, log: bool = False) -> None:
    text = bytes_text if "bytes" in quantity else "{:,.0f}".format
    if log or values.quantile(0.95) > LOG_FROM * values.quantile(0.05) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if values.max() < 3e3 * values.min() else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.08 * values.max())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _legend(axes: Axes, columns: int) -> None:
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


def _cycle(colors: tuple[str, ...]) -> Iterator[str]:
    while True:
        yield from colors
