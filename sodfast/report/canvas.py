"""What all figures share: sizes, the groups' looks, step axes, labels, and the SVG text.

Every figure has the same width and margins, so that figures below each other share their step
axis. A group is told by its colour (Okabe & Ito 2008, safe for colour-blind readers), its line
style, its marker and a label at its end, so that none of them is needed alone and a grey print
reads as well. The same input gives the same bytes.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

OVERLAID = 8  # groups that share a plot
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = (
    *((), (5, 1.5), (6, 1.5, 1, 1.5), (1, 1)),
    *((9, 2), (3, 1, 1, 1, 1, 1), (2.5, 1.2), (9, 1.5, 1, 1.5)),
)
MARKERS = "os^DvPXh"
COLLAPSE = "#D55E00"
SHEET = Path(__file__).with_name("figure.mplstyle")
_LOOK = matplotlib.rc_params_from_file(SHEET)
INK, FAINT, GRID = (_LOOK[key] for key in ("text.color", "axes.edgecolor", "grid.color"))

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 9.6, 0.82, 2.15, 0.14, 0.5  # inches
UNLABELLED = 0.2  # the right margin without labels

Style = dict[str, Any]  # the keywords of a plotted line
STYLES: list[Style] = [
    {"color": color, "ls": (0, dashes) if dashes else "-", "marker": marker}
    for color, dashes, marker in zip(COLORS, DASHES, MARKERS, strict=True)
]


def style_of(index: int, groups: int = 1) -> Style:
    """How the group of this index looks in every figure; more than `OVERLAID` groups look alike."""
    return STYLES[index % OVERLAID if groups <= OVERLAID else 0]


def swatch(index: int) -> str:
    """A group's line and marker as a small SVG, for the tables' first column."""
    with new_figure(f"swatch{index}", 0.42, 0.16) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(-1, 1))
        axes.plot([0.02, 0.98], [0, 0], **style_of(index) | {"marker": ""}, lw=1.5)
        axes.plot([0.5], [0], **style_of(index) | {"ls": "-"}, ms=4.5)
        return to_svg(figure, f"swatch{index}", "", css="swatch")


def add_axes(figure: Figure, labelled: bool = False, **inches: float) -> Axes:
    """Axes inside of margins (left, right, top, bottom) given in inches. By default the right one
    has room for labels if the axes are `labelled`."""
    right = RIGHT if labelled else UNLABELLED
    margins = {"left": LEFT, "right": right, "top": TOP, "bottom": BOTTOM, **inches}
    left, right, top, bottom = margins.values()
    width, height = figure.get_size_inches()
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, 1 - (top + bottom) / height)
    )


def hollow(axes: Axes, x: Any, y: Any, style: Style, **more: Any) -> None:
    """A group's markers, unfilled and unconnected."""
    axes.plot(x, y, ls="", mfc="none", **{"marker": style["marker"], "mec": style["color"], **more})


def finish_steps(axes: Axes, steps: int, label: str, xlabel: bool = True) -> None:
    axes.set_xlim(0, max(steps, 1))
    axes.xaxis.set_major_locator(ticks(7, integer=True))
    axes.yaxis.set_major_locator(ticks(5))
    axes.set_ylabel(label)
    inches = axes.get_window_extent().width / axes.figure.dpi
    axes.yaxis.set_label_coords(-0.62 / inches, 0.5)
    if xlabel:
        axes.set_xlabel("step")
    else:
        axes.tick_params(labelbottom=False)


def finish_lanes(axes: Axes, steps: int, end: float, start: float) -> None:
    """Rows over steps, counted downwards, with their names on the right."""
    finish_steps(axes, steps, "")
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(end, start)
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()


def finish_rows(axes: Axes, names: Sequence[str], xlabel: str) -> None:
    axes.grid(axis="x", visible=True)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=xlabel)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(ticks(5))
    axes.set_yticks(range(len(names)), [clip(name, 36) for name in names])


def name_rows(axes: Axes, names: Sequence[str], row: float, width: int = 44) -> None:
    """Row names where they can be read, row numbers (from 1, in the tables' order) where not."""
    if row >= 0.12:
        axes.set_yticks(range(len(names)), [clip(name, width) for name in names], fontsize=7.5)
    else:
        at = range(9, len(names), 10)
        axes.set_yticks(at, [str(index + 1) for index in at], fontsize=7.5)
        axes.set_ylabel("row of the table")


def ticks(most: int, integer: bool = False) -> MaxNLocator:
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=integer)


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def label_ends(
    axes: Axes, ends: Mapping[str, tuple[float, float] | None], leader: bool = True
) -> None:
    """Write the groups' names right of the plot, each as near as possible to its curve's end."""
    to_axes = axes.transData + axes.transAxes.inverted()
    extent = axes.get_window_extent()
    inch, height = axes.figure.dpi / extent.width, extent.height / axes.figure.dpi
    frame: Style = {"transform": axes.transAxes, "clip_on": False}
    placed = []
    for index, (group, end) in enumerate(ends.items()):
        if end is not None:
            text = "\n".join(wrap(group, 25)[:3])
            x, y = map(float, to_axes.transform(end))
            tall = ((text.count("\n") + 1) * 10.5 + 2.5) / 72 / height
            placed.append((y, x, text, tall, style_of(index)))
    placed.sort(key=lambda item: item[0])
    centers = spread([item[0] for item in placed], [item[3] for item in placed])
    start = 1 + 0.12 * inch
    for (y, x, text, _, style), center in zip(placed, centers, strict=True):
        if leader:  # dotted as no curve is
            dots: Style = {"color": FAINT, "lw": 0.7, "ls": (0, (1, 1.6)), "zorder": 1}
            axes.plot([min(x, 1.0), start], [y, center], **dots, **frame)
        line = style if leader else style | {"ls": "none"}
        across = [start, start + 0.15 * inch, start + 0.3 * inch]
        axes.plot(across, [center] * 3, **line, markevery=[1], ms=4, lw=1.4, **frame)
        look: Style = {"fontsize": 8, "linespacing": 1.05, "va": "center"}
        axes.text(start + 0.38 * inch, center, text, transform=axes.transAxes, **look)


def spread(centers: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Move ascending centers apart, as little as possible in the squared sense, until boxes of
    these heights do not overlap; within [0, 1] if they fit.

    Each center, less the room that the boxes below need, must ascend: an isotonic regression.
    """
    if not centers:
        return []
    gaps = (np.asarray(heights[:-1]) + np.asarray(heights[1:])) / 2
    needed = np.concatenate([[0.0], np.cumsum(gaps)])
    level = isotonic_regression(np.subtract(centers, needed)).x
    lowest = heights[0] / 2
    highest = max(1 - heights[-1] / 2 - needed[-1], lowest)
    return list(np.clip(level, lowest, highest) + needed)


@contextmanager
def new_figure(name: str, width: float, height: float) -> Iterator[Figure]:
    # The reset undoes what the user's matplotlibrc says.
    with matplotlib.style.context([SHEET, {"svg.hashsalt": name}], after_reset=True):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        yield figure


def to_svg(figure: Figure, name: str, label: str, css: str = "plot") -> str:
    """The figure as an `<svg>` element: scalable, named for screen readers, free of a date.

    Ids of groups are removed, since they repeat in every figure of a page; the ids that others
    refer to stay: they are hashes salted with the figure's name.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    text = stream.getvalue().partition("<svg")[2].partition(">")[2]
    # A <style> would apply to the whole page.
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    named = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    width, height = figure.get_size_inches()
    head = (
        f'<svg class="{css}" data-name="{escape(name)}" {named} stroke-linejoin="round" '
        f'viewBox="0 0 {width * 72:g} {height * 72:g}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + text.rstrip()


def standalone(svg: str) -> str:
    """A figure as a file of its own, with the page's font and a ground that any viewer shows."""
    look = "background: white; font-family: sans-serif"
    return svg.replace("<svg ", f'<svg style="{look}" ', 1) + "\n"
