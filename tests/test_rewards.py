"""Answers are graded once for all ranks, and rewards of another scale need their thresholds."""

from collections.abc import Sequence
from typing import Any

import pytest

from sodfast.config import Config, load_config
from sodfast.errors import RunFailed
from sodfast.rewards import grade_answers
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
        rewards(lab("collapse.eval_floor=0.01"), 0.5, reward)
    with pytest.raises(RunFailed, match=r"set collapse\.eval_floor on"):
        rewards(lab("schedule.kind=hard"), 0.5, reward)
    keys = ("collapse.eval_floor=0.01", "schedule.reward_margin=0.05")
    assert rewards(lab(*keys), 0.5, reward) == [0.5, reward]


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
