"""Tool-use questions in the manner of ToolAlpaca (arXiv 2306.05301)."""

import json
import operator
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from sodfast.config import ToolUseConfig
from sodfast.errors import UsageError
from sodfast.tasks.base import Question
from sodfast.tasks.rows import load_questions, strict_json

_MARKER = re.compile(r"Action Input:|Action:([^\r\n]*)")
# As the public implementation of arXiv 2601.20802 reads names and inputs.
_NAME = re.compile(r"Action:\s*(\w+)")
_FLAT_OBJECT = re.compile(r"Action Input:\s*(\{.*?\})", re.DOTALL)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _same_json(left: Any, right: Any) -> bool:
    return _canonical(left) == _canonical(right)


class Calls(NamedTuple):
    """The tools called, in order, and all their arguments in one object.

    Where several calls give the same argument, its last value counts.
    """

    names: list[str]
    arguments: dict[str, Any]

    def canonical(self) -> str:
        """Return a text that is equal for equal calls, whatever the order of names and keys.

        `strict_json` has turned 1.0 into 1 already, and true stays apart from 1.
        """
        return _canonical([sorted(self.names), self.arguments])


class ToolUseTask:
    """Rows whose `answer` lists the calls to make as {"Action", "Action_Input"}.

    A response makes its calls in lines "Action: name" and "Action Input: {…}". It scores 1 when
    its names, as a multiset, and its merged arguments equal the reference's (the reward of
    arXiv 2601.20802). `task.scorer` says how a response is read: strict, or reference as the
    paper's public implementation does.

    * A name is strictly the rest of the line after "Action:"; the reference takes the word
      characters after it, also those of the next line: "find(x)" calls find, "get-cat" calls get.
    * An input is strictly JSON as a whole, from the first "{" after "Action Input:"; the reference
      stops at the first "}", and the "{" must follow at once, so that it reads no nested object and
      none inside a code fence.
    * Invalid JSON scores 0 strictly; the reference leaves it out.
    * "Action:" inside the strings of an input is text strictly, and a call for the reference.
    * Blanks around a name in the row are none of it strictly; for the reference no answer calls it.
    * True and 1 differ strictly and are equal for the reference; 1 and 1.0 are equal for both.

    Raises:
        UsageError: as `load_questions`, and for an answer that is not such a list.
    """

    name = "tool_use"

    def __init__(self, config: ToolUseConfig) -> None:
        self.train, self.test = load_questions(config, _check)
        self._strict = strict = config.scorer == "strict"
        self._calls = _response_calls if strict else _flat_calls
        self._same: Callable[[Any, Any], bool] = _same_json if strict else operator.eq

    def score(self, question: Question, response: str) -> float:
        try:
            calls = self._calls(response)
        except (ValueError, RecursionError):
            return 0.0
        reference = _reference_calls(question.answer, self._strict)
        right = Counter(calls.names) == Counter(reference.names)
        return float(right and self._same(calls.arguments, reference.arguments))

    def feedback(self, question: Question, response: str) -> str | None:
        """Say which tools and arguments differ, without the reference's values; None if none do."""
        try:
            calls = self._calls(response)
        except (ValueError, RecursionError):
            return "An Action Input is not a valid JSON object."
        reference = _reference_calls(question.answer, self._strict)
        called, expected = Counter(calls.names), Counter(reference.names)
        given, required = calls.arguments, reference.arguments
        differences = {
            "Calls that are missing": (expected - called).elements(),
            "Calls that should not be made": (called - expected).elements(),
            "Arguments that are missing": required.keys() - given.keys(),
            "Arguments that should not be given": given.keys() - required.keys(),
            "Arguments with a wrong value": {
                key
                for key in required.keys() & given.keys()
                if not self._same(required[key], given[key])
            },
        }
        lines = [(title, ", ".join(sorted(names))) for title, names in differences.items()]
        return "\n".join(f"{title}: {names}." for title, names in lines if names) or None

    def extract(self, response: str) -> str | None:
        try:
            calls = self._calls(response)
            return calls.canonical() if calls.names else None
        except (ValueError, RecursionError):
            return None


def _response_calls(response: str) -> Calls:
    """Read a response from left to right. Raises ValueError or RecursionError on invalid JSON."""
    names: list[str] = []
    arguments: dict[str, Any] = {}
    marker = _MARKER.search(response)
    while marker:
        position = marker.end()
        if marker[1] is not None:
            names.append(marker[1].strip())
        else:
            brace = response.find("{", position)
            following = _MARKER.search(response, position)
            if brace < 0 or (following and following.start() < brace):
                raise ValueError("no JSON object after Action Input:")
            # The search goes on behind the object, so an "Action:" inside its strings is no call.
            values, position = strict_json.raw_decode(response, brace)
            arguments |= values
        marker = _MARKER.search(response, position)
    return Calls(names, arguments)


def _flat_calls(response: str) -> Calls:
    """Read a response as the paper's public implementation does."""
    arguments: dict[str, Any] = {}
    for text in _FLAT_OBJECT.findall(response):
        with suppress(ValueError, RecursionError):
            arguments |= json.loads(text)
    return Calls(_NAME.findall(response), arguments)


def _reference_calls(answer: Any, strict: bool = True) -> Calls:
    """Read a row's answer; strictly, blanks around a name are none of it. Raises ValueError,
    TypeError, KeyError or RecursionError."""
    # What another decoder has read is written and read again, so that its numbers compare like
    # those that `strict_json` reads from text.
    calls = strict_json.decode(answer if isinstance(answer, str) else json.dumps(answer))
    if not isinstance(calls, list) or not calls:
        raise ValueError("it is not a list of calls")
    names: list[str] = []
    arguments: dict[str, Any] = {}
    for call in calls:
        if not isinstance(call, dict):
            raise ValueError("a call is not an object")
        name, values = call["Action"], call["Action_Input"]
        values = strict_json.decode(values) if isinstance(values, str) else values
        if not isinstance(name, str) or not name.strip():
            raise ValueError("an 'Action' is not the name of a tool")
        if not isinstance(values, dict):
            raise ValueError("an 'Action_Input' is not an object")
        names.append(name.strip() if strict else name)
        arguments |= values
    return Calls(names, arguments)


def _check(question: Question) -> None:
    try:
        _reference_calls(question.answer).canonical()
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UsageError(
            "field 'answer' must be a list of calls with 'Action' and a JSON object as "
            f"'Action_Input': {reason}"
        ) from error
