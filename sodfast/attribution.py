"""What a refresh did and what a collapse came from, as far as one run's own records say.

Pure functions of metrics lines and events. An effect here is a difference to where the run was
heading, not a cause: forks that differ in one refresh alone (`sodfast fork`) show causes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Literal

import numpy as np
from scipy.stats import t as student_t

Line = Mapping[str, Any]
Verdict = Literal["corrective", "neutral", "contaminating"]
Origin = Literal["fast clock", "contaminating refresh", "none"]

BEFORE, AFTER = 20, 15  # steps that an effect is measured over, at most
FEWEST = 5  # ... and at least, on either side
CLOCK = 15  # a teacher that moves more often than that is on a fast clock
BLAMED = 50  # steps before a collapse in which a refresh can have caused it


@dataclass(frozen=True)
class Effect:
    """A change of a metric and its interval, in the metric's unit."""

    change: float
    low: float
    high: float


@dataclass(frozen=True)
class RefreshEffect:
    """What followed the refresh after `step`. `reward`: of `reward/mean`; `length`: of the
    logarithm of `length/mean`. All are None where too few steps lie around the refresh."""

    step: int
    reward: Effect | None
    length: Effect | None
    verdict: Verdict | None


def refresh_effects(
    lines: Sequence[Line], events: Sequence[Line], confidence: float = 0.95
) -> list[RefreshEffect]:
    """Each refresh of a run, with its verdict:

    corrective     the reward's interval lies above 0
    contaminating  the reward's interval lies below 0, or holds 0 while the length's lies above it:
                   answers grow and nothing is gained
    neutral        neither

    See `effect` for the intervals. Steps belong to the nearest refresh: those before it begin
    after the one before, those after it end with the next one.
    """
    steps = [int(event["step"]) for event in events if event["event"] == "refresh"]
    effects = []
    for number, step in enumerate(steps):
        first = steps[number - 1] if number else 0
        last = steps[number + 1] if number + 1 < len(steps) else None
        reward, length = (
            effect(lines, step, value, first, last, confidence) for value in (_reward, _log_length)
        )
        verdict: Verdict | None = None
        if reward is not None and length is not None:
            grows = reward.low <= 0 <= reward.high and length.low > 0
            verdict = "contaminating" if reward.high < 0 or grows else "neutral"
            verdict = "corrective" if reward.low > 0 else verdict
        effects.append(RefreshEffect(step, reward, length, verdict))
    return effects


def effect(
    lines: Sequence[Line],
    step: int,
    value: Callable[[Line], float],
    first: int = 0,
    last: int | None = None,
    confidence: float = 0.95,
) -> Effect | None:
    """Mean of `value` over the steps after `step` minus the run's own trend there.

    The trend is the straight line through at most `BEFORE` steps up to `step` and after `first`
    (step t still used the teacher from before a refresh at t); at most `AFTER` steps follow, up to
    `last`. The interval is that of a prediction from a linear regression with independent normal
    errors: it holds the error of the line and the noise of the steps after. Errors that hang
    together make it too narrow, and a trend that bends by itself, as a learning curve does, is
    taken for an effect: judge it beside the same measure at steps without a refresh.

    None where either side has fewer than `FEWEST` steps.
    """
    whole = [line for line in lines if "reward/mean" in line and line.get("length/mean", 0) > 0]
    trained = [line for line in whole if line["step"] > first]
    until = min(step + AFTER, step + AFTER if last is None else last)
    before = [line for line in trained if step - BEFORE < line["step"] <= step]
    after = [line for line in trained if step < line["step"] <= until]
    if len(before) < FEWEST or len(after) < FEWEST:
        return None
    x, y = (np.array([f(line) for line in before]) for f in (_step, value))
    ahead = float(np.mean([_step(line) for line in after]))
    centre, spread = x.mean(), ((x - x.mean()) ** 2).sum()
    slope = ((x - centre) * y).sum() / spread
    freedom = len(x) - 2
    noise = ((y - y.mean() - slope * (x - centre)) ** 2).sum() / freedom
    error = noise * (1 / len(x) + 1 / len(after) + (ahead - centre) ** 2 / spread)
    change = float(np.mean([value(line) for line in after]) - y.mean() - slope * (ahead - centre))
    reach = float(student_t.ppf((1 + confidence) / 2, freedom) * np.sqrt(error))
    return Effect(change, change - reach, change + reach)


def collapse_origin(lines: Sequence[Line], events: Sequence[Line]) -> Origin | None:
    """What a run's collapse came from; None for a run that has not collapsed.

    fast clock             the teacher was copied at least three times before, and the median of
                           the gaps is below `CLOCK` steps: no copy can be told from the next one
    contaminating refresh  a contaminating refresh (`refresh_effects` of what was known at the
                           collapse) within the `BLAMED` steps before
    none                   no refresh, or none of these; also a teacher that moves otherwise than
                           by copies, which has no refreshes
    """
    at = next((int(event["step"]) for event in events if event["event"] == "collapse"), None)
    if at is None:
        return None
    known = [event for event in events if event["event"] == "refresh" and event["step"] < at]
    steps = [int(event["step"]) for event in known]
    if len(steps) >= 3 and np.median(np.diff(steps)) < CLOCK:
        return "fast clock"
    effects = refresh_effects([line for line in lines if line["step"] <= at], known)
    blamed = [one for one in effects if at - one.step <= BLAMED]
    return "contaminating refresh" if any(e.verdict == "contaminating" for e in blamed) else "none"


def _step(line: Line) -> float:
    return float(line["step"])


def _reward(line: Line) -> float:
    return float(line["reward/mean"])


def _log_length(line: Line) -> float:
    return log(line["length/mean"])
