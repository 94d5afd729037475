"""A study on disk: its files, what holds it, how far its trials are, and their table.

study.yaml  base.yaml      what is swept: the study, its overrides and its base resolved
runs/<trial>/              the run directories of `sodfast train` and `sodfast fork`; those of the
                           sources that a study forks begin with "source"
logs/<trial>.log           what the trial's processes printed
logs/<trial>.lock          held while a process of the trial lives
logs/<trial>.failed        why the sweep gave the trial up; gone when it is tried again
table.csv                  a row per trial
.lock                      held while a sweep runs
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any, Literal

from sodfast.config import PRESETS, Config, gate_names
from sodfast.errors import UsageError
from sodfast.files import (
    is_held,
    refuse_links,
    remove_leftovers,
    replace_text,
    require_usable,
    to_csv,
    try_lock,
)
from sodfast.run.records import read_events, read_metrics, read_summary
from sodfast.study.definition import Study, Trial, flatten, load_study
from sodfast.summary import NEXT_STEPS, summarize, summarize_fork

LAST_STEPS = 5  # the steps whose mean length the table gives

Lines = list[dict[str, Any]]
Status = Literal["done", "collapsed", "interrupted", "failed", "running", "missing", "damaged"]


def run_path(directory: Path, name: str) -> Path:
    return directory / "runs" / name


def log_path(directory: Path, name: str) -> Path:
    return directory / "logs" / f"{name}.log"


def lock_path(directory: Path, name: str) -> Path:
    return directory / "logs" / f"{name}.lock"


def failure_path(directory: Path, name: str) -> Path:
    return directory / "logs" / f"{name}.failed"


# ---------------------------------------------------------------- the study


def open_study(directory: Path) -> Study:
    """The study of a study directory. Raises `UsageError`."""
    if not os.path.isfile(directory / "study.yaml"):
        raise UsageError(f"{directory} is not a study directory: it has no study.yaml")
    return load_study(directory / "study.yaml")


@contextmanager
def hold(directory: Path, study: Study) -> Iterator[None]:
    """Make `directory` the study's, or check that it is, and keep other sweeps out of it.

    Raises `UsageError`, with nothing written, for a directory that cannot be used, holds something
    else, is held, or would have the sweep write through a symbolic link.
    """
    with ExitStack() as held:
        try:
            _check_usable(directory)
            directory.mkdir(parents=True, exist_ok=True)
            lock = try_lock(directory / ".lock")
            if lock is None:
                raise UsageError(
                    f"{directory} is being swept by another process: wait for it, or stop it"
                )
            held.enter_context(lock)
            if (directory / "study.yaml").exists():
                _check_kept(directory, study)
            remove_leftovers(directory, ("base.yaml", "study.yaml", "table.csv"))
            base = PRESETS / f"{study.base}.yaml"
            text = (base if base.is_file() else Path(study.base)).read_text()
            replace_text(directory / "base.yaml", text)
            stored = study.model_copy(update={"base": "base.yaml"})
            replace_text(directory / "study.yaml", stored.to_yaml())
            for folder in ("runs", "logs"):
                (directory / folder).mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"out={directory} cannot be used: {error.strerror}") from error
        yield


def _check_usable(directory: Path) -> None:
    """Raise `UsageError` for a directory that holds something else, or links to somewhere else."""
    require_usable(directory, f"out={directory}")
    names = set(os.listdir(directory)) if directory.exists() else set()
    # A sweep that was killed while it began has left no study.yaml, but nothing of another's.
    others = [name for name in names - {".lock", "base.yaml"} if not name.endswith(".tmp")]
    if others and "study.yaml" not in names:
        raise UsageError(
            f"out={directory} holds {min(others)} and is no study directory: choose another"
        )
    refuse_links(directory, (".lock", "runs", "logs"))
    for folder in names & {"runs", "logs"}:
        refuse_links(directory / folder, os.listdir(directory / folder))


def _check_kept(directory: Path, study: Study) -> None:
    """An existing directory may gain trials; those it has must stay what they are."""
    new = {trial.name: trial.config for trial in [*study.sources, *study.trials]}
    old = open_study(directory)
    for trial in [*old.sources, *old.trials]:
        if trial.name not in new:
            difference = f"it has no trial {trial.name}"
        elif new[trial.name] != trial.config:
            difference = f"trial {trial.name}: {_difference(trial.config, new[trial.name])}"
        else:
            continue
        raise UsageError(
            f"the study is not the one in {directory} ({difference}): choose another out=, or "
            "restore it; an existing study may only gain values of its axes"
        )


def _difference(old: Config, new: Config) -> str:
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    key = next(key for key in {**before, **after} if before.get(key) != after.get(key))
    return f"{key} was {before.get(key)}, is {after.get(key)}"


# ---------------------------------------------------------------- its trials


@dataclass(frozen=True)
class TrialRun:
    """A trial and what is on disk of it: the lines of metrics.jsonl and of events.jsonl.

    One whose files cannot be read is "damaged": it has no lines, and `damage` names file, line and
    reason.
    """

    trial: Trial
    path: Path
    status: Status
    lines: Lines
    events: Lines
    damage: str = ""


def read_runs(directory: Path) -> list[TrialRun]:
    """Every trial of a study directory in the study's order. Raises `UsageError` for the directory,
    never for a trial."""
    runs = []
    for trial in open_study(directory).trials:
        path = run_path(directory, trial.name)
        try:
            status = _status(directory, trial)
            runs.append(TrialRun(trial, path, status, *read_records(path, trial.config)))
        except (UsageError, OSError) as error:
            runs.append(TrialRun(trial, path, "damaged", [], [], str(error)))
    return runs


def read_records(path: Path, config: Config) -> tuple[Lines, Lines]:
    """The metrics and the events of a run; empty ones where it has none yet.

    Raises `UsageError` where a line is damaged or a check is not one of this configuration.
    """
    lines, events = read_metrics(path), read_events(path)
    gates = set(gate_names(config.schedule))
    for number, event in enumerate(events, start=1):
        if event["event"] == "gate" and not (gates and event["gates"].keys() == gates):
            wrong = "events.jsonl has gates but the schedule has none"
            if gates:
                wrong = f"a check of {', '.join(event['gates'])}"
            raise UsageError(f"{path}/events.jsonl:{number}: {wrong}")
    return lines, events


def _status(directory: Path, trial: Trial) -> Status:
    path = run_path(directory, trial.name)
    if is_held(lock_path(directory, trial.name)):
        return "running"
    if failure_path(directory, trial.name).exists():
        return "failed"
    if not os.path.isfile(path / "config.yaml"):
        return "missing"
    return finished_status(path, trial.config) or "interrupted"


def finished_status(path: Path, config: Config) -> Literal["done", "collapsed"] | None:
    """The status of a run that has nothing left to do; None for any other. Raises `UsageError`
    where summary.json is damaged."""
    summary = read_summary(path)
    if summary is None:
        return None
    complete = summary["steps"] >= config.steps
    if summary["status"] == "collapsed" and (complete or config.collapse.stop):
        return "collapsed"
    return "done" if summary["status"] == "done" and complete else None


# ---------------------------------------------------------------- their table


def write_table(directory: Path) -> Path:
    """Write table.csv: a row per trial, in the study's order, nothing that depends on the clock.

    Undefined values are empty. The numbers follow from metrics.jsonl and events.jsonl alone, so a
    trial that was cut short has those of the steps it has finished.
    """
    runs = read_runs(directory)
    names = [*_MEASURES, *(_OF_FORKS if runs[0].trial.fork else ())]
    rows: list[list[Any]] = [["name", *runs[0].trial.point, "status", *names]]
    for run in runs:
        measures = _measures(run) if run.lines else {}
        cells = [measures.get(key) for key in names]
        rows.append([run.trial.name, *run.trial.point.values(), run.status, *cells])
    path = directory / "table.csv"
    replace_text(path, to_csv(rows))
    return path


_MEASURES = (
    *("steps", "final", "peak", "peak_step", "refreshes", "refresh_steps", "collapse_step"),
    *("entropy_mean", "entropy_final", f"length_last{LAST_STEPS}"),
)
_OF_FORKS = (
    *("fork_age", "fork_drift", "fork_tail"),
    *(f"reward_next{NEXT_STEPS}", f"length_next{NEXT_STEPS}"),
)


def _measures(run: TrialRun) -> dict[str, Any]:
    """What the table says of a run that has lines."""
    measures = summarize(run.lines, run.trial.config.eval.samples)
    collapses = [event["step"] for event in run.events if event["event"] == "collapse"]
    lengths = [line["length/mean"] for line in run.lines if "length/mean" in line][-LAST_STEPS:]
    refreshes = measures.pop("refresh_steps")
    if any("teacher/refreshed" in line for line in run.lines):  # a teacher that copies
        measures["refreshes"] = len(refreshes)
        measures["refresh_steps"] = " ".join(map(str, refreshes))
    if lengths:
        measures[f"length_last{LAST_STEPS}"] = fsum(lengths) / len(lengths)
    if run.trial.fork is not None:
        measures |= summarize_fork(run.lines, run.trial.fork.step)
    return {**measures, "collapse_step": collapses[0] if collapses else None}
