"""Diagnostics against numbers worked out by hand."""

import json
from collections.abc import Sequence
from math import log, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sodfast.collapse import CollapseDetector
from sodfast.config import CollapseConfig
from sodfast.metrics import RewardGain, length_metrics, mean_entropy, reward_metrics
from sodfast.rollout.engine import Sample
from sodfast.summary import spike_ratios, summarize


def sample(length: int, entropy: Sequence[float] | None = None, capped: bool = False) -> Sample:
    return Sample(
        prompt=torch.tensor([1, 2]),
        response=torch.zeros(length, dtype=torch.int64),
        logprob=torch.zeros(length),
        entropy=torch.zeros(length) if entropy is None else torch.tensor(entropy),
        capped=capped,
    )


# ---------------------------------------------------------------- a step's statistics


def test_reward_metrics() -> None:
    rewards = [0.0, 0.0, 1.0, 0.0, 0.4, 0.5, 0.4, 0.49]
    assert reward_metrics(rewards, 2, success=0.5) == {
        "reward/mean": pytest.approx(2.79 / 8),
        "reward/success_group_fraction": 0.5,
    }
    assert reward_metrics(rewards, 8, success=0.5)["reward/success_group_fraction"] == 1.0
    assert reward_metrics(rewards, 1, success=0.5)["reward/success_group_fraction"] == 2 / 8


def test_length_metrics() -> None:
    samples = [sample(3), sample(5), sample(4), sample(20, capped=True)]
    assert length_metrics(samples) == {
        "length/mean": 8.0,
        "length/max": 20,
        "length/tail_ratio": 2.5,
        "length/capped_fraction": 0.25,
    }


def test_shards_are_summed_in_rollout_order() -> None:
    samples = [sample(length) for length in (1, 2, 3, 4, 5, 9)]
    metrics = length_metrics(samples, shards=3)
    assert metrics["length/shard_mean"] == (3 + 7 + 14) / 3
    assert metrics["length/shard_max"] == 14
    assert metrics["length/mean"] == 4.0
    each = length_metrics(samples, shards=6)
    assert (each["length/shard_mean"], each["length/shard_max"]) == (4.0, 9)


def test_entropy_is_a_mean_over_tokens_not_over_sequences() -> None:
    samples = [sample(1, [4.0]), sample(3, [0.0, 0.0, log(2)])]
    assert mean_entropy(samples) == pytest.approx((4.0 + log(2)) / 4)


# ---------------------------------------------------------------- SNR


def test_reward_gain() -> None:
    gain = RewardGain()
    assert gain.observe(["a", "b", "c"], [0.5, 0.25, 1.0]) == {}  # nothing was visited before
    assert gain.observe(["a", "d"], [0.75, 0.0]) == {}  # one difference has no spread
    # Differences: a 1.0 − 0.75, b 1.0 − 0.25, d 0.25 − 0; e is new.
    gains = [0.25, 0.75, 0.25]
    mean = sum(gains) / 3
    std = sqrt(sum((value - mean) ** 2 for value in gains) / 3)
    metrics = gain.observe(["a", "b", "d", "e"], [1.0, 1.0, 0.25, 0.3])
    assert metrics == {"reward/snr": pytest.approx(mean / std)}
    assert gain.last == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.25, "e": 0.3}


def test_reward_gain_without_spread_is_left_out() -> None:
    gain = RewardGain()
    gain.observe(["a", "b"], [0.25, 0.5])
    assert gain.observe(["a", "b"], [0.5, 0.75]) == {}
    assert gain.observe(["a", "b"], [0.5, 0.75]) == {}


def test_a_question_asked_twice_in_one_step_is_a_visit_each_time() -> None:
    gain = RewardGain()
    gain.observe(["a"], [0.0])
    # 0.5 − 0.0, then 1.0 − 0.5 and 0.25 − 1.0.
    metrics = gain.observe(["a", "a", "a"], [0.5, 1.0, 0.25])
    gains = [0.5, 0.5, -0.75]
    mean = sum(gains) / 3
    std = sqrt(sum((value - mean) ** 2 for value in gains) / 3)
    assert metrics == {"reward/snr": pytest.approx(mean / std)}


# ---------------------------------------------------------------- collapse


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
    assert observe(detector(eval_fraction=0.5), evals(0.8, 0.39))[1]["threshold"] == 0.4


def test_an_untrained_student_has_nothing_to_lose() -> None:
    collapse = detector()
    assert collapse.observe({"step": 0, "eval/mean@4": 0.0}) is None
    assert collapse.observe({"step": 10, "eval/mean@4": 0.0}) is not None


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
        bar = max(0.01, 0.1 * max(before, default=0.0))
        return streak == [True] * 5 or lines[index].get("eval/mean@4", 1.0) < bar

    steps = [lines[index]["step"] for index in range(len(lines)) if collapsed(index)]
    assert collapse.step == (steps[0] if steps else None)


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
