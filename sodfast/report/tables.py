"""The report's tables. A row holds what the CSV holds, in full precision; columns show it."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from sodfast.report.early_warning import Forecast
from sodfast.report.intervals import Curve, mean_and_error, paired_difference, wilson_interval
from sodfast.report.runs import GATES, Group, Line, Run

ENDS = 5  # steps whose mean stands for the beginning and the end of a run
NONE = "–"

Show = Callable[[float | None], str]


class Column(NamedTuple):
    """A column of the page, made of one or several of the CSV's."""

    head: str
    text: Callable[[Line], str]
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """`keys` are the CSV's columns, so that a table without rows still has its head. Without
    `columns` it is a figure's numbers and stands in no page."""

    keys: Sequence[str]
    rows: Sequence[Line]
    columns: Sequence[Column] = ()

    def to_csv(self) -> str:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self.keys)
        writer.writerows([[_cell(row.get(key)) for key in self.keys] for row in self.rows])
        return stream.getvalue()


def _cell(value: Any) -> Any:
    """Steps with spaces between them, and those of several seeds one after the other."""
    if isinstance(value, Mapping):
        return "; ".join(f"seed {seed}: {_cell(own) or 'none'}" for seed, own in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else value


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


one_digit, two_digits = partial(number, digits=1), partial(number, digits=2)


def with_error(row: Line, key: str, show: Show = number) -> str:
    """mean ± standard error to the mean's last digit; the mean alone where there is no error."""
    mean, error = show(row[f"{key}_mean"]), row[f"{key}_error"]
    if error is None:
        return mean
    decimals = len(mean.partition(".")[2]) if "e" not in mean else 0
    return f"{mean} ± {number(error, decimals) if decimals else show(error)}"


def _interval(row: Line, low: str, high: str, digits: int = 2, sign: bool = False) -> str:
    if row[low] is None:
        return ""
    return f"[{number(row[low], digits, sign)}, {number(row[high], digits, sign)}]"


def _shown(head: str, key: str, show: Callable[[Any], str] = str, numeric: bool = True) -> Column:
    return Column(head, lambda row: NONE if row[key] is None else show(row[key]), numeric)


# ---------------------------------------------------------------- numbers of a run


Value = Callable[[Run], float | None]


def metric(key: str, how: Callable[[Any], Any] = np.mean, part: slice = slice(None)) -> Value:
    """What `how` makes of a metric over these of a run's steps; of its test scores without key."""

    def of(run: Run) -> float | None:
        values = (run.series(key) if key else run.scores).values[part]
        return float(how(values)) if values.size else None

    return of


_BEGIN, _END, _LAST = slice(ENDS), slice(-ENDS, None), slice(-1, None)
final, peak = metric("", part=_LAST), metric("", np.max)


def start(run: Run) -> float | None:
    """The untouched student's score."""
    return float(run.scores.values[0]) if 0 in run.scores.steps else None


def _last_of(kind: str) -> Value:
    """eval/<kind>@k of the last evaluation at the greatest k."""

    def of(run: Run) -> float | None:
        keys = [key for line in run.lines[-1:] for key in line if key.startswith(f"eval/{kind}@")]
        key = max(keys, key=lambda key: int(key.rpartition("@")[2]), default=None)
        return None if key is None else metric(key, part=_LAST)(run)

    return of


def _mean_shock(run: Run) -> float | None:
    return float(np.mean([e["shock"] for e in run.refreshes])) if run.refreshes else None


def _mean_spike(run: Run) -> float | None:
    return float(np.mean(list(run.spikes.values()))) if run.spikes else None


# ---------------------------------------------------------------- a row per group


class Measure(NamedTuple):
    """A number of a run, of which a group's row has the mean over its runs and the error."""

    key: str
    head: str
    of: Value
    show: Show = number

    def column(self) -> Column:
        return Column(self.head, partial(with_error, key=self.key, show=self.show))


def _by_group(
    groups: Iterable[Group],
    measures: Sequence[Measure],
    more: Callable[[Group], Line] = lambda group: {},
    columns: Sequence[Column] = (),
    among: Callable[[Run], Any] = lambda run: True,
) -> Table:
    """`more` adds to a group's row and `columns` shows it; the means are over the runs `among`
    a group's used ones that have the number."""
    rows = []
    for group in groups:
        row: dict[str, Any] = {"group": group.label, "n": len(group.used)}
        row["listed"] = len(group.runs)
        for key, _, of, _ in measures:
            values = [of(run) for run in group.used if among(run)]
            found = mean_and_error([value for value in values if value is not None])
            row |= {f"{key}_mean": found and found.value, f"{key}_error": found and found.error}
        rows.append({**row, **more(group)})
    spread = [f"{measure.key}_{part}" for measure in measures for part in ("mean", "error")]
    keys = list(dict.fromkeys(chain(["group", "n", "listed", *spread], *rows)))
    names = [_shown("group", "group", numeric=False), Column("n", runs_of)]
    return Table(keys, rows, [*names, *(one.column() for one in measures), *columns])


def runs_of(row: Line) -> str:
    return str(row["n"]) if row["n"] == row["listed"] else f"{row['n']} of {row['listed']}"


def results(groups: Sequence[Group]) -> Table:
    """Like the paper's Tables 1, 3, 5 and 6: final and peak score, collapses, differences."""
    numbers = {"start": start, "final": final, "peak": peak}
    measures = [Measure(key, key, of) for key, of in numbers.items()]
    columns = [Column("collapsed [95 %]", _collapse_rate)]
    if any(group.baseline is not None for group in groups):
        columns += [Column("difference [95 %]", _difference), Column("seeds above", _above)]
    return _by_group(groups, measures, _outcome, columns)


def _outcome(group: Group) -> dict[str, Any]:
    """How many of a group's runs collapsed, and by how much it differs from its baseline over the
    seeds that both have."""
    collapses = [run.collapse_step for run in group.used if run.collapse_step is not None]
    rate = wilson_interval(len(collapses), len(group.used)) if len(group.used) > 1 else None
    difference = None
    if group.baseline is not None and group.baseline.label != group.label:
        others = {run.config.seed: final(run) for run in group.baseline.used}
        both = [(final(run), others.get(run.config.seed)) for run in group.used]
        pairs = [(own, other) for own, other in both if own is not None and other is not None]
        difference = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
    bounds = difference.interval if difference else None
    return {
        "collapsed": len(collapses),
        "collapse_low": rate and rate.low,
        "collapse_high": rate and rate.high,
        "collapse_steps": collapses,
        "baseline": group.baseline and group.baseline.label,
        "difference": difference and difference.mean,
        "difference_low": bounds and bounds.low,
        "difference_high": bounds and bounds.high,
        "pairs": difference and difference.n,
        "pairs_above": difference and difference.above,
    }


def _collapse_rate(row: Line) -> str:
    text = f"{row['collapsed']} of {row['n']} {_interval(row, 'collapse_low', 'collapse_high')}"
    return text.strip() if row["n"] else NONE


def _difference(row: Line) -> str:
    bounds = _interval(row, "difference_low", "difference_high", digits=3, sign=True)
    text = f"{number(row['difference'], sign=True)} {bounds}".strip()
    return "baseline" if row["baseline"] == row["group"] else text


def _above(row: Line) -> str:
    return NONE if row["pairs"] is None else f"{row['pairs_above']} of {row['pairs']}"


def teacher(groups: Sequence[Group]) -> Table:
    """Like the paper's Table 3: when the teacher moved, how far, and what it did to the KL."""

    measures = [
        Measure("refreshes", "refreshes", lambda run: len(run.refreshes), one_digit),
        Measure("age", "teacher's age", metric("teacher/age"), one_digit),
        Measure("shock", "shock", _mean_shock, significant),
        Measure("spike", "spike ratio", _mean_spike, two_digits),
    ]

    def moves(group: Group) -> dict[str, Any]:
        copying = [run for run in group.used if run.copies]
        steps = {run.config.seed: [event["step"] for event in run.refreshes] for run in copying}
        return {"spikes": sum(len(run.spikes) for run in copying), "refresh_steps": steps}

    columns = [Column("refreshed at steps", _refresh_steps, numeric=False)]
    return _by_group(groups, measures, moves, columns, among=lambda run: run.copies)


def _refresh_steps(row: Line) -> str:
    """The steps of each seed; seeds that refreshed at the same steps together."""
    different = list(dict.fromkeys(map(tuple, row["refresh_steps"].values())))
    most = 6 if len(different) == 1 else 5
    parts = []
    for steps in different:
        shown = [*map(str, steps)]
        if len(steps) > most:
            shown[most - 1 :] = [f"… {steps[-1]} ({len(steps)})"]
        parts.append(", ".join(shown) or "none")
    return "; ".join(parts) or NONE


def blocked(groups: Sequence[Group]) -> Table:
    """Like the paper's Table 4: checks at which each gate blocked, for the groups with gates."""

    def blocks(gate: str) -> Callable[[Run], float]:
        return lambda run: sum(not check["gates"][gate]["pass"] for check in run.checks)

    measures = [Measure("checks", "checks", lambda run: len(run.checks), one_digit)]
    for gate in GATES:
        measures.append(Measure(f"blocked_{gate}", f"{gate} blocked", blocks(gate), one_digit))
    gated = [group for group in groups if any(run.checks for run in group.used)]
    return _by_group(gated, measures, among=lambda run: run.checks)


# Like the paper's Table 10: each run's mean over its steps, then over the runs.
DIAGNOSTICS = (
    Measure("success_group_fraction", "success groups", metric("reward/success_group_fraction")),
    Measure("snr", "SNR", metric("reward/snr")),
    Measure("reward_last", "reward, end", metric("reward/mean", part=_END)),
    Measure("entropy", "entropy", metric("policy/entropy")),
    Measure("entropy_last", "entropy, end", metric("policy/entropy", part=_END)),
    Measure("divergence", "divergence", metric("distill/divergence"), significant),
)
# Response lengths, and what the last evaluation says beside its mean.
LENGTHS = (
    Measure("length_first", "length, begin", metric("length/mean", part=_BEGIN), one_digit),
    Measure("length_last", "length, end", metric("length/mean", part=_END), one_digit),
    Measure("tail", "tail ratio", metric("length/tail_ratio"), two_digits),
    Measure("tail_max", "greatest tail ratio", metric("length/tail_ratio", np.max), two_digits),
    Measure("best", "best@k", _last_of("best")),
    Measure("maj", "maj@k", _last_of("maj")),
)


# ---------------------------------------------------------------- other rows


def _by_run(
    groups: Iterable[Group],
    keys: Sequence[str],
    of: Callable[[Run], Iterable[Line]],
    columns: Sequence[Column] = (),
) -> Table:
    """The rows `of` every run, whatever became of it, after its name and its group's."""
    rows = [
        {"run": run.name, "group": group.label, **row}
        for group in groups
        for run in group.runs
        for row in of(run)
    ]
    return Table(["run", "group", *keys], rows, columns)


def trials(groups: Sequence[Group]) -> Table:
    keys = ["seed", "status", "step", "steps", "final", "peak", "collapse_step"]

    def whole(run: Run) -> list[Line]:
        steps = (run.last_step if run.lines else None, run.config.steps)
        scores = (final(run), peak(run))
        values = (run.config.seed, run.status, *steps, *scores, run.collapse_step)
        return [dict(zip(keys, values, strict=True))]

    columns = [
        _shown("run", "run", numeric=False),
        _shown("status", "status", numeric=False),
        Column(
            "step", lambda row: f"{NONE if row['step'] is None else row['step']} of {row['steps']}"
        ),
        _shown("final", "final", number),
        _shown("peak", "peak", number),
        _shown("collapse step", "collapse_step"),
    ]
    return _by_run(groups, keys, whole, columns)


def refreshes(groups: Sequence[Group]) -> Table:
    """Every refresh: step, the student's way since the last one, the teacher's age, the spike."""

    def events(run: Run) -> list[Line]:
        return [{**e, "spike_ratio": run.spikes.get(e["step"])} for e in run.refreshes]

    return _by_run(groups, ["step", "shock", "age", "spike_ratio"], events)


def gates(groups: Sequence[Group]) -> Table:
    """Every check of every gate."""

    def checks(run: Run) -> Iterator[Line]:
        for check in run.checks:
            for gate, found in check["gates"].items():
                row = {"threshold": None, **check, **found, "gate": gate}
                flags = {"active": found["active"], "blocked": not found["pass"]}
                flags["refresh"] = check["refresh"]
                yield row | {key: int(flag) for key, flag in flags.items()}

    keys = ["step", "gate", "active", "value", "threshold", "blocked", "refresh"]
    return _by_run(groups, keys, checks)


def curve(curves: Mapping[str, Curve]) -> Table:
    """The numbers of a curve figure, without bounds where a point has one run."""
    keys = ["group", "step", "n", "mean", "low", "high"]
    rows = []
    for label, (x, (mean, low, high, n), _) in curves.items():
        for point in zip(*(part.tolist() for part in (x, n, mean, low, high)), strict=True):
            rows.append(dict(zip(keys, (label, *point[: 5 if point[1] > 1 else 3]), strict=False)))
    return Table(keys, rows)


def announcement(found: Forecast) -> Table:
    """What `sodfast.report.early_warning` says of each diagnostic."""
    rows = [one.row for one in found.diagnostics]
    rate = two_digits
    columns = [
        Column("diagnostic", lambda r: r["diagnostic"] + " *" * r["leaks the label"], False),
        Column("AUC [95 %]", lambda r: f"{rate(r['AUC'])} {_interval(r, 'AUC low', 'AUC high')}"),
        _shown("threshold", "threshold", significant),
        _shown("detected", "detection rate", rate),
        _shown("false alarms", "false-alarm rate", rate),
        _shown("detected, held out", "held-out detection rate", rate),
        _shown("false alarms, held out", "held-out false-alarm rate", rate),
        _shown("lead, median", "lead median"),
        Column(
            "least to greatest",
            lambda r: NONE if r["lead min"] is None else f"{r['lead min']} to {r['lead max']}",
        ),
    ]
    return Table(list(rows[0]) if rows else ["diagnostic"], rows, columns)


def build_tables(groups: Sequence[Group], found: Forecast | None) -> dict[str, Table]:
    """Every table but those of the curves, by the name of its CSV."""
    tables = {
        "results": results(groups),
        "teacher": teacher(groups),
        "blocked": blocked(groups),
        "gates": gates(groups),
        "refreshes": refreshes(groups),
        "diagnostics": _by_group(groups, DIAGNOSTICS),
        "lengths": _by_group(groups, LENGTHS),
        "runs": trials(groups),
    }
    return tables if found is None else {**tables, "forecast": announcement(found)}
