"""What refreshes did: on runs whose effects are known, and on real forks of a tiny run."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import lab_run

from sodfast.commands import train_fork
from sodfast.report.effects import attributed, fork_effects, fork_rows, mean_with_interval
from sodfast.report.load import load
from sodfast.report.page import write_report
from sodfast.report.runs import Group, Run
from sodfast.study.definition import load_study
from sodfast.study.directory import run_path
from sodfast.summary import NEXT_STEPS


def run_of(
    name: str,
    jump: float = 0.0,
    growth: float = 1.0,
    events: tuple[dict[str, Any], ...] = (),
    seed: int = 0,
    lab: int = 0,
) -> Run:
    """120 steps at reward 0.5 and length 10, which change after step 60; a little regular noise."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@16": 0.3}]
    for step in range(1, 121):
        late, noise = step > 60, 0.01 * (-1) ** (step // 2)
        reward = 0.5 + noise + jump * late
        length = 10.0 * (1 + noise) * (growth if late else 1.0)
        lines.append({"step": step, "reward/mean": reward, "length/mean": length})
        lines[-1] |= {"length/max": 3 * length, "length/tail_ratio": 3.0, "teacher/refreshed": 0}
        lines[-1] |= {"teacher/age": 9, "teacher/drift": 0.7}
    lines[-1]["eval/mean@16"] = 0.6 + jump
    config = lab_run("steps=120", f"seed={seed}", f"lab.seed={lab}")
    return Run(name, Path(name), config, "done", {}, lines, list(events))


def refresh(step: int) -> dict[str, Any]:
    return {"event": "refresh", "step": step, "shock": 0.7, "age": 9}


def fork(step: int = 60, source: str = "/runs/one") -> dict[str, Any]:
    return {"event": "fork", "step": step, "source": source}


def group(*runs: Run, baseline: Group | None = None) -> Group:
    return Group(runs[0].name, runs, runs, baseline)


def pair(
    effect: float, growth: float = 1.0, seed: int = 0, source: str = "/runs/one", lab: int = 0
) -> tuple[Run, Run]:
    """Two forks at step 60, of which the refreshed one is better by `effect`."""
    began = fork(source=source)
    now = run_of("now", effect, growth, (refresh(40), began, refresh(60)), seed, lab)
    return now, run_of("never", 0.0, 1.0, (refresh(40), began), seed, lab)


def test_a_mean_has_an_interval_where_there_are_two_values() -> None:
    found = mean_with_interval("x", [0.1, None, 0.3])
    half = 0.1 * math.tan(0.475 * math.pi)  # Student's, of one degree of freedom
    assert found == {
        "x": pytest.approx(0.2),
        "x_low": pytest.approx(0.2 - half),
        "x_high": pytest.approx(0.2 + half),
    }
    assert mean_with_interval("x", [0.1, None]) == {"x": 0.1, "x_low": None, "x_high": None}
    assert mean_with_interval("x", []) == {"x": None, "x_low": None, "x_high": None}


def test_a_groups_refreshes_are_counted_by_verdict_and_compared_with_a_teacher_at_rest() -> None:
    still = group(run_of("fixed", 0.2), run_of("fixed", 0.2, seed=1))
    good = [run_of("cgtr", 0.3, events=(refresh(60),), seed=seed) for seed in range(2)]
    row = attributed(group(*good, baseline=still))
    assert (row["refreshes"], row["judged"], row["corrective"], row["neutral"]) == (2, 2, 2, 0)
    assert row["reward"] == pytest.approx(0.3, abs=0.02)
    # The run without a refresh rose by 0.2 at the same step: only the rest is the refresh's.
    assert row["excess"] == pytest.approx(0.1, abs=0.001)
    assert row["excess_low"] == pytest.approx(row["excess_high"])
    longer = run_of("cgtr", 0.0, 1.5, (refresh(60),))
    row = attributed(group(longer))
    assert (row["contaminating"], row["excess"]) == (1, None)
    assert row["length"] == pytest.approx(math.log(1.5), abs=0.02)


def test_a_refresh_after_the_collapse_is_not_judged() -> None:
    end = {"event": "collapse", "step": 55}
    row = attributed(group(run_of("hard", 0.3, events=(refresh(30), end, refresh(60)))))
    assert (row["refreshes"], row["judged"], row["neutral"]) == (2, 1, 1)


def test_collapses_are_counted_by_origin() -> None:
    end = {"event": "collapse", "step": 100}
    clock = run_of("hard", events=(*map(refresh, range(1, 100)), end))
    harmed = run_of("hard", -0.3, events=(refresh(60), end), seed=1)
    row = attributed(group(clock, harmed, run_of("hard", seed=2)))
    assert row["origin: fast clock"] == row["origin: contaminating refresh"] == 1
    assert (row["origin: none"], row["refreshes"], row["judged"]) == (0, 100, 1)


def test_forks_are_paired_by_source_step_and_seeds() -> None:
    pairs = [
        *[pair(0.1, 1.2, seed) for seed in range(2)],
        pair(0.3, seed=1, source="/runs/two"),
        pair(0.2, lab=1),
    ]
    lonely, _ = pair(0.9, seed=7)
    groups = [
        group(*[now for now, _ in pairs], lonely),
        group(*[never for _, never in reversed(pairs)], run_of("no fork")),
    ]
    rows = fork_rows(groups)
    keys = [(row["run"], row["step"], row["seed"], row["lab_seed"]) for row in rows]
    assert keys == [("one", 60, 0, 0), ("one", 60, 1, 0), ("one", 60, 0, 1), ("two", 60, 1, 0)]
    assert [row["reward"] for row in rows] == pytest.approx([0.1, 0.1, 0.2, 0.3])
    assert rows[0]["length"] == pytest.approx(math.log(1.2)) and rows[0]["score"] > 0
    assert (rows[0]["age"], rows[0]["drift"]) == (9, 0.7)
    assert rows[0]["tail"] == 3.0


def test_an_effect_is_over_the_steps_that_follow() -> None:
    """Later steps do not count, and neither does a refresh that the source had made before."""
    now, never = pair(0.1)
    for line in now.lines:
        if line["step"] > 60 + NEXT_STEPS:
            line["reward/mean"] = 0.0
    (row,) = fork_rows([group(now), group(never)])
    assert row["reward"] == pytest.approx(0.1)
    once = run_of("x", 0.4, events=(refresh(60), fork()))  # the source's own refresh
    (row,) = fork_rows([group(now), group(once)])
    assert row["reward"] == pytest.approx(0.1 - 0.4)


def test_means_of_forks_are_over_cells_by_step_and_in_thirds() -> None:
    pairs = [pair(0.1 * seed, seed=seed) for seed in range(6)]
    rows = fork_rows([group(*[now for now, _ in pairs]), group(*[never for _, never in pairs])])
    for index, row in enumerate(rows):
        row["drift"] = float(index)  # type: ignore[index]
        row["run"] = f"source {index // 2}"  # type: ignore[index]
    found = [*fork_effects(rows)]
    whole = found[0]
    assert (whole["by"], whole["n"], whole["cells"]) == ("all", 6, 3)
    assert whole["reward"] == pytest.approx(0.25)
    # The two seeds of a source count once: 0.05, 0.25 and 0.45, with t(2) = 4.303.
    half = 4.302653 * 0.2 / math.sqrt(3)
    assert whole["reward_low"] == pytest.approx(0.25 - half)
    assert whole["reward_high"] == pytest.approx(0.25 + half)
    thirds = [row for row in found if row["by"] == "drift"]
    assert [(row["from"], row["to"], row["n"]) for row in thirds] == [
        (0, 1, 2),
        (2, 3, 2),
        (4, 5, 2),
    ]
    assert [row["reward"] for row in thirds] == pytest.approx([0.05, 0.25, 0.45])
    assert [row["n"] for row in found if row["by"] == "age"] == [6]  # all of one age: no thirds
    assert [*fork_effects([])] == []


@pytest.mark.slow
def test_a_study_of_real_forks(train: Any, tiny_run: list[str], tmp_path: Path) -> None:
    """What `sodfast fork` leaves is read as it is meant; arms that are the same have no effect."""
    fixed = dict(text.split("=", 1) for text in tiny_run if not text.startswith("steps="))
    study = {
        "base": "lab",
        "overrides": {key: yaml.safe_load(text) for key, text in fixed.items()},
        "fork": {"from": {"schedule": {"kind": "fixed"}}, "step": [2, 4], "further": 3},
        "axes": {"teacher.refresh": ["now", "never"], "seed": [1, 2]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    plan = load_study(tmp_path / "study.yaml")
    (source,) = plan.sources
    train(run_path(tmp_path, source.name), *source.overrides)
    for trial in plan.trials:
        out = run_path(tmp_path, trial.name)
        train_fork(run_path(tmp_path, source.name), [f"out={out}", *trial.overrides])
    write_report(tmp_path)
    with (tmp_path / "tables" / "forks.csv").open() as stream:
        rows = [*csv.DictReader(stream)]
    assert [(row["step"], row["seed"], row["age"]) for row in rows] == [
        (step, seed, step) for step in "24" for seed in "12"
    ]
    runs = {run.name: run for run in load(tmp_path).runs}
    for row in rows:
        assert row["run"] == source.name and float(row["drift"]) > 0
        arms = [
            runs[f"step{row['step']},refresh-{arm},seed{row['seed']}"] for arm in ("now", "never")
        ]
        after = [run.series("reward/mean").values[int(row["step"]) :] for run in arms]
        assert float(row["reward"]) == pytest.approx(after[0].mean() - after[1].mean())
    assert (tmp_path / "figures" / "forks.svg").is_file()
    same = [run for run in runs.values() if "never" in run.name]
    assert fork_rows([group(*same), group(*same)]) == []
