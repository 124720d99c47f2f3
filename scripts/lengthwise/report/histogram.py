"""The histogram of the records' lengths."""

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lengthwise.esm2.shapes import TRAINED_RESIDUES
from lengthwise.report.figures import styled
from lengthwise.report.svg import BLUE, CARD, PURPLE, VERMILION, Plot
from lengthwise.system.text import count


@styled
def histogram(lengths: pd.DataFrame) -> Plot | str:
    """Records by length: embedded ones up to the training length and beyond it, and rejected ones.

    Parameters
    ----------
    lengths
        `lengthwise.report.proteins.Proteins.lengths`.
    """
    lengths = lengths[lengths["length_from"] > 0]  # an empty record has no place on a logarithmic axis
    if not len(lengths):
        return "No record has a residue, so there is no histogram of lengths."
    plot = Plot("Length (residues)", "Records", size=(4.4, 3.5))
    rejected, beyond = lengths["status"] == "rejected", lengths["length_from"] > TRAINED_RESIDUES
    parts = {
        f"embedded, up to {TRAINED_RESIDUES:,}": (~rejected & ~beyond, BLUE),
        f"embedded, beyond {TRAINED_RESIDUES:,}": (~rejected & beyond, PURPLE),
        "rejected": (rejected, VERMILION),
    }
    heights = pd.Series(0, index=np.sort(lengths["length_from"].unique()))
    for label, (chosen, color) in parts.items():
        here = lengths[chosen].groupby(["length_from", "length_to"], as_index=False)["records"].sum()
        if not len(here):
            continue
        left, records = here["length_from"], here["records"].to_numpy()
        sizes = {"width": here["length_to"] - left, "bottom": heights[left].to_numpy()}
        bars = plot.axes.bar(left, records, **sizes, align="edge", color=color, edgecolor=CARD, lw=0.5, label=label)
        heights[left] += records
        for bar, row in zip(bars, here.itertuples(), strict=True):
            last = row.length_to - 1
            span = f"{row.length_from:,} to {last:,}" if last > row.length_from else f"{last:,}"
            plot.explain(bar, [f"{span} residues: {count(row.records, 'record')} {label.partition(',')[0]}"])
    plot.axes.set_xscale("log")
    low, high = lengths["length_from"].min(), lengths["length_to"].max()
    plot.axes.set_xlim(low / 1.1, high * 1.1)
    plot.axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1, 3)))
    plot.axes.xaxis.set_minor_formatter(NullFormatter())
    plot.axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for axis in (plot.axes.xaxis, plot.axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    plot.axes.grid(axis="x", visible=False)
    plot.legend(columns=2)
    return plot
