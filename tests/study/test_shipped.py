"""The shipped studies: each expands, says what it asks and costs, and is listed in their README."""

import re
from functools import cache
from pathlib import Path

import pytest
from marks import slow

from sodfast.config import ArithmeticConfig, HardConfig
from sodfast.study.definition import STUDIES, Study, load_study

FILES = sorted(STUDIES.glob("*.yaml"))
README = (STUDIES / "README.md").read_text()
# `study` | question | in the paper | runs × steps of _lab | its time | runs × steps of _qwen3_8b
ROW = re.compile(r"^\| `(\w+)` \|.*\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
LISTED = {
    f"{name}_{model}": cost
    for name, *costs in ROW.findall(README)
    for model, cost in zip(("lab", "qwen3_8b"), costs, strict=True)
    if cost != "–"
}


@cache
def shipped(name: str) -> Study:
    return load_study(STUDIES / f"{name}.yaml")


def test_the_readme_lists_every_study() -> None:
    assert set(LISTED) == {path.stem for path in FILES}


LAB = [path for path in FILES if path.stem.endswith("_lab")]
LARGE = [path for path in FILES if path not in LAB]


@pytest.mark.parametrize("path", [*LAB[:1], *slow(*LAB[1:], *LARGE)], ids=lambda path: path.stem)
def test_a_study_expands_to_what_it_says(path: Path) -> None:
    study = shipped(path.stem)
    trials = study.trials
    (steps,) = {trial.config.steps - (trial.fork.step if trial.fork else 0) for trial in trials}
    cost = f"{len(trials)} {'forks' if study.fork else 'runs'} × {steps} steps"
    assert LISTED[path.stem] == cost
    comment = " ".join(
        line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")
    )
    question, _, rest = comment.partition("? ")
    assert question and "The paper: " in rest and f"Cost: {cost}, " in rest
    if study.fork is None:
        assert "schedule" in study.axes and len(study.axes["seed"]) >= 3
    for trial in [*study.sources, *trials]:
        on_lab = trial.config.model.path is None
        assert on_lab == path.stem.endswith("_lab")
        assert on_lab == isinstance(trial.config.task, ArithmeticConfig)
        assert on_lab or (trial.config.log.samples_every or 0) >= 100  # a gigabyte in each run


def test_the_main_study_has_six_schedules_and_five_seeds() -> None:
    axes = shipped("schedules_lab").axes
    assert len(axes["schedule"]) >= 6 and len(axes["seed"]) >= 5


@pytest.mark.slow
def test_the_headline_has_ten_runs_a_schedule_on_two_warm_starts() -> None:
    trials = shipped("headline_lab").trials
    kinds = [trial.config.schedule.model_dump_json() for trial in trials]
    assert {kinds.count(kind) for kind in kinds} == {10} and len(set(kinds)) == 7
    assert {trial.config.lab.seed for trial in trials} == {0, 1}
    regimes = [
        study.overrides for study in map(shipped, ("headline_lab", "forks_lab", "burst_lab"))
    ]
    keys = ("optimizer.lr", "lab.stubborn", "objective.distill_coef", "task.test", "eval.samples")
    assert len({tuple(regime[key] for key in keys) for regime in regimes}) == 1


def test_a_burst_ends_at_a_tick_of_one_clock_and_of_no_other() -> None:
    ends = set()
    for trial in shipped("burst_lab").trials:
        burst, schedule = trial.config.optimizer.lr_burst, trial.config.schedule
        if burst is not None and isinstance(schedule, HardConfig):
            inside = [s for s in range(burst.first, burst.last + 1) if s % schedule.every == 0]
            assert inside in ([], [burst.last])
            ends |= {(schedule.every, step) for step in inside}
    assert ends == {(50, 100)}


@pytest.mark.slow
def test_the_forks_are_pairs_that_differ_in_the_refresh_alone() -> None:
    study = shipped("forks_lab")
    pairs: dict[tuple[str, ...], set[str]] = {}
    for trial in study.trials:
        point = dict(trial.point)
        refresh = point.pop("teacher.refresh")
        pairs.setdefault((*point.values(), trial.config.to_yaml()), set()).add(refresh)
    assert len(pairs) == 20 and all(arms == {"now", "never"} for arms in pairs.values())
    # No fork has the random numbers of its source, and no two sources have the same ones.
    seeds = [source.config.seed for source in study.sources]
    assert len({*seeds}) == len(seeds) and not {*seeds} & {t.config.seed for t in study.trials}


def test_the_ablation_drops_each_gate_once() -> None:
    for name in ("gate_ablation_lab", "gate_ablation_qwen3_8b"):
        trials = shipped(name).trials
        gates = {"isolation", "reward", "length"}
        dropped = {tuple(gates - set(trial.config.schedule.gates)) for trial in trials}
        assert dropped == {(), ("isolation",), ("reward",), ("length",)}


def test_the_sensitivity_study_moves_one_threshold_at_a_time() -> None:
    trials = shipped("sensitivity_qwen3_8b").trials
    points = {
        (s.min_isolation, s.reward_margin, s.max_tail_ratio)
        for s in (trial.config.schedule for trial in trials)
    }
    centre = (30, 0.05, 3.2)
    assert points == {
        centre,
        *((value, *centre[1:]) for value in (20, 40)),
        *((30, value, 3.2) for value in (0.02, 0.1)),
        *((30, 0.05, value) for value in (2.8, 4.0)),
    }


@pytest.mark.slow
def test_the_refresh_sweep_has_the_papers_schedules() -> None:
    for name in ("refresh_sweep_lab", "refresh_sweep_qwen3_8b"):
        schedules = shipped(name).axes["schedule"]
        assert [s["every"] for s in schedules if s["kind"] == "hard"] == [
            *(1, 2, 3, 4, 5, 8, 10, 20, 50)
        ]
        assert [s["rate"] for s in schedules if s["kind"] == "ema"] == [0.1, 0.04]
        assert {"fixed", "cgtr"} <= {s["kind"] for s in schedules}
