"""Programming questions: the model's program is run on tests, in a sandbox."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from sodfast.config import CodeConfig
from sodfast.errors import UsageError
from sodfast.tasks.base import Grade, Question
from sodfast.tasks.rows import load_questions
from sodfast.tasks.sandbox import Limits, Outcome, Sandbox, require_sandbox
from sodfast.tasks.worker import WorkerEnded, parallel

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_SHOWN = 500  # characters of an input or an output in a feedback
_LINES = 10  # of a traceback
# Bytes: no program can write more, or read more on its standard input, see sandbox_runner.py.
_OUTPUT = 64 << 10
_INPUT = 16 << 20
_logger = logging.getLogger(__name__)


class CodeTask:
    """Rows with `tests`: a list of {"stdin", "stdout"}, or Python that may raise, as a list of
    pieces such as asserts or as one text. `entry_point` names what the tests call; a `check` that
    the tests define is called with it, as in HumanEval (arXiv 2107.03374).

    A response's program is its last fenced block, or all of it where there is none. It is right
    when it passes all tests within `task.timeout` seconds: an output equals the expected one but
    for white space at the ends of lines and of the text. A program that answers tests from within
    their process could forge their result; one that is given `stdin` never sees what is expected.

    Raises:
        UsageError: as `load_questions`, for tests that cannot be used, and where this system does
            not let programs be kept apart.
    """

    name = "code"
    extract = None

    def __init__(self, config: CodeConfig) -> None:
        options = config.options
        self._limits = Limits(options.isolation, options.memory_mib << 20, options.processes)
        self._seconds = config.timeout
        self.train, self.test = load_questions(config, _check, needs_answer=False)
        if options.isolation == "rlimits":
            _logger.warning(
                "task.options.isolation=rlimits: programs of the model can read and write what "
                "this user can (SECURITY.md)"
            )
        require_sandbox(self._limits)

    def score(self, question: Question, response: str) -> float:
        return self._grade(question, response).reward

    def feedback(self, question: Question, response: str) -> str | None:
        """Return what the first failing test was given, expected and got, or its traceback."""
        return self._grade(question, response).feedback

    def grade(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Grade]:
        return parallel(self._grade, questions, responses)

    def _grade(self, question: Question, response: str) -> Grade:
        program = find_program(response)
        if not program.strip():
            return Grade(0.0, "The response holds no program.")
        tests = question.columns["tests"]
        try:
            with Sandbox(self._limits, self._seconds) as sandbox:
                if isinstance(tests, list) and isinstance(tests[0], dict):
                    words = self._examples(sandbox, program, tests)
                else:
                    words = self._asserts(sandbox, program, _pieces(question.columns))
        except WorkerEnded:  # the machine is short of memory or processes for another sandbox
            words = "The program could not be run."
        return Grade(float(words is None), words)

    def _examples(
        self, sandbox: Sandbox, program: str, tests: Sequence[dict[str, str]]
    ) -> str | None:
        """What is wrong with the first failing test, None where all pass."""
        for number, test in enumerate(tests, start=1):
            outcome = sandbox.run(program, test["stdin"])
            same = _lines(outcome.stdout) == _lines(test["stdout"])
            if outcome.ended == "exit" and outcome.code == 0 and same:
                continue
            words = f"Test {number} failed.\nInput:\n{_cut(test['stdin'])}\n"
            words += f"Expected:\n{_cut(test['stdout'])}\n"
            if outcome.ended == "exit" and outcome.code == 0:
                return f"{words}Got:\n{_cut(outcome.stdout)}"
            return words + self._end(outcome)
        return None

    def _asserts(self, sandbox: Sandbox, program: str, tests: list[str]) -> str | None:
        outcome = sandbox.test(program, tests)
        if outcome.ended == "exit" and outcome.passed and outcome.code == 0:
            return None
        if outcome.ended == "exit" and not outcome.stderr:
            return "The program ended before its tests."
        return f"A test failed.\n{self._end(outcome)}"

    def _end(self, outcome: Outcome) -> str:
        """Why a program has not come to a good end."""
        match outcome.ended:
            case "time":
                return f"The program took longer than {self._seconds:g} seconds."
            case "memory":
                return f"The program took more than {self._limits.memory >> 20} MiB of memory."
            case "processes":
                return f"The program had more than {self._limits.processes} processes."
            case "output":
                return f"The program wrote more than {_OUTPUT >> 10} KiB."
            case "lost":
                return "The program ended what it ran in."
        last = outcome.stderr.strip().splitlines()[-_LINES:]
        return "\n".join(last) or f"The program ended with exit code {outcome.code}."


def find_program(response: str) -> str:
    """The last fenced block of a response, all of it where there is none."""
    blocks = _FENCE.findall(response)
    return str(blocks[-1]) if blocks else response


def _pieces(columns: Any) -> list[str]:
    """The tests as pieces of Python that run one after the other."""
    tests, entry_point = columns["tests"], columns.get("entry_point")
    pieces = [tests] if isinstance(tests, str) else list(tests)
    if entry_point is not None:
        pieces.insert(0, entry_point)  # a NameError says what is missing
        if any(re.search(r"^def check\(", piece, re.MULTILINE) for piece in pieces):
            pieces.append(f"check({entry_point})")
    return pieces


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _cut(text: str) -> str:
    text = text.rstrip("\n")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def _check(question: Question) -> None:
    tests, entry_point = question.columns.get("tests"), question.columns.get("entry_point")
    if entry_point is not None and not (
        isinstance(entry_point, str) and entry_point.isidentifier()
    ):
        raise UsageError("field 'entry_point' must be the name of what the tests call, or null")
    if isinstance(tests, str) and tests.strip():
        return
    if isinstance(tests, list) and tests:
        if all(isinstance(test, str) for test in tests):
            return
        if all(_is_example(test) for test in tests):
            for test in tests:
                _require_size("stdin", test["stdin"], _INPUT)
                _require_size("stdout", test["stdout"], _OUTPUT)
            return
    raise UsageError(
        "field 'tests' must be a list of objects with the texts 'stdin' and 'stdout', or Python "
        "that asserts, as text or a list of texts"
    )


def _require_size(name: str, text: str, most: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"field 'tests': a {name!r} holds half of a surrogate pair") from error
    if size > most:
        raise UsageError(f"field 'tests': a {name!r} exceeds {most >> 10} KiB")


def _is_example(test: Any) -> bool:
    return isinstance(test, dict) and all(
        isinstance(test.get(key), str) for key in ("stdin", "stdout")
    )
