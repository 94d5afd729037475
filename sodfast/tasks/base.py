"""What a task is: its questions, their scorer, and what the scorer says about an answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Question:
    """One question: the user's turn, the reference answer, an optional system message, a name.

    `history` holds the messages of a conversation between the system message and that turn, each
    with `role` and `content`; `columns` all fields of the row that the question was read from.
    `arrival`: the first step whose rollouts may answer it.
    """

    prompt: str
    answer: Any = None
    system: str | None = None
    id: str = ""
    history: tuple[Mapping[str, str], ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    arrival: int = 0


@dataclass(frozen=True)
class Grade:
    """What a task says about one answer: its reward, the environment's words on it (None: no
    words), and the answer in the form that is counted for maj@k (None: there is none)."""

    reward: float
    feedback: str | None = None
    answer: str | None = None


class Task(Protocol):
    """Questions with their scorer. `response` is always decoded text without special tokens."""

    name: str
    train: Sequence[Question]
    test: Sequence[Question]

    def score(self, question: Question, response: str) -> float:
        """Return 1.0 for a right response and 0.0 for any other (arXiv 2601.20802)."""

    def feedback(self, question: Question, response: str) -> str | None:
        """Return what the environment says about a response, None where it says nothing."""

    @property
    def extract(self) -> Callable[[str], str | None] | None:
        """From a response to its answer in a form that can be counted for maj@k, or to None where
        it has no answer. A task without `extract` has no maj@k."""


@runtime_checkable
class BatchTask(Protocol):
    """A task that grades a batch of answers at once: a function, or a sandbox for each core."""

    def grade(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Grade]:
        """Grade `responses[i]` to `questions[i]`."""


def grade(task: Task, questions: Sequence[Question], responses: Sequence[str]) -> list[Grade]:
    """Grade `responses[i]` to `questions[i]`: at once where the task can, else one by one.

    Raises:
        RunFailed: the task is the user's, and its code failed.
    """
    if isinstance(task, BatchTask):
        return task.grade(questions, responses)
    extract = task.extract or (lambda response: None)
    return [
        Grade(task.score(question, text), task.feedback(question, text), extract(text))
        for question, text in zip(questions, responses, strict=True)
    ]
