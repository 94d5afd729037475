"""What another schedule would have decided on a recorded run: `sodfast replay`.

Counterfactual. The metrics come from the run as it was: after the first decision that differs,
another teacher would have made other rollouts, and so other metrics. What is said about later
steps is what the schedule says about these data, not what the other run would have done.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sodfast.config import Config, ScheduleConfig, read_overrides, validate
from sodfast.errors import UsageError
from sodfast.report.templates import template
from sodfast.run.records import read_events, read_metrics, require_run
from sodfast.schedule import (
    PROBE_KEYS,
    Decision,
    Schedule,
    build_schedule,
    replay,
    student_share,
)


@dataclass(frozen=True)
class Replay:
    """`decisions[i]` and `recorded[i]` belong to step `first` + i; a fork is replayed from its fork
    on. `recorded` are those of the run's own schedule, and its copies are the refreshes of
    metrics.jsonl."""

    run: Path
    first: int
    schedule: ScheduleConfig
    recorded_schedule: ScheduleConfig
    decisions: list[Decision]
    recorded: list[Decision]

    @property
    def refreshes(self) -> list[int]:
        return _copies(self.decisions, self.first)

    @property
    def recorded_refreshes(self) -> list[int]:
        return _copies(self.recorded, self.first)

    @property
    def blocked(self) -> dict[str, int]:
        """Checks at which each active gate blocked, whatever the others did."""
        counts = Counter[str]()
        for decision in self.decisions:
            for name, gate in (decision.gates or {}).items():
                if gate["active"]:
                    counts[name] += not gate["pass"]
        return dict(counts)

    @property
    def first_difference(self) -> int | None:
        """The first step after which the teachers differ; None: they never do."""
        ours = [_move(self.schedule, decision) for decision in self.decisions]
        theirs = [_move(self.recorded_schedule, decision) for decision in self.recorded]
        steps = enumerate(zip(ours, theirs, strict=True), start=self.first)
        return next((step for step, (our, their) in steps if our != their), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "steps": len(self.decisions),
            "schedule": self.schedule.model_dump(mode="json"),
            "recorded_schedule": self.recorded_schedule.model_dump(mode="json"),
            "refreshes": self.refreshes,
            "recorded_refreshes": self.recorded_refreshes,
            "blocked": self.blocked,
            "first_difference": self.first_difference,
        }

    def text(self) -> list[str]:
        """The lines for people: the caveat, each check and each refresh, and the sums."""
        pairs = enumerate(zip(self.decisions, self.recorded, strict=True), start=self.first)
        rows = [(step, ours, theirs) for step, (ours, theirs) in pairs]
        shown = [row for row in rows if row[1].gates or "copy" in (row[1].action, row[2].action)]
        return template("replay.txt.j2").render(replay=self, shown=shown).splitlines()


def replay_run(run: Path, overrides: Sequence[str]) -> Replay:
    """Replay `run` under its schedule with `schedule.*` overrides.

    Raises `UsageError` where `run` is no run directory, its metrics lack what the schedule looks
    at, or its own schedule does not give the refreshes it recorded.
    """
    for text in overrides:
        if text.partition("=")[0].partition(".")[0] != "schedule":
            raise UsageError(f"replay takes only schedule.key=value; {text!r} needs another run")
    require_run(run)
    config = validate(read_overrides(run / "config.yaml", []))
    other = validate(read_overrides(run / "config.yaml", list(overrides)))
    lines = _training_lines(run, config, other)
    events = read_events(run)
    forked = max((event["step"] for event in events if event["event"] == "fork"), default=0)
    copies = {e["step"] for e in events if e["event"] == "refresh" and e["step"] <= forked}

    def decisions(schedule: Schedule) -> list[Decision]:
        if forked:
            schedule.follow(lines[:forked], copies)
        return replay(schedule, lines[forked:])

    result = Replay(
        run,
        forked + 1,
        other.schedule,
        config.schedule,
        decisions(build_schedule(other.schedule)),
        decisions(build_schedule(config.schedule)),
    )
    logged = [line["step"] for line in lines[forked:] if line.get("teacher/refreshed")]
    if logged != result.recorded_refreshes:
        raise UsageError(
            f"{run}: the schedule of config.yaml refreshes at {result.recorded_refreshes} on these "
            f"metrics, but metrics.jsonl recorded {logged}: restore the file that was changed"
        )
    return result


def _training_lines(run: Path, recorded: Config, other: Config) -> list[dict[str, Any]]:
    """The metrics of every step from 1, with what the other schedule looks at."""
    file = run / "metrics.jsonl"
    if not os.path.isfile(file):
        raise UsageError(f"{file} does not exist: the run has no metrics to replay")
    lines = [line for line in read_metrics(run) if line["step"] != 0]
    if not lines:
        raise UsageError(f"{file} holds no training step: there is nothing to replay")
    for number, line in enumerate(lines, start=1):
        if line["step"] != number:
            raise UsageError(f"{file}: step {number} is missing; a replay needs every step from 1")
    if other.length_shards not in (None, recorded.length_shards):
        raise UsageError(
            f"{run} logged no lengths of {other.length_shards} shards: length_unit=shard can "
            "be replayed only on a run that was recorded with it and with as many schedule.shards"
        )
    schedules = [build_schedule(config.schedule) for config in (recorded, other)]
    for line in lines:
        read = {name for schedule in schedules for name in schedule.reads(line["step"])}
        missing = sorted(read - line.keys())
        if missing:
            raise UsageError(
                f"{file}: step {line['step']} has no {missing[0]}: "
                + (
                    "only a run of schedule.kind=evidence probes, every schedule.probe_every steps"
                    if missing[0] in PROBE_KEYS
                    else "restore the file"
                )
            )
    return lines


def _move(schedule: ScheduleConfig, decision: Decision) -> tuple[Any, ...]:
    """What a decision does to the teacher. A trust region never moves it, but mixes its logits."""
    return decision.action, decision.rate, student_share(schedule) or 0.0


def _copies(decisions: Sequence[Decision], first: int) -> list[int]:
    return [step for step, d in enumerate(decisions, start=first) if d.action == "copy"]
