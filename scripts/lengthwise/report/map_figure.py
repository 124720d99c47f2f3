"""The figure of the map of embeddings."""

import matplotlib.colors
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import LogLocator, NullFormatter

from lengthwise.report.figures import GROUP_COLORS, styled
from lengthwise.report.pca import Projection
from lengthwise.report.svg import SOFT, Plot

_TONES = LinearSegmentedColormap.from_list("lengths", ["#56b4e9", "#0072b2", "#cc79a7", "#d55e00"])


@styled
def embedding_map(projection: Projection) -> Plot:
    """Records on two principal components, by length on the left and by dataset on the right; below by UMAP, if it is there."""
    has_umap = projection.records["umap1"].notna().all()
    plot = Plot(size=(8.8, 7.4 if has_umap else 3.7))
    grid = plot.figure.add_gridspec(1 + has_umap, 2)
    plot.axes.set_subplotspec(grid[0])
    shares = projection.shares
    labels = f"First component ({shares[0]:.0%} of the variance)", f"Second ({shares[1]:.0%})"
    _draw(plot, plot.axes, plot.figure.add_subplot(grid[1]), projection.records, ("pc1", "pc2"), labels)
    if has_umap:
        left, right = (plot.figure.add_subplot(grid[place]) for place in (2, 3))
        _draw(plot, left, right, projection.records, ("umap1", "umap2"), ("UMAP 1", "UMAP 2"))
    return plot


def _draw(
    plot: Plot, left: Axes, right: Axes, records: pd.DataFrame, columns: tuple[str, str], labels: tuple[str, str]
) -> None:
    """Two panels of the same points."""
    x, y = (records[column] for column in columns)
    hover_texts = [f"{row.id}: {row.length:,} residues, {row.dataset}" for row in records.itertuples()]
    lengths = records["length"]
    norm = matplotlib.colors.LogNorm(lengths.min(), max(lengths.max(), lengths.min() + 1))
    drawn = left.scatter(x, y, s=9, c=lengths, cmap=_TONES, norm=norm, lw=0, alpha=0.8)
    plot.explain(drawn, hover_texts)
    bar = plot.figure.colorbar(drawn, ax=left, label="Length (residues)", format=lambda value, _: f"{value:,.0f}")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_visible(False)
    frequent = records["dataset"].value_counts().index[: len(GROUP_COLORS)].tolist()
    groups = [
        (color, dataset, records["dataset"] == dataset) for color, dataset in zip(GROUP_COLORS, frequent, strict=False)
    ]
    rest = ~records["dataset"].isin(frequent)
    if rest.any():
        groups.append((SOFT, "others", rest))
    for color, name, here in groups:
        drawn = right.scatter(x[here], y[here], s=9, color=color, lw=0, alpha=0.6, label=name)
        plot.explain(drawn, [text for text, inside in zip(hover_texts, here, strict=True) if inside])
    for axes in (left, right):
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
    right.legend(fontsize=8, markerscale=2)
