"""A run or a study as one HTML page with its figures, and its tables as CSV.

    report_data.load → groups → curves, tables.py, figures.py → page.html.j2

The same runs give the same bytes: nothing on the page depends on the clock. Only finished runs
(done or collapsed) enter a mean; the others are listed, and drawn as thin lines.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sodfast.config import CGTRConfig
from sodfast.errors import UsageError
from sodfast.files import replace_text
from sodfast.report import plots as figures
from sodfast.report import tables
from sodfast.report.early_warning import MAX_FALSE_ALARM_RATE, Forecast, RunRecord, forecast
from sodfast.report.intervals import Curve, Series, bin_width, group_curve
from sodfast.report.runs import Group, Run, Source, describe_schedule, group_runs, load
from sodfast.report.tables import Comparison, Table
from sodfast.summary import SPIKE_STEPS

TIMELINES = 48  # runs whose gates are drawn
DOTS = 100  # refreshes per group that are drawn


def write_report(directory: Path, baseline: str | None = None) -> Path:
    """Write `directory`/report.html and tables/*.csv; returns the page's path.

    `baseline`: AXIS=LABEL of a study, the value that the others are compared with. Raises
    `UsageError`, before anything is written, where there is nothing to report or compare.
    """
    report = Report(load(directory), baseline)
    page = report.page()
    try:
        (directory / "tables").mkdir(exist_ok=True)
        for table in report.tables:
            replace_text(directory / "tables" / f"{table.name}.csv", table.to_csv())
        (directory / "figures").mkdir(exist_ok=True)
        for name, svg in report.figures.items():
            replace_text(directory / "figures" / f"{name}.svg", figures.standalone(svg))
        replace_text(directory / "report.html", page)
    except OSError as error:
        raise UsageError(f"{directory} cannot be written: {error.strerror}") from error
    return directory / "report.html"


@dataclass(frozen=True)
class Exhibit:
    """A figure (one or several SVGs under each other) or a table, with its caption."""

    title: str
    caption: str
    svgs: Sequence[str] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    text: str
    exhibits: Sequence[Exhibit]


class Report:
    """Everything a page shows. `tables` holds all CSVs, those of the curves included."""

    def __init__(self, source: Source, baseline: str | None) -> None:
        self.source = source
        self.groups = group_runs(source)
        self.single = not source.is_study
        self.axis, self.value = self._baseline(baseline)
        self.steps = max(run.last_step for run in source.runs)
        overlaid = self.single or len(self.groups) <= figures.OVERLAID
        self.points = 300 if self.single else 60 if overlaid else 50
        self.tables: list[Table] = []
        self.figures: dict[str, str] = {}
        members = {tuple(group.point.items()): group for group in self.groups}
        self.comparisons = []
        for group in self.groups:
            other = None
            if self.axis is not None and self.value is not None:
                other = members.get(tuple({**group.point, self.axis: self.value}.items()))
            self.comparisons.append(
                Comparison(group, self._used(group), other, self._used(other) if other else [])
            )

    def _used(self, group: Group) -> list[Run]:
        """The runs that the statistics are over: the finished ones; a single run in any state."""
        return [run for run in group.runs if run.finished or self.single]

    def _baseline(self, text: str | None) -> tuple[str | None, str | None]:
        """The axis and the label that groups are compared with, other axes being equal.

        By default `schedule`, if it is an axis, else the first axis, at its first value.
        """
        known: dict[str, tuple[str, str]] = {
            f"{axis}={label}": (axis, label)
            for group in self.groups
            for axis, label in group.point.items()
        }
        if text is not None:
            if text not in known:
                choices = ", ".join(known) or "nothing: there is only one group"
                raise UsageError(f"baseline {text} is not in the study; it can be {choices}")
            return known[text]
        if len(self.groups) < 2:
            return None, None
        axes = self.source.axes
        axis = "schedule" if "schedule" in axes else axes[0]
        return axis, self.groups[0].point[axis]

    # ------------------------------------------------------------ page

    def page(self) -> str:
        sections = [
            self._outcome(),
            self._teacher(),
            self._divergence(),
            self._policy(),
            self._announcement(),
            self._runs(),
        ]
        svgs = [svg for section in sections for shown in section.exhibits for svg in shown.svgs]
        self.figures = {figures.name_of(svg): svg for svg in svgs}
        environment = Environment(
            loader=PackageLoader("sodfast.report", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        shown = self.single or len(self.groups) > figures.OVERLAID
        return environment.get_template("page.html.j2").render(
            title=self.source.directory.resolve().name,
            kind="Run" if self.single else "Study",
            facts=self._facts(),
            findings=self._findings(),
            warnings=self._warnings(),
            sections=[section for section in sections if section.exhibits or section.text],
            swatches={}
            if shown
            else {
                group.label: Markup(figures.swatch(index))
                for index, group in enumerate(self.groups)
            },
            markup=Markup,
            definition=self.source.definition,
            environments=self._environments(),
        )

    def _facts(self) -> list[tuple[str, str]]:
        """What the head of the page says before anything else."""
        runs = self.source.runs
        if not self.single:
            finished = sum(run.finished for run in runs)
            collapsed = sum(run.finished and run.collapse_step is not None for run in runs)
            return [
                ("trials", str(len(runs))),
                ("groups", str(len(self.groups))),
                ("finished", str(finished)),
                ("collapsed", str(collapsed)),
                ("steps", _range([run.config.steps for run in runs])),
            ]
        (run,) = runs
        facts = [
            ("schedule", self.groups[0].label),
            ("seed", str(run.config.seed)),
            ("steps", f"{run.last_step} of {run.config.steps}"),
            ("start", tables.number(tables.start(run))),
            ("final", tables.number(tables.final(run))),
            ("peak", tables.number(tables.peak(run))),
        ]
        if run.copies:
            facts.append(("refreshes", str(len(run.refreshes))))
        step = run.collapse_step
        return [*facts, ("collapse", "none" if step is None else f"step {step}")]

    def _findings(self) -> list[str]:
        """The outcome in sentences that the table backs."""
        if self.single:
            return []
        rows = [row for row in self._results().rows if row["final_mean"] is not None]
        if not rows:
            return ["No trial has finished, so there are no means yet."]
        text = tables.with_error("final")
        best = max(rows, key=lambda row: row["final_mean"])
        worst = min(rows, key=lambda row: row["final_mean"])
        found = [f"Highest mean final score: {best['group']}, {text(best)} (n = {best['n']})."]
        if worst is not best:
            found.append(f"Lowest: {worst['group']}, {text(worst)} (n = {worst['n']}).")
        lost = [row for row in rows if row["collapsed"]]
        if lost:
            parts = [f"{row['group']} in {row['collapsed']} of {row['n']}" for row in lost[:8]]
            rest = f" and {len(lost) - 8} more groups" if len(lost) > 8 else ""
            found.append(f"Collapsed: {'; '.join(parts)}{rest}.")
        else:
            found.append("No finished trial collapsed.")
        compared = [row for row in rows if row["difference_low"] is not None]
        above = [row["group"] for row in compared if row["difference_low"] > 0]
        below = [row["group"] for row in compared if row["difference_high"] < 0]
        if compared:
            found.append(
                f"Against {self._baseline_label()}, the interval of the paired difference of the "
                f"final score lies above zero for {_listed(above, 5)} and below zero for "
                f"{_listed(below, 5)} (each interval for itself, "
                f"{len(compared)} comparison{'s' if len(compared) > 1 else ''})."
            )
        return found

    def _baseline_label(self) -> str:
        """One group's name; or, with further axes, the value that the baselines share."""
        found = {c.baseline.label: c.baseline for c in self.comparisons if c.baseline is not None}
        if len(found) == 1:
            return next(iter(found))
        if self.axis == "schedule":
            return describe_schedule(next(iter(found.values())).runs[0].config.schedule)
        return f"{self.axis}={self.value}"

    def _warnings(self) -> list[str]:
        runs = self.source.runs
        if self.single:
            (run,) = runs
            text = f"This run is not finished: it stands at step {run.last_step} of its {{}}."
            return [] if run.finished else [text.format(run.config.steps)]
        found = []
        if all(len(group.runs) == 1 for group in self.groups):
            found.append(
                "Every group has one seed. One run says nothing about the spread between seeds, "
                "so there are no errors, no intervals and no bands."
            )
        for status in dict.fromkeys(run.status for run in runs if not run.finished):
            names = [run.name for run in runs if run.status == status]
            found.append(
                f"{len(names)} of {len(runs)} trials are {status} and in no mean: "
                f"{_listed(names, 6)}."
            )
        return found

    def _environments(self) -> list[str]:
        """Each different machine and set of versions that the runs were made with."""
        found: dict[str, int] = {}
        for run in self.source.runs:
            try:
                values = json.loads((run.path / "environment.json").read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                continue
            versions = ", ".join(f"{name} {text}" for name, text in values["versions"].items())
            text = (
                f"{values['processor']}, {values['device']}, {values['threads']} threads; "
                f"{versions}; commit {values['commit']}"
            )
            found[text] = found.get(text, 0) + 1
        return [f"{count} × {text}" if not self.single else text for text, count in found.items()]

    # ------------------------------------------------------------ sections

    def _results(self) -> Table:
        return next((t for t in self.tables if t.name == "results"), None) or self._keep(
            tables.results(self.comparisons)
        )

    def _keep(self, table: Table) -> Table:
        self.tables.append(table)
        return table

    def _outcome(self) -> Section:
        exhibits = []
        if not self.single:
            exhibits.append(self._ranking())
        table = self._results()
        evaluations = (
            f"{self._k} is the mean reward of {self._samples} answers per test question. "
            "start: before the first step; final: after the last; peak: the highest of all "
            "evaluations, which flatters a noisy run. "
        )
        collapse = (
            "Collapsed: mean response length at least collapse.length_fraction of the cap for "
            "collapse.length_steps steps in a row, or a score below collapse.eval_fraction of the "
            "best so far" + ("; the interval is Wilson's. " if self._several else ". ")
        )
        exhibits.append(
            Exhibit(
                "Final and peak test score",
                evaluations + self._error_note() + collapse + self._difference_note(),
                table=table,
            )
        )
        collapsed = {
            group.label: [run.collapse_step for run in group.runs if run.collapse_step is not None]
            for group in self.groups
        }
        crossed = any(collapsed.values()) and not self.single
        svgs = self._curves(
            "score",
            f"test {self._k}",
            lambda run: run.scores,
            width=self._evaluation_width(),
            markers=True,
        )
        more = ""
        if crossed:
            svgs.append(
                figures.lane_figure(
                    "collapses",
                    "Steps of collapses",
                    {label: steps for label, steps in collapsed.items() if steps},
                    self.steps,
                    labelled=len(self.groups) > 1,
                    symbol="x",
                    color=figures.COLLAPSE,
                )
            )
            more = " Crosses below: the step at which a trial met the collapse criterion."
        exhibits.append(
            Exhibit(
                "Test score over training",
                f"Test {self._k} at every evaluation; step 0 is the untouched student. "
                + self._band_note()
                + more,
                svgs,
            )
        )
        return Section("outcome", "Outcome", "", exhibits)

    def _ranking(self) -> Exhibit:
        rows = []
        for one, row in zip(self.comparisons, self._results().rows, strict=True):
            scored = [run for run in one.runs if run.scores.values.size]
            low, high = row["difference_low"], row["difference_high"]
            rows.append(
                figures.Row(
                    group=f"{one.group.label} ({tables.runs_of(row)})",
                    values=tuple(float(run.scores.values[-1]) for run in scored),
                    collapsed=tuple(run.collapse_step is not None for run in scored),
                    mean=row["final_mean"],
                    error=row["final_error"],
                    difference=row["difference"],
                    interval=None if low is None else figures.Interval(low, high),
                )
            )
        bars = "black bars the mean ± standard error" if self._several else "one run each"
        paired = (
            " Right: mean paired difference by seed and its 95 % bootstrap interval."
            if any(row.difference is not None for row in rows)
            else ""
        )
        svg = figures.ranking_figure(
            "ranking",
            f"final test {self._k}",
            rows,
            f"difference to {self._baseline_label()}" if self.axis else "",
        )
        return Exhibit(
            "Final test score of every run",
            f"Left: the last evaluation of each finished run (n in parentheses; crosses are "
            f"collapsed runs), {bars}.{paired}",
            [svg],
        )

    def _teacher(self) -> Section:
        table = self._keep(tables.teacher(self.comparisons))
        exhibits = [
            Exhibit(
                "When the teacher moved",
                "Per run: refreshes, the teacher's mean age in steps, mean shock (‖θ − φ‖₂ over "
                "all parameters at a refresh) and mean spike ratio of the refreshes that have "
                "one. EMA and trust region copy nothing (–). Semicolons separate seeds. "
                + self._error_note(),
                table=table,
            )
        ]
        gates = self._keep(tables.blocked(self.comparisons))
        if gates.rows:
            exhibits.append(
                Exhibit(
                    "Checks that each gate blocked",
                    "Per run: CGTR's checks, and those at which a gate blocked, whatever the "
                    "others did and whether it was active or switched off. " + self._error_note(),
                    table=gates,
                )
            )
        timeline = self._gates()
        if timeline is not None:
            exhibits.append(timeline)
        if self.single and self.source.runs[0].checks:
            exhibits.append(self._reward_bar())
        shock = self._shock()
        if shock is not None:
            exhibits.append(shock)
        return Section("teacher", "When the teacher moves", "", exhibits)

    def _gates(self) -> Exhibit | None:
        gated = [(group, run) for group in self.groups for run in group.runs if run.checks]
        self._keep(tables.gates(self.groups))
        if not gated:
            return None
        rows = []
        for group, run in gated[:TIMELINES]:
            schedule = run.config.schedule
            if not isinstance(schedule, CGTRConfig):
                raise UsageError(f"{run.path}: events.jsonl has gates but the schedule has none")
            name = "" if self.single else f"{group.label}, seed {run.config.seed}"
            rows.append(
                figures.Timeline(
                    run=name,
                    every=schedule.check_every,
                    blocked={
                        gate: [c["step"] for c in run.checks if not c["gates"][gate]["pass"]]
                        for gate in figures.GATES
                    },
                    inactive=frozenset(figures.GATES) - set(schedule.gates),
                    refreshes=[event["step"] for event in run.refreshes],
                    collapse=run.collapse_step,
                    last=run.last_step,
                )
            )
        some = (
            f" The first {TIMELINES} of {len(gated)} runs are drawn; tables/gates.csv has all."
            if len(gated) > TIMELINES
            else ""
        )
        return Exhibit(
            "Which gate blocked, and when",
            "CGTR's checks, three lanes per run: a lane is filled around the checks at which its "
            "gate blocked. A refresh needs all three lanes empty; a gate that is switched off is "
            "pale on a dotted line and blocks nothing." + some,
            [figures.gate_figure("gates", rows, self.steps)],
        )

    def _reward_bar(self) -> Exhibit:
        (run,) = self.source.runs
        gates = [(check["step"], check["gates"]["reward"]) for check in run.checks]
        curves = {}
        for name, key in (("mean reward of the window", "value"), ("bar to pass", "threshold")):
            pairs = [(step, gate[key]) for step, gate in gates if key in gate]
            steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
            curves[name] = group_curve([Series(steps, values)], [], self._width())
        schedule = run.config.schedule
        assert isinstance(schedule, CGTRConfig)
        return Exhibit(
            "The reward gate",
            f"Mean training reward of the last {schedule.window} steps at each check, and the "
            f"bar: the window's mean at the last refresh (at first, of the first "
            f"{schedule.window} steps) plus {schedule.reward_margin:g}." + self._bin_note(),
            [figures.curve_figure("reward_gate", "reward", curves, self.steps)],
        )

    def _shock(self) -> Exhibit | None:
        self._keep(tables.refreshes(self.groups))
        points = {
            group.label: [
                (event["step"], event["shock"]) for run in group.runs for event in run.refreshes
            ]
            for group in self.groups
        }
        known = {label: _thin(sorted(pairs)) for label, pairs in points.items() if pairs}
        svgs = self._curves(
            "drift", "‖θ − φ‖₂", lambda run: run.series("teacher/drift"), xlabel=not known
        )
        if known:
            svgs.append(
                figures.scatter_figure("shock", "shock ‖θ − φ‖₂", self._in_order(known), self.steps)
            )
        return Exhibit(
            "Distance of student and teacher, and refresh shock",
            ("Top: " if known else "")
            + "‖θ − φ‖₂ over all parameters after a step's update and before a refresh (trust "
            "region: to the initial weights). "
            + self._band_note()
            + self._bin_note()
            + (" Bottom: the same at each refresh of every run." if known else "")
            + self._thin_note(points),
            svgs,
        )

    def _divergence(self) -> Section:
        refreshes = {
            group.label: sorted(event["step"] for run in group.runs for event in run.refreshes)
            for group in self.groups
        }
        marked = {label: _thin(steps, 400) for label, steps in refreshes.items() if steps}
        # Between an overlay and a map, each group's panel has its ticks.
        lanes = marked and not figures.OVERLAID < len(self.groups) <= figures.PANELS
        svgs = self._curves(
            "divergence",
            "divergence",
            lambda run: run.series("distill/divergence"),
            marks=marked,
            xlabel=not lanes,
        )
        if lanes:
            svgs.append(
                figures.lane_figure(
                    "marks",
                    "Refreshes",
                    self._in_order(marked),
                    self.steps,
                    labelled=len(self.groups) > 1,
                )
            )
        exhibits = [
            Exhibit(
                "Student-teacher divergence and the refreshes",
                "Mean per-token divergence of student and teacher over the response tokens that "
                "are distilled, at each step that has such tokens; the line bridges the others. "
                + self._band_note()
                + self._bin_note()
                + (" Ticks below: refreshes of all runs of a group." if marked else "")
                + (
                    " At most 400 evenly chosen ones per group are drawn."
                    if any(len(steps) > 400 for steps in refreshes.values())
                    else ""
                ),
                svgs,
            )
        ]
        spikes = {
            group.label: sorted(pair for run in group.runs for pair in run.spikes.items())
            for group in self.groups
        }
        total = sum(len(steps) for steps in refreshes.values())
        known = {label: pairs for label, pairs in spikes.items() if pairs}
        count = sum(len(pairs) for pairs in known.values())
        if known:
            drawn = {label: _thin(pairs) for label, pairs in known.items()}
            exhibits.append(
                Exhibit(
                    "Spike ratio of each refresh",
                    f"Mean divergence of the {SPIKE_STEPS} steps after a refresh over that of the "
                    f"{SPIKE_STEPS} steps up to it, logarithmic. Above 1 the divergence rises "
                    "after the refresh: the paper's corrective spike. "
                    f"{count} of {total} refreshes have one: those without another refresh, or "
                    "the run's end, within these steps." + self._thin_note(known),
                    [
                        figures.scatter_figure(
                            "spikes", "spike ratio", self._in_order(drawn), self.steps, ratio=True
                        )
                    ],
                )
            )
        text = ""
        if total and not known:
            text = (
                "No refresh has a spike ratio: each has another refresh, or the end of the run, "
                f"within {SPIKE_STEPS} steps."
            )
        return Section("divergence", "Temporal structure of the divergence", text, exhibits)

    def _policy(self) -> Section:
        runs = [run for run in self.source.runs if run.lines]
        schedules = [run.config.schedule for run in runs]
        limits = sorted({s.max_tail_ratio for s in schedules if isinstance(s, CGTRConfig)})
        caps = sorted(
            {
                run.config.collapse.length_fraction * run.config.rollout.max_new_tokens
                for run in runs
            }
        )
        note = self._band_note() + self._bin_note()
        exhibits = [
            Exhibit(
                "Training reward",
                "Mean reward of a step's rollouts. " + note,
                self._curves("reward", "reward", lambda run: run.series("reward/mean")),
            ),
            Exhibit(
                "Entropy",
                "Mean token entropy of the student on its rollouts, in nats, measured when each "
                "token was sampled. " + note,
                self._curves("entropy", "entropy (nats)", lambda run: run.series("policy/entropy")),
            ),
            Exhibit(
                "Response length and its tail",
                "Top: mean response length. Bottom: length-tail ratio, the longest over the mean "
                "response of the last 5 steps pooled (CGTR: of its window), as its gate sees it; "
                "dashed: the gate's limit. " + note,
                [
                    *self._curves(
                        "length",
                        "tokens",
                        lambda run: run.series("length/mean"),
                        thresholds={"runaway length": caps[0]} if len(caps) == 1 else {},
                        xlabel=False,
                    ),
                    *self._curves(
                        "tail",
                        "max / mean length",
                        lambda run: run.tail(),
                        thresholds={f"limit {limit:g}": limit for limit in limits[:4]},
                    ),
                ],
            ),
            Exhibit(
                "Diagnostics",
                "Means over a run's steps, then over runs; end: the last "
                f"{tables.ENDS} steps. success groups: share of questions with at least one right "
                "rollout. SNR: mean over standard deviation of the questions' gain in reward since "
                "their previous visit. Entropy in nats. " + self._error_note(),
                table=self._keep(tables.diagnostics(self.comparisons)),
            ),
            Exhibit(
                "Lengths, best and majority answers",
                f"begin and end: the first and the last {tables.ENDS} steps, in tokens. Tail "
                "ratio: longest over mean response of a step, mean over steps, and its greatest. "
                "best@k and maj@k: last evaluation, greatest k. " + self._error_note(),
                table=self._keep(tables.lengths(self.comparisons)),
            ),
        ]
        return Section("policy", "What the policy does", "", exhibits)

    def _announcement(self) -> Section:
        title = "Does anything announce the collapse?"
        if self.single:
            return Section("forecast", title, "", [])
        found = forecast(
            [
                RunRecord(
                    name=run.name,
                    lines=run.lines,
                    collapse_step=run.collapse_step,
                    group=group.label,
                    detector_steps=run.config.collapse.length_steps,
                )
                for group in self.groups
                for run in self._used(group)
            ]
        )
        table = self._keep(tables.announcement(found))
        notes = " ".join(f"{note[:1].upper()}{note[1:]}." for note in found.notes)
        if not found.diagnostics:
            return Section("forecast", title, notes, [])
        exhibits = [
            Exhibit(
                "ROC and lead times",
                f"{found.n_collapsed} collapsed and {found.n_stable} stable runs. Left: share of "
                "collapsed runs that a diagnostic announces before the detector's own window, "
                "over the share of stable runs in which it alarms at any step, for every "
                "threshold. Right: steps from the first alarm to the collapse, one symbol per "
                "announced collapse, at the threshold with at most "
                f"{MAX_FALSE_ALARM_RATE:.0%} false alarms.",
                [_forecast_svg(found)],
            ),
            Exhibit(
                "Diagnostics as alarms",
                f"AUC with a 95 % score interval. The threshold is the least with at most "
                f"{MAX_FALSE_ALARM_RATE:.0%} false alarms among these runs, so its rates are "
                "in-sample; held out: chosen on the other groups. Seeds of one group are near "
                "replicates: the intervals are too narrow, and a diagnostic may tell schedules "
                "apart rather than foresee a collapse. * is made of the label itself.",
                table=table,
            ),
        ]
        return Section("forecast", title, notes, exhibits)

    def _runs(self) -> Section:
        table = self._keep(tables.trials(self.groups))
        if self.single:
            return Section("runs", "Runs", "", [])
        caption = "Every trial of the study, in its order; table.csv has more columns."
        return Section("runs", "All trials", "", [Exhibit("Trials", caption, table=table)])

    # ------------------------------------------------------------ parts

    def _curves(
        self,
        name: str,
        label: str,
        series: Callable[[Run], Series],
        width: int | None = None,
        **options: Any,
    ) -> list[str]:
        """The figure of a metric, and its numbers as a table of its own."""
        curves = {
            group.label: group.curve(series, width or self._width(), self.single)
            for group in self.groups
        }
        self._keep(_curve_table(name, curves))
        collapse = self.source.runs[0].collapse_step if self.single else None
        return [figures.curve_figure(name, label, curves, self.steps, collapse=collapse, **options)]

    def _in_order(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """With an empty entry for the other groups, so that a group keeps its style."""
        return {group.label: chosen.get(group.label, ()) for group in self.groups}

    def _width(self) -> int:
        return bin_width(self.steps, self.points)

    def _evaluation_width(self) -> int:
        counts = [run.scores.steps.size for run in self.source.runs]
        return bin_width(self.steps, self.points) if max(counts) > 2 * self.points else 1

    @property
    def _k(self) -> str:
        samples = {run.config.eval.samples for run in self.source.runs}
        return f"mean@{samples.pop()}" if len(samples) == 1 else "mean@k"

    @property
    def _samples(self) -> str:
        return self._k.rpartition("@")[2]

    @property
    def _several(self) -> bool:
        return any(len(one.runs) > 1 for one in self.comparisons)

    def _counts(self) -> str:
        counts = sorted({len(one.runs) for one in self.comparisons})
        text = " to ".join(map(str, [counts[0], counts[-1]][: len(counts)]))
        return f"n = {text} {'seeds' if counts[-1] > 1 else 'seed'} per group"

    def _error_note(self) -> str:
        if not self._several:
            return "" if self.single else "One run per group: no errors. "
        return f"± is the standard error over seeds ({self._counts()}). "

    def _band_note(self) -> str:
        if self.single:
            mark = self.source.runs[0].collapse_step is not None
            return "One run; the dotted line marks its collapse." if mark else "One run."
        if not self._several:
            return "One run per group (n = 1): no bands and no intervals." + self._loose_note()
        if len(self.groups) > figures.PANELS:
            return f"Lightness: mean over seeds ({self._counts()}), finished runs only."
        others = (
            " Grey: the means of the other groups." if len(self.groups) > figures.OVERLAID else ""
        )
        return (
            f"Line: mean over seeds ({self._counts()}); band: 95 % interval of the mean "
            f"(Student's t), at each point for itself and cut at the plot's edge."
            f"{self._loose_note()}{others}"
        )

    def _loose_note(self) -> str:
        """Where thin lines are drawn, what they are."""
        uneven = any(len({run.last_step for run in one.runs}) > 1 for one in self.comparisons)
        if all(run.finished for run in self.source.runs) and not uneven:
            return ""
        return " Thin lines: unfinished runs, and runs that outlast the first of their group."

    def _bin_note(self) -> str:
        width = self._width()
        return f" Each point is the mean of {width} steps." if width > 1 else ""

    def _difference_note(self) -> str:
        if not any(row["difference"] is not None for row in self._results().rows):
            return ""
        note = (
            f"Difference: mean over seeds of the final score minus that of "
            f"{self._baseline_label()} with the same seed and the same other axes"
        )
        if not any(row["difference_low"] is not None for row in self._results().rows):
            return note + "; one pair has no interval."
        return (
            note + "; 95 % percentile bootstrap over pairs, which covers less than it says "
            "with a handful of seeds; no correction for several comparisons."
        )

    def _thin_note(self, points: Mapping[str, Sequence[Any]]) -> str:
        if max(map(len, points.values()), default=0) <= DOTS:
            return ""
        return (
            f" At most {DOTS} evenly chosen ones per group are drawn; tables/refreshes.csv has all."
        )


def _curve_table(name: str, curves: Mapping[str, Curve]) -> Table:
    keys = ["group", "step", "n", "mean", "low", "high"]
    rows = [
        {
            "group": label,
            "step": float(x),
            "n": int(n),
            "mean": float(mean),
            **({"low": float(low), "high": float(high)} if n > 1 else {}),
        }
        for label, curve in curves.items()
        for x, n, mean, low, high in zip(
            curve.x, curve.band.n, curve.band.mean, curve.band.low, curve.band.high, strict=True
        )
        if n > 0
    ]
    return Table(f"curve_{name}", keys, rows)


def _forecast_svg(found: Forecast) -> str:
    return figures.forecast_figure(
        "forecast",
        [
            figures.RocCurve(
                name=one.diagnostic.name,
                false_alarms=[point.false_alarm_rate for point in one.roc],
                detections=[point.detection_rate for point in one.roc],
                area=one.auc,
                leads=one.leads,
            )
            for one in found.diagnostics
        ],
    )


def _thin(items: Sequence[Any], most: int = DOTS) -> list[Any]:
    """At most `most` of the items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _listed(names: Sequence[str], most: int = 8) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + rest
