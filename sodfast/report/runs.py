"""What a report is about: a run, or studies, as runs in groups that differ only by their seeds.

What is shown of a run follows from its config.yaml, metrics.jsonl and events.jsonl alone. load.py
reads them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sodfast.attribution import RefreshEffect, refresh_effects
from sodfast.config import (
    CGTRConfig,
    Config,
    EvidenceConfig,
    PythonScheduleConfig,
    ScheduleConfig,
)
from sodfast.report.intervals import Curve, Series, group_curve
from sodfast.schedule import Schedule, build_schedule
from sodfast.study.definition import VARIANT, flatten
from sodfast.summary import spike_ratios

GATES = EvidenceConfig().gates  # CGTR's among them
STUDY = "study"  # the axis of several studies that are read as one
_INSIDE = (
    "schedule",
    "fork.from",
    "fork.step",
    "teacher.refresh",
)  # axes that are varied inside of a regime

Line = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Run:
    """One run as it is on disk. `point`: axis → label, without the replicates'; empty for a single
    run."""

    name: str
    path: Path
    config: Config
    status: str
    point: Mapping[str, str]
    lines: Sequence[Line]
    events: Sequence[Line]
    damage: str = ""  # why a trial of a study could not be read, and so has no lines

    @property
    def finished(self) -> bool:
        return self.status in ("done", "collapsed")

    @property
    def replicate(self) -> tuple[int, int]:
        """Runs of two groups are a pair where this is equal."""
        return self.config.lab.seed, self.config.seed

    @property
    def seed_name(self) -> str:
        lab, seed = self.replicate
        return f"seed {seed} of lab {lab}" if lab else f"seed {seed}"

    @property
    def regime(self) -> str:
        """The values of the axes beside the schedule, or beside a fork's; empty without any."""
        labels = _labels(self)
        if not labels.keys() & {STUDY, *_INSIDE}:
            return ""
        return ", ".join(text for axis, text in labels.items() if axis not in _INSIDE)

    @property
    def last_step(self) -> int:
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def copies(self) -> bool:
        """Whether this run's teacher moves by copies, if at all (fixed, hard, cgtr, evidence)."""
        return any("teacher/refreshed" in line for line in self.lines)

    @cached_property
    def refreshes(self) -> list[Line]:
        return [event for event in self.events if event["event"] == "refresh"]

    @cached_property
    def checks(self) -> list[Line]:
        return [event for event in self.events if event["event"] == "gate"]

    @property
    def collapse_step(self) -> int | None:
        return next((int(e["step"]) for e in self.events if e["event"] == "collapse"), None)

    @cached_property
    def spikes(self) -> dict[int, float]:
        return spike_ratios(self.lines)

    @cached_property
    def effects(self) -> list[RefreshEffect]:
        """What each refresh did; nothing is said of those after a collapse."""
        end = self.collapse_step or self.last_step
        return refresh_effects([x for x in self.lines if x["step"] <= end], self.refreshes)

    @cached_property
    def scores(self) -> Series:
        return self.series(f"eval/mean@{self.config.eval.samples}")

    @property
    def final(self) -> float | None:
        """The last test score."""
        return float(self.scores.values[-1]) if self.scores.values.size else None

    def series(self, key: str) -> Series:
        """A metric at the steps that carry it."""
        return Series.of([(line["step"], line[key]) for line in self.lines if key in line])

    def tail(self) -> Series:
        """max / mean response length pooled over the last `window` steps: what the gate sees."""
        schedule = self.config.schedule
        window = schedule.window if isinstance(schedule, CGTRConfig) else CGTRConfig().window
        own = isinstance(schedule, PythonScheduleConfig)  # whose file may be gone
        _, mean_key, max_key = Schedule.inputs if own else build_schedule(schedule).inputs
        lines = [line for line in self.lines if line.get(mean_key, 0) > 0 and max_key in line]
        if not lines:
            return Series.of([])
        values = np.array([[line[max_key] for line in lines], [line[mean_key] for line in lines]])
        known = np.concatenate([np.full((2, window - 1), np.nan), values], axis=1)
        longest, means = np.lib.stride_tricks.sliding_window_view(known, window, axis=1)
        steps = np.array([line["step"] for line in lines], dtype=np.float64)
        return Series(steps, np.nanmax(longest, axis=1) / np.nanmean(means, axis=1))


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds. `used` are those that the statistics are over:
    the finished ones, and a single run in any state."""

    label: str
    runs: Sequence[Run]
    used: Sequence[Run]
    baseline: "Group | None" = None  # what it is compared with, perhaps itself

    @property
    def point(self) -> Mapping[str, str]:
        return self.runs[0].point

    @property
    def regime(self) -> str:
        return self.runs[0].regime if self.runs else ""

    @property
    def called(self) -> str:
        """Its name among the groups of its regime."""
        return describe_schedule(self.runs[0].config.schedule) if self.regime else self.label

    def curve(self, series: Callable[[Run], Series], width: int) -> Curve:
        rest = [run for run in self.runs if run not in self.used and run.lines]
        return group_curve([*map(series, self.used)], [*map(series, rest)], width)


@dataclass(frozen=True)
class Source:
    """What a report is about: a single run, the runs of a study in its order, or runs that were
    named side by side, in groups. `called`: what the page is called.

    The groups are compared with those that have `value` on `axis`, the other axes being equal;
    both are None where there is only one group.
    """

    directory: Path
    called: str
    runs: Sequence[Run]
    groups: Sequence[Group]
    axis: str | None
    value: str | None
    definition: str  # the study file; empty without a study

    @property
    def single(self) -> bool:
        return not self.definition and len(self.runs) == 1

    @cached_property
    def differing(self) -> dict[str, list[str]]:
        """Of runs side by side, the dotted keys whose values differ, and each run's value."""
        if self.definition:
            return {}
        values = [flatten(run.config.model_dump(mode="json", exclude={"out"})) for run in self.runs]
        keys = dict.fromkeys(key for one in values for key in one)
        shown = {
            key: [json.dumps(one[key]) if key in one else "" for one in values] for key in keys
        }
        return {key: texts for key, texts in shown.items() if len(set(texts)) > 1}

    @property
    def steps(self) -> int:
        return max(run.last_step for run in self.runs)

    @property
    def metric(self) -> str:
        """What the test score is called."""
        samples = {run.config.eval.samples for run in self.runs}
        return f"mean@{samples.pop()}" if len(samples) == 1 else "mean@k"

    @property
    def baseline(self) -> str | None:
        """What all groups are compared with: one group's name, or, with further axes, the value
        that the baselines share."""
        if self.axis is None:
            return None
        found = {group.baseline.label: group.baseline for group in self.groups if group.baseline}
        label, group = next(iter(found.items()))
        if len(found) > 1 and self.axis == "schedule":
            return describe_schedule(group.runs[0].config.schedule)
        return label if len(found) == 1 else f"{self.axis}={self.value}"


_CALLED = {
    "fixed": "fixed",
    "hard": "hard, every {every}",
    "ema": "EMA {rate:g}",
    "trust_region": "trust region {rate:g}",
}


def describe_schedule(schedule: ScheduleConfig) -> str:
    """A schedule as the figures call it; one with gates with what differs from its defaults, which
    are the paper's for CGTR."""
    values = schedule.model_dump()
    if isinstance(schedule, PythonScheduleConfig):
        return schedule.source.rpartition("/")[2]
    if not isinstance(schedule, CGTRConfig | EvidenceConfig):
        return _CALLED[schedule.kind].format(**values)
    usual = type(schedule)()
    parts = [f"no {gate} gate" for gate in usual.gates if gate not in schedule.gates]
    for key, value in values.items():
        if key not in ("kind", "gates") and value != getattr(usual, key):
            parts.append(f"{key} {value}")
    return ", ".join(["CGTR" if schedule.kind == "cgtr" else schedule.kind, *parts])


def group_runs(runs: Sequence[Run], single: bool = False) -> list[Group]:
    """In the study's order, under a short name that is unique."""
    members: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        members.setdefault(tuple(run.point.items()), []).append(run)
    short = [
        ", ".join(_labels(own[0]).values()) or describe_schedule(own[0].config.schedule)
        for own in members.values()
    ]
    groups = []
    for text, (point, own) in zip(short, members.items(), strict=True):
        if short.count(text) > 1:
            text = ", ".join(f"{axis}={label}" for axis, label in point)
        groups.append(Group(text, own, [run for run in own if run.finished or single]))
    return groups


def _labels(run: Run) -> dict[str, str]:
    """A run's values on the axes, a schedule as `describe_schedule` calls it."""
    parts = {axis: f"{axis.rpartition('.')[2]} {label}" for axis, label in run.point.items()}
    named = {axis: run.point[axis] for axis in (STUDY, VARIANT) if axis in parts}
    schedule = describe_schedule(run.config.schedule)
    return {**parts, **named, **({"schedule": schedule} if "schedule" in parts else {})}
