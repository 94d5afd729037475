"""Does a run's past announce its collapse: by hand, against scipy, and never from the future."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from synthetic import lab_run

from sodfast.config import Config
from sodfast.report.early_warning import (
    DIAGNOSTICS,
    DiagnosticForecast,
    Forecast,
    auc,
    auc_interval,
    forecast,
    horizon,
    scores,
)
from sodfast.report.runs import Run, group_runs

BY_NAME = {diagnostic.name: diagnostic for diagnostic in DIAGNOSTICS}


@cache
def config(detector_steps: int) -> Config:
    return lab_run(f"collapse.length_steps={detector_steps}")


def record(
    name: str,
    lines: list[dict[str, Any]],
    collapse_step: int | None = None,
    group: str = "",
    detector_steps: int = 5,
) -> Run:
    """A finished run; it is a group of its own where it names none."""
    point = {"group": group or name}
    events = [{"event": "collapse", "step": collapse_step}] if collapse_step else []
    return Run(name, Path(name), config(detector_steps), "done", point, lines, events)


def run(name: str, entropies: list[float], *label: Any, **more: Any) -> Run:
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@4": 0.4}]
    lines += [{"step": step, "policy/entropy": e} for step, e in enumerate(entropies, start=1)]
    return record(name, lines, *label, **more)


def announced(runs: list[Run]) -> Forecast:
    return forecast(group_runs(runs))


def step_up(at: int, to: float, steps: int = 40) -> list[float]:
    """Entropy 1, from step `at` on `to`."""
    return [1.0 if step < at else to for step in range(1, steps + 1)]


def judged(runs: list[Run], name: str = "entropy rise") -> DiagnosticForecast:
    (found,) = [d for d in announced(runs).diagnostics if d.diagnostic.name == name]
    return found


def rates(found: DiagnosticForecast) -> tuple[float, float]:
    """In-sample."""
    return found.row["detection rate"], found.row["false-alarm rate"]


def held_out(found: DiagnosticForecast) -> tuple[float, float]:
    return found.row["held-out detection rate"], found.row["held-out false-alarm rate"]


# ---------------------------------------------------------------- scores by hand

LINES = [
    {
        "step": step,
        "length/mean": 10.0 + (step > 5) * 2 + (step > 10) * 3,
        "length/max": 90.0 if step == 11 else 30.0,
        "policy/entropy": 0.5 if step <= 5 else 0.4,
        "distill/divergence": {3: 0.2, 8: 0.1}.get(step, 0.3),
        "teacher/drift": float(step),
    }
    for step in range(1, 17)
]


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("length tail", 10, 30 / 12),
        ("length tail", 11, 90 / ((4 * 12 + 15) / 5)),
        ("length tail", 15, 90 / 15),
        ("length tail", 16, 30 / 15),
        ("entropy rise", 10, 0.4 / 0.5 - 1),
        ("entropy fall", 10, 1 - 0.4 / 0.5),
        ("temporal KL rise", 10, 1.3 / 1.4 - 1),
        ("temporal KL fall", 12, 1 - 1.3 / 1.4),
        ("temporal KL fall", 13, 1 - 1.5 / 1.4),
        ("temporal KL jump", 10, 1.3 / 1.4 - 1),
        ("temporal KL jump", 13, 1.5 / 1.3 - 1),
        ("teacher drift", 14, 12 / 3 - 1),
        ("mean length", 11, (4 * 12 + 15) / 5 / 10 - 1),
    ],
)
def test_scores_by_hand(name: str, step: int, expected: float) -> None:
    assert scores(BY_NAME[name], LINES)[step] == pytest.approx(expected)


def test_scores_begin_where_the_last_window_has_left_the_opening() -> None:
    for diagnostic in DIAGNOSTICS:
        assert list(scores(diagnostic, LINES)) == list(range(10, 17))


def test_a_window_averages_the_steps_that_carry_the_metric() -> None:
    lines = [dict(line) for line in LINES]
    for step in (1, 2, 6, 7, 8, 9):
        del lines[step - 1]["distill/divergence"]
    found = scores(BY_NAME["temporal KL rise"], lines)
    assert found[10] == pytest.approx(0.3 / ((0.2 + 0.3 + 0.3) / 3) - 1)
    for step in (10, 11, 12, 13, 14):
        del lines[step - 1]["distill/divergence"]
    found = scores(BY_NAME["temporal KL rise"], lines)
    assert list(found) == [15, 16]


def test_there_is_no_relative_score_without_a_positive_opening() -> None:
    flat = [{"step": step, "policy/entropy": float(step > 5)} for step in range(1, 20)]
    assert scores(BY_NAME["entropy rise"], flat) == {}
    assert scores(BY_NAME["temporal KL jump"], flat) == {}


VALUE = st.one_of(st.none(), st.floats(0, 100))
RUN_LINES = st.lists(st.tuples(VALUE, VALUE, VALUE, VALUE, VALUE), max_size=40).map(
    lambda rows: [
        {"step": step}
        | {
            key: value
            for key, value in zip(
                ("length/mean", "length/max", "policy/entropy", "distill/divergence"),
                row,
                strict=False,
            )
            if value is not None
        }
        for step, row in enumerate(rows, start=1)
    ]
)


@given(RUN_LINES, st.integers(0, 40))
def test_no_score_uses_the_future(lines: list[dict[str, Any]], end: int) -> None:
    for diagnostic in DIAGNOSTICS:
        whole = scores(diagnostic, lines)
        assert scores(diagnostic, lines[:end]) == {s: v for s, v in whole.items() if s <= end}


# ---------------------------------------------------------------- a forecast by hand


def test_a_forecast_by_hand() -> None:
    """Entropy steps up; the 5-step mean then rises by a fifth of the step's height per step."""
    runs = [
        run("early", step_up(12, 2.0), collapse_step=30),  # 0.2, 0.4, ... 1 from step 16 on
        run("late", step_up(25, 2.0), collapse_step=32),  # horizon 27: up to 0.6
        run("silent", step_up(28, 9.0), collapse_step=32),  # rises one step after the horizon
        run("calm", step_up(1, 1.0)),
        run("noisy", step_up(30, 1.5)),  # up to 0.5
    ]
    found = judged(runs)
    assert (found.row["collapsed runs"], found.row["stable runs"]) == (3, 2)
    # Pairs won: early and late beat both; silent ties with calm (both 0) and loses to noisy.
    assert found.row["AUC"] == (2 + 2 + 0.5) / 6
    # With two stable runs, at most 10 % false alarms means none.
    assert found.row["threshold"] == pytest.approx(0.5)
    assert rates(found) == (2 / 3, 0.0)
    alarms = {alarm.run: (alarm.alarm_step, alarm.lead) for alarm in found.alarms}
    assert alarms == {
        "early": (14, 16),
        "late": (27, 5),
        "silent": (None, None),
        "calm": (None, None),
        "noisy": (None, None),
    }
    # Without noisy the threshold is 0, which late still exceeds; without calm it stays 0.5.
    assert held_out(found) == (2 / 3, 1 / 2)
    assert found.roc == [
        (pytest.approx(1.0), 0, 0),
        (pytest.approx(0.6), 0, 1 / 3),
        (pytest.approx(0.5), 0, 2 / 3),
        (0.0, 1 / 2, 2 / 3),
        (-math.inf, 1, 1),
    ]
    row = found.row
    assert (row["lead median"], row["lead min"], row["lead max"]) == (10.5, 5, 16)
    assert row["missed collapses"] == 1 and row["AUC"] == 0.75


def test_an_alarm_that_subsides_does_not_stand() -> None:
    """Three of a window's five steps must be high: steps 14 to 18, and again from 27 on."""
    high = {*range(12, 17), *range(25, 41)}
    lull = [2.0 if step in high else 1.0 for step in range(1, 41)]
    fluke = [2.0 if step in range(12, 17) else 1.0 for step in range(1, 41)]
    found = judged([run("lull", lull, 40), run("fluke", fluke, 40), run("s", step_up(30, 1.5))])
    alarms = [(alarm.alarm_step, alarm.standing_step) for alarm in found.alarms]
    assert alarms == [(14, 27), (14, None), (None, None)]
    row = found.row
    assert (row["lead median"], row["standing lead median"], row["standing alarms"]) == (26, 13, 1)


def test_alarms_in_the_detectors_window_do_not_count() -> None:
    stable = run("stable", step_up(1, 1.0))
    for detector_steps, lead in ((5, None), (4, 4), (1, 4)):
        late = run("late", step_up(26, 2.0), 30, detector_steps=detector_steps)
        assert horizon(late) == 30 - detector_steps
        (alarm, _) = judged([late, stable]).alarms
        assert alarm.lead == lead


def test_ten_stable_runs_allow_one_false_alarm() -> None:
    stable = [run(f"s{i}", step_up(20, 1 + i / 10)) for i in range(10)]
    found = judged([run("c", step_up(20, 1.85), 39), *stable])
    assert found.row["threshold"] == pytest.approx(0.8)
    assert rates(found) == (1.0, 0.1)
    falsely = [alarm.run for alarm in found.alarms if alarm.alarm_step and alarm.lead is None]
    assert falsely == ["s9"]


def test_held_out_rates_leave_out_whole_groups() -> None:
    def study(groups: list[str]) -> list[Run]:
        highs = [1.0, 1.1, 1.5, 1.6]
        runs = [
            run(f"s{i}", step_up(20, h), None, g)
            for i, (h, g) in enumerate(zip(highs, groups, strict=True))
        ]
        return [run("c", step_up(20, 1.3), 40, "fast"), *runs]

    # Alone, only the highest run is above the other three.
    assert held_out(judged(study(["a", "b", "c", "d"])))[1] == 1 / 4
    # As two schedules with two seeds each, both runs of the noisy schedule are above the calm.
    assert held_out(judged(study(["a", "a", "b", "b"])))[1] == 2 / 4
    # Of one schedule only, nothing remains to choose a threshold on.
    assert held_out(judged(study(["a", "a", "a", "a"]))) == (None, None)


def test_a_collapse_before_the_first_score_is_missed_and_not_left_out() -> None:
    found = judged([run("c", [1.0] * 12, 12), run("s", step_up(20, 0.5))])
    assert found.row["collapsed runs"] == 1
    assert found.row["detection rate"] == 0 and found.row["AUC"] == 0
    assert found.alarms[0].score == -math.inf


def test_runs_without_the_metric_are_left_out_and_named() -> None:
    runs = [run("c", step_up(20, 2.0), 40), run("s", step_up(20, 1.0))]
    result = announced(runs)
    assert [d.diagnostic.name for d in result.diagnostics] == ["entropy rise", "entropy fall"]
    assert "temporal KL rise: no run with a score (distill/divergence)" in result.notes
    bare = record("bare", [{"step": 1, "reward/mean": 0.5}])
    assert judged([*runs, bare]).row["stable runs"] == 1
    lone = announced([runs[0], bare])
    assert lone.diagnostics == ()
    assert "entropy rise: no stable run with a score (policy/entropy)" in lone.notes


def test_without_both_kinds_there_are_no_numbers() -> None:
    collapsed, stable = run("c", step_up(20, 2.0), 40), run("s", step_up(20, 1.0))
    for runs, said in (
        ([], "no run"),
        ([stable, stable], "no run collapsed"),
        ([collapsed], "every run collapsed"),
    ):
        result = announced(runs)
        assert result.diagnostics == ()
        assert len(result.notes) == 1 and result.notes[0].startswith(f"{said}: ")


def test_only_the_criterion_itself_is_marked_as_leaking() -> None:
    assert [d.name for d in DIAGNOSTICS if d.leaks] == ["mean length"]


# ---------------------------------------------------------------- ROC and AUC

# Few distinct values, so that ties are common.
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_auc_is_the_mann_whitney_statistic(collapsed: list[float], stable: list[float]) -> None:
    statistic = mannwhitneyu(collapsed, stable).statistic
    assert auc(collapsed, stable) == pytest.approx(statistic / len(collapsed) / len(stable))
    assert auc(collapsed, stable) + auc(stable, collapsed) == pytest.approx(1)


HEIGHTS = st.lists(st.integers(1, 6).map(float), min_size=1, max_size=6)


@pytest.mark.slow
@given(HEIGHTS, HEIGHTS)
def test_the_roc_rises_and_its_area_is_the_auc(high: list[float], low: list[float]) -> None:
    found = judged(
        [run(f"c{i}", step_up(20, h), 40) for i, h in enumerate(high)]
        + [run(f"s{i}", step_up(20, h)) for i, h in enumerate(low)]
    )
    _, false, detected = map(list, zip(*found.roc, strict=True))
    assert false == sorted(false) and detected == sorted(detected)
    assert (false[0], detected[0], false[-1], detected[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(detected, false) == pytest.approx(found.row["AUC"])
    rate, false_alarm_rate = rates(found)
    assert false_alarm_rate <= 0.1
    # No other threshold detects more at as few false alarms.
    assert rate == max(detection for _, alarms, detection in found.roc if alarms <= 0.1)


@given(HEIGHTS, HEIGHTS, st.sampled_from([math.sqrt, math.exp, lambda x: 3 * x - 7]))
def test_monotone_transforms_change_no_area(
    high: list[float], low: list[float], transform: Any
) -> None:
    assert auc([transform(x) for x in high], [transform(x) for x in low]) == auc(high, low)


@pytest.mark.slow
@given(HEIGHTS, HEIGHTS, st.sampled_from([0.25, 2.0, 1024.0]))
def test_a_relative_forecast_has_no_unit(high: list[float], low: list[float], unit: float) -> None:
    """Entropy in bits instead of nats announces the same collapses at the same steps."""

    def study(scale: float) -> DiagnosticForecast:
        return judged(
            [run(f"c{i}", [scale * e for e in step_up(20, h)], 40) for i, h in enumerate(high)]
            + [run(f"s{i}", [scale * e for e in step_up(20, h)]) for i, h in enumerate(low)]
        )

    assert study(unit) == study(1.0)


# ---------------------------------------------------------------- the interval


def test_the_interval_solves_its_equation() -> None:
    """|AUC − θ| = 1.96 se(θ), with Hanley's and McNeil's Q1 and Q2 written out. For equal groups
    the balanced standard error is theirs exactly."""
    z = 1.959964
    for area, runs in ((0.5, 4), (0.7, 10), (0.95, 25), (1.0, 3)):
        low, high = auc_interval(area, runs, runs)
        for theta in (low, high):
            if theta in (0.0, 1.0):
                continue
            q1, q2 = theta / (2 - theta), 2 * theta**2 / (1 + theta)
            variance = theta * (1 - theta) + (runs - 1) * (q1 + q2 - 2 * theta**2)
            assert abs(area - theta) == pytest.approx(z * math.sqrt(variance) / runs, rel=1e-6)
    assert auc_interval(1.0, 3, 3)[1] == 1.0 and auc_interval(0.0, 3, 3)[0] == 0.0


def test_with_one_run_each_it_is_wilsons_interval_of_one_trial() -> None:
    z2 = 1.959964**2
    assert auc_interval(1.0, 1, 1) == (pytest.approx(1 / (1 + z2)), 1.0)
    assert auc_interval(0.0, 1, 1) == (0.0, pytest.approx(z2 / (1 + z2)))


@pytest.mark.slow
@given(st.floats(0, 1), st.integers(1, 40), st.integers(1, 40))
def test_the_interval_holds_the_area_and_mirrors(area: float, m: int, n: int) -> None:
    low, high = auc_interval(area, m, n)
    assert 0 <= low <= area <= high <= 1 and low < high
    mirrored = auc_interval(1 - area, m, n)
    assert mirrored == (pytest.approx(1 - high, abs=1e-9), pytest.approx(1 - low, abs=1e-9))


def test_the_interval_covers() -> None:
    """Normal scores 1 apart: the true area is Φ(1/√2) = 0.760. 8 and 12 runs, 2,000 studies."""
    rng = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(0.5))
    covered = 0
    for _ in range(2000):
        area = auc(rng.normal(1, 1, 8).tolist(), rng.normal(0, 1, 12).tolist())
        low, high = auc_interval(area, 8, 12)
        covered += low <= truth <= high
    assert 0.93 <= covered / 2000 <= 0.985
