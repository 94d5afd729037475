"""What refreshes did: beside the run's own trend, and between forks that differ in one refresh.

Rows for the report's tables. Effects on the length are differences of its logarithm: 0.05 is about
5 % more. Intervals of means are those of `intervals.paired_difference`, and like there an interval
of one value does not exist.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import log
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sodfast.attribution import Origin, RefreshEffect, Verdict, collapse_origin, refresh_effects
from sodfast.report.intervals import paired_difference
from sodfast.report.runs import Group, Line, Run

HORIZON = 30  # steps after a fork over which its effect is measured, at most
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
ORIGINS: tuple[Origin, ...] = get_args(Origin)
OUTCOMES = ("reward", "length", "score")  # what a refresh has an effect on
CUTS = ("age", "drift", "tail")  # what the pairs of forks are cut into thirds by

FORK_KEYS = (
    *("run", "regime", "step", "seed", "lab_seed"),
    *("age", "drift", "tail", "reward", "length", "score"),
)
EFFECT_KEYS = (
    *("regime", "by", "from", "to", "n"),
    *(f"{outcome}{end}" for outcome in OUTCOMES for end in ("", "_low", "_high")),
)


def mean_with_interval(key: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """The mean of the values that exist and the bootstrap interval of that mean."""
    known = [value for value in values if value is not None]
    found = paired_difference(known, [0.0] * len(known))
    low, high = found.interval if found and found.interval else (None, None)
    return {key: found and found.mean, f"{key}_low": low, f"{key}_high": high}


# ---------------------------------------------------------------- refreshes within a run


def refresh_row(found: RefreshEffect) -> dict[str, Any]:
    """The columns of tables/refreshes.csv that `refresh_effects` fills."""
    row: dict[str, Any] = {"verdict": found.verdict}
    for name, effect in (("reward", found.reward), ("length", found.length)):
        ends = (effect.change, effect.low, effect.high) if effect else (None,) * 3
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    return row


def attributed(group: Group) -> dict[str, Any]:
    """Of a group's refreshes how many have which verdict, and the mean effect over runs; of its
    collapses how many have which origin.

    `excess`: the run's mean effect on the reward minus what the same measure says at the same
    steps of the baseline's run of the same seeds, whose teacher never moved. A learning curve that
    bends shows in both.
    """
    kinds: Counter[str | None] = Counter()
    means: dict[str, list[float | None]] = {"reward": [], "length": []}
    excess: list[float | None] = []
    base = group.baseline
    still = {} if base is None or base is group else {run.replicate: run for run in base.used}
    for run in group.used:
        kinds.update(one.verdict for one in run.effects)
        own = _mean_effect(run.effects, "reward")
        for name, values in means.items():
            values.append(_mean_effect(run.effects, name))
        other = still.get(run.replicate)
        if own is not None and other is not None and not other.refreshes and other.copies:
            there = _mean_effect(refresh_effects(other.lines, run.refreshes), "reward")
            excess.append(None if there is None else own - there)
    origins = Counter(collapse_origin(run.lines, run.events) for run in group.used)
    return {
        "refreshes": kinds.total(),
        "judged": sum(kinds[verdict] for verdict in VERDICTS),
        **{verdict: kinds[verdict] for verdict in VERDICTS},
        **mean_with_interval("reward", means["reward"]),
        **mean_with_interval("length", means["length"]),
        **mean_with_interval("excess", excess),
        **{f"origin: {origin}": origins[origin] for origin in ORIGINS},
    }


def _mean_effect(found: Iterable[RefreshEffect], name: str) -> float | None:
    changes = [effect.change for one in found if (effect := getattr(one, name)) is not None]
    return float(np.mean(changes)) if changes else None


# ---------------------------------------------------------------- forks


def fork_rows(groups: Iterable[Group]) -> list[Line]:
    """A row per pair of finished forks of one run at one step and with one seed, of which one
    began with a refresh and the other without.

    `age`, `drift` (‖θ − φ‖₂) and `tail` are those at the fork. `reward` and `length`: mean over the
    `HORIZON` steps after it of now, minus that of never; `score`: the same of the last test scores.
    """
    arms: dict[tuple[Any, ...], dict[bool, tuple[Run, Group, Line]]] = {}
    for group in groups:
        for run in group.used:
            found = _forked(run)
            if found is not None:
                fork, refresh = found
                key = (group.regime, fork["source"], fork["step"], *run.replicate)
                arms.setdefault(key, {})[refresh is not None] = (run, group, refresh or fork)
    pairs = {key: both for key, both in arms.items() if len(both) == 2}
    return [
        {
            "run": Path(source).name,
            "regime": regime,
            "step": step,
            "seed": seed,
            "lab_seed": lab,
            **_effect(both[True][0], both[False][0], both[True][2]),
        }
        for (regime, source, step, lab, seed), both in sorted(pairs.items(), key=itemgetter(0))
    ]


def _forked(run: Run) -> tuple[Line, Line | None] | None:
    """The event of a run's last fork, and that of the refresh it began with."""
    at = [index for index, event in enumerate(run.events) if event["event"] == "fork"]
    if not at:
        return None
    fork, *later = run.events[at[-1] :]
    began = (e for e in later if e["event"] == "refresh" and e["step"] == fork["step"])
    return fork, next(began, None)


def _effect(now: Run, never: Run, refresh: Line) -> dict[str, Any]:
    step = refresh["step"]
    tail = now.tail()
    before = tail.values[tail.steps <= step]
    both = [_after(run, step) for run in (now, never)]
    ends = [run.scores.values[-1:] for run in (now, never) if run.scores.steps[-1:] > step]
    return {
        "age": refresh["age"],
        "drift": refresh["shock"],
        "tail": float(before[-1]) if before.size else None,
        "reward": both[0]["reward"] - both[1]["reward"],
        "length": log(both[0]["length"] / both[1]["length"]),
        "score": float(ends[0][0] - ends[1][0]) if len(ends) == 2 else None,
    }


def _after(run: Run, step: int) -> dict[str, float]:
    """Mean reward and length of the `HORIZON` steps after a fork, or of those that there are."""
    found = {}
    for name in ("reward", "length"):
        series = run.series(f"{name}/mean")
        found[name] = float(
            series.values[(series.steps > step) & (series.steps <= step + HORIZON)].mean()
        )
    return found


def fork_effects(rows: Sequence[Line]) -> Iterator[Line]:
    """Mean effects with their intervals over pairs: of a regime's pairs together, at each step, and
    in thirds by age, drift and tail, all of whose bounds belong to what was measured."""
    for regime, members in groupby(rows, key=itemgetter("regime")):
        own = [*members]
        yield _summary(regime, "all", own, "step")
        for step in sorted({row["step"] for row in own}):
            yield _summary(regime, "step", [row for row in own if row["step"] == step], "step")
        for key in CUTS:
            known = [row for row in own if row[key] is not None]
            bounds = np.quantile([row[key] for row in known], [1 / 3, 2 / 3]) if known else []
            thirds = np.searchsorted(bounds, [row[key] for row in known])
            for third in np.unique(thirds):
                yield _summary(
                    regime,
                    key,
                    [r for r, at in zip(known, thirds, strict=True) if at == third],
                    key,
                )


def _summary(regime: str, by: str, rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    values = [row[key] for row in rows]
    row = {"regime": regime, "by": by, "from": min(values), "to": max(values), "n": len(rows)}
    for outcome in OUTCOMES:
        row |= mean_with_interval(outcome, [one[outcome] for one in rows])
    return row
