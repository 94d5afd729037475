"""A task of the user's own in Python: a class with the members of a `Task`, or a function that
scores the rows of a file by TRL's convention, `reward(prompts, completions, **columns)`."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, TypeVar

from sodfast.config import PythonConfig
from sodfast.errors import RunFailed, UsageError
from sodfast.source import Source, TimeUp, find_source
from sodfast.tasks.base import Grade, Question, Task
from sodfast.tasks.rows import load_questions, require_unicode

T = TypeVar("T")
_OWN = {"prompts", "completions"}  # what every function is given, whatever the columns


def python_task(config: PythonConfig) -> Task:
    """The task that `task.source` names.

    Raises:
        UsageError: the source cannot be loaded, is neither a class nor a function, or its rows
            cannot be used.
    """
    source = find_source(config.source)
    found = source.load()
    if isinstance(found, type):
        return ClassTask(found, config, source)
    if callable(found):
        return FunctionTask(found, config, source)
    raise UsageError(f"task.source: {source.name} of {source.file} is neither class nor function")


class ClassTask:
    """The user's class, built from `task.options`. Only `train`, `test` and `score` must be there:
    without `feedback` the environment says nothing, without `extract` there is no maj@k.

    Raises:
        UsageError: the class cannot be built, or lacks a member.
    """

    name = "python"

    def __init__(self, kind: type, config: PythonConfig, source: Source) -> None:
        if config.train is not None:
            raise UsageError(
                f"task.train: the class {source.name} brings its own questions; name files in "
                "task.options instead"
            )
        self._call = _Call(source, config.timeout)
        with source.running(source.unusable):
            task = kind(**config.options)
            questions = {key: list(getattr(task, key)) for key in ("train", "test")}
        if not callable(getattr(task, "score", None)):
            raise UsageError(f"task.source: the class {source.name} has no method score")
        self.train: Sequence[Question] = _named(questions["train"], "train")
        self.test: Sequence[Question] = _named(questions["test"], "test")
        if not self.train or not self.test:
            raise UsageError(f"task.source: {source.name}().train or .test holds no questions")
        self._score: Callable[..., Any] = task.score
        self._feedback: Callable[..., Any] = getattr(task, "feedback", lambda question, text: None)
        extract = getattr(task, "extract", None)
        self.extract: Callable[[str], str | None] | None = extract and (
            lambda response: self._call(extract, None, lambda: _text(extract(response), "extract"))
        )

    def score(self, question: Question, response: str) -> float:
        score = self._score
        return self._call(score, question, lambda: _reward(score(question, response)))

    def feedback(self, question: Question, response: str) -> str | None:
        said = self._feedback
        return self._call(said, question, lambda: _text(said(question, response), "feedback"))


class FunctionTask:
    """Rows of `task.train` and `task.test`, scored a batch at a time by the user's function.

    A prompt that is text arrives as text, and so does its completion; a list of chat messages
    arrives as that list, its completion as a list of one message. Every other column arrives as a
    list under its name, None where a row lacks it. A function without `**columns` is given what it
    names. It returns a number for each completion, or a pair (number, feedback).

    Raises:
        UsageError: as `load_questions`, and where a row lacks a column that the function needs.
    """

    name = "python"
    extract = None

    def __init__(self, function: Callable[..., Any], config: PythonConfig, source: Source) -> None:
        self._function = function
        self._call = _Call(source, config.timeout)
        if config.train is None:
            raise UsageError("task.train: name the file whose rows the function scores")
        if config.options:
            raise UsageError("task.options is for classes: a function takes the rows' columns")
        needed, self._columns = _parameters(function, source)

        def check(question: Question) -> None:
            for name in sorted(needed - question.columns.keys()):
                raise UsageError(
                    f"no column {name!r}, which {source.name} needs: add it, or name the column "
                    f"that holds it in task.columns.{name}"
                )
            for name in sorted(_OWN & question.columns.keys()) if self._columns is None else ():
                raise UsageError(
                    f"a column {name!r}, which {source.name} is given already: name it otherwise "
                    f"in task.columns, such as task.columns.own_{name}={name}"
                )

        self.train, self.test = load_questions(config, check, needs_answer=False)
        if self._columns is None:
            rows = [question.columns for question in (*self.train, *self.test)]
            self._columns = list(dict.fromkeys(name for row in rows for name in row))
            self._columns.remove("prompt")

    def score(self, question: Question, response: str) -> float:
        return self.grade([question], [response])[0].reward

    def feedback(self, question: Question, response: str) -> str | None:
        return self.grade([question], [response])[0].feedback

    def grade(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Grade]:
        try:
            return self._grade(questions, responses)
        except RunFailed as error:
            # An exception does not say which row it is about: the function is asked row by row.
            if len(questions) > 1 and not isinstance(error.__cause__, _Refused | TimeUp):
                for question, response in zip(questions, responses, strict=True):
                    self._grade([question], [response])
            raise

    def _grade(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Grade]:
        prompts, completions = [], []
        for question, response in zip(questions, responses, strict=True):
            chat = not isinstance(question.columns["prompt"], str)
            prompts.append(_conversation(question) if chat else question.prompt)
            completions.append([{"role": "assistant", "content": response}] if chat else response)
        columns = {
            name: [question.columns.get(name) for question in questions]
            for name in self._columns or ()
        }

        def ask() -> list[Grade]:
            found = self._function(prompts=prompts, completions=completions, **columns)
            try:
                rewards = iter(found)
            except TypeError as error:
                raise _Refused(f"must return a list, not {str(found)[:40]!r}") from error
            results = list(rewards)
            if len(results) != len(questions):
                raise _Refused(f"{len(results)} rewards for {len(questions)} completions")
            return [_grade(*pair) for pair in zip(results, questions, strict=True)]

        return self._call(self._function, questions[0] if len(questions) == 1 else None, ask)


class _Refused(ValueError):
    """What the user's code returned cannot be used; `question`: for which one, if it is known."""

    question: Question | None = None


class _Call:
    """Calls into the user's code, each within `seconds`; a failure becomes `RunFailed`."""

    def __init__(self, source: Source, seconds: float) -> None:
        self._source = source
        self._limit = ("task.timeout", seconds)

    def __call__(
        self, function: Callable[..., Any], question: Question | None, ask: Callable[[], T]
    ) -> T:
        """What `ask`, which calls the user's `function`, returns. `question`: what the call is
        about, None for several."""
        row = _row(question)
        with self._source.running(lambda text: RunFailed(f"{text}{row}"), self._limit):
            try:
                return ask()
            except _Refused as error:
                place = f"{self._source.place(function)}, {self._source.name}"
                raise RunFailed(f"{place}: {error}{_row(error.question) or row}") from error


def _row(question: Question | None) -> str:
    return "" if question is None else f" (row {question.id!r})"


def _named(questions: Sequence[Any], key: str) -> Sequence[Question]:
    """The questions, with a name where the user gave none."""
    for number, question in enumerate(questions):
        if not isinstance(question, Question):
            kind = type(question).__name__
            raise UsageError(f"task.source: {key}[{number}] must be a Question, not a {kind}")
        if question.id and not isinstance(question.id, str):
            raise UsageError(f"task.source: {key}[{number}].id must be text, not {question.id!r}")
        require_unicode(f"task.source: {key}[{number}]", question.id or "")
    return [q if q.id else replace(q, id=f"{key} {number}") for number, q in enumerate(questions)]


def _parameters(
    function: Callable[..., Any], source: Source
) -> tuple[set[str], Sequence[str] | None]:
    """The columns that the function cannot do without, and those that it is given; None: all."""
    parameters = dict(inspect.signature(function).parameters)
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not everything and not parameters.keys() >= _OWN:
        raise UsageError(
            f"task.source: {source.name} must take (prompts, completions, **columns), TRL's "
            "convention"
        )
    named = {
        name: p
        for name, p in parameters.items()
        if name not in _OWN and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    needed = {name for name, p in named.items() if p.default is p.empty}
    return needed, None if everything else list(named)


def _conversation(question: Question) -> list[Mapping[str, str]]:
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, *question.history, {"role": "user", "content": question.prompt}]


def _grade(result: Any, question: Question) -> Grade:
    try:
        if isinstance(result, tuple) and len(result) == 2:
            return Grade(_reward(result[0]), _text(result[1], "feedback"))
        return Grade(_reward(result))
    except _Refused as error:
        error.question = question
        raise


def _reward(value: Any) -> float:
    try:
        reward = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # of an integer
        reward = math.inf
    if not math.isfinite(reward):
        raise _Refused(f"a reward must be a finite number, not {str(value)[:40]!r}")
    return reward


def _text(value: Any, what: str) -> str | None:
    if not isinstance(value, str | None):
        raise _Refused(f"{what} must be text or None, not {str(value)[:40]!r}")
    return value
