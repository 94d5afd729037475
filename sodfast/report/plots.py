"""The report's figures: arrays in, SVG text out. Nothing here reads a file or computes a statistic.

Every figure has the same width and margins, so that figures below each other share their step
axis. A group is told by its colour (Okabe & Ito 2008, safe for colour-blind readers), its line
style, its marker and a label at its end, so that none of them is needed alone and a grey print
reads as well. Up to `OVERLAID` groups share one plot; up to `PANELS` get a panel each, before the
others in grey; more become the rows of a map. The same input gives the same bytes.
"""

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from textwrap import wrap
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter
from scipy.optimize import isotonic_regression

from sodfast.report.intervals import Curve, Interval

OVERLAID = 8
PANELS = 24
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
)
LINES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (1, 1)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2.5, 1.2)),
    (0, (9, 1.5, 1, 1.5)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
INK, FAINT, GRID = "#222222", "#8A8A8A", "#E4E4E4"
GATES = {"isolation": "#8A8A8A", "reward": "#E69F00", "length": "#0072B2"}
REFRESH, COLLAPSE = "#000000", "#D55E00"

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 9.6, 0.82, 2.15, 0.14, 0.5  # inches
UNLABELLED = 0.2  # the right margin without labels
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout is the same everywhere
    "font.size": 8.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a label may hold a dollar sign
}


@dataclass(frozen=True)
class Style:
    """How the group of an index looks wherever it appears."""

    color: str
    line: Any
    marker: str


def style_of(index: int) -> Style:
    return Style(
        COLORS[index % len(COLORS)], LINES[index % len(LINES)], MARKERS[index % len(MARKERS)]
    )


def swatch(index: int) -> str:
    """A group's line and marker as a small SVG, for the tables' first column."""
    style = style_of(index)
    with _figure(f"swatch{index}", 0.42, 0.16) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(-1, 1))
        axes.plot([0.02, 0.98], [0, 0], color=style.color, ls=style.line, lw=1.5)
        axes.plot([0.5], [0], color=style.color, marker=style.marker, ms=4.5)
        return _svg(figure, f"swatch{index}", "", css="swatch")


def curve_figure(
    name: str,
    label: str,
    curves: Mapping[str, Curve],
    steps: int,
    *,
    thresholds: Mapping[str, float] | None = None,
    marks: Mapping[str, Sequence[int]] | None = None,
    collapse: int | None = None,
    markers: bool = False,
    xlabel: bool = True,
) -> str:
    """A metric over steps 0 … `steps`, one curve per group.

    `label` names the metric and its unit; `thresholds` are horizontal lines by name, drawn when
    they lie within twice the data's range. `marks` are steps by group to tick on the step axis,
    where each group has a panel; `collapse` is the step of a single run's collapse.
    """
    thresholds = _near(thresholds or {}, curves)
    if len(curves) <= OVERLAID:
        return _overlay(name, label, curves, steps, thresholds, collapse, markers, xlabel)
    if len(curves) <= PANELS:
        return _panels(name, label, curves, steps, thresholds, marks or {})
    return _map(name, label, curves, steps)


def _near(thresholds: Mapping[str, float], curves: Mapping[str, Curve]) -> dict[str, float]:
    values = _drawn(curves)
    if not values.size:
        return dict(thresholds)
    low, high = min(0.0, values.min()), values.max()
    return {name: value for name, value in thresholds.items() if value <= low + 2 * (high - low)}


def _drawn(curves: Mapping[str, Curve]) -> Any:
    parts = [curve.band.mean for curve in curves.values()]
    parts += [series.values for curve in curves.values() for series in curve.loose]
    values = np.concatenate(parts) if parts else np.empty(0)
    return values[np.isfinite(values)]


def _overlay(
    name: str,
    label: str,
    curves: Mapping[str, Curve],
    steps: int,
    thresholds: Mapping[str, float],
    collapse: int | None,
    markers: bool,
    xlabel: bool,
) -> str:
    bottom = BOTTOM if xlabel else 0.12  # without a step axis: another figure follows below
    height = (2.4 if len(curves) > 1 else 1.7) + bottom
    with _figure(name, WIDTH, height) as figure:
        axes = _add_axes(figure, right=_right(curves), bottom=bottom)
        ends = []
        for index, (group, curve) in enumerate(curves.items()):
            style = style_of(index)
            _draw(axes, curve, style, markers)
            end = _end(curve)
            if end is not None:
                ends.append((end, group, style))
        _finish_steps(axes, steps, label, xlabel)
        _limit(axes, curves, thresholds)
        for text, value in thresholds.items():
            axes.axhline(value, color=INK, lw=0.9, ls=(0, (4, 2)))
            _note(axes, 0, value, text)
        if collapse is not None:
            axes.axvline(collapse, color=COLLAPSE, lw=1.1, ls=(0, (1, 1.2)))
        if len(curves) > 1:
            _label_ends(axes, ends)
        return _svg(figure, name, label)


def _draw(axes: Axes, curve: Curve, style: Style, markers: bool) -> None:
    several = curve.band.n > 1
    if several.any():
        axes.fill_between(
            curve.x,
            curve.band.low,
            curve.band.high,
            where=several.tolist(),
            color=style.color,
            alpha=0.14,
            lw=0,
        )
    for series in curve.loose:
        axes.plot(series.steps, series.values, color=style.color, lw=0.8, alpha=0.7)
    axes.plot(
        curve.x,
        curve.band.mean,
        color=style.color,
        ls=style.line,
        marker=style.marker if markers else "",
        ms=3.6,
        markevery=max(1, len(curve.x) // 15),
        clip_on=False,
    )


def _end(curve: Curve) -> tuple[float, float] | None:
    """The last point that is drawn of a curve."""
    if curve.x.size:
        return float(curve.x[-1]), float(curve.band.mean[-1])
    if curve.loose:
        return float(curve.loose[0].steps[-1]), float(curve.loose[0].values[-1])
    return None


def _limit(axes: Axes, curves: Mapping[str, Curve], thresholds: Mapping[str, float]) -> None:
    """The axis follows what was measured: a wide interval of few seeds is cut, not the data."""
    values = np.concatenate([_drawn(curves), list(thresholds.values())])
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    bands = [(c.band.low[c.band.n > 1], c.band.high[c.band.n > 1]) for c in curves.values()]
    spread = (high - low) or abs(high) or 1.0
    for lows, highs in bands:
        if lows.size:
            low = min(low, max(float(lows.min()), low - 0.25 * spread))
            high = max(high, min(float(highs.max()), high + 0.25 * spread))
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    # Nothing below zero where nothing was measured below zero.
    axes.set_ylim(max(low - margin, -margin / 2 if values.min() >= 0 else -np.inf), high + margin)


def _panels(
    name: str,
    label: str,
    curves: Mapping[str, Curve],
    steps: int,
    thresholds: Mapping[str, float],
    marks: Mapping[str, Sequence[int]],
) -> str:
    columns = 4
    rows = -(-len(curves) // columns)
    height = 1.55 * rows + 0.6
    with _figure(name, WIDTH, height) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=LEFT / WIDTH,
            right=1 - 0.1 / WIDTH,
            bottom=0.45 / height,
            top=1 - 0.3 / height,
            hspace=0.42,
            wspace=0.13,
        )
        own = Style(COLORS[0], "-", "o")
        for axes, (group, curve) in zip(grid.flat, curves.items(), strict=False):
            for other in curves.values():
                axes.plot(other.x, other.band.mean, color="#CFCFCF", lw=0.6)
            _draw(axes, curve, own, markers=False)
            for value in thresholds.values():
                axes.axhline(value, color=INK, lw=0.7, ls=(0, (4, 2)))
            axes.plot(
                list(marks.get(group, ())),
                np.zeros(len(marks.get(group, ()))),
                "|",
                color=REFRESH,
                ms=6,
                mew=0.7,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
            axes.set_title(_clip(group, 34), fontsize=7.5, loc="left", pad=3, color=INK)
        for axes in grid.flat[len(curves) :]:
            axes.axis("off")
        _limit(grid.flat[0], curves, thresholds)
        grid.flat[0].set_xlim(0, max(steps, 1))
        grid.flat[0].xaxis.set_major_locator(_ticks(4, integer=True))
        figure.supylabel(label, fontsize=8.5, x=0.12 / WIDTH, ha="left", color=INK)
        figure.supxlabel("step", fontsize=8.5, y=0.08 / height, va="bottom", color=INK)
        return _svg(figure, name, label)


def _map(name: str, label: str, curves: Mapping[str, Curve], steps: int) -> str:
    """Groups as rows, steps as columns, the group's mean as lightness."""
    row = min(0.17, 12.0 / len(curves))
    height = row * len(curves) + 1.2
    points = np.unique(np.concatenate([curve.x for curve in curves.values()] or [np.empty(0)]))
    values = np.full((len(curves), len(points)), np.nan)
    for index, curve in enumerate(curves.values()):
        values[index, np.searchsorted(points, curve.x)] = curve.band.mean
        values[index] = _carry(values[index], _end(curve), points)
    with _figure(name, WIDTH, height) as figure:
        axes = figure.add_axes(
            ((2.9) / WIDTH, 0.5 / height, (WIDTH - 3.0) / WIDTH, row * len(curves) / height)
        )
        axes.grid(False)
        if points.size:
            image = axes.pcolormesh(
                points,
                range(len(curves)),
                values,
                cmap="cividis",
                shading="nearest",
                rasterized=True,
            )
            bar = figure.add_axes(((2.9) / WIDTH, 1 - 0.3 / height, 3.0 / WIDTH, 0.1 / height))
            figure.colorbar(image, cax=bar, orientation="horizontal", label=label)
        axes.set(xlim=(0, max(steps, 1)), ylim=(len(curves) - 0.5, -0.5), xlabel="step")
        _name_rows(axes, list(curves), row)
        return _svg(figure, name, label)


def _carry(row: Any, end: tuple[float, float] | None, points: Any) -> Any:
    """Fill columns between a group's points with the point before, up to its last."""
    if end is None:
        return row
    filled, last = row.copy(), np.nan
    for column, value in enumerate(row):
        if points[column] > end[0]:
            break
        last = value if np.isfinite(value) else last
        filled[column] = last
    return filled


@dataclass(frozen=True)
class Row:
    """A group of the ranking: its runs' values, mean and interval, and the difference."""

    group: str
    values: tuple[float, ...]
    collapsed: tuple[bool, ...]
    mean: float | None
    error: float | None
    difference: float | None = None
    interval: Interval | None = None


def ranking_figure(name: str, label: str, rows: Sequence[Row], difference_label: str) -> str:
    """Final scores of every run and their means; beside them the differences to the baseline."""
    row_height = 0.3 if len(rows) <= 30 else 0.2
    height = row_height * len(rows) + TOP + BOTTOM
    differences = any(row.difference is not None for row in rows)
    left = 2.3
    with _figure(name, WIDTH, height) as figure:
        whole = WIDTH - left - 0.2
        width = 0.56 * whole if differences else whole
        box = (BOTTOM / height, (height - TOP - BOTTOM) / height)
        axes = figure.add_axes((left / WIDTH, box[0], width / WIDTH, box[1]))
        for index, row in enumerate(rows):
            style = style_of(index) if len(rows) <= OVERLAID else Style(COLORS[0], "-", "o")
            above = 0.0 if row.error is None else 0.16  # the runs over their mean
            for value, collapsed in zip(row.values, row.collapsed, strict=True):
                axes.plot(
                    value,
                    index - above,
                    marker="x" if collapsed else style.marker,
                    ms=4.5,
                    mew=1.1,
                    mec=style.color,
                    mfc="none",
                    ls="none",
                )
            if row.mean is not None and row.error is not None:
                ends = (row.mean - row.error, row.mean + row.error)
                axes.plot(ends, (index + 0.2,) * 2, color=INK, lw=2.2, solid_capstyle="butt")
                axes.plot(row.mean, index + 0.2, "|", color=INK, ms=6, mew=1.4)
        _rows(axes, [row.group for row in rows], label)
        if differences:
            other = figure.add_axes(
                ((left + width + 0.25) / WIDTH, box[0], (whole - width - 0.25) / WIDTH, box[1])
            )
            _draw_differences(other, rows)
            _rows(other, [""] * len(rows), difference_label)
        return _svg(figure, name, label)


def _draw_differences(axes: Axes, rows: Sequence[Row]) -> None:
    """The range is that of the groups in which a run survived: a group that collapsed as a whole
    would press the others together, so it stands at the edge, with its number."""
    survivors = [r for r in rows if r.difference is not None and not all(r.collapsed)]
    shown = survivors or [r for r in rows if r.difference is not None]
    bounds = [b for r in shown for b in ((r.interval.low, r.interval.high) if r.interval else ())]
    reach = [0.0, *(r.difference for r in shown if r.difference is not None), *bounds]
    low, high = min(reach), max(reach)
    margin = 0.08 * ((high - low) or 1.0)
    low, high = low - margin, high + margin
    axes.axvline(0, color=INK, lw=0.9)
    for index, row in enumerate(rows):
        style = style_of(index) if len(rows) <= OVERLAID else Style(COLORS[0], "-", "o")
        if row.difference is None:
            continue
        if low <= row.difference <= high:
            if row.interval is not None:
                ends = (row.interval.low, row.interval.high)
                axes.plot(ends, (index, index), color=style.color, lw=2, solid_capstyle="butt")
            axes.plot(row.difference, index, marker=style.marker, color=style.color, ms=5)
        else:
            edge, arrow, side = (low, "<", 8) if row.difference < low else (high, ">", -8)
            axes.plot(edge, index, arrow, color=style.color, ms=6, clip_on=False)
            axes.annotate(
                f"{row.difference:+.3f}".replace("-", "\u2212"),
                (edge, index),
                xytext=(side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=8,
                color=INK,
            )
    axes.set_xlim(low, high)


def _rows(axes: Axes, names: Sequence[str], xlabel: str) -> None:
    axes.grid(axis="x", visible=True)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=xlabel)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(_ticks(5))
    axes.set_yticks(range(len(names)), [_clip(name, 36) for name in names])


def scatter_figure(
    name: str,
    label: str,
    points: Mapping[str, Sequence[tuple[int, float]]],
    steps: int,
    *,
    ratio: bool = False,
    marker_size: float = 4.5,
) -> str:
    """One point per (step, value), told by group: over steps up to `OVERLAID` groups, else a row
    per group. `ratio`: a logarithmic axis around 1."""
    rows = len(points) > OVERLAID
    row = min(0.2, 12.0 / len(points))
    height = row * len(points) + 0.8 if rows else 2.7
    with _figure(name, WIDTH, height) as figure:
        axes = _add_axes(figure, left=2.9 if rows else LEFT, right=0.15 if rows else _right(points))
        ends = []
        for index, (group, pairs) in enumerate(points.items()):
            style = Style(COLORS[0], "-", "o") if rows else style_of(index)
            at = [index if rows else step for step, _ in pairs]
            values = [value for _, value in pairs]
            x, y = (values, at) if rows else (at, values)
            axes.plot(
                x,
                y,
                ls="none",
                marker=style.marker,
                ms=marker_size,
                mec=style.color,
                mfc="none",
                mew=1.1,
                alpha=0.8,
                clip_on=False,
            )
            if pairs and not rows:
                ends.append(((float(pairs[-1][0]), float(values[-1])), group, style))
        if rows:
            axes.set(xlabel=label)
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", visible=True)
            _name_rows(axes, list(points), row)
            axes.set_ylim(len(points) - 0.5, -0.5)
        else:
            _finish_steps(axes, steps, label)
        if ratio:
            known = [value for pairs in points.values() for _, value in pairs]
            _ratio_axis(axes, "x" if rows else "y", known)
        elif not rows:
            axes.set_ylim(bottom=0)
        if not rows and len(points) > 1:
            _label_ends(axes, ends, leader=False)
        return _svg(figure, name, label)


def _ratio_axis(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Equal distances for equal factors; 1 marked, and the range kept readable."""
    low, high = min([0.9, *values]) / 1.05, max([1.1, *values]) * 1.05
    ticks = [
        t for t in (0.1, 0.2, 0.5, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10) if low <= t <= high
    ]
    if high / low > 4:
        ticks = [t for t in ticks if t not in (0.8, 0.9, 1.1, 1.25)]
    axis = axes.yaxis if which == "y" else axes.xaxis
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(FixedLocator([]))
    (axes.set_ylim if which == "y" else axes.set_xlim)(low, high)
    (axes.axhline if which == "y" else axes.axvline)(1, color=INK, lw=0.9)


def lane_figure(
    name: str,
    label: str,
    lanes: Mapping[str, Sequence[int]],
    steps: int,
    *,
    labelled: bool,
    symbol: str = "|",
    color: str | None = None,
) -> str:
    """Steps at which something happened, a lane per group. `labelled` says whether the curve
    figure above it, with which it is aligned, has labels on its right; then the lanes have, too."""
    row = 0.17 if len(lanes) <= 60 else 12.0 / len(lanes)
    height = row * len(lanes) + TOP + BOTTOM
    with _figure(name, WIDTH, height) as figure:
        axes = _add_axes(figure, right=RIGHT if labelled else UNLABELLED)
        for index, at in enumerate(lanes.values()):
            own = style_of(index).color if len(lanes) <= OVERLAID else INK
            axes.plot(
                list(at),
                [index] * len(at),
                symbol,
                color=color or own,
                ms=min(8.0, row * 60) if symbol == "|" else 6,
                mew=1.1,
            )
        _finish_steps(axes, steps, "")
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.yaxis.set_label_position("right")
        axes.yaxis.tick_right()
        _name_rows(axes, list(lanes) if labelled else [""] * len(lanes), row, width=32)
        return _svg(figure, name, label)


@dataclass(frozen=True)
class Timeline:
    """One run's checks, `every` steps apart: the steps at which each gate blocked. `run` is its
    name, empty where it needs none; `inactive` are the gates that are switched off.
    """

    run: str
    every: int
    blocked: Mapping[str, Sequence[int]]
    inactive: frozenset[str]
    refreshes: Sequence[int]
    collapse: int | None
    last: int


def gate_figure(name: str, runs: Sequence[Timeline], steps: int) -> str:
    """Three lanes per run, one per gate, filled over the checks at which that gate blocked."""
    row = 0.34
    height = row * len(runs) + 0.95
    with _figure(name, WIDTH, height) as figure:
        named = [run.run for run in runs if run.run]
        axes = _add_axes(figure, right=RIGHT if named else UNLABELLED, top=0.42)
        for index, run in enumerate(runs):
            for lane, (gate, color) in enumerate(GATES.items()):
                top = index + 0.06 + 0.3 * lane
                if gate in run.inactive:
                    axes.plot([0, run.last], [top + 0.13] * 2, color=FAINT, lw=0.6, ls=":")
                spans = _spans(run.blocked.get(gate, ()), run.every)
                axes.broken_barh(
                    spans,
                    (top, 0.26),
                    facecolors=color,
                    alpha=0.35 if gate in run.inactive else 1,
                    lw=0,
                )
            axes.plot(
                list(run.refreshes),
                [index + 0.49] * len(run.refreshes),
                marker="v",
                ls="none",
                color=REFRESH,
                mec="white",
                mew=0.6,
                ms=7.5,
                zorder=5,
            )
            if run.collapse is not None:
                axes.plot(run.collapse, index + 0.49, "X", color=COLLAPSE, mec="white", ms=8)
        _finish_steps(axes, steps, "")
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.hlines(range(len(runs) + 1), 0, max(steps, 1), color=GRID, lw=0.7)
        axes.set_ylim(len(runs), 0)
        axes.yaxis.tick_right()
        at = [index + 0.5 for index in range(len(runs))]
        axes.set_yticks(at, [_clip(run.run, 32) for run in runs])
        _gate_legend(figure, height)
        return _svg(figure, name, "Gates that blocked, over steps")


def _gate_legend(figure: Figure, height: float) -> None:
    x = LEFT / WIDTH
    for gate, color in GATES.items():
        figure.patches.append(
            matplotlib.patches.Rectangle(
                (x, 1 - 0.27 / height),
                0.22 / WIDTH,
                0.11 / height,
                color=color,
                lw=0,
                transform=figure.transFigure,
            )
        )
        figure.text(
            x + 0.3 / WIDTH, 1 - 0.21 / height, f"{gate} blocks", va="center", color=INK, fontsize=8
        )
        x += 1.35 / WIDTH
    for symbol, color, text in (("v", REFRESH, "refresh"), ("X", COLLAPSE, "collapse")):
        figure.lines.append(
            matplotlib.lines.Line2D(
                [x + 0.1 / WIDTH],
                [1 - 0.21 / height],
                marker=symbol,
                color=color,
                mec="white",
                mew=0.6,
                ms=7,
                transform=figure.transFigure,
            )
        )
        figure.text(x + 0.24 / WIDTH, 1 - 0.21 / height, text, va="center", color=INK, fontsize=8)
        x += 0.95 / WIDTH


def _spans(steps: Sequence[int], every: int) -> list[tuple[float, float]]:
    """Neighbouring checks as one bar, each check in the middle of its interval."""
    if not steps:
        return []
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(steps)) if b - a > every), len(steps)]
    return [(steps[a] - every / 2, steps[b - 1] - steps[a] + every) for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class RocCurve:
    name: str
    false_alarms: Sequence[float]
    detections: Sequence[float]
    area: float
    leads: Sequence[int]


def forecast_figure(name: str, curves: Sequence[RocCurve]) -> str:
    """Left: detection over false-alarm rate. Right: each announced collapse's lead time."""
    height = 3.7
    with _figure(name, WIDTH, height) as figure:
        box = (BOTTOM / height, (height - 0.3 - BOTTOM) / height)
        axes = figure.add_axes((LEFT / WIDTH, box[0], 3.1 / WIDTH, box[1]))
        axes.plot([0, 1], [0, 1], color=FAINT, lw=0.9, ls=":")
        other = figure.add_axes((6.15 / WIDTH, box[0], 3.3 / WIDTH, box[1]))
        for index, curve in enumerate(curves):
            style = style_of(index)
            axes.plot(
                curve.false_alarms,
                curve.detections,
                color=style.color,
                ls=style.line,
                marker=style.marker,
                ms=3.5,
                markevery=max(1, len(curve.detections) // 6),
                alpha=0.9,
                clip_on=False,
            )
            other.plot(
                list(curve.leads),
                [index] * len(curve.leads),
                ls="none",
                marker=style.marker,
                mec=style.color,
                mfc="none",
                ms=5.5,
            )
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set(xlabel="false-alarm rate (stable runs)", ylabel="detection rate (collapsed runs)")
        axes.grid(axis="both", visible=True)
        other.axvline(0, color=INK, lw=0.9)
        _rows(other, [f"{c.name}  (AUC {c.area:.2f})" for c in curves], "steps before the collapse")
        other.tick_params(axis="y", pad=30)
        for index in range(len(curves)):
            style = style_of(index)
            other.plot(
                [-0.11, -0.065, -0.02],
                [index] * 3,
                color=style.color,
                ls=style.line,
                marker=style.marker,
                markevery=[1],
                ms=4,
                transform=other.get_yaxis_transform(),
                clip_on=False,
            )
        other.xaxis.set_major_locator(_ticks(6, integer=True))
        return _svg(figure, name, "ROC and lead times")


def _add_axes(
    figure: Figure,
    left: float = LEFT,
    right: float = RIGHT,
    top: float = TOP,
    bottom: float = BOTTOM,
) -> Axes:
    """Axes inside of margins given in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, 1 - (top + bottom) / height)
    )


def _right(items: Collection[Any]) -> float:
    """The right margin: room for labels, where there are several things to tell apart."""
    return RIGHT if len(items) > 1 else UNLABELLED


def _finish_steps(axes: Axes, steps: int, label: str, xlabel: bool = True) -> None:
    axes.set_xlim(0, max(steps, 1))
    axes.xaxis.set_major_locator(_ticks(7, integer=True))
    axes.yaxis.set_major_locator(_ticks(5))
    axes.set_ylabel(label)
    inches = axes.get_window_extent().width / axes.figure.dpi
    axes.yaxis.set_label_coords(-0.62 / inches, 0.5)
    if xlabel:
        axes.set_xlabel("step")
    else:
        axes.tick_params(labelbottom=False)


def _ticks(most: int, integer: bool = False) -> MaxNLocator:
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=integer)


def _note(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(3, 2),
        textcoords="offset points",
        xycoords=("axes fraction", "data"),
        fontsize=7.5,
        color=INK,
        zorder=6,
        bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.6},
    )


def _label_ends(
    axes: Axes, ends: Sequence[tuple[tuple[float, float], str, Style]], leader: bool = True
) -> None:
    """A label per group right of the plot, at the height of its curve's end or next to it."""
    to_axes = axes.transData + axes.transAxes.inverted()
    figure = axes.figure
    extent = axes.get_window_extent()
    width, height = extent.width / figure.dpi, extent.height / figure.dpi  # inches
    placed = []
    for (x, y), group, style in ends:
        text = "\n".join(wrap(group, 25)[:3])
        lines = text.count("\n") + 1
        at = to_axes.transform((x, y))
        placed.append((float(at[1]), float(at[0]), text, (lines * 10.5 + 2.5) / 72 / height, style))
    placed.sort(key=lambda item: item[0])
    centers = spread([item[0] for item in placed], [item[3] for item in placed])
    unit = 1 / width  # an inch
    for (y, x, text, _, style), center in zip(placed, centers, strict=True):
        start = 1 + 0.12 * unit
        if leader:  # unlike any curve
            axes.plot(
                [min(x, 1.0), start],
                [y, center],
                color=FAINT,
                lw=0.7,
                ls=(0, (1, 1.6)),
                transform=axes.transAxes,
                clip_on=False,
                zorder=1,
            )
        axes.plot(
            [start, start + 0.15 * unit, start + 0.3 * unit],
            [center] * 3,
            color=style.color,
            ls=style.line if leader else "none",
            marker=style.marker,
            markevery=[1],
            ms=4,
            lw=1.4,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(
            start + 0.38 * unit,
            center,
            text,
            transform=axes.transAxes,
            va="center",
            fontsize=8,
            linespacing=1.05,
            color=INK,
        )


def spread(centers: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Move ascending centers apart, as little as possible in the squared sense, until boxes of
    these heights do not overlap; within [0, 1] if they fit.

    Centers less what the boxes below need must ascend: an isotonic regression.
    """
    if not centers:
        return []
    gaps = (np.asarray(heights[:-1]) + np.asarray(heights[1:])) / 2
    needed = np.concatenate([[0.0], np.cumsum(gaps)])
    level = isotonic_regression(np.subtract(centers, needed)).x
    lowest = heights[0] / 2
    highest = max(1 - heights[-1] / 2 - needed[-1], lowest)
    return list(np.clip(level, lowest, highest) + needed)


def _name_rows(axes: Axes, names: Sequence[str], row: float, width: int = 44) -> None:
    """Row names where they can be read, row numbers (from 1, in the tables' order) where not."""
    if row >= 0.12:
        axes.set_yticks(range(len(names)), [_clip(name, width) for name in names], fontsize=7.5)
    else:
        at = range(9, len(names), 10)
        axes.set_yticks(at, [str(index + 1) for index in at], fontsize=7.5)
        axes.set_ylabel("row of the table")


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[Figure]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["svg.hashsalt"] = name
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        yield figure


def _svg(figure: Figure, name: str, label: str, css: str = "plot") -> str:
    """The figure as an `<svg>` element: scalable, named for screen readers, free of a date.

    Group ids go, since several figures stand in one page; ids that are referred to are hashes
    salted with the figure's name.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would hold for the whole page
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    named = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    width, height = figure.get_size_inches()
    head = (
        f'<svg class="{css}" data-name="{escape(name)}" {named} stroke-linejoin="round" '
        f'viewBox="0 0 {width * 72:g} {height * 72:g}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"<svg[^>]*>", head, text, count=1).rstrip()


def name_of(svg: str) -> str:
    """The name that a figure was drawn under."""
    found = re.search(r'data-name="([^"]*)"', svg)
    assert found is not None
    return found[1]


def standalone(svg: str) -> str:
    """A figure as a file of its own, with the page's font and a ground that any viewer shows."""
    return (
        svg.replace("<svg ", '<svg style="background: white; font-family: sans-serif" ', 1) + "\n"
    )
