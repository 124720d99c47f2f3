"""Figures of the report: production batches and the scaling study. Their captions are in page.html and workflow/report/.

Each function returns a plot, or a sentence where there is nothing to draw.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lengthwise.esm2.shapes import ModelConfig
from lengthwise.report.study.fits import Fit, choose
from lengthwise.report.study.schema import FAIR_ESM, LENGTHWISE, OK, SKIPPED_TIME
from lengthwise.report.svg import BLUE, CARD, GREEN, INK, LINE, ORANGE, PURPLE, SOFT, STYLE, VERMILION, Plot
from lengthwise.report.tables import SHARES
from lengthwise.system.text import count

P = ParamSpec("P")
T = TypeVar("T")
MAX_POINTS = 1_500  # drawn in a figure; more make the page heavy
LOG_FROM = 12.0  # largest over smallest value above which an axis is logarithmic
LENGTH = "Sequence length (residues)"
GROUP_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
ENGINES = {LENGTHWISE: ("Lengthwise", BLUE, "o"), FAIR_ESM: ("fair-esm", VERMILION, "s")}
NO_COPIES = "A CPU computes where the sequences already are: nothing is copied."
PRECISIONS = {"float32": BLUE, "float16": GREEN, "bfloat16": PURPLE}

SHARE_WORDS = {
    "computing": ("computing", BLUE),
    "wait_read": ("waiting for sequences", ORANGE),
    "wait_write": ("waiting for the disk", VERMILION),
    "other": ("", LINE),  # named by the caller: it depends on the device
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorator: draw in the report's style."""

    @wraps(draw)
    def draw_styled(*arguments: P.args, **named: P.kwargs) -> T:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **named)

    return draw_styled


@styled
def production(batches: pd.DataFrame, bins: pd.DataFrame, quantity: str, label: str) -> Plot:
    """Every batch as a point, and the median and middle half of each bin of lengths, one colour per group.

    Parameters
    ----------
    batches
        One row per batch, with `group` (what the legend says), `mean_length`, `n_sequences` and the quantity.
    bins
        One row per group and bin, with `group`, `median_length` and the quantity's `_median`, `_q25` and `_q75`.
    quantity
        The column to draw.
    label
        Label of the vertical axis.
    """
    batches = batches[["group", "mean_length", "n_sequences", quantity]].dropna(subset=[quantity])
    bins = bins.dropna(subset=[f"{quantity}_median"])
    text = _text(quantity)
    shown = batches if len(batches) <= MAX_POINTS else batches.sample(MAX_POINTS, random_state=0).sort_index()
    plot = Plot("Mean length of the batch's sequences (residues)", label)
    for number, (group, here) in enumerate(bins.groupby("group")):
        color = GROUP_COLORS[number % len(GROUP_COLORS)]
        points = shown[shown["group"] == group]
        size, alpha = (14, 0.55) if len(points) <= 200 else (8, 0.25)
        drawn = plot.axes.scatter(points["mean_length"], points[quantity], s=size, color=color, alpha=alpha, lw=0)
        plot.explain(
            drawn,
            (
                f"{count(int(row.n_sequences), 'sequence')} of {row.mean_length:,.0f} residues on average: "
                f"{text(getattr(row, quantity))}"
                for row in points.itertuples()
            ),
        )
        quartiles = here[f"{quantity}_q25"], here[f"{quantity}_q75"]
        plot.axes.fill_between(here["median_length"], *quartiles, color=color, alpha=0.2, linewidth=0)
        median = here[f"{quantity}_median"]
        (line,) = plot.axes.plot(here["median_length"], median, color=color, marker="o", ms=4, label=f"{group}, median")
        plot.explain(
            line,
            (
                f"{row.length_from:,} to {row.length_to - 1:,} residues: median {text(getattr(row, f'{quantity}_median'))}, "
                f"middle half {text(getattr(row, f'{quantity}_q25'))} to {text(getattr(row, f'{quantity}_q75'))}, "
                f"{row.n_batches:,} batches"
                for row in here.itertuples()
            ),
        )
    _scale_lengths(plot.axes, batches["mean_length"])
    _scale_values(plot.axes, batches[quantity], quantity)
    plot.legend()
    return plot


@styled
def time_shares(devices: pd.DataFrame, rest: str) -> Plot:
    """Shares of each device's time, a bar for each; `rest` names what is neither computing nor waiting."""
    names = [f"{row.device},\n{row.precision}" for row in devices.itertuples()]
    plot = Plot("Share of the batches' time (%)", size=(4.4, 1.9 + 0.55 * len(names)))
    start = np.zeros(len(names))
    for share in SHARES:
        words, color = SHARE_WORDS[share]
        words = words or rest
        values = 100 * devices[share].to_numpy(float)
        bars = plot.axes.barh(range(len(names)), values, left=start, color=color, label=words, height=0.5)
        for bar, value in zip(bars, values, strict=True):
            plot.explain(bar, [f"{words}: {value:.1f} %"])
        start += values
    plot.axes.set_yticks(range(len(names)), [""] * len(names))
    for number, name in enumerate(names):
        plot.axes.text(0, number + 0.31, name.replace("\n", " "), va="bottom", fontsize=9)
    plot.axes.set_xlim(0, 100)
    plot.axes.set_ylim(-0.45, len(names) - 0.25)
    plot.axes.grid(axis="y", visible=False)
    plot.axes.spines["left"].set_visible(False)
    plot.axes.tick_params(axis="y", length=0)
    plot.legend(columns=2)
    return plot


@styled
def scaling_throughput(study: pd.DataFrame) -> Plot | str:
    """Residues a second against length, without gradients: full batches and one sequence at a time, both engines."""
    study, planned = study[study["wall_ms"].notna()], study
    if not len(study):
        return _unmeasured(planned, "a single point")
    plot = Plot(LENGTH, "Residues per second")
    largest = study["batch_tokens"].max()
    for what, style, chosen in (
        ("full batches", "-", study["batch_tokens"] == largest),
        ("one at a time", "--", study["batch_tokens"].isna()),
    ):
        _engines(plot, study[chosen.fillna(False).astype(bool)], "residues_per_second", what, style)
    _finish(plot, study, "residues_per_second")
    plot.legend(columns=2)
    return plot


def _draw_fits(
    plot: Plot, study: pd.DataFrame, found: list[Fit], quantity: str, config: ModelConfig, factor: int = 1
) -> None:
    """A line for the fit of each engine, over the lengths that were measured."""
    for engine, (name, color, _) in ENGINES.items():
        fit = choose(found, quantity, engine, study["precision"].iloc[0])
        if fit and fit.determined:
            points = study.loc[(study["engine"] == engine) & ~study["gradients"], "length"]
            lengths = np.geomspace(points.min(), points.max(), 60)
            values = [factor * fit.at(config, length) for length in lengths]
            plot.axes.plot(lengths, values, color=color, lw=1.2, label=f"{name}, fit")


@styled
def scaling_memory(study: pd.DataFrame, found: list[Fit], config: ModelConfig, measure: str) -> Plot | str:
    """Memory that one sequence adds against its length, both engines, with fits."""
    study, planned = study[study["batch_tokens"].isna() & (study["peak_bytes"] > 0)], study
    if not len(study):
        return _no_memory(planned[planned["batch_tokens"].isna()], "the memory of one protein")
    plot = Plot(LENGTH, f"Added {measure}")
    _engines(plot, study, "peak_bytes", "measured", "")
    _draw_fits(plot, study, found, "memory", config)
    _finish(plot, study, "peak_bytes", log=True)
    for length in (50, 500):
        _mark(plot, length, f"{length} residues")
    plot.legend(columns=2)
    return plot


@styled
def scaling_time(study: pd.DataFrame, found: list[Fit], config: ModelConfig) -> Plot | str:
    """Time of a pass of one sequence against its length, both engines, with fits."""
    study, planned = study[study["batch_tokens"].isna() & study["wall_ms"].notna()], study
    if not len(study):
        return _unmeasured(planned[planned["batch_tokens"].isna()], "the time of one protein")
    plot = Plot(LENGTH, "Time of one protein (ms)")
    _engines(plot, study, "wall_ms", "measured", "")
    _draw_fits(plot, study, found, "time", config, factor=1000)
    _finish(plot, study, "wall_ms", log=True)
    plot.legend(columns=2)
    return plot


@styled
def no_grad(study: pd.DataFrame, measure: str) -> Plot | str:
    """Memory of one sequence with gradients and without, both engines."""
    study, planned = study[study["batch_tokens"].isna() & (study["peak_bytes"] > 0)], study
    if not study["gradients"].any():
        return _no_memory(planned[planned["gradients"]], "passes with gradients")
    plot = Plot(LENGTH, f"Added {measure}")
    for what, style, kept in (("no_grad", "-", False), ("gradients kept", "--", True)):
        _engines(plot, study[study["gradients"] == kept], "peak_bytes", what, style)
    _finish(plot, study, "peak_bytes", log=True)
    plot.legend(columns=2)
    return plot


@styled
def half_precision(study: pd.DataFrame) -> Plot | str:
    """Residues a second of full batches against length, one line for each precision of Lengthwise."""
    planned = study[(study["engine"] == LENGTHWISE) & ~study["gradients"]]
    study = planned[planned["wall_ms"].notna()]
    study = study[(study["batch_tokens"] == study["batch_tokens"].max()).fillna(False).astype(bool)]
    if study["precision"].nunique() < 2:
        if planned["precision"].nunique() == 1:  # the study plans every precision that the device computes in
            return f"{planned['device'].iloc[0]} has no instructions for half precision."
        return _unmeasured(planned[~planned["precision"].isin(study["precision"])], "a second precision")
    plot = Plot(LENGTH, "Residues per second")
    for precision, rows in study.groupby("precision", sort=False):
        _line(plot, rows, "residues_per_second", precision, PRECISIONS[precision], "-", "o")
    _finish(plot, study, "residues_per_second")
    plot.legend(columns=2)
    return plot


@styled
def copies(study: pd.DataFrame) -> Plot | str:
    """Time of the copies as a share of their pass, in full batches."""
    study, planned = study[study["copy_out_ms"].notna()], study
    if not len(study):
        measured = planned["wall_ms"].notna().any()
        return NO_COPIES if measured else _unmeasured(planned, "copies to and from the device")
    study = study[study["batch_tokens"] == study["batch_tokens"].max()]
    plot = Plot(LENGTH, "Share of the pass's time (%)")
    for column, words, color in (("copy_in_ms", "tokens in", GREEN), ("copy_out_ms", "rows out", VERMILION)):
        rows = study.assign(share=100 * study[column] / study["wall_ms"]).sort_values("length")
        for precision, here in rows.groupby("precision", sort=False):
            style = "-" if precision == "float32" else "--"
            _line(plot, here, "share", f"{words}, {precision}", color, style, "o")
    _scale_lengths(plot.axes, study["length"])
    plot.axes.set_yscale("log")
    plot.axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plot.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    plot.axes.yaxis.set_minor_formatter(NullFormatter())
    plot.legend(columns=2)
    return plot


@styled
def note(text: str) -> Plot:
    """A sentence in place of a figure."""
    plot = Plot(size=(5.8, 0.9))
    plot.axes.set_axis_off()
    plot.axes.text(0.5, 0.5, text, ha="center", va="center", wrap=True, transform=plot.axes.transAxes, color=INK)
    return plot


def bytes_text(count: float) -> str:
    """Bytes in decimal units, as short as an axis wants them.

    >>> bytes_text(1_500_000_000)
    '1.5 GB'
    """
    power = next((power for power in range(4) if abs(count) < 999.5 * 1000**power), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _unmeasured(planned: pd.DataFrame, what: str) -> str:
    """Why no point of the study was measured, by what its rows say."""
    statuses = set(planned["status"]) - {OK}
    if statuses and SKIPPED_TIME not in statuses:
        return f"The scaling study measured nothing of {what}: it does not fit into this device's memory."
    return f"The scaling study had no time for {what}."


def _no_memory(planned: pd.DataFrame, what: str) -> str:
    """Why no point of the study has a peak."""
    if not planned["wall_ms"].notna().any():
        return _unmeasured(planned, what)
    if planned["memory_measure"].isna().all():
        return "This system does not say how much memory a pass takes, so there is no figure of it."
    return f"The scaling study saw no growth for {what}: the passes fitted into memory that was there before."


def _mark(plot: Plot, length: int, words: str) -> None:
    """A dotted line at a length, with its label in the corner that rising curves leave free."""
    low, high = plot.axes.get_xlim()
    if not low <= length <= high:
        return
    plot.axes.axvline(length, color=SOFT, lw=0.8, ls=":")
    where = plot.axes.get_xaxis_transform()
    height, side = (0.98, "top") if length**2 < low * high else (0.02, "bottom")
    plot.axes.text(length, height, words, transform=where, rotation=90, ha="right", va=side, fontsize=8, color=SOFT)


def _engines(plot: Plot, rows: pd.DataFrame, quantity: str, what: str, style: str) -> None:
    for engine, (name, color, marker) in ENGINES.items():
        _line(plot, rows[rows["engine"] == engine], quantity, f"{name}, {what}", color, style, marker)


def _line(plot: Plot, rows: pd.DataFrame, quantity: str, label: str, color: str, style: str, marker: str) -> None:
    if not len(rows):
        return
    rows, text = rows.sort_values("length"), _text(quantity)
    values = rows[quantity].astype(float)
    face = CARD if style == "--" else color  # hollow markers leave the dash visible in the legend
    spread = _spread(rows, quantity)
    if spread is not None:  # from the shortest pass to the longest
        plot.axes.vlines(rows["length"], *spread, color=color, lw=1, alpha=0.45)
    (line,) = plot.axes.plot(
        rows["length"], values, color=color, ls=style, marker=marker, ms=4.5, mfc=face, label=label
    )
    passes = {row.length: _passes(row) for row in rows.itertuples()} if spread is not None else {}
    plot.explain(
        line,
        (
            f"{label}: {row.n_sequences:,} x {row.length:,} residues: {text(value)}{passes.get(row.length, '')}"
            for row, value in zip(rows.itertuples(), values, strict=True)
        ),
    )


def _spread(rows: pd.DataFrame, quantity: str) -> tuple[pd.Series, pd.Series] | None:
    """Lowest and highest value of each point over its passes; None for what is not a time."""
    slowest = (rows["wall_ms_max"] / rows["wall_ms"]).astype(float)
    values = rows[quantity].astype(float)
    if quantity == "wall_ms":
        return values, values * slowest
    return (values / slowest, values) if quantity == "residues_per_second" else None


def _passes(row: Any) -> str:
    """How far the passes of a point are apart, for its hover text."""
    if pd.isna(row.wall_ms_max):
        return ""
    return f" (the shortest of {row.repeats} passes, {row.wall_ms:,.3g} to {row.wall_ms_max:,.3g} ms)"


def _text(quantity: str) -> Callable[[float], str]:
    if "bytes" in quantity:
        return bytes_text
    if quantity == "share":
        return lambda value: f"{value:.3g} %"
    return (lambda value: f"{value:,.3g} ms") if quantity == "wall_ms" else (lambda value: f"{value:,.0f} residues/s")


def _finish(plot: Plot, rows: pd.DataFrame, quantity: str, log: bool = False) -> None:
    _scale_lengths(plot.axes, rows["length"])
    _scale_values(plot.axes, rows[quantity].astype(float), quantity, log)


def _scale_lengths(axes: Axes, lengths: pd.Series) -> None:
    low, high = float(lengths.min()), float(lengths.max())
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    if lengths.nunique() <= 3:  # ticks at the lengths themselves
        axes.xaxis.set_major_locator(FixedLocator(sorted(lengths.unique())))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 60 * low else (1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _scale_values(axes: Axes, values: pd.Series, quantity: str, log: bool = False) -> None:
    text = bytes_text if "bytes" in quantity else ("{:,.5g}" if quantity == "wall_ms" else "{:,.0f}").format
    if log or values.quantile(0.95) > LOG_FROM * values.quantile(0.05) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if values.max() < 3e3 * values.min() else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.08 * values.max())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
