"""What a task is: its questions and their scorer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Question:
    """One question: the user's turn, the reference answer, an optional system message, a name."""

    prompt: str
    answer: Any
    system: str | None
    id: str


class Task(Protocol):
    """Questions with their scorer. `response` is always decoded text without special tokens."""

    name: str
    train: Sequence[Question]
    test: Sequence[Question]

    def score(self, question: Question, response: str) -> float:
        """Return 1.0 for a right response and 0.0 for any other (arXiv 2601.20802)."""

    def feedback(self, question: Question, response: str) -> str | None:
        """Return what the environment says about a response, None where it says nothing."""

    def extract(self, response: str) -> str | None:
        """Return the answer in a form that can be counted for maj@k, None where there is none."""
