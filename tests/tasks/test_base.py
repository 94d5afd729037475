"""Grades: at once where the task can, else answer by answer."""

from collections.abc import Sequence

import pytest

from sodfast.tasks.base import Grade, Question, grade

QUESTIONS = [Question("1+1=", "2"), Question("1+2=", "3")]


class OneByOne:
    name = "one by one"
    train = test = QUESTIONS

    def score(self, question: Question, response: str) -> float:
        return float(response == question.answer)

    def feedback(self, question: Question, response: str) -> str | None:
        return None if response == question.answer else f"not {response}"

    def extract(self, response: str) -> str | None:
        return response or None


class Silent(OneByOne):
    extract = None  # type: ignore[assignment]


class AtOnce(OneByOne):
    def grade(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Grade]:
        return [Grade(float(len(questions)), answer=text) for text in responses]


def test_answers_are_graded_one_by_one() -> None:
    assert grade(OneByOne(), QUESTIONS, ["2", ""]) == [
        Grade(1.0, None, "2"),
        Grade(0.0, "not ", None),
    ]
    assert grade(OneByOne(), [], []) == []


def test_a_task_without_extract_counts_no_answers() -> None:
    assert [given.answer for given in grade(Silent(), QUESTIONS, ["2", "3"])] == [None, None]


def test_a_task_that_can_grades_a_batch_at_once() -> None:
    assert grade(AtOnce(), QUESTIONS, ["a", "b"]) == [Grade(2.0, None, "a"), Grade(2.0, None, "b")]


def test_every_answer_needs_its_question() -> None:
    with pytest.raises(ValueError, match="zip"):
        grade(OneByOne(), QUESTIONS, ["2"])
