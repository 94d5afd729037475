"""The tables' rows by hand, and the cells that the page shows."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import lab_run

from sodfast.report.early_warning import Forecast
from sodfast.report.intervals import Series, group_curve
from sodfast.report.runs import Group, Run
from sodfast.report.tables import Table, build_tables, curve
from sodfast.report.templates import template


def run_of(seed: int, score: float, events: list[dict[str, Any]], copies: bool = True) -> Run:
    """Three steps, of which the first and the last are evaluated."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@16": 0.5, "eval/best@16": 0.6}]
    lines += [{"step": step, "length/mean": 10.0 * step} for step in range(1, 4)]
    lines[-1] |= {"eval/mean@16": score, "eval/best@4": 0.7, "eval/best@16": 0.9}
    for line in lines[1:] if copies else []:
        line |= {"teacher/refreshed": 0, "teacher/age": line["step"]}
    config = lab_run("steps=3", f"seed={seed}")
    return Run(f"seed{seed}", Path("runs"), config, "done", {}, lines, events)


def gate(step: int, passes: bool) -> dict[str, Any]:
    found = {"active": True, "pass": passes, "value": 1.0}
    gates = {name: found for name in ("isolation", "reward", "length")}
    return {"event": "gate", "step": step, "refresh": passes, "gates": gates}


REFRESHES = [
    {"event": "refresh", "step": step, "shock": step / 10, "age": step} for step in (1, 2, 3)
]
RUNS = [run_of(0, 0.8, [gate(1, False), *REFRESHES]), run_of(1, 0.6, [gate(1, True)])]


def tables_of(*groups: Group) -> dict[str, Table]:
    return build_tables(groups, None)


def row_of(table: Table) -> dict[str, Any]:
    (row,) = table.rows
    return dict(row)


def shown(name: str, group: Group) -> list[str]:
    """The cells of a group's row on the page."""
    (row,) = tables_of(group)[name].rows
    columns: Any = template("tables.html.j2").module
    return [write(row, *more) for _, write, *more in columns.columns[name]]


def test_a_group_is_its_runs_means_and_standard_errors() -> None:
    group = Group("CGTR", [*RUNS, run_of(2, 0.0, [])], RUNS)
    row = row_of(tables_of(group)["results"])
    assert (row["n"], row["listed"]) == (2, 3)
    assert (row["start_mean"], row["start_error"]) == (0.5, 0.0)
    assert (row["final_mean"], row["final_error"]) == (pytest.approx(0.7), pytest.approx(0.1))
    assert row["baseline"] is None and row["difference"] is None
    assert shown("results", group)[:4] == ["CGTR", "2 of 3", "0.500 ± 0.000", "0.700 ± 0.100"]


def test_a_difference_is_over_the_seeds_that_both_have() -> None:
    base = Group("base", [run_of(1, 0.5, [])], [run_of(1, 0.5, [])])
    row = row_of(tables_of(Group("CGTR", RUNS, RUNS, base))["results"])
    assert (row["pairs"], row["pairs_above"], row["difference_low"]) == (1, 1, None)
    assert row["difference"] == pytest.approx(0.1)


def test_steps_of_refreshes_by_seed_and_for_people() -> None:
    group = Group("CGTR", RUNS, RUNS)
    row = next(csv.DictReader(io.StringIO(tables_of(group)["teacher"].to_csv())))
    assert row["refresh_steps"] == "seed 0: 1 2 3; seed 1: none"
    assert shown("teacher", group)[-1] == "1, 2, 3; none"
    # A run without a refresh has no shock and does not enter its mean.
    assert (row["refreshes_mean"], float(row["shock_mean"])) == ("1.5", pytest.approx(0.2))
    many = [{"event": "refresh", "step": s, "shock": 0.0, "age": 1} for s in range(1, 9)]
    one = Group("hard", *[[run_of(0, 0.5, many)]] * 2)
    assert shown("teacher", one)[-1] == "1, 2, 3, 4, 5, … 8 (8)"
    still = Group("EMA", *[[run_of(0, 0.5, [], copies=False)]] * 2)
    assert shown("teacher", still)[2:] == ["–"] * 5


def test_blocked_checks_and_their_rows() -> None:
    found = tables_of(Group("CGTR", RUNS, RUNS), Group("fixed", [], []))
    assert row_of(found["blocked"])["blocked_reward_mean"] == 0.5
    rows = found["gates"].rows
    assert [(row["run"], row["gate"], row["blocked"], row["refresh"]) for row in rows[2:4]] == [
        ("seed0", "length", 1, 0),
        ("seed1", "isolation", 0, 1),
    ]
    assert rows[0]["threshold"] is None
    empty = tables_of(Group("fixed", [], []))["blocked"]
    assert empty.to_csv().startswith("group,n,listed,checks_mean,checks_error,blocked_isolation")
    assert empty.to_csv().count("\n") == 1


def test_lengths_and_the_answers_at_the_greatest_k() -> None:
    row = row_of(tables_of(Group("CGTR", RUNS, RUNS))["lengths"])
    assert (row["length_first_mean"], row["best_mean"], row["maj_mean"]) == (20.0, 0.9, None)


def test_every_run_and_every_refresh_has_a_row() -> None:
    found = tables_of(Group("CGTR", RUNS, RUNS[:1]))
    assert [row["final"] for row in found["runs"].rows] == [0.8, 0.6]
    steps = [(row["step"], row["shock"], row["spike_ratio"]) for row in found["refreshes"].rows]
    assert steps == [(1, 0.1, None), (2, 0.2, None), (3, 0.3, None)]


def test_a_curve_has_bounds_where_several_runs_have_a_point() -> None:
    steps = np.array([1.0, 2.0])
    pair = [Series(steps, np.array([1.0, 1.0])), Series(steps[:1], np.array([3.0]))]
    lone = [Series(steps, np.array([1.0, 2.0]))]
    curves = {"two": group_curve(pair, [], 1), "one": group_curve(lone, [], 1)}
    text = curve(curves).to_csv().splitlines()
    assert text[0] == "group,step,n,mean,low,high" and text[2] == "one,1.0,1,1.0,,"
    assert text[1].startswith("two,1.0,2,2.0,-10.7") and len(text) == 4


def test_a_forecast_without_both_kinds_is_a_table_without_rows() -> None:
    found = Forecast(0, 2, (), ("no run collapsed",))
    tables = build_tables([Group("CGTR", RUNS, RUNS)], found)
    assert tables["forecast"].to_csv() == "diagnostic\n"
    assert "forecast" not in tables_of(Group("CGTR", RUNS, RUNS))


def test_no_cell_is_a_formula() -> None:
    row = {"run": "=cmd|' /C calc'!A1", "group": "a,b", "step": -3}
    assert Table(["run", "group", "step"], [row]).to_csv() == (
        "run,group,step\n'=cmd|' /C calc'!A1,\"a,b\",-3\n"
    )
