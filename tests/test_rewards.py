"""Answers are graded once for all ranks, and rewards of another scale need their thresholds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sodfast.config import Config, load_config, read_overrides, validate
from sodfast.errors import RunFailed
from sodfast.rewards import grade_answers, with_noise
from sodfast.tasks.base import Grade, Question

QUESTIONS = [Question("1+1=", "2", id="a"), Question("1+2=", "3", id="b")]


class Fixed:
    """Gives these rewards, whatever is answered."""

    name = "fixed"
    train = test = QUESTIONS
    extract = None

    def __init__(self, *rewards: float) -> None:
        self.rewards = rewards

    def score(self, question: Question, response: str) -> float:
        return 0.0

    def feedback(self, question: Question, response: str) -> str | None:
        return None

    def grade(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Grade]:
        return [Grade(reward) for reward in self.rewards]


def rewards(config: Config, *given: float) -> list[float]:
    return [g.reward for g in grade_answers(config, Fixed(*given), QUESTIONS, ["x", "y"])]


def lab(*overrides: str) -> Config:
    return load_config("lab", list(overrides))


def test_rewards_between_0_and_1_need_no_thresholds() -> None:
    assert rewards(lab(), 0.0, 1.0) == [0.0, 1.0]


@pytest.mark.parametrize("reward", [-0.01, 1.01, 100.0])
def test_other_rewards_need_every_threshold_that_counts(reward: float) -> None:
    both = r"\(row 'b'\) lies outside \[0, 1\].* set collapse\.eval_floor and schedule\.reward_marg"
    with pytest.raises(RunFailed, match=both):
        rewards(lab(), 0.5, reward)
    with pytest.raises(RunFailed, match=r"set schedule\.reward_margin on"):
        rewards(lab("collapse.eval_floor=0.02"), 0.5, reward)
    with pytest.raises(RunFailed, match=r"set collapse\.eval_floor on"):
        rewards(lab("schedule.kind=hard"), 0.5, reward)
    keys = ("collapse.eval_floor=0.02", "schedule.reward_margin=0.06")
    assert rewards(lab(*keys), 0.5, reward) == [0.5, reward]


@pytest.mark.parametrize("keys", [(), ("collapse.eval_floor=0.01", "schedule.reward_margin=0.05")])
def test_a_default_is_no_threshold_of_another_scale_however_it_came(
    tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """A resumed run reads every key from its config.yaml."""
    (tmp_path / "config.yaml").write_text(lab(*keys).to_yaml())
    for config in (lab(*keys), validate(read_overrides(tmp_path / "config.yaml", []))):
        with pytest.raises(RunFailed, match=r"eval_floor and schedule\.reward_margin on"):
            rewards(config, 0.5, 2.0)


class _Random(Fixed):
    def grade(self, questions: Any, responses: Any) -> list[Grade]:
        import random

        return [Grade(random.random()) for _ in questions]


def _graded(ranks: Any) -> list[float]:
    grades = grade_answers(lab(), _Random(), QUESTIONS, ["x", "y"], ranks)
    return [given.reward for given in grades]


def test_all_ranks_have_the_grades_of_the_first(pair: Any) -> None:
    one, other = pair(_graded)
    assert one == other and len(set(one)) == 2


# ---------------------------------------------------------------- noise


def noisy(step: int, *overrides: str, probe: bool = False, count: int = 4000) -> list[float]:
    """Rewards that were 0.25, as training sees them."""
    given = [Grade(0.25, "words", "42")] * count
    return [grade.reward for grade in with_noise(lab(*overrides), step, given, probe)]


def test_the_share_of_rewards_says_the_opposite() -> None:
    rewards = noisy(7, "task.label_noise={share: 0.3}")
    assert set(rewards) == {0.25, 0.75}
    assert 0.27 < rewards.count(0.75) / 4000 < 0.33  # four standard errors
    assert noisy(7, "task.label_noise={share: 1.0}", count=3) == [0.75] * 3
    assert noisy(7, "task.label_noise={share: 0.0}", count=3) == [0.25] * 3
    (grade,) = with_noise(lab("task.label_noise={share: 1.0}"), 1, [Grade(0.0, "words", "42")])
    assert grade == Grade(1.0, "words", "42")


def test_noise_is_a_function_of_seed_step_and_sample() -> None:
    on = "task.label_noise={share: 0.3}"
    rewards = noisy(7, on)
    assert noisy(7, on) == rewards
    assert noisy(7, on, count=9) == rewards[:9]  # a sample's noise is not that of how many follow
    others = [noisy(8, on), noisy(7, on, "seed=1"), noisy(7, on, probe=True)]
    assert rewards not in others and len({tuple(other) for other in others}) == 3


def test_noise_has_a_first_and_a_last_step() -> None:
    on = "task.label_noise={share: 1.0, first: 3, last: 4}"
    assert [noisy(step, on, count=1) for step in (2, 3, 4, 5)] == [[0.25], [0.75], [0.75], [0.25]]
    assert noisy(3, count=1) == [0.25]


def test_noise_needs_rewards_with_an_opposite() -> None:
    with pytest.raises(RunFailed, match=r"the reward 2 lies outside \[0, 1\]"):
        with_noise(lab("task.label_noise={share: 0.0}"), 1, [Grade(1.0), Grade(2.0)])
    assert with_noise(lab(), 1, [Grade(2.0)]) == [Grade(2.0)]
