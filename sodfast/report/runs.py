"""What a report reads: a run or a study directory, as runs in groups that differ only by seed.

What is shown of a run follows from its config.yaml, metrics.jsonl and events.jsonl alone, and
each file is read once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sodfast.config import CGTRConfig, Config, ScheduleConfig, read_overrides, validate
from sodfast.errors import UsageError
from sodfast.files import read_lines
from sodfast.report.intervals import Curve, Series, group_curve
from sodfast.study.definition import Trial
from sodfast.study.directory import finished_status, read_runs
from sodfast.summary import spike_ratios

FINISHED = ("done", "collapsed")
GATES = ("isolation", "reward", "length")

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run as it is on disk. `point`: axis → label, without `seed`; empty for a single run."""

    name: str
    path: Path
    config: Config
    status: str
    point: Mapping[str, str]
    lines: Sequence[Line]
    events: Sequence[Line]

    @property
    def finished(self) -> bool:
        return self.status in FINISHED

    @property
    def last_step(self) -> int:
        return int(self.lines[-1]["step"]) if self.lines else 0

    @cached_property
    def scores(self) -> Series:
        return self.series(f"eval/mean@{self.config.eval.samples}")

    @cached_property
    def refreshes(self) -> list[Line]:
        return [event for event in self.events if event["event"] == "refresh"]

    @property
    def copies(self) -> bool:
        """Whether this run's teacher moves by copies, if at all (fixed, hard, cgtr)."""
        return any("teacher/refreshed" in line for line in self.lines)

    @cached_property
    def checks(self) -> list[Line]:
        return [event for event in self.events if event["event"] == "gate"]

    @property
    def collapse_step(self) -> int | None:
        return next((int(e["step"]) for e in self.events if e["event"] == "collapse"), None)

    @cached_property
    def spikes(self) -> dict[int, float]:
        return spike_ratios(self.lines)

    def series(self, key: str) -> Series:
        """A metric at the steps that carry it. Raises `UsageError` where it is not finite."""
        pairs = [(line["step"], line[key]) for line in self.lines if key in line]
        steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        if not np.isfinite(values).all():
            step = int(steps[~np.isfinite(values)][0])
            raise UsageError(f"{self.path}/metrics.jsonl: {key} of step {step} is not finite")
        return Series(steps, values)

    def tail(self) -> Series:
        """max / mean response length pooled over the last `window` steps: what the gate sees."""
        schedule = self.config.schedule
        window = schedule.window if isinstance(schedule, CGTRConfig) else CGTRConfig().window
        prefix = "length/shard_" if self.config.length_shards else "length/"
        greatest, mean = self.series(prefix + "max"), self.series(prefix + "mean")
        if not mean.steps.size:
            return mean
        lead = np.full(window - 1, np.nan)
        view = np.lib.stride_tricks.sliding_window_view
        maxima = np.nanmax(view(np.concatenate([lead, greatest.values]), window), axis=1)
        means = np.nanmean(view(np.concatenate([lead, mean.values]), window), axis=1)
        return Series(mean.steps, maxima / means)


@dataclass(frozen=True)
class Source:
    """What a report is about: the runs of a study in its order, or a single run."""

    directory: Path
    runs: Sequence[Run]
    axes: Sequence[str]  # without seed
    is_study: bool
    definition: str = ""  # the study file


def load(directory: Path) -> Source:
    """Read a run or a study directory, each metrics file once. Raises `UsageError`."""
    if (directory / "study.yaml").is_file():
        trials = read_runs(directory)
        runs = [
            _read_run(
                item.trial.name, item.path, item.trial.config, item.status, _point(item.trial)
            )
            for item in trials
        ]
        if not any(run.lines for run in runs):
            raise UsageError(
                f"no trial of {directory} has metrics yet: run sodfast sweep, or look into "
                f"{directory / 'logs'}"
            )
        definition = (directory / "study.yaml").read_text()
        return Source(directory, runs, list(runs[0].point), True, definition)
    if not (directory / "config.yaml").is_file():
        raise UsageError(
            f"{directory} is neither a run nor a study directory: it has no config.yaml and no "
            "study.yaml"
        )
    config = validate(read_overrides(directory / "config.yaml", []))
    status = finished_status(directory, config) or "unfinished"
    run = _read_run(directory.resolve().name, directory, config, status, {})
    if not run.lines:
        raise UsageError(
            f"{directory} has no metrics yet: continue it with sodfast train --resume {directory}"
        )
    return Source(directory, [run], [], False)


def _point(trial: Trial) -> dict[str, str]:
    return {axis: label for axis, label in trial.point.items() if axis != "seed"}


def _read_run(name: str, path: Path, config: Config, status: str, point: Mapping[str, str]) -> Run:
    lines, events = read_lines(path / "metrics.jsonl"), read_lines(path / "events.jsonl")
    for file, items in (("metrics.jsonl", lines), ("events.jsonl", events)):
        for number, item in enumerate(items, start=1):
            if not isinstance(item, dict) or not isinstance(item.get("step"), int):
                raise UsageError(f"{path / file}:{number}: no object with a step")
    return Run(name, path, config, status, point, lines, events)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: Sequence[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def point(self) -> Mapping[str, str]:
        return self.runs[0].point

    def curve(self, series: Callable[[Run], Series], width: int, single: bool = False) -> Curve:
        """`single`: a report of one run, whose mean it is, finished or not."""
        whole = [run for run in self.runs if run.finished or single]
        rest = [run for run in self.runs if not run.finished and not single and run.lines]
        return group_curve([series(run) for run in whole], [series(run) for run in rest], width)


def describe_schedule(schedule: ScheduleConfig) -> str:
    """A schedule as the figures call it; CGTR with what differs from the paper's settings."""
    match schedule.kind:
        case "fixed":
            return "fixed"
        case "hard":
            return f"hard, every {schedule.every}"
        case "ema":
            return f"EMA {schedule.rate:g}"
        case "trust_region":
            return f"trust region {schedule.rate:g}"
    parts = [f"no {gate} gate" for gate in GATES if gate not in schedule.gates]
    usual = CGTRConfig()
    parts += [
        f"{key} {value}"
        for key, value in schedule.model_dump().items()
        if key not in ("kind", "gates") and value != getattr(usual, key)
    ]
    return ", ".join(["CGTR", *parts])


def group_runs(source: Source) -> list[Group]:
    """In the study's order, under a short name that is unique."""
    members: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in source.runs:
        members.setdefault(tuple(run.point.items()), []).append(run)
    short = [_short_label(runs[0]) for runs in members.values()]
    labels = [
        text if short.count(text) == 1 else ", ".join(f"{axis}={label}" for axis, label in point)
        for text, point in zip(short, members, strict=True)
    ]
    return [Group(label, runs) for label, runs in zip(labels, members.values(), strict=True)]


def _short_label(run: Run) -> str:
    parts = [
        describe_schedule(run.config.schedule)
        if axis == "schedule"
        else f"{axis.rpartition('.')[2]} {label}"
        for axis, label in run.point.items()
    ]
    return ", ".join(parts) or describe_schedule(run.config.schedule)
