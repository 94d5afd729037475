"""Diagnostics against numbers worked out by hand."""

from collections.abc import Sequence
from math import log, sqrt
from typing import Any

import pytest
import torch

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
