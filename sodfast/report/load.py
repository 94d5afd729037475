"""Runs and studies on disk, read as a report shows them: each file once.

What a run, a group and a source are is in runs.py.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sodfast.config import read_overrides, validate
from sodfast.errors import UsageError
from sodfast.report.runs import STUDY, Group, Run, Source, group_runs
from sodfast.run.records import require_run
from sodfast.study.directory import TrialRun, finished_status, read_records, read_runs

REPLICATES = ("seed", "lab.seed")  # axes whose values repeat a trial: groups are over them


def load(directory: Path, baseline: str | None = None) -> Source:
    """Read a run or a study directory, each metrics file once.

    Raises `UsageError`, also for a damaged run; a damaged trial of a study has no lines.
    """
    if os.path.isfile(directory / "study.yaml"):
        return _source_of({directory: [_run_of(trial) for trial in read_runs(directory)]}, baseline)
    if not os.path.isfile(directory / "config.yaml"):
        raise UsageError(
            f"{directory} is neither a run nor a study directory: it has no config.yaml and no "
            "study.yaml"
        )
    run = _load_run(directory, directory.resolve().name)
    groups = group_runs([run], single=True)
    _baseline(groups, baseline)
    return Source(directory, run.name, [run], groups, None, None, "")


def load_studies(directories: Sequence[Path], baseline: str | None = None) -> Source:
    """Read several studies as one, with an axis more: each is a regime, or several, under the name
    of its directory.

    Raises `UsageError` as `load`, and for two directories of one name.
    """
    names = [Path(os.path.abspath(directory)).name for directory in directories]
    if len(set(names)) < len(names):
        raise UsageError("two studies are called alike: rename a directory, or link to it")
    runs = {
        directory: [_run_of(trial, {STUDY: name}) for trial in read_runs(directory)]
        for directory, name in zip(directories, names, strict=True)
    }
    return _source_of(runs, baseline)


def _source_of(studies: Mapping[Path, Sequence[Run]], baseline: str | None) -> Source:
    runs = [run for own in studies.values() for run in own]
    if not any(run.lines for run in runs):
        raise UsageError(
            next((run.damage for run in runs if run.damage), "")
            or f"no trial of {', '.join(map(str, studies))} has metrics yet: run sodfast sweep, or "
            "look into logs there"
        )
    groups = group_runs(runs)
    axis, value = _baseline(groups, baseline)
    if axis is not None:
        points = [{**group.point, axis: value} for group in groups]
        others = [next((g for g in groups if g.point == point), None) for point in points]
        groups = [replace(g, baseline=other) for g, other in zip(groups, others, strict=True)]
    called = ", ".join(directory.resolve().name for directory in studies)
    definition = "\n".join((directory / "study.yaml").read_text() for directory in studies)
    return Source(next(iter(studies)), called, runs, groups, axis, value, definition)


def load_side_by_side(directories: Sequence[Path], directory: Path) -> Source:
    """Read several runs, each a group of its own in any state, for a report into `directory`.

    They are called as their directories are, or by their whole paths where two are called the same.
    Raises `UsageError`, also for a damaged run and for one that is named twice.
    """
    paths = [path.resolve() for path in directories]
    if len(set(paths)) < len(paths):
        raise UsageError("a run is named twice: leave one out")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    for path in directories:
        require_run(path)
    runs = [_load_run(path, name) for path, name in zip(directories, names, strict=True)]
    groups = [Group(run.name, [run], [run]) for run in runs]
    return Source(directory, ", ".join(names), runs, groups, None, None, "")


def _load_run(directory: Path, name: str) -> Run:
    """A run directory. Raises `UsageError` for a damaged one and for one that has no metrics."""
    config = validate(read_overrides(directory / "config.yaml", []))
    status = finished_status(directory, config) or "unfinished"
    run = Run(name, directory, config, status, {}, *read_records(directory, config))
    if not run.lines:
        raise UsageError(
            f"{directory} has no metrics yet: continue it with sodfast train --resume {directory}"
        )
    return run


def _run_of(found: TrialRun, point: Mapping[str, str] | None = None) -> Run:
    trial = found.trial
    own = {axis: label for axis, label in trial.point.items() if axis not in REPLICATES}
    point = {**(point or {}), **own}
    records = found.lines, found.events, found.damage
    return Run(trial.name, found.path, trial.config, found.status, point, *records)


def _baseline(groups: Sequence[Group], text: str | None) -> tuple[str | None, str | None]:
    """The axis and the label that groups are compared with, given as AXIS=LABEL.

    By default `schedule`, if it is an axis, at its first value, or teacher.refresh=never, else the
    first axis at its first value.
    """
    points = [group.point for group in groups]
    known = {f"{axis}={label}": (axis, label) for point in points for axis, label in point.items()}
    if text is not None:
        if text not in known:
            choices = ", ".join(known) or "nothing: there is only one group"
            raise UsageError(f"baseline {text} is not in the study; it can be {choices}")
        return known[text]
    if len(groups) < 2:
        return None, None
    if "schedule" not in points[0] and "teacher.refresh=never" in known:
        return known["teacher.refresh=never"]
    axis = "schedule" if "schedule" in points[0] else next(iter(points[0]))
    return axis, points[0][axis]
