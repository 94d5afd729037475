"""The report's tables as the CSVs hold them, in full precision. tables.html.j2 shows them."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np

from sodfast.attribution import collapse_origin
from sodfast.files import to_csv
from sodfast.report import effects
from sodfast.report.early_warning import Forecast
from sodfast.report.intervals import (
    Curve,
    Difference,
    difference_of,
    from_the_highest,
    mean_and_error,
    mean_of,
    wilson_interval,
)
from sodfast.report.runs import GATES, Group, Line, Run, describe_schedule

ENDS = 5  # steps whose mean stands for the beginning and the end of a run
COMPARISON = (
    *("regime", "highest", "other", "difference", "difference_low", "difference_high"),
    *("pairs", "pairs_above"),
)


@dataclass(frozen=True)
class Table:
    """`keys` are the CSV's columns, so that a table without rows still has its head."""

    keys: Sequence[str]
    rows: Sequence[Line]

    def to_csv(self) -> str:
        rows = [[_cell(row.get(key)) for key in self.keys] for row in self.rows]
        return to_csv([self.keys, *rows])


def _cell(value: Any) -> Any:
    """Steps are written with spaces between them, and those of several seeds in a row."""
    if isinstance(value, Mapping):
        return "; ".join(f"{seed}: {_cell(own) or 'none'}" for seed, own in value.items())
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


Value = Callable[[Run], float | None]
_BEGIN, _END, _LAST = slice(ENDS), slice(-ENDS, None), slice(-1, None)


def metric(
    key: str, run: Run, how: Callable[[Any], Any] = np.mean, part: slice = slice(None)
) -> float | None:
    """`how` of a metric over a part of a run's steps; of its test scores where `key` is empty."""
    values = (run.series(key) if key else run.scores).values[part]
    return float(how(values)) if values.size else None


peak = partial(metric, "", how=np.max)


def _start(run: Run) -> float | None:
    """The untouched student's score."""
    return float(run.scores.values[0]) if 0 in run.scores.steps else None


def _last_of(kind: str, run: Run) -> float | None:
    """eval/<kind>@k of the last evaluation at the greatest k."""
    kinds = [key.partition(f"eval/{kind}@") for line in run.lines[-1:] for key in line]
    sizes = [int(k) for before, _, k in kinds if not before and k.isdecimal()]
    return metric(f"eval/{kind}@{max(sizes)}", run, part=_LAST) if sizes else None


def _blocked(gate: str, run: Run) -> float | None:
    passed = [check["gates"][gate]["pass"] for check in run.checks if gate in check["gates"]]
    return passed.count(False) if passed else None


# The tables with a row per group, like those of the paper; the page shows them in this order.
MEASURES: dict[str, dict[str, Value]] = {
    # Tables 1, 3, 5 and 6
    "results": {"start": _start, "final": attrgetter("final"), "peak": peak},
    # Table 3: when the teacher moved, how far, and what it did to the KL
    "teacher": {
        "refreshes": lambda run: len(run.refreshes) if run.copies else None,
        "age": partial(metric, "teacher/age"),
        "shock": lambda run: mean_of(event["shock"] for event in run.refreshes),
        "spike": lambda run: mean_of(run.spikes.values()),
    },
    # which refreshes did good or harm, and what collapses came from
    "attribution": {},
    # Table 4: checks at which each gate blocked
    "blocked": {
        "checks": lambda run: len(run.checks) or None,
        **{f"blocked_{gate}": partial(_blocked, gate) for gate in GATES},
    },
    # Table 10: each run's mean over its steps, then over the runs
    "diagnostics": {
        "success_group_fraction": partial(metric, "reward/success_group_fraction"),
        "snr": partial(metric, "reward/snr"),
        "reward_last": partial(metric, "reward/mean", part=_END),
        "entropy": partial(metric, "policy/entropy"),
        "entropy_last": partial(metric, "policy/entropy", part=_END),
        "divergence": partial(metric, "distill/divergence"),
    },
    # response lengths, and what the last evaluation says beside its mean
    "lengths": {
        "length_first": partial(metric, "length/mean", part=_BEGIN),
        "length_last": partial(metric, "length/mean", part=_END),
        "tail": partial(metric, "length/tail_ratio"),
        "tail_max": partial(metric, "length/tail_ratio", how=np.max),
        "best": partial(_last_of, "best"),
        "maj": partial(_last_of, "maj"),
    },
}


# Tables without the groups in whose runs there is nothing of their kind.
_ABOUT: dict[str, Callable[[Run], object]] = {
    "blocked": lambda run: run.checks,
    "attribution": lambda run: run.refreshes or run.collapse_step,
}


def build_tables(groups: Sequence[Group], found: Forecast | None) -> dict[str, Table]:
    """Every table but those of the curves, by the name of its CSV."""
    more = {"results": _outcome, "teacher": _moves, "attribution": effects.attributed}
    checks = [check for group in groups for run in group.runs for check in run.checks[:1]]
    tables = {}
    for name, measures in MEASURES.items():
        # Only CGTR and evidence have gates that can block, and only the latter one for the tail.
        members = [g for g in groups if name not in _ABOUT or any(map(_ABOUT[name], g.used))]
        if name == "blocked" and not any("tail" in check["gates"] for check in checks):
            measures = {key: value for key, value in measures.items() if key != "blocked_tail"}
        tables[name] = _by_group(members, measures, more.get(name, lambda group: {}))
    # Every trial of the study, every refresh, and every check of every gate.
    trial = [
        *("regime", "schedule", "seed", "lab_seed", "status", "step", "steps", "start", "final"),
        *("peak", "collapsed", "collapse_step", "origin", "length", "refreshes"),
    ]
    effect = [f"{name}{end}" for name in ("reward", "length") for end in ("", "_low", "_high")]
    check = ["step", "gate", "active", "value", "threshold", "blocked", "refresh"]
    tables["runs"] = _by_run(groups, trial, _trial)
    refresh = ["step", "shock", "age", "spike_ratio", "verdict", *effect]
    tables["refreshes"] = _by_run(groups, refresh, _refreshes)
    tables["gates"] = _by_run(groups, check, _checks)
    forks = effects.fork_rows(groups)
    tables["forks"] = Table(effects.FORK_KEYS, forks)
    tables["effects"] = Table(effects.EFFECT_KEYS, [*effects.fork_effects(forks)])
    tables["comparisons"] = Table(COMPARISON, [] if forks else [*_comparisons(groups)])
    if found is not None:
        rows = [one.row for one in found.diagnostics]
        tables["forecast"] = Table(list(rows[0]) if rows else ["diagnostic"], rows)
    return tables


def curve(curves: Mapping[str, Curve]) -> Table:
    """The numbers of a curve figure, without bounds where a point has one run."""
    keys = ["group", "step", "n", "mean", "low", "high"]
    rows = []
    for label, (x, (mean, low, high, n), _) in curves.items():
        for point in zip(*(part.tolist() for part in (x, n, mean, low, high)), strict=True):
            rows.append(dict(zip(keys, (label, *point[: 5 if point[1] > 1 else 3]), strict=False)))
    return Table(keys, rows)


def _by_group(
    groups: Iterable[Group], measures: Mapping[str, Value], more: Callable[[Group], Line]
) -> Table:
    """A row per group: the mean and the error of each measure over the used runs that have it,
    and `more`."""
    rows = []
    for group in groups:
        row = {"group": group.label, "n": len(group.used), "listed": len(group.runs)}
        for key, of in measures.items():
            found = mean_and_error([value for value in map(of, group.used) if value is not None])
            row |= {f"{key}_mean": found and found.value, f"{key}_error": found and found.error}
        rows.append({**row, **more(group)})
    numbers = [f"{key}_{part}" for key in measures for part in ("mean", "error")]
    return Table(list(dict.fromkeys(chain(["group", "n", "listed", *numbers], *rows))), rows)


def _outcome(group: Group) -> dict[str, Any]:
    """How many of a group's runs collapsed, and by how much it differs from its baseline."""
    collapses = [run.collapse_step for run in group.used if run.collapse_step is not None]
    rate = wilson_interval(len(collapses), len(group.used)) if len(group.used) > 1 else None
    base = group.baseline
    return {
        "collapsed": len(collapses),
        "collapse_low": rate and rate.low,
        "collapse_high": rate and rate.high,
        "collapse_steps": tuple(collapses),
        "baseline": base and base.label,
        **_difference(group, None if base is None or base.label == group.label else base),
        "regime": group.regime,
        "schedule": group.called,
    }


def _difference(group: Group, other: Group | None) -> dict[str, Any]:
    """By how much the final score differs from another group's, over the seeds that both have."""
    found: Difference | None = None
    if other is not None:
        found = difference_of(_finals(group), _finals(other))
    return difference_row(found)


def _finals(group: Group) -> dict[Hashable, float]:
    return {run.replicate: run.final for run in group.used if run.final is not None}


def difference_row(found: Difference | None) -> dict[str, Any]:
    """The columns of results.csv and comparisons.csv that a paired difference fills."""
    bounds = found.interval if found else None
    return {
        "difference": found and found.mean,
        "difference_low": bounds and bounds.low,
        "difference_high": bounds and bounds.high,
        "pairs": found and found.n,
        "pairs_above": found and found.above,
    }


def _comparisons(groups: Sequence[Group]) -> Iterator[Line]:
    """In each regime the group with the highest mean final score against each other, from above."""
    for regime in dict.fromkeys(group.regime for group in groups):
        called = {group.label: group.called for group in groups if group.regime == regime}
        finals = {group.label: _finals(group) for group in groups if group.label in called}
        finals = {label: own for label, own in finals.items() if own}
        if len(finals) > 1:
            best, others = from_the_highest(finals)
            for other, found in others:
                names = {"regime": regime, "highest": called[best], "other": called[other]}
                yield {**names, **difference_row(found)}


def _moves(group: Group) -> dict[str, Any]:
    """How many spikes the mean is over, and when each seed's teacher was refreshed."""
    copying = [run for run in group.used if run.copies]
    steps = {run.seed_name: tuple(e["step"] for e in run.refreshes) for run in copying}
    return {"spikes": sum(len(run.spikes) for run in copying), "refresh_steps": steps}


def _by_run(
    groups: Iterable[Group], keys: Sequence[str], of: Callable[[Run], Iterable[Line]]
) -> Table:
    """The rows that `of` gives for every run, finished or not, after its name and its group's."""
    rows = [
        {"run": run.name, "group": group.label, **row}
        for group in groups
        for run in group.runs
        for row in of(run)
    ]
    return Table(["run", "group", *keys], rows)


def _trial(run: Run) -> Iterator[Line]:
    yield {
        "regime": run.regime,
        "schedule": describe_schedule(run.config.schedule),
        "seed": run.config.seed,
        "lab_seed": run.config.lab.seed,
        "status": run.status,
        "step": run.last_step if run.lines else None,
        "steps": run.config.steps,
        "start": _start(run),
        "final": run.final,
        "peak": peak(run),
        "collapsed": int(run.collapse_step is not None) if run.lines else None,
        "collapse_step": run.collapse_step,
        "origin": collapse_origin(run.lines, run.events),
        "length": metric("length/mean", run, part=_END),
        "refreshes": len(run.refreshes) if run.copies else None,
    }


def _refreshes(run: Run) -> Iterator[Line]:
    """The student's way since the last refresh, the teacher's age, the spike and the effect."""
    for event, effect in zip(run.refreshes, run.effects, strict=True):
        spike = {"spike_ratio": run.spikes.get(event["step"])}
        yield {**event, **spike, **effects.refresh_row(effect)}


def _checks(run: Run) -> Iterator[Line]:
    for check in run.checks:
        for gate, found in check["gates"].items():
            row = {
                "value": None,
                "threshold": None,
                **check,
                **found,
                "gate": gate,
                "blocked": not found["pass"],
            }
            yield row | {flag: int(row[flag]) for flag in ("active", "blocked", "refresh")}
