"""Effects of refreshes on made-up runs whose effects are known."""

from typing import Any

import numpy as np
import pytest

from sodfast.attribution import _reward, collapse_origin, effect, refresh_effects

Lines = list[dict[str, Any]]


def run(
    jump: float = 0.0, growth: float = 1.0, at: int = 60, steps: int = 120, seed: int = 1
) -> Lines:
    """A reward on a slope, which jumps after `at`, where lengths grow by a factor."""
    noise = np.random.default_rng(seed).normal(0, 0.01, steps + 1)
    lines: Lines = [{"step": 0, "eval/mean@4": 0.3}]
    for step in range(1, steps + 1):
        late = step > at
        reward = 0.3 + 0.001 * step + noise[step] + jump * late
        length = 12 * (1 + noise[-step]) * (growth if late else 1.0)
        lines.append({"step": step, "reward/mean": reward, "length/mean": length})
    return lines


def refreshes(*steps: int) -> Lines:
    return [{"step": step, "event": "refresh", "shock": 1.0} for step in steps]


@pytest.mark.parametrize(
    ("jump", "growth", "verdict"),
    [
        (0.1, 1.0, "corrective"),
        (0.1, 1.5, "corrective"),
        (0.0, 1.0, "neutral"),
        (0.0, 0.7, "neutral"),
        (0.0, 1.5, "contaminating"),
        (-0.1, 1.0, "contaminating"),
        (-0.1, 0.7, "contaminating"),
    ],
)
def test_what_a_refresh_did(jump: float, growth: float, verdict: str) -> None:
    (found,) = refresh_effects(run(jump, growth), refreshes(60))
    assert found.step == 60 and found.verdict == verdict
    assert found.reward is not None and found.length is not None
    assert found.reward.low < jump < found.reward.high
    assert found.length.low < np.log(growth) < found.length.high


def test_the_trend_of_the_run_is_no_effect_and_intervals_hold_their_level() -> None:
    inside = 0
    for seed in range(300):
        found = effect(run(seed=seed), 60, _reward)
        assert found is not None and found.change == pytest.approx(0, abs=0.04)
        inside += found.low <= 0 <= found.high
    assert inside / 300 == pytest.approx(0.95, abs=0.035)


def test_a_neighbouring_refresh_bounds_what_is_looked_at() -> None:
    lines = run(jump=0.2)
    # From 60 on there is the jump; a refresh at 50 sees ten steps after it and none of the jump.
    first, second = refresh_effects(lines, refreshes(50, 60))
    assert first.verdict == "neutral" and second.verdict == "corrective"
    few = refresh_effects(lines, refreshes(57, 60))
    assert [one.verdict for one in few] == [None, None]
    assert refresh_effects(lines, refreshes(118))[0].reward is None
    assert refresh_effects(lines, []) == []
    assert refresh_effects([], refreshes(5))[0].verdict is None


@pytest.mark.parametrize(
    ("jump", "steps", "origin"),
    [
        (0.0, [10, 20, 30, 40, 50, 60], "fast clock"),
        (-0.2, [60], "contaminating refresh"),
        (-0.2, [10, 60], "contaminating refresh"),
        (0.0, [60], "none"),
        (0.1, [60], "none"),
        (0.0, [], "none"),
    ],
)
def test_what_a_collapse_came_from(jump: float, steps: list[int], origin: str) -> None:
    lines, moves = run(jump), refreshes(*steps)
    collapse = {"step": 100, "event": "collapse", "reason": "length"}
    assert collapse_origin(lines, [*moves, collapse]) == origin
    assert collapse_origin(lines, moves) is None


def test_a_refresh_long_before_or_after_the_collapse_is_not_blamed() -> None:
    late = {"step": 115, "event": "collapse", "reason": "length"}
    assert collapse_origin(run(-0.2), [*refreshes(60), late]) == "none"
    early = {"step": 50, "event": "collapse", "reason": "length"}
    assert collapse_origin(run(-0.2), [early, *refreshes(60)]) == "none"
