"""Questions whose answer is a number or a formula, compared by the package math-verify."""

import importlib.util
import math
import os
import queue
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sodfast.config import MathConfig
from sodfast.errors import RunFailed, UsageError
from sodfast.tasks.base import Grade, Question
from sodfast.tasks.rows import load_questions
from sodfast.tasks.worker import Worker, WorkerEnded, cores, parallel

PROGRAM = Path(__file__).with_name("math_worker.py")
STARTING = 120.0  # seconds that importing SymPy may take


class MathTask:
    """Rows whose `answer` is a number or LaTeX. A response is right when its last closed
    \\boxed{…}, or, without any, the final expression that math-verify finds in it, equals the
    answer: 1/2 is 0.5, 12 cm is 12 (units are not compared), [1, 2) is not (1, 2).

    Processes of their own compare, one for each core; one that takes longer than `task.timeout`
    seconds is ended, and its answer is wrong.

    Raises:
        UsageError: as `load_questions`, for an answer that is no number and no text, and where
            math-verify is not installed.
    """

    name = "math"

    def __init__(self, config: MathConfig) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UsageError("task.name=math needs math-verify: `pip install 'sodfast[math]'`")
        self.train, self.test = load_questions(config, _check)
        self._seconds = config.timeout
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(cores()):
            self._idle.put(None)
        self._compare(None, "1")  # says now rather than after a rollout what does not work

    def score(self, question: Question, response: str) -> float:
        return self.grade([question], [response])[0].reward

    def feedback(self, question: Question, response: str) -> str | None:
        """Return what was read as the answer of a wrong response, without the right one."""
        return self.grade([question], [response])[0].feedback

    def extract(self, response: str) -> str | None:
        found = self._compare(None, response)
        return None if found is None else found["read"]

    def grade(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Grade]:
        answers = [_text(question.answer) for question in questions]
        return [self._grade(found) for found in parallel(self._compare, answers, responses)]

    def _grade(self, found: dict[str, Any] | None) -> Grade:
        if found is None:
            words = f"The final answer could not be compared within {self._seconds:g} seconds."
            return Grade(0.0, words)
        if found["read"] is None:
            return Grade(0.0, "No final answer was found: write it as \\boxed{answer}.")
        if found["reward"] == 1.0:
            return Grade(1.0, None, found["read"])
        words = f"The final answer was read as {found['read']}, which is not right."
        return Grade(0.0, words, found["read"])

    def _compare(self, answer: str | None, response: str) -> dict[str, Any] | None:
        """What the program math_worker.py says, None where it takes too long or too much."""
        worker = self._idle.get()
        try:
            if worker is None:
                worker = Worker([sys.executable, "-P", str(PROGRAM)], dict(os.environ))
                try:
                    worker.ask({"answer": "1", "response": "1"}, STARTING)
                except WorkerEnded as error:
                    worker = None
                    raise RunFailed(
                        f"task.name=math: math-verify does not start: {error}"
                    ) from error
            try:
                reply: dict[str, Any] = worker.ask(
                    {"answer": answer, "response": response}, self._seconds
                )
                return reply
            except WorkerEnded:
                worker = None
                return None
        finally:
            self._idle.put(worker)


def _check(question: Question) -> None:
    answer = question.answer
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if not (math.isfinite(answer) if number else isinstance(answer, str) and answer.strip()):
        raise UsageError(f"field 'answer' must be a number or LaTeX, not {str(answer)[:40]!r}")


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else repr(answer)
