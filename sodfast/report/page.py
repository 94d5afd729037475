"""A run or a study as one HTML page with its figures, and its tables as CSV.

    load.py → groups → tables.py (rows) → plots.py and maps.py (SVG) → page.html.j2 (all words)

The same runs give the same bytes: nothing on the page depends on the clock. Only finished runs
(done or collapsed) enter a mean; the others are listed, and drawn as thin lines.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from operator import attrgetter, methodcaller
from os.path import isdir, lexists
from pathlib import Path
from typing import Any

import numpy as np

from sodfast.attribution import BLAMED, CLOCK
from sodfast.config import CGTRConfig
from sodfast.errors import RunFailed, UsageError
from sodfast.files import refuse_links, replace_bytes
from sodfast.report import canvas, maps, plots, tables
from sodfast.report.answers import Shown, compare
from sodfast.report.early_warning import MAX_FALSE_ALARM_RATE, Forecast, forecast
from sodfast.report.intervals import Curve, Series, bin_width, group_curve
from sodfast.report.load import load, load_side_by_side, load_studies
from sodfast.report.runs import Group, Line, Run, Source
from sodfast.report.templates import template
from sodfast.run.environment import describe
from sodfast.run.show import SHADES
from sodfast.summary import NEXT_STEPS, SPIKE_STEPS

Tables = dict[str, tables.Table]
# Figure: the label of its axis, and what gives the series of a run.
CURVES: dict[str, tuple[str, Callable[[Run], Series]]] = {
    "score": ("test {metric}", attrgetter("scores")),
    "drift": ("‖θ − φ‖₂", methodcaller("series", "teacher/drift")),
    "divergence": ("divergence", methodcaller("series", "distill/divergence")),
    "reward": ("reward", methodcaller("series", "reward/mean")),
    "entropy": ("entropy (nats)", methodcaller("series", "policy/entropy")),
    "length": ("tokens", methodcaller("series", "length/mean")),
    "tail": ("max / mean length", methodcaller("tail")),
}


def write_report(directory: Path, baseline: str | None = None) -> Path:
    """Write `directory`/report.html, tables/*.csv and figures/*.svg; returns the page's path.

    `baseline`: AXIS=LABEL of a study, the value that the others are compared with. Raises
    `UsageError`, before anything is written, where there is nothing to report or compare, or
    something is in the way; `RunFailed` where the disk refuses.
    """
    return _write_report(load(directory, baseline), directory)


def write_studies(directories: Sequence[Path], out: Path, baseline: str | None = None) -> Path:
    """Write one report of several studies, each a regime under the name of its directory, into the
    directory `out`; returns the page's path. Raises `UsageError` as `write_report`."""
    if lexists(out) and not isdir(out):
        raise UsageError(f"--out {out} cannot be used: name a directory")
    return _write_report(load_studies(directories, baseline), out)


def _write_report(source: Source, directory: Path) -> Path:
    page, rows, figures = _build(source)
    files = {f"tables/{name}.csv": table.to_csv() for name, table in rows.items()}
    if lexists(directory):
        refuse_links(directory, ("tables", "figures"))
    files |= {f"figures/{name}.svg": canvas.standalone(svg) for name, svg in figures.items()}
    _write(directory, {**files, "report.html": page})
    return directory / "report.html"


def write_comparison(directories: Sequence[Path], out: Path) -> Path:
    """Write `out`, one page that shows several runs side by side, the keys that differ first.

    Raises `UsageError`, before anything is written, where one is no run, or `out` is a name that
    is not of the form *.html, or of a link or a directory; `RunFailed` where the disk refuses.
    """
    if out.suffix != ".html" or out.is_symlink() or out.is_dir():
        raise UsageError(f"--out {out} cannot be used: name a file of the form NAME.html")
    page, _, _ = _build(load_side_by_side(directories, out.parent))
    _write(out.parent, {out.name: page})
    return out


def _build(source: Source) -> tuple[str, Tables, dict[str, str]]:
    """The page, the rows of its tables, and its figures."""
    found = forecast(source.groups) if source.definition else None
    rows = tables.build_tables(source.groups, found)
    figures = _draw(source, rows, found)
    return _render(source, rows, figures, found, _answers(source)), rows, figures


def _write(directory: Path, files: Mapping[str, str]) -> None:
    """Replace files, by their names from `directory`. Raises `UsageError`, with nothing replaced,
    where something is in the way, and `RunFailed` where the disk refuses."""
    texts = {directory / name: text for name, text in files.items()}
    for file in texts:
        above = [path for path in (file.parent, directory, directory.parent) if lexists(path)]
        if not above or not above[0].is_dir():
            raise UsageError(f"{file} cannot be written: {file.parent} cannot be a folder")
        if file.is_dir():
            raise UsageError(f"{file} cannot be written: it is a directory")
    try:
        directory.mkdir(exist_ok=True)
        for file, text in texts.items():
            file.parent.mkdir(exist_ok=True)
            # Half of a surrogate pair, as JSON may name one, is no text: it is shown as its escape.
            replace_bytes(file, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise RunFailed(f"{directory} cannot be written: {error.strerror}") from error


def _draw(source: Source, rows: Tables, found: Forecast | None) -> dict[str, str]:
    """Every figure that has something to show, by its name. Adds the curves' numbers to `rows`."""
    groups, single, steps = source.groups, source.single, source.steps
    refreshes = rows["refreshes"].rows
    shocks, spikes = (_thin(groups, refreshes, key) for key in ("shock", "spike_ratio"))
    ticks = _thin(groups, refreshes, "shock", plots.MARKS)
    marks = {label: [step for step, _ in pairs] for label, pairs in ticks.items()}
    # Panels mark refreshes on their own axes; below other layouts stands a figure of lanes.
    lanes = bool(refreshes) and not canvas.OVERLAID < len(groups) <= plots.PANELS
    runaway, limits = _thresholds(source)
    options: dict[str, dict[str, Any]] = {
        "score": {"markers": True},
        "drift": {"xlabel": not refreshes},
        "divergence": {"xlabel": not lanes, "marks": marks},
        "length": {"xlabel": False, "thresholds": runaway},
        "tail": {"thresholds": limits},
    }
    collapse = source.runs[0].collapse_step if single else None
    figures: dict[str, str] = {}

    def add(name: str, draw: Callable[..., str], *args: Any, **keys: Any) -> None:
        figures[name] = draw(name, *args, **keys)

    for name, (label, series) in CURVES.items():
        curves = {g.label: g.curve(series, _width(source, name == "score")) for g in groups}
        rows[f"curve_{name}"] = tables.curve(curves)
        more = {"collapse": collapse, **options.get(name, {})}
        add(name, plots.curve_figure, label.format(metric=source.metric), curves, steps, **more)
    if refreshes:
        add("shock", plots.scatter_figure, "shock ‖θ − φ‖₂", shocks, steps)
    if lanes:
        add("marks", plots.lane_figure, "Refreshes", marks, steps, labelled=len(groups) > 1)
    if any(spikes.values()):
        add("spikes", plots.scatter_figure, "spike ratio", spikes, steps, ratio=True)
    gated = {f"{g.label}, {r.seed_name}": r for g in groups for r in g.runs if r.checks}
    if gated and single:
        add("gates", plots.gate_figure, {"": source.runs[0]}, steps)
        bars = _reward_bars(source.runs[0], _width(source))
        label = "z of the gain" if source.runs[0].config.schedule.kind == "evidence" else "reward"
        add("reward_gate", plots.curve_figure, label, bars, steps)
    elif gated:
        add("gates", plots.gate_figure, dict(islice(gated.items(), plots.TIMELINES)), steps)
    ends = {g.label: [run.collapse_step for run in g.runs if run.collapse_step] for g in groups}
    lost = {label: at for label, at in ends.items() if at}
    if lost and not single:
        look = {"labelled": len(groups) > 1, "collapses": True}
        add("collapses", plots.lane_figure, "Steps of collapses", lost, steps, **look)
    if not single:
        label, against = f"final test {source.metric}", f"difference to {source.baseline}"
        add("ranking", plots.ranking_figure, label, groups, rows["results"].rows, against)
    if found is not None and found.diagnostics:
        add("forecast", plots.forecast_figure, found.diagnostics)
    comparisons, forks = rows["comparisons"].rows, rows["forks"].rows
    if comparisons and any(row["regime"] for row in comparisons):
        results = rows["results"].rows
        add("phase", maps.phase_figure, f"mean final test {source.metric}", results, comparisons)
    if any(row["verdict"] for row in refreshes):
        add("attribution", maps.attribution_figure, refreshes, steps)
    if forks:
        add("forks", maps.fork_figure, forks, rows["effects"].rows)
    return figures


def _thresholds(source: Source) -> tuple[dict[str, float], dict[str, float]]:
    """The mean length that counts as a collapse, where it is the same in all runs; and the length
    gate's limits, the first four."""
    configs = [run.config for run in source.runs if run.lines]
    caps = {c.collapse.length_fraction * c.rollout.max_new_tokens for c in configs}
    schedules = [config.schedule for config in configs]
    limits = sorted({s.max_tail_ratio for s in schedules if isinstance(s, CGTRConfig)})[:4]
    runaway = {"runaway length": caps.pop()} if len(caps) == 1 else {}
    return runaway, {f"limit {limit:g}": limit for limit in limits}


def _reward_bars(run: Run, width: int) -> dict[str, Curve]:
    """The two values that the reward gate of a run compares, as curves."""
    curves = {}
    value = "mean reward" if run.config.schedule.kind == "cgtr" else "z of the gain"
    for name, key in ((f"{value} of the window", "value"), ("bar to pass", "threshold")):
        gates = [(check["step"], check["gates"]["reward"]) for check in run.checks]
        pairs = [(step, gate[key]) for step, gate in gates if key in gate]
        curves[name] = group_curve([Series.of(pairs)], [], width)
    return curves


def _thin(
    groups: Sequence[Group], rows: Sequence[Line], key: str, most: int = plots.DOTS
) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of the rows that have one, ascending: at most `most` of a group, evenly
    chosen, the first and the last among them. Every group has an entry, so that it keeps its
    style."""
    points: dict[str, list[tuple[int, float]]] = {group.label: [] for group in groups}
    for row in rows:
        if row[key] is not None:
            points[row["group"]].append((row["step"], row[key]))
    for label, pairs in points.items():
        chosen = np.linspace(0, len(pairs) - 1, min(len(pairs), most)).round().astype(int)
        ascending = sorted(pairs)
        points[label] = [ascending[index] for index in chosen]
    return points


def _width(source: Source, scores: bool = False) -> int:
    """Steps per point of a curve; evaluations are averaged only where they are very many."""
    overlaid = len(source.groups) <= canvas.OVERLAID
    points = 300 if source.single else 60 if overlaid else 50
    if scores and max(run.scores.steps.size for run in source.runs) <= 2 * points:
        return 1
    return bin_width(source.steps, points)


def _answers(source: Source) -> dict[str, dict[str, list[Shown]]]:
    """What each part of the page of answers compares; only a single run has any."""
    run = source.runs[0].path
    kinds = {"training": False, "evaluation": True} if source.single else {}
    found = {kind: compare(run, evaluation) for kind, evaluation in kinds.items()}
    return {kind: questions for kind, questions in found.items() if questions}


def _render(
    source: Source,
    rows: Tables,
    figures: Mapping[str, str],
    found: Forecast | None,
    answers: Mapping[str, Mapping[str, Sequence[Shown]]],
) -> str:
    many = source.single or len(source.groups) > canvas.OVERLAID
    labels = [] if many else [group.label for group in source.groups]
    lasts = [{run.last_step for run in group.used} for group in source.groups]
    uneven = any(len(steps) > 1 for steps in lasts)
    return template("page.html.j2").render(
        title=source.called,
        source=source,
        tables=rows,
        figures=figures,
        found=found,
        swatches={label: canvas.swatch(index) for index, label in enumerate(labels)},
        loose=uneven or not all(run.finished for run in source.runs),
        width=_width(source),
        environments=Counter(filter(None, (describe(run.path) for run in source.runs))),
        plots=plots,
        maps=maps,
        CLOCK=CLOCK,
        BLAMED=BLAMED,
        answers=answers,
        NEXT_STEPS=NEXT_STEPS,
        SHADES=SHADES,
        SPIKE_STEPS=SPIKE_STEPS,
        ENDS=tables.ENDS,
        FALSE_ALARMS=f"{MAX_FALSE_ALARM_RATE:.0%}",
    )
