"""Figures as SVG and PNG files, and as SVG elements of the page with its colours, its fonts and values on hover."""

import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lengthwise.system.files import atomic

# Okabe and Ito's palette, which colour-blind people can tell apart: https://jfly.uni-koeln.de/color/
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
INK, SOFT, LINE, CARD = "#1b1f24", "#59636e", "#d8dee4", "#ffffff"
# CSS variables of page.html, whose dark mode has lighter colours.
VARIABLES = {BLUE: "blue", VERMILION: "vermilion", GREEN: "green", PURPLE: "purple", ORANGE: "orange"}

VARIABLES |= {INK: "ink", SOFT: "soft", LINE: "line", CARD: "card"}

STYLE: dict[Any, Any] = {  # matplotlib's rc parameters
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.8,  # long enough to show a dash beside the marker
    "legend.columnspacing": 1.0,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "lengthwise",
    "text.parse_math": False,  # a device's name may contain $
}

_SVG = "http://www.w3.org/2000/svg"

ElementTree.register_namespace("", _SVG)

ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


class Plot:
    """A figure with one pair of axes and hover texts for its points. Captions are in page.html and workflow/report/."""

    def __init__(self, x_label: str = "", y_label: str = "", size: tuple[float, float] = (4.4, 3.5)):
        self.figure = Figure(figsize=size, layout="constrained")
        self.axes: Axes = self.figure.subplots()
        self.axes.set_xlabel(x_label)
        self.axes.set_ylabel(y_label)
        self.axes.set_axisbelow(True)
        self.hover_texts: dict[str, list[str]] = {}

    def explain(self, artist: Artist, texts: Iterable[str]) -> None:
        """Set the hover text of each point of a line, scatter or bar, in the order of drawing."""
        name = f"points{len(self.hover_texts)}"
        artist.set_gid(name)
        self.hover_texts[name] = list(texts)

    def legend(self, columns: int = 1) -> None:
        self.figure.legend(*self.axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns)


def save(plot: Plot, out: Path, name: str) -> str:
    """Write `name`.svg and `name`.png; returns the SVG element for the page."""
    # No date and no metadata: equal data make equal files.
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with atomic(out / f"{name}.png") as part:
        plot.figure.savefig(part, format="png", dpi=200)
    plot.figure.set_layout_engine("none")  # keep the arrangement of the first drawing
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "path"}), atomic(out / f"{name}.svg") as part:
        plot.figure.savefig(part, format="svg", metadata=empty)  # letters as outlines need no font
    buffer = StringIO()
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": name}):
        plot.figure.savefig(buffer, format="svg", metadata=empty, transparent=True)
    return _for_page(buffer.getvalue(), plot.hover_texts)


def _for_page(text: str, hover_texts: dict[str, list[str]]) -> str:
    """Turn an SVG file into an element of the page: hover texts, CSS variables for colours, no fixed size."""
    root = ElementTree.fromstring(text)
    for group in root.iter(f"{{{_SVG}}}g"):
        name = group.attrib.pop("id", "")  # ids would repeat on a page of several figures
        if name in hover_texts:
            points = list(group.iter(f"{{{_SVG}}}use")) or [group]
            for point, hover_text in zip(points, hover_texts[name], strict=True):
                ElementTree.SubElement(point, f"{{{_SVG}}}title").text = hover_text
    for size in ("width", "height"):
        del root.attrib[size]
    text = ElementTree.tostring(root, encoding="unicode")
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return re.sub(r"\s*\n\s*", "\n", text)
