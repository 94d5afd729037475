"""Runs and groups: series, the length tail, and what they are called."""

from pathlib import Path
from typing import Any

import pytest
from synthetic import lab_run, write_study

from sodfast.config import CGTRConfig, EMAConfig, FixedConfig, HardConfig, TrustRegionConfig
from sodfast.report.load import load
from sodfast.report.runs import Run, describe_schedule


def run_of(lines: list[dict[str, Any]], *overrides: str) -> Run:
    return Run("run", Path("run"), lab_run(*overrides), "done", {}, lines, [])


def test_names_that_would_be_the_same_are_written_out(tmp_path: Path) -> None:
    axes = {"optimizer.lr": [1e-5, 1e-4], "rollout.temperature": [0.6, 1.0]}
    overrides = {"steps": 1}
    write_study(tmp_path / "s", {"base": "lab", "overrides": overrides, "axes": axes})
    source = load(tmp_path / "s")
    labels = [group.label for group in source.groups]
    assert source.baseline == "optimizer.lr=1e-05"  # of two groups, one for each temperature
    assert labels[0] == "lr 1e-05, temperature 0.6" and len(set(labels)) == 4


def test_a_series_holds_the_steps_that_carry_it() -> None:
    found = run_of([{"step": 0}, {"step": 1, "x": 2}, {"step": 2}, {"step": 3, "x": 4}]).series("x")
    assert (found.steps.tolist(), found.values.tolist()) == ([1, 3], [2, 4])


@pytest.mark.parametrize("unit", ["sequence", "shard"])
def test_the_tail_is_the_one_that_the_gate_sees(unit: str) -> None:
    """Pooled over the window, over fewer steps at the beginning, in the schedule's unit."""
    prefix = "length/shard_" if unit == "shard" else "length/"
    means, longest = [10.0, 20.0, 30.0], [30.0, 20.0, 60.0]
    lines: list[dict[str, Any]] = [
        {"step": step, f"{prefix}mean": mean, f"{prefix}max": most}
        for step, (mean, most) in enumerate(zip(means, longest, strict=True), start=1)
    ]
    found = run_of(lines, "schedule.window=2", f"schedule.length_unit={unit}").tail()
    assert found.values.tolist() == [3.0, 2.0, 60 / 25]
    assert run_of([{"step": 0}]).tail().values.size == 0


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (FixedConfig(), "fixed"),
        (HardConfig(every=3), "hard, every 3"),
        (EMAConfig(rate=0.1), "EMA 0.1"),
        (TrustRegionConfig(), "trust region 0.04"),
        (CGTRConfig(), "CGTR"),
        (CGTRConfig(gates=("isolation", "length")), "CGTR, no reward gate"),
        (
            CGTRConfig(min_isolation=20, max_tail_ratio=4),
            "CGTR, min_isolation 20, max_tail_ratio 4.0",
        ),
    ],
)
def test_schedules_have_short_names(schedule: Any, name: str) -> None:
    assert describe_schedule(schedule) == name
