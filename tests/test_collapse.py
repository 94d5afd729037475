"""Collapse by its definition: which step counts as the first, and that a resume changes none."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sodfast.collapse import CollapseDetector, SignalWatch
from sodfast.config import CollapseConfig


def detector(**keys: Any) -> CollapseDetector:
    return CollapseDetector(CollapseConfig(**keys), max_new_tokens=100, eval_samples=4)


def observe(collapse: CollapseDetector, lines: Sequence[dict[str, Any]]) -> list[Any]:
    return [collapse.observe(line) for line in lines]


def lengths(*values: float) -> list[dict[str, Any]]:
    return [{"step": step, "length/mean": value} for step, value in enumerate(values, start=1)]


def evals(*values: float) -> list[dict[str, Any]]:
    return [{"step": 10 * step, "eval/mean@4": value} for step, value in enumerate(values)]


def test_runaway_length_takes_five_steps_in_a_row() -> None:
    collapse = detector()
    reasons = observe(collapse, lengths(95, 90, 91, 99, 90, 99))
    assert reasons[:4] == [None] * 4
    assert reasons[4] == {"reason": "length", "value": 90, "threshold": 90.0}
    assert collapse.step == 5
    assert reasons[5] is None  # only the first step counts


def test_an_interrupted_streak_starts_over() -> None:
    collapse = detector()
    assert observe(collapse, lengths(95, 95, 95, 95, 89.9, 95, 95, 95, 95)) == [None] * 9
    assert collapse.observe({"step": 10, "length/mean": 95}) is not None
    assert collapse.step == 10


def test_a_streak_survives_a_resume() -> None:
    before, after = detector(), detector()
    observe(before, lengths(95, 95, 95, 95))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.observe({"step": 5, "length/mean": 95}) is not None


def test_an_evaluation_without_lengths_does_not_interrupt_a_streak() -> None:
    collapse = detector(length_steps=2)
    observe(collapse, lengths(95))
    assert collapse.observe({"step": 1, "eval/mean@4": 0.5}) is None
    assert collapse.observe({"step": 2, "length/mean": 95}) is not None


@pytest.mark.parametrize(
    ("scores", "step", "threshold"),
    [
        ((0.5, 0.051), None, None),
        ((0.5, 0.05), None, None),  # equal is not below
        ((0.5, 0.049), 10, 0.05),  # a tenth of the best
        ((0.2, 0.6, 0.061, 0.059), 30, 0.06),  # the best so far, not the first
        ((0.05, 0.0099), 10, 0.01),  # the floor
        ((0.05, 0.01), None, None),
        ((0.049, 0.0), None, None),  # nothing to fall from
        ((0.0, 0.0, 0.0), None, None),
        ((0.0, 0.0, 0.3, 0.0), 30, 0.03),
    ],
)
def test_lost_score(scores: tuple[float, ...], step: int | None, threshold: float | None) -> None:
    collapse = detector()
    reasons = observe(collapse, evals(*scores))
    assert collapse.step == step
    expected = {"reason": "eval", "value": scores[-1], "threshold": pytest.approx(threshold)}
    assert reasons[-1] == (None if step is None else expected)
    assert reasons[:-1] == [None] * (len(scores) - 1)


def test_every_threshold_is_a_key() -> None:
    assert detector(length_steps=1, length_fraction=0.5).observe(
        {"step": 1, "length/mean": 50}
    ) == {"reason": "length", "value": 50, "threshold": 50.0}
    assert observe(detector(eval_floor=0.3), evals(0.31, 0.29))[1]["threshold"] == 0.3
    # A user's rewards may be negative: no share of the best so far is a threshold then.
    assert observe(detector(eval_floor=-2.0), evals(-1.0, -0.5, -1.5)) == [None] * 3
    assert observe(detector(eval_floor=-2.0), evals(-1.0, -2.5))[1]["threshold"] == -2.0
    assert observe(detector(eval_fraction=0.5), evals(0.8, 0.39))[1]["threshold"] == 0.4


def test_an_untrained_student_has_nothing_to_lose() -> None:
    collapse = detector()
    assert collapse.observe({"step": 0, "eval/mean@4": 0.0}) is None
    assert collapse.observe({"step": 10, "eval/mean@4": 0.0}) is None
    assert collapse.observe({"step": 20, "eval/mean@4": 0.05}) is None
    assert collapse.observe({"step": 30, "eval/mean@4": 0.0}) is not None


def test_another_number_of_samples_is_another_score() -> None:
    collapse = detector()
    assert collapse.observe({"step": 0, "eval/mean@16": 0.0}) is None


LINES = st.lists(
    st.fixed_dictionaries(
        {"length/mean": st.sampled_from([50.0, 90.0, 95.0])},
        optional={"eval/mean@4": st.sampled_from([0.0, 0.005, 0.02, 0.05, 0.3, 0.6])},
    ),
    max_size=25,
).map(lambda lines: [{"step": step, **line} for step, line in enumerate(lines, start=1)])


@given(LINES, st.integers(0, 25))
def test_resuming_changes_no_collapse(lines: list[dict[str, Any]], cut: int) -> None:
    live, before, after = detector(), detector(), detector()
    expected = observe(live, lines)
    reasons = observe(before, lines[:cut])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert reasons + observe(after, lines[cut:]) == expected
    assert after.state_dict() == live.state_dict()


@given(LINES)
def test_the_first_collapse_by_definition(lines: list[dict[str, Any]]) -> None:
    collapse = detector()
    observe(collapse, lines)

    def collapsed(index: int) -> bool:
        streak = [line["length/mean"] >= 90 for line in lines[max(0, index - 4) : index + 1]]
        before = [line["eval/mean@4"] for line in lines[:index] if "eval/mean@4" in line]
        best = max(before, default=0.0)
        fallen = lines[index].get("eval/mean@4", 1.0) < max(0.01, 0.1 * best)
        return streak == [True] * 5 or (best >= 0.05 and fallen)

    steps = [lines[index]["step"] for index in range(len(lines)) if collapsed(index)]
    assert collapse.step == (steps[0] if steps else None)


# ---------------------------------------------------------------- nothing to learn from


def silent(step: int, reward: float = 0.0, **values: float) -> dict[str, Any]:
    return {"step": step, "reward/mean": reward, "optim/grad_norm": 0.0, **values}


@pytest.mark.parametrize(
    ("reward", "remedy"), [(0.0, "teacher.success_reward"), (1.0, "harder"), (0.5, "policy_coef")]
)
@pytest.mark.parametrize(("steps", "said"), [(100, 5), (3, 3)])
def test_a_run_without_a_signal_says_once_what_to_change(
    reward: float, remedy: str, steps: int, said: int
) -> None:
    watch = SignalWatch(steps)
    assert watch.observe({"step": 0, "eval/mean@4": 0.0}) is None
    messages = [watch.observe(silent(step, reward)) for step in range(1, 20)]
    assert [step for step, text in enumerate(messages, start=1) if text] == [said]
    assert remedy in (messages[said - 1] or "")


@pytest.mark.parametrize("signal", [{"optim/grad_norm": 0.1}, {"distill/divergence": 0.1}])
def test_a_run_that_has_had_a_signal_says_nothing(signal: dict[str, float]) -> None:
    watch = SignalWatch(100)
    lines = [silent(1), {**silent(2), **signal}, *(silent(step) for step in range(3, 30))]
    assert [watch.observe(line) for line in lines] == [None] * 29
