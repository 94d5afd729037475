"""Diagnostics that predict: does a run's past announce its collapse, how early, how often in vain?

A diagnostic gives each step a score that depends on that step and those before it. An alarm is
the first score above a threshold. A run is labelled by whether it collapsed, and judged whole:

* A collapsed run is watched up to its horizon, `collapse_step − detector_steps`. The detector
  calls a collapse on the last of `detector_steps` long steps (`collapse.length_steps`, 5), so the
  horizon is the last step before the first of them: no score may see what the label is made of.
  A collapse that the evaluation showed is cut at the same distance. Later alarms do not count.
* A stable run is watched to its last step, and any alarm in it is false. Stable runs are mostly
  watched longer, which counts against every diagnostic. A run that ended early might have
  collapsed later: give finished runs only.
* A run's score is its greatest up to there, and the ROC is over thresholds on these scores.
* The lead is `collapse_step − alarm_step`. A first alarm may be a fluke that subsides long before;
  the standing lead counts from the start of the alarm that still stands at the horizon.

Windows are `WINDOW` = 5 steps, as CGTR's. Relative scores compare the last window with the run's
opening window, steps 1 to 5, so that tasks, learning rates and model sizes are comparable. Scores
begin at step 10, where the two no longer overlap. A mean is over the steps of its window that
carry the metric.

What the numbers cannot say. The runs of a study differ in schedule, and a diagnostic may tell
schedules apart rather than foresee a collapse: an alarm at the first score is a property of the
schedule and no warning; it shows as a lead time of nearly the whole run. Seeds of one schedule
are near replicates, so that intervals, which take runs as independent, are too narrow. Every
diagnostic is shown, in both directions where neither is obvious: the best of several is the best
partly by chance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, inf, sqrt
from statistics import NormalDist, median
from typing import Any

WINDOW = 5
MAX_FALSE_ALARM_RATE = 0.1

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """One finished run: its metrics lines (step 0 is ignored) and its label.

    `group` names what its replicates share (the trial without its seed), and a held-out estimate
    leaves out a group at a time; empty: the run alone. `detector_steps` is `collapse.length_steps`
    of its configuration.
    """

    name: str
    lines: Lines
    collapse_step: int | None
    group: str = ""
    detector_steps: int = 5

    @property
    def horizon(self) -> int:
        """The last step whose score counts."""
        if self.collapse_step is not None:
            return self.collapse_step - self.detector_steps
        return int(self.lines[-1]["step"]) if self.lines else 0


class Windows:
    """What the score of `step` may look at: the opening window and the last two."""

    def __init__(self, lines: Mapping[int, Mapping[str, Any]], step: int) -> None:
        self._lines = lines
        self._step = step

    def opening(self, key: str) -> float | None:
        return _mean(self._values(key, WINDOW))

    def previous(self, key: str) -> float | None:
        return _mean(self._values(key, self._step - WINDOW))

    def last(self, key: str) -> float | None:
        return _mean(self._values(key, self._step))

    def greatest(self, key: str) -> float | None:
        return max(self._values(key, self._step), default=None)

    def _values(self, key: str, end: int) -> list[float]:
        window = (self._lines.get(step, {}) for step in range(end - WINDOW + 1, end + 1))
        return [line[key] for line in window if key in line]


@dataclass(frozen=True)
class Diagnostic:
    """`score` of a step, None where it is undefined; high is alarming. `leaks`: the label is made
    of this very metric, so that announcing it is no feat."""

    name: str
    definition: str
    key: str
    score: Callable[[Windows], float | None]
    leaks: bool = False


def _tail(windows: Windows) -> float | None:
    greatest, mean = windows.greatest("length/max"), windows.last("length/mean")
    return None if greatest is None or not mean else greatest / mean


def _rise(key: str) -> Callable[[Windows], float | None]:
    return lambda windows: _change(windows.last(key), windows.opening(key))


def _fall(key: str) -> Callable[[Windows], float | None]:
    def score(windows: Windows) -> float | None:
        change = _change(windows.last(key), windows.opening(key))
        return None if change is None else -change

    return score


def _jump(key: str) -> Callable[[Windows], float | None]:
    return lambda windows: _change(windows.last(key), windows.previous(key))


def _change(now: float | None, before: float | None) -> float | None:
    """Relative change, 0.3 for 30 % more; None without a positive base."""
    return None if now is None or before is None or before <= 0 else now / before - 1


ENTROPY, DIVERGENCE, DRIFT, LENGTH = (
    "policy/entropy",
    "distill/divergence",
    "teacher/drift",
    "length/mean",
)
DIAGNOSTICS = (
    Diagnostic(
        "length tail", "max / mean length pooled over 5 steps, as CGTR's gate", LENGTH, _tail
    ),
    Diagnostic("entropy rise", "5-step mean against the opening", ENTROPY, _rise(ENTROPY)),
    Diagnostic("entropy fall", "5-step mean against the opening", ENTROPY, _fall(ENTROPY)),
    Diagnostic(
        "temporal KL rise", "5-step mean against the opening", DIVERGENCE, _rise(DIVERGENCE)
    ),
    Diagnostic(
        "temporal KL fall", "5-step mean against the opening", DIVERGENCE, _fall(DIVERGENCE)
    ),
    Diagnostic(
        "temporal KL jump", "5-step mean against the 5 steps before", DIVERGENCE, _jump(DIVERGENCE)
    ),
    Diagnostic("teacher drift", "5-step mean against the opening", DRIFT, _rise(DRIFT)),
    Diagnostic(
        "mean length",
        "5-step mean against the opening; runaway length is itself a collapse criterion",
        LENGTH,
        _rise(LENGTH),
        leaks=True,
    ),
)


@dataclass(frozen=True)
class RocPoint:
    """Shares of the stable and the collapsed runs whose score exceeds `threshold`."""

    threshold: float
    false_alarm_rate: float
    detection_rate: float


@dataclass(frozen=True)
class Alarm:
    """What one run's watch came to. `score` is −inf for a run that collapsed before any score
    could exist. `standing_step` begins the unbroken alarm that reaches the horizon, if one does.
    The leads count steps to the collapse, in a collapsed run that was announced."""

    run: str
    group: str
    collapse_step: int | None
    score: float
    alarm_step: int | None
    standing_step: int | None

    @property
    def lead(self) -> int | None:
        return self._before_collapse(self.alarm_step)

    @property
    def standing_lead(self) -> int | None:
        return self._before_collapse(self.standing_step)

    def _before_collapse(self, step: int | None) -> int | None:
        return None if self.collapse_step is None or step is None else self.collapse_step - step


@dataclass(frozen=True)
class DiagnosticForecast:
    """One diagnostic over all runs that recorded its metric.

    `threshold` is the least with at most `MAX_FALSE_ALARM_RATE` false alarms among these runs, so
    `detection_rate` and `false_alarm_rate` are in-sample. The `held_out_*` rates choose it, for
    each group in turn, on the stable runs of the other groups; None where the stable runs are all
    of one group. `auc` has a 95 % interval (`auc_interval`).
    """

    diagnostic: Diagnostic
    n_collapsed: int
    n_stable: int
    auc: float
    auc_low: float
    auc_high: float
    threshold: float
    detection_rate: float
    false_alarm_rate: float
    held_out_detection_rate: float | None
    held_out_false_alarm_rate: float | None
    roc: tuple[RocPoint, ...]
    alarms: tuple[Alarm, ...]

    @property
    def leads(self) -> list[int]:
        """Steps of warning in each announced collapse, ascending."""
        return sorted(alarm.lead for alarm in self.alarms if alarm.lead is not None)

    @property
    def standing_leads(self) -> list[int]:
        return sorted(a.standing_lead for a in self.alarms if a.standing_lead is not None)

    def row(self) -> dict[str, Any]:
        """The table's row; None where a value is undefined."""
        leads, standing = self.leads, self.standing_leads
        return {
            "diagnostic": self.diagnostic.name,
            "leaks the label": self.diagnostic.leaks,
            "AUC": self.auc,
            "AUC low": self.auc_low,
            "AUC high": self.auc_high,
            "threshold": self.threshold,
            "detection rate": self.detection_rate,
            "false-alarm rate": self.false_alarm_rate,
            "held-out detection rate": self.held_out_detection_rate,
            "held-out false-alarm rate": self.held_out_false_alarm_rate,
            "missed collapses": self.n_collapsed - len(leads),
            "lead median": median(leads) if leads else None,
            "lead min": leads[0] if leads else None,
            "lead max": leads[-1] if leads else None,
            "standing alarms": len(standing),
            "standing lead median": median(standing) if standing else None,
            "collapsed runs": self.n_collapsed,
            "stable runs": self.n_stable,
        }


@dataclass(frozen=True)
class Forecast:
    """`notes` says what is missing and why; without a collapsed or a stable run, that is all."""

    n_collapsed: int
    n_stable: int
    diagnostics: tuple[DiagnosticForecast, ...]
    notes: tuple[str, ...]

    def table(self) -> list[dict[str, Any]]:
        return [diagnostic.row() for diagnostic in self.diagnostics]


def forecast(runs: Sequence[RunRecord]) -> Forecast:
    """Judge every diagnostic on the finished runs of a study."""
    collapsed = sum(run.collapse_step is not None for run in runs)
    stable = len(runs) - collapsed
    if not collapsed or not stable:
        missing = (
            "no run" if not runs else "no run collapsed" if not collapsed else "every run collapsed"
        )
        note = f"{missing}: a forecast needs collapsed and stable runs, so there is none"
        return Forecast(collapsed, stable, (), (note,))
    judged, notes = [], []
    for diagnostic in DIAGNOSTICS:
        watches = [watch for run in runs if (watch := _watch(diagnostic, run)) is not None]
        ends = {watch.run.collapse_step is None for watch in watches}
        if len(ends) == 2:
            judged.append(_judge(diagnostic, watches))
        else:
            kind = (
                "no run" if not ends else "no collapsed run" if ends == {True} else "no stable run"
            )
            notes.append(f"{diagnostic.name}: {kind} with a score ({diagnostic.key})")
    return Forecast(collapsed, stable, tuple(judged), tuple(notes))


def scores(diagnostic: Diagnostic, lines: Lines) -> dict[int, float]:
    """The score of every step that has one. A step's score does not depend on later lines."""
    by_step = {line["step"]: line for line in lines if line["step"] > 0}
    found = {}
    for step in by_step:
        if step >= 2 * WINDOW:
            score = diagnostic.score(Windows(by_step, step))
            if score is not None:
                found[step] = score
    return found


def auc(collapsed: Sequence[float], stable: Sequence[float]) -> float:
    """Chance that a collapsed run scores above a stable one, ties counted half: the Mann-Whitney
    statistic over the number of pairs, which is the area under the ROC."""
    wins = sum((high > low) + 0.5 * (high == low) for high in collapsed for low in stable)
    return wins / (len(collapsed) * len(stable))


def auc_interval(
    area: float, n_collapsed: int, n_stable: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Score interval of an AUC: every θ with |area − θ| ≤ z · se(θ).

    se is Hanley's and McNeil's (Radiology 143, 1982) with both sample sizes replaced by their
    mean where they weigh the two terms: method 5 of Newcombe (Statistics in Medicine 25, 2006,
    559). Unlike the bootstrap or DeLong's it does not shrink to a point when the runs are
    separated perfectly, the common case with few runs.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    others = (n_collapsed + n_stable) / 2 - 1

    def inside(theta: float) -> bool:
        terms = 1 + others * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(area - theta) <= z * sqrt(theta * (1 - theta) * terms / (n_collapsed * n_stable))

    return _boundary(inside, area, 0.0), _boundary(inside, area, 1.0)


def _boundary(inside: Callable[[float], bool], within: float, without: float) -> float:
    """Bisect to where `inside` ends between a point that is and one that need not be."""
    if inside(without):
        return without
    for _ in range(60):
        middle = (within + without) / 2
        within, without = (middle, without) if inside(middle) else (within, middle)
    return within


@dataclass(frozen=True)
class _Watch:
    """A run's scores up to its horizon, and the greatest."""

    run: RunRecord
    scores: dict[int, float]
    greatest: float

    @property
    def group(self) -> str:
        return self.run.group or self.run.name

    def alarm(self, threshold: float) -> int | None:
        return next((step for step, score in self.scores.items() if score > threshold), None)

    def standing(self, threshold: float) -> int | None:
        start = None
        for step, score in self.scores.items():
            start = None if score <= threshold else step if start is None else start
        return start


def _watch(diagnostic: Diagnostic, run: RunRecord) -> _Watch | None:
    """None where there is nothing to judge: a metric that was not recorded, a stable run without
    a score. A run that records it and collapses before its first score is missed, by right."""
    if not any(diagnostic.key in line for line in run.lines):
        return None
    known = {s: v for s, v in scores(diagnostic, run.lines).items() if s <= run.horizon}
    if not known and run.collapse_step is None:
        return None
    return _Watch(run, known, max(known.values(), default=-inf))


def _judge(diagnostic: Diagnostic, watches: Sequence[_Watch]) -> DiagnosticForecast:
    collapsed = [w.greatest for w in watches if w.run.collapse_step is not None]
    stable = [w.greatest for w in watches if w.run.collapse_step is None]
    area = auc(collapsed, stable)
    low, high = auc_interval(area, len(collapsed), len(stable))
    threshold = _threshold(stable)
    held_out = _held_out(watches)
    return DiagnosticForecast(
        diagnostic=diagnostic,
        n_collapsed=len(collapsed),
        n_stable=len(stable),
        auc=area,
        auc_low=low,
        auc_high=high,
        threshold=threshold,
        detection_rate=_share_above(threshold, collapsed),
        false_alarm_rate=_share_above(threshold, stable),
        held_out_detection_rate=held_out and held_out[0],
        held_out_false_alarm_rate=held_out and held_out[1],
        roc=_roc(collapsed, stable),
        alarms=tuple(
            Alarm(
                run=watch.run.name,
                group=watch.group,
                collapse_step=watch.run.collapse_step,
                score=watch.greatest,
                alarm_step=watch.alarm(threshold),
                standing_step=watch.standing(threshold),
            )
            for watch in watches
        ),
    )


def _threshold(stable: Sequence[float]) -> float:
    """The least score of a stable run that at most `MAX_FALSE_ALARM_RATE` of them exceed."""
    allowed = (t for t in sorted(stable) if _share_above(t, stable) <= MAX_FALSE_ALARM_RATE)
    return next(allowed)


def _held_out(watches: Sequence[_Watch]) -> tuple[float, float] | None:
    """(detection, false-alarm) rates with each group judged by the others' threshold."""
    alarmed: dict[bool, list[bool]] = {True: [], False: []}
    for group in {watch.group for watch in watches}:
        others = [w.greatest for w in watches if w.group != group and w.run.collapse_step is None]
        if not others:
            return None
        threshold = _threshold(others)
        for watch in watches:
            if watch.group == group:
                alarmed[watch.run.collapse_step is not None].append(watch.greatest > threshold)
    return sum(alarmed[True]) / len(alarmed[True]), sum(alarmed[False]) / len(alarmed[False])


def _roc(collapsed: Sequence[float], stable: Sequence[float]) -> tuple[RocPoint, ...]:
    """From no alarm to an alarm wherever there is a score, over every threshold that matters."""
    thresholds = sorted({*collapsed, *stable, -inf}, reverse=True)
    return tuple(
        RocPoint(t, _share_above(t, stable), _share_above(t, collapsed)) for t in thresholds
    )


def _share_above(threshold: float, values: Sequence[float]) -> float:
    return sum(value > threshold for value in values) / len(values)


def _mean(values: Sequence[float]) -> float | None:
    return fsum(values) / len(values) if values else None
