"""The report's figures: rows and curves in, SVG text out. Nothing here reads a file.

Up to `OVERLAID` groups share one plot; up to `PANELS` get a panel each, with the others behind in
grey; more become the rows of a map.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from sodfast.config import CGTRConfig, EvidenceConfig, gate_names
from sodfast.report import canvas
from sodfast.report.canvas import BOTTOM, COLLAPSE, FAINT, GRID, INK, LEFT, OVERLAID, TOP, WIDTH
from sodfast.report.early_warning import DiagnosticForecast
from sodfast.report.intervals import Curve, Series
from sodfast.report.runs import Group, Line, Run
from sodfast.report.templates import number, runs_of

PANELS = 24
TIMELINES = 48  # runs whose gates are drawn
DOTS, MARKS = 100, 400  # refreshes per group that are drawn, as points and as ticks
GATES = {"isolation": "#8A8A8A", "reward": "#E69F00", "length": "#0072B2", "tail": "#009E73"}
REFRESH = "#000000"

Curves = Mapping[str, Curve]  # by group
Levels = Mapping[str, float]  # thresholds by name
Marks = Mapping[str, Sequence[int]]  # steps by group
Points = Mapping[str, Sequence[tuple[int, float]]]  # (step, value) by group


def curve_figure(
    name: str,
    label: str,
    curves: Curves,
    steps: int,
    *,
    thresholds: Levels | None = None,
    marks: Marks | None = None,
    collapse: int | None = None,
    markers: bool = False,
    xlabel: bool = True,
) -> str:
    """A metric over steps 0 … `steps`, one curve per group.

    `label` names the metric and its unit; `thresholds` are horizontal lines by name, drawn when
    they lie within twice the data's range. `marks` are steps by group to tick on the step axis,
    where each group has a panel; `collapse` is the step of a single run's collapse. Without
    `xlabel` the step axis has no numbers: another figure follows below.
    """
    if len(curves) > PANELS:
        return _map(name, label, curves, steps)
    if len(curves) > OVERLAID:
        return _panels(name, label, curves, steps, thresholds or {}, marks or {})
    bottom = BOTTOM if xlabel else 0.12
    with canvas.new_figure(name, WIDTH, (2.4 if len(curves) > 1 else 1.7) + bottom) as figure:
        axes = canvas.add_axes(figure, labelled=len(curves) > 1, bottom=bottom)
        for index, curve in enumerate(curves.values()):
            _draw(axes, curve, canvas.style_of(index), markers)
        canvas.finish_steps(axes, steps, label, xlabel)
        for text, value in _limit(axes, curves, thresholds or {}).items():
            axes.axhline(value, color=INK, lw=0.9, ls=(0, (4, 2)))
            box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.6}
            place = ((0, value), (3, 2), ("axes fraction", "data"), "offset points")
            axes.annotate(text, *place, fontsize=7.5, zorder=6, bbox=box)
        if collapse is not None:
            axes.axvline(collapse, color=COLLAPSE, lw=1.1, ls=(0, (1, 1.2)))
        if len(curves) > 1:
            canvas.label_ends(axes, {group: curve.end for group, curve in curves.items()})
        return canvas.to_svg(figure, name, label)


def _draw(axes: Axes, curve: Curve, style: canvas.Style, markers: bool) -> None:
    x, (mean, low, high, n), loose = curve
    color, several = style["color"], (n > 1).tolist()
    if any(several):
        axes.fill_between(x, low, high, where=several, color=color, alpha=0.14, lw=0)
    for series in loose:
        axes.plot(*series, color=color, lw=0.8, alpha=0.7)
    line = style if markers else style | {"marker": ""}
    axes.plot(x, mean, **line, ms=3.6, markevery=max(1, len(x) // 15), clip_on=False)


def _limit(axes: Axes, curves: Curves, thresholds: Levels) -> Levels:
    """The axis follows what was measured: a wide interval of few seeds is cut, not the data.
    Returns the thresholds that are near."""
    parts = [part.values for curve in curves.values() for part in curve.parts]
    values = np.concatenate([*parts, np.empty(0)])
    values = values[np.isfinite(values)]
    if values.size:
        low, high = min(0.0, values.min()), values.max()
        thresholds = {t: y for t, y in thresholds.items() if y <= low + 2 * (high - low)}
    values = np.concatenate([values, list(thresholds.values())])
    if not values.size:
        return thresholds
    low, high = float(values.min()), float(values.max())
    spread = (high - low) or abs(high) or 1.0
    for _, band, _ in curves.values():
        low = min(low, max(np.fmin.reduce(band.low, initial=np.inf), low - 0.25 * spread))
        high = max(high, min(np.fmax.reduce(band.high, initial=-np.inf), high + 0.25 * spread))
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    # The axis stays above zero where nothing below zero was measured.
    axes.set_ylim(max(low - margin, -margin / 2 if values.min() >= 0 else -np.inf), high + margin)
    return thresholds


def _panels(
    name: str, label: str, curves: Curves, steps: int, thresholds: Levels, marks: Marks
) -> str:
    columns = 4
    rows = -(-len(curves) // columns)
    height = 1.55 * rows + 0.6
    with canvas.new_figure(name, WIDTH, height) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        sides = {"left": LEFT / WIDTH, "right": 1 - 0.1 / WIDTH, "wspace": 0.13, "hspace": 0.42}
        figure.subplots_adjust(bottom=0.45 / height, top=1 - 0.3 / height, **sides)
        thresholds = _limit(grid.flat[0], curves, thresholds)
        for axes, (group, curve) in zip(grid.flat, curves.items(), strict=False):
            for other in curves.values():
                axes.plot(other.x, other.band.mean, color="#CFCFCF", lw=0.6)
            _draw(axes, curve, canvas.style_of(0), markers=False)
            for value in thresholds.values():
                axes.axhline(value, color=INK, lw=0.7, ls=(0, (4, 2)))
            tick: dict[str, Any] = {"color": REFRESH, "ms": 6, "mew": 0.7, "clip_on": False}
            at = list(marks.get(group, ()))
            axes.plot(at, [0] * len(at), "|", **tick, transform=axes.get_xaxis_transform())
            axes.set_title(canvas.clip(group, 34), fontsize=7.5, loc="left", pad=3)
        for axes in grid.flat[len(curves) :]:
            axes.axis("off")
        grid.flat[0].set_xlim(0, max(steps, 1))
        grid.flat[0].xaxis.set_major_locator(canvas.ticks(4, integer=True))
        figure.supylabel(label, fontsize=8.5, x=0.12 / WIDTH, ha="left")
        figure.supxlabel("step", fontsize=8.5, y=0.08 / height, va="bottom")
        return canvas.to_svg(figure, name, label)


def _map(name: str, label: str, curves: Curves, steps: int) -> str:
    """Groups as rows, steps as columns, the group's mean as lightness."""
    row = min(0.17, 12.0 / len(curves))
    height = row * len(curves) + 1.2
    points = np.unique(np.concatenate([curve.x for curve in curves.values()]))
    values = np.full((len(curves), len(points)), np.nan)
    for index, curve in enumerate(curves.values()):
        if curve.x.size:  # each point holds until the next, the last one ends the row
            inside = (points >= curve.x[0]) & (points <= curve.x[-1])
            before = np.searchsorted(curve.x, points[inside], side="right") - 1
            values[index, inside] = curve.band.mean[before]
    with canvas.new_figure(name, WIDTH, height) as figure:
        axes = canvas.add_axes(figure, left=2.9, right=0.1, top=0.7)
        axes.grid(False)
        if points.size:
            look: dict[str, Any] = {"cmap": "cividis", "shading": "nearest", "rasterized": True}
            image = axes.pcolormesh(points, range(len(curves)), values, **look)
            bar = figure.add_axes((2.9 / WIDTH, 1 - 0.3 / height, 3.0 / WIDTH, 0.1 / height))
            figure.colorbar(image, cax=bar, orientation="horizontal", label=label)
        axes.set(xlim=(0, max(steps, 1)), ylim=(len(curves) - 0.5, -0.5), xlabel="step")
        canvas.name_rows(axes, list(curves), row)
        return canvas.to_svg(figure, name, label)


def ranking_figure(
    name: str, label: str, groups: Sequence[Group], rows: Sequence[Line], difference_label: str
) -> str:
    """Final scores of every used run and their means; beside them the differences to the baseline.
    `rows` are those of the groups in the results table."""
    height = (0.3 if len(rows) <= 30 else 0.2) * len(rows) + TOP + BOTTOM
    differences = any(row["difference"] is not None for row in rows)
    with canvas.new_figure(name, WIDTH, height) as figure:
        axes = canvas.add_axes(figure, left=2.3, right=3.324 if differences else 0.2)
        for index, (group, row) in enumerate(zip(groups, rows, strict=True)):
            style = canvas.style_of(index, len(rows))
            mean, error = row["final_mean"], row["final_error"]
            above = 0.0 if error is None else 0.16  # the runs are drawn above their mean
            for run in group.used:
                if run.scores.values.size:
                    cross = {} if run.collapse_step is None else {"marker": "x"}
                    canvas.hollow(axes, run.final, index - above, style, ms=4.5, mew=1.1, **cross)
            if error is not None:
                bar: dict[str, Any] = {"color": INK, "lw": 2.2, "solid_capstyle": "butt"}
                axes.plot((mean - error, mean + error), (index + 0.2,) * 2, **bar)
                axes.plot(mean, index + 0.2, "|", color=INK, ms=6, mew=1.4)
        canvas.finish_rows(axes, [f"{row['group']} ({runs_of(row)})" for row in rows], label)
        if differences:
            other = canvas.add_axes(figure, left=6.526, right=0.2)
            _draw_differences(other, rows)
            canvas.finish_rows(other, [""] * len(rows), difference_label)
        return canvas.to_svg(figure, name, label)


def _draw_differences(axes: Axes, rows: Sequence[Line]) -> None:
    """The range is that of the groups in which a run survived: a group that collapsed as a whole
    would press the others together, so it stands at the edge, with its number."""
    compared = [row for row in rows if row["difference"] is not None]
    survivors = [row for row in compared if row["collapsed"] < row["n"]]
    keys = ("difference", "difference_low", "difference_high")
    reach = [row[key] for row in survivors or compared for key in keys if row[key] is not None]
    low, high = min(0.0, *reach), max(0.0, *reach)
    margin = 0.08 * ((high - low) or 1.0)
    low, high = low - margin, high + margin
    axes.axvline(0, color=INK, lw=0.9)
    for index, row in enumerate(rows):
        style, difference = canvas.style_of(index, len(rows)), row["difference"]
        color = style["color"]
        if difference is None:
            continue
        if low <= difference <= high:
            if row["difference_low"] is not None:
                ends = (row["difference_low"], row["difference_high"])
                axes.plot(ends, (index, index), color=color, lw=2, solid_capstyle="butt")
            axes.plot(difference, index, marker=style["marker"], color=color, ms=5)
        else:
            ends = (low, "<", 8, "left"), (high, ">", -8, "right")
            edge, arrow, side, align = ends[difference > high]
            axes.plot(edge, index, arrow, color=color, ms=6, clip_on=False)
            place = (number(difference, sign=True), (edge, index), (side, 0))
            axes.annotate(*place, textcoords="offset points", va="center", ha=align, fontsize=8)
    axes.set_xlim(low, high)


def scatter_figure(
    name: str, label: str, points: Points, steps: int, *, ratio: bool = False
) -> str:
    """One point per (step, value), told by group: over steps up to `OVERLAID` groups, else a row
    per group. `ratio`: a logarithmic axis around 1."""
    rows, several = len(points) > OVERLAID, len(points) > 1
    row = min(0.2, 12.0 / len(points))
    sides = {"left": 2.9, "right": 0.15} if rows else {}
    with canvas.new_figure(name, WIDTH, row * len(points) + 0.8 if rows else 2.7) as figure:
        axes = canvas.add_axes(figure, labelled=several, **sides)
        for index, pairs in enumerate(points.values()):
            at, values = Series.of(pairs)
            x, y = (values, np.full_like(values, index)) if rows else (at, values)
            style = canvas.style_of(index, len(points))
            canvas.hollow(axes, x, y, style, ms=4.5, mew=1.1, alpha=0.8, clip_on=False)
        if rows:
            axes.set(xlabel=label)
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", visible=True)
            canvas.name_rows(axes, list(points), row)
            axes.set_ylim(len(points) - 0.5, -0.5)
        else:
            canvas.finish_steps(axes, steps, label)
        if ratio:
            known = [value for pairs in points.values() for _, value in pairs]
            _ratio_axis(axes, "x" if rows else "y", known)
        elif not rows:
            axes.set_ylim(bottom=0)
        if several and not rows:
            ends = {group: pairs[-1] if pairs else None for group, pairs in points.items()}
            canvas.label_ends(axes, ends, leader=False)
        return canvas.to_svg(figure, name, label)


def _ratio_axis(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Equal distances for equal factors; 1 marked, and the range kept readable."""
    low, high = min(0.9, *values) / 1.05, max(1.1, *values) * 1.05
    fine = () if high / low > 4 else (0.8, 0.9, 1.1, 1.25)
    ticks = sorted([0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, *fine])
    at = [tick for tick in ticks if low <= tick <= high]
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axes.set(**{f"{which}scale": "log"})
    axis.set_ticks(at, [f"{tick:g}" for tick in at])
    axes.minorticks_off()
    axes.set(**{f"{which}lim": (low, high)})
    (axes.axhline if which == "y" else axes.axvline)(1, color=INK, lw=0.9)


def lane_figure(
    name: str, label: str, lanes: Marks, steps: int, *, labelled: bool, collapses: bool = False
) -> str:
    """Steps at which something happened, a lane per group; crosses for `collapses`. `labelled` says
    whether the curve figure above it, with which it is aligned, has labels on its right; then the
    lanes have, too."""
    row = 0.17 if len(lanes) <= 60 else 12.0 / len(lanes)
    symbol, size = ("x", 6.0) if collapses else ("|", min(8.0, row * 60))
    with canvas.new_figure(name, WIDTH, row * len(lanes) + TOP + BOTTOM) as figure:
        axes = canvas.add_axes(figure, labelled=labelled)
        for index, at in enumerate(lanes.values()):
            own = canvas.style_of(index)["color"] if len(lanes) <= OVERLAID else INK
            color = COLLAPSE if collapses else own
            axes.plot(list(at), [index] * len(at), symbol, color=color, ms=size, mew=1.1)
        canvas.finish_lanes(axes, steps, len(lanes) - 0.5, -0.5)
        canvas.name_rows(axes, list(lanes) if labelled else [""] * len(lanes), row, width=32)
        return canvas.to_svg(figure, name, label)


def gate_figure(name: str, runs: Mapping[str, Run], steps: int) -> str:
    """A lane for each gate of each run, filled over the checks at which that gate blocked. `runs`:
    those with gates, by the name that stands beside its lanes; an empty name is not written."""
    height = 0.34 * len(runs) + 0.95
    with canvas.new_figure(name, WIDTH, height) as figure:
        axes = canvas.add_axes(figure, labelled=any(runs), top=0.42)
        for index, run in enumerate(runs.values()):
            schedule = run.config.schedule
            assert isinstance(schedule, CGTRConfig | EvidenceConfig)
            every = schedule.check_every if schedule.kind == "cgtr" else schedule.probe_every
            gates = gate_names(schedule)
            pitch = 0.9 / len(gates)
            for lane, gate in enumerate(gates):
                top, pale = index + 0.06 + pitch * lane, gate not in schedule.gates
                if pale:
                    middle = [top + (pitch - 0.04) / 2] * 2
                    axes.plot([0, run.last_step], middle, color=FAINT, lw=0.6, ls=":")
                blocked = [c["step"] for c in run.checks if not c["gates"][gate]["pass"]]
                bars, alpha = _spans(blocked, every), 0.35 if pale else 1
                look: dict[str, Any] = {"facecolors": GATES[gate], "alpha": alpha, "lw": 0}
                axes.broken_barh(bars, (top, pitch - 0.04), **look)
            at = [event["step"] for event in run.refreshes]
            edge: dict[str, Any] = {"color": REFRESH, "mec": "white", "mew": 0.6, "zorder": 5}
            axes.plot(at, [index + 0.49] * len(at), "v", **edge, ms=7.5)
            if run.collapse_step is not None:
                axes.plot(run.collapse_step, index + 0.49, "X", color=COLLAPSE, mec="white", ms=8)
        axes.hlines(range(len(runs) + 1), 0, max(steps, 1), color=GRID, lw=0.7)
        canvas.finish_lanes(axes, steps, len(runs), 0)
        middles = [index + 0.5 for index in range(len(runs))]
        axes.set_yticks(middles, [canvas.clip(name, 32) for name in runs])
        shown = {gate for run in runs.values() for gate in gate_names(run.config.schedule)}
        _gate_legend(figure, height, [gate for gate in GATES if gate in shown])
        return canvas.to_svg(figure, name, "Gates that blocked, over steps")


def _gate_legend(figure: Figure, height: float, gates: Sequence[str]) -> None:
    x, y = LEFT / WIDTH, 1 - 0.21 / height
    for gate in gates:
        size = (0.22 / WIDTH, 0.11 / height)
        figure.add_artist(Rectangle((x, 1 - 0.27 / height), *size, color=GATES[gate], lw=0))
        figure.text(x + 0.3 / WIDTH, y, f"{gate} blocks", va="center", fontsize=8)
        x += 1.35 / WIDTH
    for symbol, color, text in (("v", REFRESH, "refresh"), ("X", COLLAPSE, "collapse")):
        look: dict[str, Any] = {"marker": symbol, "color": color, "mec": "white", "mew": 0.6}
        figure.add_artist(Line2D([x + 0.1 / WIDTH], [y], **look, ms=7))
        figure.text(x + 0.24 / WIDTH, y, text, va="center", fontsize=8)
        x += 0.95 / WIDTH


def _spans(steps: Sequence[int], every: int) -> list[tuple[float, float]]:
    """Neighbouring checks as one bar, each check in the middle of its interval."""
    cuts = [i for i, (a, b) in enumerate(pairwise(steps), start=1) if b - a > every]
    runs = pairwise([0, *cuts, len(steps)] if steps else [])
    return [(steps[a] - every / 2, steps[b - 1] - steps[a] + every) for a, b in runs]


def forecast_figure(name: str, found: Sequence[DiagnosticForecast]) -> str:
    """Left: detection over false-alarm rate. Right: each announced collapse's lead time."""
    with canvas.new_figure(name, WIDTH, 3.7) as figure:
        axes = canvas.add_axes(figure, right=WIDTH - LEFT - 3.1, top=0.3)
        axes.plot([0, 1], [0, 1], color=FAINT, lw=0.9, ls=":")
        other = canvas.add_axes(figure, left=6.15, right=WIDTH - 9.45, top=0.3)
        for index, one in enumerate(found):
            style = canvas.style_of(index)
            _, false_alarms, detections = zip(*one.roc, strict=True)
            line: dict[str, Any] = {"ms": 3.5, "markevery": max(1, len(one.roc) // 6), **style}
            axes.plot(false_alarms, detections, **line, alpha=0.9, clip_on=False)
            leads = sorted(alarm.lead for alarm in one.alarms if alarm.lead is not None)
            canvas.hollow(other, leads, [index] * len(leads), style, ms=5.5)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set(xlabel="false-alarm rate (stable runs)", ylabel="detection rate (collapsed runs)")
        axes.grid(axis="both", visible=True)
        other.axvline(0, color=INK, lw=0.9)
        names = [f"{one.diagnostic.name}  (AUC {one.row['AUC']:.2f})" for one in found]
        canvas.finish_rows(other, names, "steps before the collapse")
        other.tick_params(axis="y", pad=30)
        for index in range(len(found)):
            frame: dict[str, Any] = {"transform": other.get_yaxis_transform(), "clip_on": False}
            at = [-0.11, -0.065, -0.02]
            other.plot(at, [index] * 3, **canvas.style_of(index), markevery=[1], ms=4, **frame)
        other.xaxis.set_major_locator(canvas.ticks(6, integer=True))
        return canvas.to_svg(figure, name, "ROC and lead times")
