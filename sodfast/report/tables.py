"""The report's tables. A row holds what the CSV holds, in full precision; columns show it."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sodfast.report.early_warning import Forecast
from sodfast.report.intervals import (
    Mean,
    Series,
    mean_and_error,
    paired_difference,
    wilson_interval,
)
from sodfast.report.runs import GATES, Group, Line, Run

ENDS = 5  # steps whose mean stands for the beginning and the end of a run
NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column of the page, made of one or several of the CSV's."""

    head: str
    text: Callable[[Line], str]
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """`keys` are the CSV's columns, so that a table without rows still has its head. Without
    `columns` it is a figure's numbers and stands in no page."""

    name: str
    keys: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[Column] = ()

    def to_csv(self) -> str:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self.keys)
        writer.writerows([[row.get(key) for key in self.keys] for row in self.rows])
        return stream.getvalue()

    def cells(self, row: Line) -> list[str]:
        return [column.text(row) for column in self.columns]


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """With a true minus sign; a dash where there is no value."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not text.strip("+-0."):  # no sign before a rounded zero
        text = text.lstrip("+-")
    return text.replace("-", "−")


def significant(value: float | None, digits: int = 3) -> str:
    """With this many significant digits, for quantities of any magnitude."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    exponent = int(np.floor(np.log10(abs(value))))
    if exponent < -4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return number(value, max(0, digits - 1 - exponent))


def with_error(key: str, show: Callable[[float | None], str] = number) -> Callable[[Line], str]:
    """mean ± standard error to the mean's last digit; the mean alone where there is no error."""

    def text(row: Line) -> str:
        mean, error = show(row[f"{key}_mean"]), row[f"{key}_error"]
        if error is None:
            return mean
        decimals = len(mean.partition(".")[2]) if "e" not in mean else 0
        return f"{mean} ± {number(error, decimals) if decimals else show(error)}"

    return text


def interval(low: float | None, high: float | None, **options: Any) -> str:
    return "" if low is None else f"[{number(low, **options)}, {number(high, **options)}]"


def _one_digit(value: float | None) -> str:
    return number(value, 1)


def _plain(key: str) -> Callable[[Line], str]:
    return lambda row: NONE if row[key] is None else str(row[key])


def _name(head: str = "group", key: str = "group") -> Column:
    return Column(head, _plain(key), numeric=False)


def _spread(key: str, found: Mean | None) -> dict[str, float | None]:
    return {
        f"{key}_mean": found.value if found else None,
        f"{key}_error": found.error if found else None,
    }


def _spread_keys(*keys: str) -> list[str]:
    return [f"{key}_{part}" for key in keys for part in ("mean", "error")]


def mean_of(runs: Iterable[Run], value: Callable[[Run], float | None]) -> Mean | None:
    """Over the runs that have the value."""
    return mean_and_error([found for run in runs if (found := value(run)) is not None])


def start(run: Run) -> float | None:
    """The untouched student's score."""
    scores = run.scores
    return float(scores.values[0]) if scores.steps.size and scores.steps[0] == 0 else None


def final(run: Run) -> float | None:
    return _last(run.scores)


def peak(run: Run) -> float | None:
    return float(run.scores.values.max()) if run.scores.values.size else None


def _last(series: Series) -> float | None:
    return float(series.values[-1]) if series.values.size else None


def average(run: Run, key: str, part: slice = slice(None)) -> float | None:
    values = run.series(key).values[part]
    return float(values.mean()) if values.size else None


def pairs(runs: Sequence[Run], baseline: Sequence[Run]) -> list[tuple[float, float]]:
    """Final scores of the seeds that both have."""
    others = {run.config.seed: final(run) for run in baseline}
    found = [(final(run), others.get(run.config.seed)) for run in runs]
    return [(a, b) for a, b in found if a is not None and b is not None]


@dataclass(frozen=True)
class Comparison:
    """A group, those of its runs that its statistics are over, and its baseline's."""

    group: Group
    runs: Sequence[Run]
    baseline: Group | None
    baseline_runs: Sequence[Run]


def results(comparisons: Sequence[Comparison]) -> Table:
    """Like the paper's Tables 1, 3, 5 and 6: final and peak score, collapses, differences."""
    rows = []
    for one in comparisons:
        runs = one.runs
        collapses = [run.collapse_step for run in runs if run.collapse_step is not None]
        rate = wilson_interval(len(collapses), len(runs)) if len(runs) > 1 else None
        difference = None
        if one.baseline is not None and one.baseline is not one.group:
            paired = pairs(runs, one.baseline_runs)
            difference = paired_difference([a for a, _ in paired], [b for _, b in paired])
        bounds = difference.interval if difference else None
        rows.append(
            {
                "group": one.group.label,
                "n": len(runs),
                "listed": len(one.group.runs),
                **_spread("start", mean_of(runs, start)),
                **_spread("final", mean_of(runs, final)),
                **_spread("peak", mean_of(runs, peak)),
                "collapsed": len(collapses),
                "collapse_low": rate.low if rate else None,
                "collapse_high": rate.high if rate else None,
                "collapse_steps": " ".join(map(str, collapses)),
                "baseline": one.baseline.label if one.baseline else None,
                "difference": difference.mean if difference else None,
                "difference_low": bounds.low if bounds else None,
                "difference_high": bounds.high if bounds else None,
                "pairs": difference.n if difference else None,
                "pairs_above": difference.above if difference else None,
            }
        )
    compared = [row for row in rows if row["baseline"] is not None]
    columns = [
        _name(),
        Column("n", runs_of),
        Column("start", with_error("start")),
        Column("final", with_error("final")),
        Column("peak", with_error("peak")),
        Column("collapsed [95 %]", _collapse_rate),
    ]
    if compared:
        columns += [
            Column("difference [95 %]", _difference),
            Column("seeds above", _above),
        ]
    return Table("results", list(rows[0]), rows, columns)


def runs_of(row: Line) -> str:
    return str(row["n"]) if row["n"] == row["listed"] else f"{row['n']} of {row['listed']}"


def _collapse_rate(row: Line) -> str:
    if not row["n"]:
        return NONE
    bounds = interval(row["collapse_low"], row["collapse_high"], digits=2)
    return f"{row['collapsed']} of {row['n']} {bounds}".strip()


def _difference(row: Line) -> str:
    if row["baseline"] == row["group"]:
        return "baseline"
    bounds = interval(row["difference_low"], row["difference_high"], sign=True)
    return f"{number(row['difference'], sign=True)} {bounds}".strip()


def _above(row: Line) -> str:
    return NONE if row["pairs"] is None else f"{row['pairs_above']} of {row['pairs']}"


def _shorten(items: Sequence[str], most: int = 6) -> str:
    if len(items) <= most:
        return ", ".join(items) or NONE
    return ", ".join(items[: most - 1]) + f", … {items[-1]} ({len(items)})"


def teacher(comparisons: Sequence[Comparison]) -> Table:
    """Like the paper's Table 3: when the teacher moved, how far, and what it did to the KL."""
    rows = []
    for one in comparisons:
        copying = [run for run in one.runs if run.copies]
        rows.append(
            {
                **_counts(one),
                **_spread("refreshes", mean_of(copying, lambda run: float(len(run.refreshes)))),
                **_spread("age", mean_of(copying, lambda run: average(run, "teacher/age"))),
                **_spread("shock", mean_of(copying, _mean_shock)),
                **_spread("spike", mean_of(copying, _mean_spike)),
                "spikes": sum(len(run.spikes) for run in copying),
                "refresh_steps": "; ".join(
                    f"seed {run.config.seed}: "
                    + (" ".join(str(event["step"]) for event in run.refreshes) or "none")
                    for run in copying
                ),
            }
        )
    columns = [
        _name(),
        Column("n", runs_of),
        Column("refreshes", with_error("refreshes", _one_digit)),
        Column("teacher's age", with_error("age", _one_digit)),
        Column("shock", with_error("shock", significant)),
        Column("spike ratio", with_error("spike", _two_digits)),
        Column("refreshed at steps", _refresh_steps, numeric=False),
    ]
    return Table("teacher", list(rows[0]), rows, columns)


def blocked(comparisons: Sequence[Comparison]) -> Table:
    """Like the paper's Table 4: checks at which each gate blocked, for the groups with gates."""
    keys = [*_spread_keys("checks", *(f"blocked_{gate}" for gate in GATES))]
    rows = []
    for one in comparisons:
        gated = [run for run in one.runs if run.checks]
        if not gated:
            continue
        row = _counts(one) | _spread("checks", mean_of(gated, lambda run: float(len(run.checks))))
        for gate in GATES:
            row |= _spread(f"blocked_{gate}", mean_of(gated, _blocks(gate)))
        rows.append(row)
    columns = [_name(), Column("n", runs_of), Column("checks", with_error("checks", _one_digit))]
    columns += [
        Column(f"{gate} blocked", with_error(f"blocked_{gate}", _one_digit)) for gate in GATES
    ]
    return Table("blocked", ["group", "n", "listed", *keys], rows, columns)


def _counts(one: Comparison) -> dict[str, Any]:
    """What every row by group begins with."""
    return {"group": one.group.label, "n": len(one.runs), "listed": len(one.group.runs)}


def _blocks(gate: str) -> Callable[[Run], float]:
    return lambda run: float(sum(not check["gates"][gate]["pass"] for check in run.checks))


def _mean_shock(run: Run) -> float | None:
    found = mean_and_error([event["shock"] for event in run.refreshes])
    return found.value if found else None


def _mean_spike(run: Run) -> float | None:
    found = mean_and_error(list(run.spikes.values()))
    return found.value if found else None


def _refresh_steps(row: Line) -> str:
    """The steps of each seed; seeds that refreshed at the same steps together."""
    seeds: dict[str, list[str]] = {}
    for part in row["refresh_steps"].split("; ") if row["refresh_steps"] else []:
        seed, _, steps = part.partition(": ")
        seeds.setdefault(steps, []).append(seed.removeprefix("seed "))
    if not seeds:
        return NONE
    if len(seeds) == 1:
        return _shorten(next(iter(seeds)).split())
    return "; ".join(f"{_shorten(steps.split(), 5)}" for steps in seeds)


Measure = tuple[str, Callable[[Run], float | None], Callable[[float | None], str]]


def _two_digits(value: float | None) -> str:
    return number(value, 2)


def diagnostics(comparisons: Sequence[Comparison]) -> Table:
    """Like the paper's Table 10: each run's mean over its steps, then over the runs."""
    measures: dict[str, Measure] = {
        "success_group_fraction": (
            "success groups",
            lambda run: average(run, "reward/success_group_fraction"),
            number,
        ),
        "snr": ("SNR", lambda run: average(run, "reward/snr"), number),
        "reward_last": ("reward, end", lambda run: average(run, "reward/mean", _END), number),
        "entropy": ("entropy", lambda run: average(run, "policy/entropy"), number),
        "entropy_last": ("entropy, end", lambda run: average(run, "policy/entropy", _END), number),
        "divergence": ("divergence", lambda run: average(run, "distill/divergence"), significant),
    }
    return _measure_table("diagnostics", comparisons, measures)


def lengths(comparisons: Sequence[Comparison]) -> Table:
    """Response lengths, and what the last evaluation says beside its mean."""
    measures: dict[str, Measure] = {
        "length_first": (
            "length, begin",
            lambda run: average(run, "length/mean", _BEGIN),
            _one_digit,
        ),
        "length_last": ("length, end", lambda run: average(run, "length/mean", _END), _one_digit),
        "tail": ("tail ratio", lambda run: average(run, "length/tail_ratio"), _two_digits),
        "tail_max": ("greatest tail ratio", _greatest_tail, _two_digits),
        "best": ("best@k", lambda run: _last_of(run, "best"), number),
        "maj": ("maj@k", lambda run: _last_of(run, "maj"), number),
    }
    return _measure_table("lengths", comparisons, measures)


def _measure_table(
    name: str, comparisons: Sequence[Comparison], measures: Mapping[str, Measure]
) -> Table:
    rows = [
        {
            **_counts(one),
            **{
                key: value
                for measure, (_, of, _) in measures.items()
                for key, value in _spread(measure, mean_of(one.runs, of)).items()
            },
        }
        for one in comparisons
    ]
    shown = [Column(head, with_error(key, show)) for key, (head, _, show) in measures.items()]
    return Table(name, list(rows[0]), rows, [_name(), Column("n", runs_of), *shown])


_BEGIN, _END = slice(ENDS), slice(-ENDS, None)


def _greatest_tail(run: Run) -> float | None:
    values = run.series("length/tail_ratio").values
    return float(values.max()) if values.size else None


def _last_of(run: Run, kind: str) -> float | None:
    """eval/<kind>@k of the last evaluation at the greatest k."""
    keys = {key for line in run.lines[-1:] for key in line if key.startswith(f"eval/{kind}@")}
    if not keys:
        return None
    return _last(run.series(max(keys, key=lambda key: int(key.rpartition("@")[2]))))


def trials(groups: Sequence[Group]) -> Table:
    """Every run, whatever became of it."""
    rows = [
        {
            "run": run.name,
            "group": group.label,
            "seed": run.config.seed,
            "status": run.status,
            "step": run.last_step if run.lines else None,
            "steps": run.config.steps,
            "final": final(run),
            "peak": peak(run),
            "collapse_step": run.collapse_step,
        }
        for group in groups
        for run in group.runs
    ]
    columns = [
        _name("run", "run"),
        Column("status", _plain("status"), numeric=False),
        Column(
            "step", lambda row: f"{NONE if row['step'] is None else row['step']} of {row['steps']}"
        ),
        Column("final", lambda row: number(row["final"])),
        Column("peak", lambda row: number(row["peak"])),
        Column("collapse step", _plain("collapse_step")),
    ]
    return Table("runs", list(rows[0]), rows, columns)


def refreshes(groups: Sequence[Group]) -> Table:
    """Every refresh: step, the student's way since the last one, the teacher's age, the spike."""
    keys = ["run", "group", "step", "shock", "age", "spike_ratio"]
    rows = [
        {
            "run": run.name,
            "group": group.label,
            "step": event["step"],
            "shock": event["shock"],
            "age": event["age"],
            "spike_ratio": run.spikes.get(event["step"]),
        }
        for group in groups
        for run in group.runs
        for event in run.refreshes
    ]
    return Table("refreshes", keys, rows)


def gates(groups: Sequence[Group]) -> Table:
    """Every check of every gate."""
    keys = ["run", "group", "step", "gate", "active", "value", "threshold", "blocked", "refresh"]
    rows = [
        {
            "run": run.name,
            "group": group.label,
            "step": check["step"],
            "gate": gate,
            "active": int(values["active"]),
            "value": values["value"],
            "threshold": values.get("threshold"),
            "blocked": int(not values["pass"]),
            "refresh": int(check["refresh"]),
        }
        for group in groups
        for run in group.runs
        for check in run.checks
        for gate, values in check["gates"].items()
    ]
    return Table("gates", keys, rows)


def announcement(found: Forecast | None) -> Table:
    """What `sodfast.report.early_warning` says of each diagnostic."""
    rows = found.table() if found else []
    keys = list(rows[0]) if rows else ["diagnostic"]

    def rate(key: str) -> Callable[[Line], str]:
        return lambda row: number(row[key], 2)

    columns = [
        Column(
            "diagnostic",
            lambda row: row["diagnostic"] + (" *" if row["leaks the label"] else ""),
            numeric=False,
        ),
        Column(
            "AUC [95 %]",
            lambda r: f"{number(r['AUC'], 2)} {interval(r['AUC low'], r['AUC high'], digits=2)}",
        ),
        Column("threshold", lambda row: significant(row["threshold"])),
        Column("detected", rate("detection rate")),
        Column("false alarms", rate("false-alarm rate")),
        Column("detected, held out", rate("held-out detection rate")),
        Column("false alarms, held out", rate("held-out false-alarm rate")),
        Column("lead, median", _plain("lead median")),
        Column(
            "least to greatest",
            lambda r: NONE if r["lead min"] is None else f"{r['lead min']} to {r['lead max']}",
        ),
    ]
    return Table("forecast", keys, rows, columns)
