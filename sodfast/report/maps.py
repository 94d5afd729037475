"""The figures of the report's answers: where which schedule ends how high, and what a refresh does.

Rows of the tables in, SVG text out, as in plots.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from sodfast.report import canvas
from sodfast.report.canvas import BOTTOM, COLLAPSE, FAINT, INK, LEFT, WIDTH
from sodfast.report.effects import CUTS, OUTCOMES
from sodfast.report.runs import Line
from sodfast.report.templates import number

VERDICT_COLORS = {"corrective": "#009E73", "neutral": FAINT, "contaminating": COLLAPSE}
DRAWN = 400  # refreshes whose effects are drawn, at most


def phase_figure(
    name: str, label: str, results: Sequence[Line], comparisons: Sequence[Line]
) -> str:
    """Regimes as rows, schedules as columns: the mean final score as colour and number, below it in
    how many of the runs the student collapsed. Framed: the highest of a regime, dashed where an
    interval of `comparisons` does not separate another from it. Colours range over the groups in
    which a run survived, as they would hardly differ otherwise."""
    regimes, schedules = (
        list(dict.fromkeys(r[k] for r in results)) for k in ("regime", "schedule")
    )
    scored = [row for row in results if row["final_mean"] is not None]
    survived = [row["final_mean"] for row in scored if row["collapsed"] < row["n"]]
    low, high = min(survived, default=0.0), max(survived, default=1.0)
    highest = {row["regime"]: row["highest"] for row in comparisons}
    level = {(r["regime"], r["other"]) for r in comparisons if not (r["difference_low"] or 0) > 0}
    doubtful = {regime for regime, _ in level}
    height = 0.52 * len(regimes) + 0.55
    with canvas.new_figure(name, WIDTH, height) as figure:
        axes = canvas.add_axes(figure, left=1.9, right=0.1, top=0.05, bottom=0.5)
        for row in scored:
            x, y = schedules.index(row["schedule"]), regimes.index(row["regime"])
            shade = max(0.0, (row["final_mean"] - low) / ((high - low) or 1.0))
            color = colormaps["cividis"](shade)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=color, ec="white", lw=1.5))
            ink: dict[str, Any] = {"color": "black" if shade > 0.5 else "white", "ha": "center"}
            lost = row["collapsed"]
            place = y - 0.12 if lost else y
            axes.text(x, place, number(row["final_mean"]), va="center", fontsize=9, **ink)
            if lost:
                text = f"× {lost} of {row['n']}"
                axes.text(x, y + 0.24, text, va="center", fontsize=7.5, **ink)
            first = highest.get(row["regime"]) == row["schedule"]
            if first or (row["regime"], row["schedule"]) in level:
                dashed = (0, (3, 2)) if row["regime"] in doubtful else "-"
                edge: dict[str, Any] = {"fc": "none", "ec": COLLAPSE, "lw": 2.2, "ls": dashed}
                axes.add_patch(Rectangle((x - 0.45, y - 0.43), 0.9, 0.86, **edge))
        axes.grid(False)
        axes.set(xlim=(-0.5, len(schedules) - 0.5), ylim=(len(regimes) - 0.5, -0.5), xlabel=label)
        axes.set_xticks(range(len(schedules)), [canvas.clip(text, 22) for text in schedules])
        axes.set_yticks(range(len(regimes)), [canvas.clip(text, 28) for text in regimes])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        return canvas.to_svg(figure, name, label)


def attribution_figure(name: str, refreshes: Sequence[Line], steps: int) -> str:
    """The effect of each refresh that could be judged, with its interval, at its step: on reward
    above, on length below, coloured by its verdict."""
    judged = [row for row in refreshes if row["verdict"] is not None]
    chosen = np.linspace(0, len(judged) - 1, min(len(judged), DRAWN)).round().astype(int)
    look: dict[str, Any] = {"ls": "", "marker": "o", "ms": 3.5, "elinewidth": 0.6, "alpha": 0.75}
    with canvas.new_figure(name, WIDTH, 4.2) as figure:
        for key, label, top in (
            ("reward", "effect on reward", 0.3),
            ("length", "on log length", 2.1),
        ):
            axes = canvas.add_axes(figure, labelled=True, top=top, bottom=2.65 - top)
            for verdict, color in VERDICT_COLORS.items():
                own = [judged[index] for index in chosen if judged[index]["verdict"] == verdict]
                at, change = [row["step"] for row in own], [row[key] for row in own]
                ends = [[r[key] - r[f"{key}_low"], r[f"{key}_high"] - r[key]] for r in own]
                reach = np.reshape(ends, (-1, 2)).T
                axes.errorbar(at, change, yerr=reach, color=color, label=verdict, **look)
            axes.axhline(0, color=INK, lw=0.9)
            canvas.finish_steps(axes, steps, label, xlabel=key == "length")
        figure.axes[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return canvas.to_svg(figure, name, "Effect of each refresh beside the run's own trend")


def fork_figure(name: str, pairs: Sequence[Line], effects: Sequence[Line]) -> str:
    """The causal figure: what a refresh at a fork changes, a small point per pair; means of each
    step, and of thirds by age, drift and tail, with their intervals. A colour per regime."""
    regimes = list(dict.fromkeys(row["regime"] for row in pairs))
    labels = ("step of the fork", "age in steps", "drift ‖θ − φ‖₂", "tail, max / mean length")
    height, size = 4.4, 1 + len(CUTS)
    with canvas.new_figure(name, WIDTH, height) as figure:
        grid = figure.subplots(2, size, sharex="col", sharey="row", squeeze=False)
        sides = {"left": LEFT / WIDTH, "right": 1 - 0.1 / WIDTH, "wspace": 0.1, "hspace": 0.12}
        figure.subplots_adjust(bottom=BOTTOM / height, top=1 - 0.4 / height, **sides)
        for index, axes in enumerate(grid.flat):
            outcome, by = OUTCOMES[index // size], ("step", *CUTS)[index % size]
            axes.axhline(0, color=INK, lw=0.9)
            for place, regime in enumerate(regimes):
                style = canvas.style_of(place)
                own = [row for row in pairs if row["regime"] == regime and row[by] is not None]
                at, values = [row[by] for row in own], [row[outcome] for row in own]
                canvas.hollow(axes, at, values, style, ms=2.6, mew=0.6, alpha=0.5)
                means = [row for row in effects if (row["regime"], row["by"]) == (regime, by)]
                _draw_means(axes, means, outcome, style)
        for axes, label in zip(grid[1], labels, strict=True):
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(canvas.ticks(4))
        for axes, label in zip(grid[:, 0], ("reward", "log length"), strict=True):
            axes.set_ylabel(f"{label}, now − never")
        for index, regime in enumerate(regimes):
            color = canvas.style_of(index)["color"]
            figure.text((LEFT + 1.8 * index) / WIDTH, 1 - 0.2 / height, regime, color=color)
        return canvas.to_svg(figure, name, "Effect of one refresh, from forks")


def _draw_means(axes: Axes, rows: Sequence[Line], outcome: str, style: canvas.Style) -> None:
    """A mean in the middle of its rows' range, with its interval where it has one."""
    look: dict[str, Any] = {"color": style["color"], "mec": "white", "mew": 0.6, "ms": 6}
    for row in rows:
        middle, ends = (
            (row["from"] + row["to"]) / 2,
            [row[f"{outcome}_low"], row[f"{outcome}_high"]],
        )
        if None not in ends:
            axes.plot([middle] * 2, ends, color=style["color"], lw=2, solid_capstyle="butt")
        axes.plot(middle, row[outcome], style["marker"], **look)
