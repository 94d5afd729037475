"""A schedule of the user's own: a class in a file of theirs, found, asked and checked."""

import json
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from sodfast.config import PythonScheduleConfig
from sodfast.errors import RunFailed, UsageError
from sodfast.schedule.base import Action, Decision, Schedule, StepStatistics, trained
from sodfast.source import find_source


class PythonSchedule(Schedule):
    """A class of the user's: `observe(statistics) -> Decision`, called after every step.

    `state_dict() -> JSON values` and `load_state_dict(state)` let a resumed run go on exactly;
    without both, it begins as it was built. Where it takes over from another schedule in a fork,
    `follow(lines, copies)` is called as `Schedule.follow` is or, without one, `observe` for each
    step so far, whose decisions are not carried out. Ages are counted here.

    Raises:
        UsageError: the class is not there, cannot be built, or lacks a method.
        RunFailed: a call has failed or returned what is no decision.
    """

    def __init__(self, config: PythonScheduleConfig) -> None:
        self.config = config
        self._source = source = find_source(config.source, "schedule.source")
        self._limit = ("schedule.timeout", config.timeout)
        kind = source.load()
        with source.running(source.unusable):
            self._own = kind(**config.options)
        both = "state_dict", "load_state_dict"
        needed = ("observe", *(both if any(hasattr(self._own, name) for name in both) else ()))
        for name in needed:
            if not callable(getattr(self._own, name, None)):
                raise UsageError(f"{source.key}: the class {source.name} has no method {name}")
        self.last_copy = 0

    def __deepcopy__(self, memo: object) -> "PythonSchedule":
        return PythonSchedule(self.config)

    def observe(self, statistics: StepStatistics) -> Decision:
        decision: Decision = self._ask("observe", statistics)
        if wrong := _unusable(decision):
            raise RunFailed(f"{self._source.file}, {self._source.name}.observe: {wrong}")
        age = statistics.step - self.last_copy
        if decision.action == "copy":
            self.last_copy = statistics.step
        return replace(decision, age=age)

    def follow(self, lines: Sequence[Mapping[str, Any]], copies: Container[int]) -> None:
        if hasattr(self._own, "follow"):
            self._ask("follow", lines, copies)
        else:
            for line in trained(lines):
                self._ask("observe", self._statistics(line))
        steps = [line["step"] for line in lines]
        self.last_copy = max((step for step in steps if step in copies), default=0)

    def state_dict(self) -> dict[str, Any]:
        own = self._ask("state_dict") if hasattr(self._own, "state_dict") else None
        try:  # a copy, which no later step changes
            own = json.loads(json.dumps(own, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            place = f"{self._source.file}, {self._source.name}.state_dict"
            raise RunFailed(f"{place}: must return JSON values: {error}") from error
        return {"last_copy": self.last_copy, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_copy = state["last_copy"]
        if hasattr(self._own, "load_state_dict"):
            self._ask("load_state_dict", state["own"])

    def _ask(self, method: str, *arguments: Any) -> Any:
        call: Callable[..., Any] = getattr(self._own, method)
        with self._source.running(RunFailed, self._limit):
            return call(*arguments)


def _unusable(decision: Any) -> str | None:
    """Why this is no decision of a user's schedule; None where it is one."""
    if not isinstance(decision, Decision):
        return f"must return a sodfast.schedule.Decision, not {str(decision)[:40]!r}"
    if decision.action not in get_args(Action):
        return f"action must be one of {', '.join(get_args(Action))}, not {decision.action!r}"
    if not isinstance(decision.rate, int | float) or not 0 <= decision.rate <= 1:
        return f"rate must lie in [0, 1], not {decision.rate!r}"
    if decision.gates is not None:
        return "gates are CGTR's: say in metrics what was decided upon"
    if not isinstance(decision.metrics, Mapping):
        return f"metrics must be a dict, not {str(decision.metrics)[:40]!r}"
    for name, value in decision.metrics.items():
        if not isinstance(name, str) or not name.startswith("schedule/"):
            return f"names in metrics begin with schedule/, unlike {name!r}"
        if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            return f"metrics: {name} must be a finite number, not {str(value)[:40]!r}"
    return None
