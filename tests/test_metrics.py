"""Diagnostics against numbers worked out by hand."""

from collections.abc import Sequence
from math import log, sqrt

import pytest
import torch

from sodfast.metrics import RewardGain, length_metrics, mean_entropy, reward_metrics
from sodfast.rollout.engine import Sample


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
