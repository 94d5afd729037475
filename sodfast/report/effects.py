"""What refreshes did: beside the run's own trend, and between forks that differ in one refresh.

Rows for the report's tables. Effects on the length are differences of its logarithm: 0.05 is about
5 % more. Intervals of means are those of `intervals.paired_difference`, and like there an interval
of one value does not exist. Forks of one run at one step have the student in common, and their
effects differ little: the seeds of such a cell count as one value, their mean.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import log
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sodfast.attribution import Origin, RefreshEffect, Verdict, collapse_origin, refresh_effects
from sodfast.report.intervals import mean_of, paired_difference
from sodfast.report.runs import Group, Line, Run
from sodfast.summary import NEXT_STEPS, summarize_fork

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
ORIGINS: tuple[Origin, ...] = get_args(Origin)
OUTCOMES = ("reward", "length", "score")  # what a refresh has an effect on
CUTS = ("age", "drift", "tail")  # what the pairs of forks are cut into thirds by

FORK_KEYS = ("run", "regime", "step", "seed", "lab_seed", *CUTS, *OUTCOMES)
EFFECT_KEYS = (
    *("regime", "by", "from", "to", "n", "cells"),
    *(f"{outcome}{end}" for outcome in OUTCOMES for end in ("", "_low", "_high")),
)


def mean_with_interval(key: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """The mean of the values that exist and Student's interval of that mean."""
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

    `excess`: the effect on the reward minus what the same measure says at the same step of the
    baseline's run of the same seeds, whose teacher never moved. A learning curve that bends shows
    in both.
    """
    kinds = Counter(one.verdict for run in group.used for one in run.effects)
    origins = Counter(collapse_origin(run.lines, run.events) for run in group.used)
    base = group.baseline.used if group.baseline else []
    still = {run.replicate: run.lines for run in base if run.copies and not run.refreshes}
    means: dict[str, list[float | None]] = {"reward": [], "length": [], "excess": []}
    for run in group.used:
        judged = [one for one in run.effects if one.reward and one.length]
        lines = still.get(run.replicate, []) if judged else []
        there = refresh_effects(lines, run.refreshes) if lines else []
        means["reward"].append(mean_of(one.reward.change for one in judged if one.reward))
        means["length"].append(mean_of(one.length.change for one in judged if one.length))
        both = zip(run.effects, there, strict=False)
        changes = (a.reward.change - b.reward.change for a, b in both if a.reward and b.reward)
        means["excess"].append(mean_of(changes))
    row: dict[str, Any] = {"refreshes": sum(len(run.refreshes) for run in group.used)}
    row |= {"judged": sum(kinds[verdict] for verdict in VERDICTS)}
    row |= {verdict: kinds[verdict] for verdict in VERDICTS}
    for name, values in means.items():
        row |= mean_with_interval(name, values)
    return row | {f"origin: {origin}": origins[origin] for origin in ORIGINS}


# ---------------------------------------------------------------- forks


def fork_rows(groups: Iterable[Group]) -> list[Line]:
    """A row per pair of finished forks of one run at one step and with one seed, of which one
    began with a refresh and the other without.

    `age`, `drift` and `tail` are those at the fork; `reward` and `length` are means over the steps
    after it of now, minus those of never (`summary.summarize_fork`); `score`: the same of the last
    test scores. A fork without a step of its own is left out.
    """
    arms: dict[tuple[Any, ...], dict[bool, Run]] = {}
    for run in (run for group in groups for run in group.used):
        places = [place for place, event in enumerate(run.events) if event["event"] == "fork"]
        if places and run.last_step > run.events[places[-1]]["step"]:
            fork, *later = run.events[places[-1] :]
            moved = any(e["event"] == "refresh" and e["step"] == fork["step"] for e in later)
            key = (run.regime, fork["source"], fork["step"], *run.replicate)
            arms.setdefault(key, {})[moved] = run
    pairs = sorted((key, both) for key, both in arms.items() if len(both) == 2)
    keys = ("regime", "run", "step", "lab_seed", "seed")
    return [
        {
            **dict(zip(keys, key, strict=True)),
            "run": Path(key[1]).name,
            **_effect(both[True], both[False], key[2]),
        }
        for key, both in pairs
    ]


def _effect(now: Run, never: Run, step: int) -> dict[str, float | None]:
    arms = [summarize_fork(run.lines, step) for run in (now, never)]
    reward, length = ([arm[f"{name}_next{NEXT_STEPS}"] for arm in arms] for name in OUTCOMES[:2])
    ends = [run.scores.values[-1] for run in (now, never) if run.scores.steps[-1:] > step]
    return {
        **{cut: arms[0].get(f"fork_{cut}") for cut in CUTS},
        "reward": reward[0] - reward[1],
        "length": log(length[0] / length[1]),
        "score": float(ends[0] - ends[1]) if len(ends) == 2 else None,
    }


def fork_effects(rows: Sequence[Line]) -> Iterator[Line]:
    """Mean effects with their intervals over cells (pairs of one run and step): of a regime's
    together, at each step, and in thirds by age, drift and tail, whose bounds belong to what was
    measured."""
    for regime, members in groupby(rows, key=itemgetter("regime")):
        own = [*members]
        parts = [("all", "step", own)]
        for step in sorted({row["step"] for row in own}):
            parts.append(("step", "step", [row for row in own if row["step"] == step]))
        for key in CUTS:
            known = [row for row in own if row[key] is not None]
            bounds = np.quantile([row[key] for row in known], [1 / 3, 2 / 3]) if known else []
            thirds: dict[int, list[Line]] = {}
            for row in sorted(known, key=itemgetter(key)):
                thirds.setdefault(int(np.searchsorted(bounds, row[key])), []).append(row)
            parts += [(key, key, third) for third in thirds.values()]
        for by, key, part in parts:
            values = [row[key] for row in part]
            cells: dict[tuple[Any, ...], list[Line]] = {}
            for row in part:
                cells.setdefault((row["run"], row["lab_seed"], row["step"]), []).append(row)
            found = {
                "regime": regime,
                "by": by,
                "from": min(values),
                "to": max(values),
                "n": len(part),
                "cells": len(cells),
            }
            for name in OUTCOMES:
                means = [
                    mean_of(row[name] for row in cell if row[name] is not None)
                    for cell in cells.values()
                ]
                found |= mean_with_interval(name, means)
            yield found
