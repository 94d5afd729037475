"""The lab's generated task: a product and a digit to add, such as `17*8+6=`.

A response writes the product, then the sum, `136+6=142`. It may check itself any number of
times, each pass after a question mark, `128+6=134?136+6=142`: the last pass counts.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from sodfast.config import ArithmeticConfig, ArrivalConfig
from sodfast.errors import UsageError
from sodfast.tasks.base import Question

LEFT_FACTORS = range(2, 20)
RIGHT_FACTORS = range(2, 10)
ADDENDS = range(1, 10)
TEST_POOL = 192

_LAST_RESULT = re.compile(r"=([0-9]+)\Z")


@cache
def question_pools() -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Return every question of the task as (train pool, test pool), two disjoint sets.

    The split is one fixed permutation, whatever the configuration: the lab's warm start draws on
    the train pool only, so that a test question is new to every lab model.
    """
    questions = [
        Question(
            prompt=f"{a}*{b}+{c}=",
            answer=str(a * b + c),
            id=f"arithmetic-{a}-{b}-{c}",
            columns={"solution": f"{a * b}+{c}={a * b + c}"},
        )
        for a in LEFT_FACTORS
        for b in RIGHT_FACTORS
        for c in ADDENDS
    ]
    # A Philox stream is the same on every platform and in every numpy version.
    order = np.argsort(np.random.Philox(key=20260603).random_raw(len(questions)), kind="stable")
    shuffled = [questions[index] for index in order]
    return tuple(shuffled[TEST_POOL:]), tuple(shuffled[:TEST_POOL])


class ArithmeticTask:
    """The first `config.train` and `config.test` questions of the two pools.

    With `config.arrival` those to train on whose left factor is one of the largest come later.

    Raises:
        UsageError: a pool holds fewer questions than the configuration asks for.
    """

    name = "arithmetic"

    def __init__(self, config: ArithmeticConfig) -> None:
        train_pool, test_pool = question_pools()
        self.train: Sequence[Question] = _first("train", config.train, train_pool)
        if config.arrival is not None:
            self.train = [_arriving(question, config.arrival) for question in self.train]
        self.test: Sequence[Question] = _first("test", config.test, test_pool)

    def score(self, question: Question, response: str) -> float:
        """Return 1.0 if the number after the last `=` ends the response and is the answer.

        The steps before it are not checked: two errors that cancel score 1.0, as `45+9=44` does for
        `7*5+9=`.
        """
        return float(self.extract(response) == question.answer)

    def feedback(self, question: Question, response: str) -> str | None:
        """Return the step that is left to do once the product is right, `136+6=|`, for a response
        that is wrong; None for one that is right.

        The teacher's prompts of the lab's preset end a hint with `|`.
        """
        if self.score(question, response):
            return None
        return str(question.columns["solution"]).partition("=")[0] + "=|"

    def extract(self, response: str) -> str | None:
        """Return the last result without leading zeros, None where the response ends otherwise."""
        match = _LAST_RESULT.search(response)
        return (match[1].lstrip("0") or "0") if match else None


def _arriving(question: Question, arrival: ArrivalConfig) -> Question:
    early = LEFT_FACTORS[: round((1 - arrival.share) * len(LEFT_FACTORS))]
    left = int(question.prompt.partition("*")[0])
    return question if left in early else replace(question, arrival=arrival.step)


def _first(key: str, count: int, pool: tuple[Question, ...]) -> tuple[Question, ...]:
    if count > len(pool):
        raise UsageError(f"task.{key}={count}: arithmetic has {len(pool)}; ask for no more")
    return pool[:count]
