"""Spike ratios and the summary against numbers worked out by hand."""

from collections.abc import Sequence
from typing import Any

import pytest

from sodfast.config import load_config
from sodfast.summary import lasting_steps, spike_ratios, summarize, summarize_fork

# ---------------------------------------------------------------- temporal KL


def divergences(
    steps: int, refreshes: Sequence[int], missing: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Step t has divergence t, but for `missing`; line 0 is an evaluation only."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@4": 0.5}]
    for step in range(1, steps + 1):
        line: dict[str, Any] = {"step": step, "teacher/refreshed": int(step in refreshes)}
        if step not in missing:
            line["distill/divergence"] = float(step)
        lines.append(line)
    return lines


def ratio(step: int) -> float:
    """With divergence t at step t: mean of step+1 … step+5 over mean of step−4 … step."""
    return (step + 3) / (step - 2)


def test_spike_ratio() -> None:
    assert spike_ratios(divergences(20, [10])) == {10: pytest.approx(13 / 8)}
    assert spike_ratios(divergences(20, [])) == {}
    assert spike_ratios([]) == {}


@pytest.mark.parametrize(
    ("other", "kept"),
    [(14, True), (15, True), (16, False), (19, False), (21, False), (25, False), (26, True)],
)
def test_a_refresh_with_another_inside_its_ten_steps_is_left_out(other: int, kept: bool) -> None:
    """Refreshes at 20 and `other`: the ten steps of 20 are 16 … 25."""
    ratios = spike_ratios(divergences(40, [20, other]))
    assert (20 in ratios) == kept
    if kept:
        assert ratios[20] == pytest.approx(ratio(20))


def test_a_refresh_with_fewer_than_ten_known_steps_is_left_out() -> None:
    assert list(spike_ratios(divergences(30, [5, 25]))) == [5, 25]
    assert list(spike_ratios(divergences(30, [4, 26]))) == []
    for missing in (16, 20, 21, 25):
        assert spike_ratios(divergences(40, [20], missing=[missing])) == {}
    for missing in (15, 26):
        assert list(spike_ratios(divergences(40, [20], missing=[missing]))) == [20]


def test_a_refresh_after_no_divergence_at_all_has_no_ratio() -> None:
    lines = [
        {"step": step, "teacher/refreshed": int(step == 5), "distill/divergence": 0.0}
        for step in range(1, 12)
    ]
    assert spike_ratios(lines) == {}


# ---------------------------------------------------------------- summary


def test_summarize() -> None:
    lines = divergences(12, [6])
    lines[5] |= {"policy/entropy": 0.5, "eval/mean@4": 0.8}
    lines[10] |= {"policy/entropy": 0.75, "eval/mean@4": 0.8}
    lines[12] |= {"policy/entropy": 1.0, "eval/mean@4": 0.7}
    assert summarize(lines, eval_samples=4) == {
        "steps": 12,
        "final": 0.7,
        "peak": 0.8,
        "peak_step": 5,  # the first of equals
        "refresh_steps": [6],
        "entropy_mean": 0.75,
        "entropy_final": 1.0,
        "spike_ratios": {"6": pytest.approx(9 / 4)},
    }


def test_summarize_leaves_out_what_is_undefined() -> None:
    assert summarize([], 4) == {"steps": 0, "refresh_steps": [], "spike_ratios": {}}
    only_start = summarize([{"step": 0, "eval/mean@4": 0.25}], 4)
    assert (only_start["final"], only_start["peak"], only_start["peak_step"]) == (0.25, 0.25, 0)
    assert "entropy_mean" not in only_start
    assert "final" not in summarize([{"step": 0, "eval/mean@16": 0.25}], 4)


# ---------------------------------------------------------------- forks


def test_what_a_fork_had_come_to_and_what_followed() -> None:
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@4": 0.5}]
    for step in range(1, 91):
        copied = step == 50
        line = {"step": step, "reward/mean": step / 100, "length/mean": 2.0 * step}
        line |= {"length/tail_ratio": 1 + step / 10, "teacher/refreshed": int(copied)}
        line |= {"teacher/age": step if step <= 50 else step - 50, "teacher/drift": step / 7}
        lines.append(line)
    assert summarize_fork(lines, 20) == pytest.approx(
        {
            "fork_age": 20,
            "fork_drift": 20 / 7,
            "fork_tail": 1 + 15.5 / 10,  # steps 11 to 20
            "reward_next30": 0.355,  # steps 21 to 50
            "length_next30": 71.0,
        }
    )
    # The source's own copy comes before the fork, whose teacher then is its student.
    assert summarize_fork(lines, 50).items() >= {"fork_age": 0, "fork_drift": 0}.items()
    # Near the end there are fewer steps, and at the very end none.
    assert summarize_fork(lines, 80)["reward_next30"] == pytest.approx(0.855)
    assert summarize_fork(lines, 90).keys() == {"fork_age", "fork_drift", "fork_tail"}
    assert summarize_fork(lines[:1], 0) == {}


# ---------------------------------------------------------------- checkpoints that stay


def test_named_steps_and_the_best_evaluation_last() -> None:
    """Beside the best of all, the best of the evaluations that a longer run would have, too."""
    keys = ["eval.every=2", "eval.samples=1", "checkpoint.at=[1]"]
    scores = {0: 0.1, 2: 0.6, 4: 0.6, 5: 0.9}  # the run ends at 5, where none is due otherwise
    lines: list[dict[str, Any]] = [{"step": step} for step in range(6)]
    for step, score in scores.items():
        lines[step]["eval/mean@1"] = score
    assert lasting_steps(load_config("lab", keys), lines) == {1}
    best = load_config("lab", [*keys, "checkpoint.best=true"])
    assert lasting_steps(best, lines) == {1, 2, 5}
    assert lasting_steps(best, lines[:5]) == {1, 2}
    assert lasting_steps(best, []) == {1}
