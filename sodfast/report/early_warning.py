"""Diagnostics that predict: does a run's past announce its collapse, how early, how often in vain?

A diagnostic gives each step a score that depends on that step and those before it. An alarm is
the first score above a threshold. A run is labelled by whether it collapsed, and judged whole, by
its greatest score; the ROC is over thresholds on these:

* A collapsed run is watched up to its horizon, `collapse_step − detector_steps`. The detector
  calls a collapse on the last of `detector_steps` long steps (`collapse.length_steps`, 5), so the
  horizon is the last step before the first of them: no score may see what the label is made of.
  A collapse that the evaluation showed is cut at the same distance. Later alarms do not count.
* A stable run is watched to its last step, and any alarm in it is false. Stable runs are mostly
  watched longer, which counts against every diagnostic. A run that ended early might have
  collapsed later: give finished runs only.
* The lead is `collapse_step − alarm_step`. A first alarm may be a fluke that subsides long before;
  the standing lead counts from the start of the alarm that still stands at the horizon.

Windows are `WINDOW` = 5 steps, as CGTR's; a mean is over the steps of its window that carry the
metric. Relative scores compare the last window with the run's opening window, steps 1 to 5, so
that tasks, learning rates and model sizes are comparable. Scores begin at step 10, where the two
windows no longer overlap.

What the numbers cannot say: the runs of a study differ in schedule, and a diagnostic may tell
schedules apart rather than foresee a collapse. Seeds of one schedule are near replicates, so that
intervals, which take runs as independent, are too narrow. Every diagnostic is shown, in both
directions where neither is obvious: the best of several is the best partly by chance.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf, sqrt
from statistics import NormalDist, fmean, median
from typing import Any, NamedTuple

import numpy as np

from sodfast.report.intervals import CONFIDENCE, Array, Interval
from sodfast.report.runs import Group, Line, Run

WINDOW = 5
MAX_FALSE_ALARM_RATE = 0.1

Window = Callable[[str, int], list[float]]  # a metric's values in the window that ends at a step
Score = Callable[[str, Window, int], float | None]  # of a metric in the window that ends at a step
Watched = tuple[
    str, Run, Mapping[int, float]
]  # what is held out, its run, scores up to its horizon


class Diagnostic(NamedTuple):
    """`score` of a step, None where it is undefined; high is alarming. `leaks`: the label is made
    of this very metric, so that announcing it is no feat."""

    name: str
    key: str
    score: Score
    leaks: bool = False


def _tail(key: str, window: Window, step: int) -> float | None:
    """max / mean length pooled over the window, as CGTR's gate; `key` is the mean's."""
    longest, means = window("length/max", step), window(key, step)
    mean = fmean(means) if means else 0.0  # 0 of damaged lines, too
    return max(longest) / mean if longest and mean else None


def _change(
    key: str, window: Window, step: int, sign: int = 1, opening: bool = True
) -> float | None:
    """Relative change of the window's mean, 0.3 for 30 % more, against the opening window or the
    window before; None without a positive base. `sign` −1: a fall is alarming."""
    now, before = window(key, step), window(key, WINDOW if opening else step - WINDOW)
    if not now or not before or fmean(before) <= 0:
        return None
    return sign * (fmean(now) / fmean(before) - 1)


ENTROPY, DIVERGENCE, DRIFT = "policy/entropy", "distill/divergence", "teacher/drift"
LENGTH = "length/mean"  # runaway length is itself a collapse criterion
DIAGNOSTICS = (
    Diagnostic("length tail", LENGTH, _tail),
    Diagnostic("entropy rise", ENTROPY, _change),
    Diagnostic("entropy fall", ENTROPY, partial(_change, sign=-1)),
    Diagnostic("temporal KL rise", DIVERGENCE, _change),
    Diagnostic("temporal KL fall", DIVERGENCE, partial(_change, sign=-1)),
    Diagnostic("temporal KL jump", DIVERGENCE, partial(_change, opening=False)),
    Diagnostic("teacher drift", DRIFT, _change),
    Diagnostic("mean length", LENGTH, _change, leaks=True),
)


def scores(diagnostic: Diagnostic, lines: Sequence[Line], last: float = inf) -> dict[int, float]:
    """The score of every step up to `last` that has one; it does not depend on later lines."""
    by_step = {line["step"]: line for line in lines if line["step"] > 0}

    def window(key: str, end: int) -> list[float]:
        inside = (by_step.get(step, {}) for step in range(end - WINDOW + 1, end + 1))
        return [line[key] for line in inside if key in line]

    steps = [step for step in by_step if 2 * WINDOW <= step <= last]
    found = {step: diagnostic.score(diagnostic.key, window, step) for step in steps}
    return {step: score for step, score in found.items() if score is not None}


class Alarm(NamedTuple):
    """What one run's watch came to. `score` is −inf for a run that collapsed before any score
    could exist. `standing_step` begins the unbroken alarm that reaches the horizon, if one does.
    The leads count steps to the collapse, in a collapsed run that was announced."""

    run: str
    score: float
    alarm_step: int | None
    standing_step: int | None
    lead: int | None
    standing_lead: int | None


class DiagnosticForecast(NamedTuple):
    """One diagnostic over all runs that recorded its metric; `row` is the table's, None where a
    value is undefined.

    Its threshold is the least with at most `MAX_FALSE_ALARM_RATE` false alarms among these runs,
    so its rates are in-sample. For the held-out rates each regime or, where there is only one, each
    group is judged by the threshold of the others; they are None where the stable runs are all of
    one. "AUC within" is that of each regime, or group, that has runs of both kinds: pooled runs of
    regimes whose scores differ hide what tells collapses apart within each. `roc` is
    (threshold, false-alarm rate, detection rate) from no alarm to one wherever there is a score.
    """

    diagnostic: Diagnostic
    row: dict[str, Any]
    roc: list[tuple[float, float, float]]
    alarms: list[Alarm]


class Forecast(NamedTuple):
    """`notes` says what is missing and why; without a collapsed or a stable run, all is missing."""

    n_collapsed: int
    n_stable: int
    diagnostics: tuple[DiagnosticForecast, ...]
    notes: tuple[str, ...]


def horizon(run: Run) -> int:
    """The last step whose score may announce a collapse."""
    step = run.collapse_step
    return run.last_step if step is None else step - run.config.collapse.length_steps


def forecast(groups: Sequence[Group]) -> Forecast:
    """Judge every diagnostic on the finished runs of a study.

    A diagnostic leaves out the runs that did not record its metric and the stable runs without a
    score. A run that records it and collapses before its first score counts as missed.
    """
    regimes = {group.regime for group in groups}
    names = [group.regime if len(regimes) > 1 else group.label for group in groups]
    runs = [(name, run) for name, group in zip(names, groups, strict=True) for run in group.used]
    collapsed = sum(run.collapse_step is not None for _, run in runs)
    stable = len(runs) - collapsed
    if not collapsed or not stable:
        found = "no run" if not runs else "no run collapsed" if stable else "every run collapsed"
        note = f"{found}: a forecast needs collapsed and stable runs, so there is none"
        return Forecast(collapsed, stable, (), (note,))
    judged, notes = [], []
    for diagnostic in DIAGNOSTICS:
        watched: list[Watched] = []
        for group, run in runs:
            known = scores(diagnostic, run.lines, horizon(run))
            recorded = any(diagnostic.key in line for line in run.lines)
            if known or (recorded and run.collapse_step is not None):
                watched.append((group, run, known))
        stays = {run.collapse_step is None for _, run, _ in watched}
        if len(stays) == 2:
            judged.append(_judge(diagnostic, watched))
        else:
            kind = "run" if not stays else "collapsed run" if True in stays else "stable run"
            notes.append(f"{diagnostic.name}: no {kind} with a score ({diagnostic.key})")
    return Forecast(collapsed, stable, tuple(judged), tuple(notes))


def _judge(diagnostic: Diagnostic, watched: Sequence[Watched]) -> DiagnosticForecast:
    top = np.array([max(known.values(), default=-inf) for _, _, known in watched])
    lost = np.array([run.collapse_step is not None for _, run, _ in watched])
    collapsed, stable = top[lost], top[~lost]
    threshold, area = _threshold(stable), auc(collapsed, stable)
    low, high = auc_interval(area, len(collapsed), len(stable))
    names = np.array([group for group, _, _ in watched])
    held_out = _held_out(top, lost, names)
    within = {
        name: (top[lost & (names == name)], top[~lost & (names == name)])
        for name in dict.fromkeys(names.tolist())
    }
    alarms = [_alarm(run, known, threshold) for _, run, known in watched]
    leads = [alarm.lead for alarm in alarms if alarm.lead is not None]
    standing = [alarm.standing_lead for alarm in alarms if alarm.standing_lead is not None]
    row = {
        "diagnostic": diagnostic.name,
        "leaks the label": diagnostic.leaks,
        "AUC": area,
        "AUC low": low,
        "AUC high": high,
        "AUC within": "; ".join(
            f"{name} {auc(*own):.2f}" for name, own in within.items() if all(map(len, own))
        )
        or None,
        "threshold": threshold,
        "detection rate": _share_above(threshold, collapsed),
        "false-alarm rate": _share_above(threshold, stable),
        "held-out detection rate": held_out[0],
        "held-out false-alarm rate": held_out[1],
        "missed collapses": len(collapsed) - len(leads),
        "lead median": median(leads) if leads else None,
        "lead min": min(leads, default=None),
        "lead max": max(leads, default=None),
        "standing alarms": len(standing),
        "standing lead median": median(standing) if standing else None,
        "collapsed runs": len(collapsed),
        "stable runs": len(stable),
    }
    cuts = sorted({*top.tolist(), -inf}, reverse=True)  # every threshold that matters
    roc = [(cut, _share_above(cut, stable), _share_above(cut, collapsed)) for cut in cuts]
    return DiagnosticForecast(diagnostic, row, roc, alarms)


def _alarm(run: Run, known: Mapping[int, float], threshold: float) -> Alarm:
    first = standing = None
    for step, score in known.items():
        standing = None if score <= threshold else standing or step
        first = first or standing
    end = run.collapse_step
    leads = [None if end is None or step is None else end - step for step in (first, standing)]
    return Alarm(run.name, max(known.values(), default=-inf), first, standing, *leads)


def _share_above(threshold: float, values: Array) -> float:
    return float(np.mean(values > threshold))


def _threshold(stable: Array) -> float:
    """The least score of a stable run that at most `MAX_FALSE_ALARM_RATE` of them exceed."""
    return float(np.sort(stable)[::-1][int(MAX_FALSE_ALARM_RATE * len(stable))])


def _held_out(top: Array, lost: Any, groups: Any) -> tuple[float | None, float | None]:
    """Detection and false-alarm rate with each group judged by the others' threshold."""
    alarmed = np.zeros(len(top), dtype=bool)
    for group in np.unique(groups):
        own = groups == group
        others = top[~own & ~lost]
        if not others.size:
            return None, None
        alarmed[own] = top[own] > _threshold(others)
    return float(alarmed[lost].mean()), float(alarmed[~lost].mean())


def auc(collapsed: Sequence[float] | Array, stable: Sequence[float] | Array) -> float:
    """Chance that a collapsed run scores above a stable one, ties counted half: the Mann-Whitney
    statistic over the number of pairs, which is the area under the ROC."""
    wins = np.greater.outer(collapsed, stable) + 0.5 * np.equal.outer(collapsed, stable)
    return float(wins.mean())


def auc_interval(area: float, n_collapsed: int, n_stable: int) -> Interval:
    """Score interval of an AUC, 95 %: every θ with |area − θ| ≤ z · se(θ).

    se is Hanley's and McNeil's (Radiology 143, 1982) with both sample sizes replaced by their
    mean where they weigh the two terms: method 5 of Newcombe (Statistics in Medicine 25, 2006,
    559). Unlike the bootstrap or DeLong's it does not shrink to a point when the runs are
    separated perfectly, the common case with few runs.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    others = (n_collapsed + n_stable) / 2 - 1

    def end(without: float) -> float:
        """The last θ of the interval on the way from `area` to `without`, found by bisection."""
        within, middle = area, without
        for _ in range(61):
            terms = 1 + others * ((1 - middle) / (2 - middle) + middle / (1 + middle))
            error = sqrt(middle * (1 - middle) * terms / (n_collapsed * n_stable))
            if abs(area - middle) <= z * error:
                within = middle
            else:
                without = middle
            middle = (within + without) / 2
        return within

    return Interval(end(0.0), end(1.0))
