"""The tool-use scorer: golden cases, JSON equality as properties, the real sample."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sodfast.config import ToolUseConfig
from sodfast.tasks import build_task
from sodfast.tasks.base import Question
from sodfast.tasks.tool_use import ToolUseTask


def ask(*calls: tuple[str, Any]) -> Question:
    answer = [{"Action": name, "Action_Input": values} for name, values in calls]
    return Question("Find a cat.", answer, None, "0")


def respond(*calls: tuple[str, Any]) -> str:
    return "\n".join(
        f"Thought: next\nAction: {name}\nAction Input: {json.dumps(values)}"
        for name, values in calls
    )


def built(tmp_path_factory: pytest.TempPathFactory, scorer: Any) -> ToolUseTask:
    folder = tmp_path_factory.mktemp("rows")
    row = json.dumps({"prompt": "x", "answer": [{"Action": "find", "Action_Input": "{}"}]})
    paths = [Path(folder, name) for name in ("train.jsonl", "test.jsonl")]
    for path in paths:
        path.write_text(row + "\n")
    return ToolUseTask(ToolUseConfig(train=str(paths[0]), test=str(paths[1]), scorer=scorer))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ToolUseTask:
    return built(tmp_path_factory, "strict")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ToolUseTask:
    return built(tmp_path_factory, "reference")


CAT = ask(("find", {"kind": "cat", "limit": 1}))


@pytest.mark.parametrize(
    "response",
    [
        'Action: find\nAction Input: {"kind": "cat", "limit": 1}',
        'Thought: hm\r\nAction: find\r\nAction Input: {"limit": 1.0, "kind": "cat"}\r\n',
        'Action:find\nAction Input:\n{\n  "kind": "cat",\n  "limit": 10e-1\n}\nThat is all.',
        'Action:  find \t\nAction Input: ```json\n{"kind": "cat", "limit": 1}\n```',
        'Thought: so Action: find\nAction Input: {"kind": "\\u0063at", "limit": 1}}',
        'Action Input: {"kind": "cat", "limit": 1}\nAction: find',
        'Action: find\nAction Input: {"kind": "cat"}\nAction Input: {"limit": 1}',
        'Action: find\nAction Input: {"kind": "dog", "kind": "cat", "limit": 1}',
    ],
)
def test_right(task: ToolUseTask, response: str) -> None:
    assert task.score(CAT, response) == 1.0
    assert task.feedback(CAT, response) is None


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ("", "Calls that are missing: find.\nArguments that are missing: kind, limit."),
        ('Action: find\nAction Input: {"kind": "cat"}', "Arguments that are missing: limit."),
        (
            'Action: find\nAction Input: {"kind": "cat", "limit": 1, "page": 2}',
            "Arguments that should not be given: page.",
        ),
        (
            'Action: find\nAction Input: {"kind": "Cat", "limit": true}',
            "Arguments with a wrong value: kind, limit.",
        ),
        (
            'Action: find\nAction Input: {"kind": "cat", "limit": "1"}',
            "Arguments with a wrong value: limit.",
        ),
        (
            'Action: Find it\nAction Input: {"kind": "cat", "limit": 1}',
            "Calls that are missing: find.\nCalls that should not be made: Find it.",
        ),
        (
            'Action: find\nAction: find\nAction Input: {"kind": "cat", "limit": 1}',
            "Calls that should not be made: find.",
        ),
        (
            'Action: find Action Input: {"kind": "cat", "limit": 1}',
            "Calls that are missing: find.\n"
            'Calls that should not be made: find Action Input: {"kind": "cat", "limit": 1}.\n'
            "Arguments that are missing: kind, limit.",
        ),
    ],
)
def test_wrong(task: ToolUseTask, response: str, feedback: str) -> None:
    assert task.score(CAT, response) == 0.0
    assert task.feedback(CAT, response) == feedback


@pytest.mark.parametrize(
    "values",
    [
        "",
        "none",
        "{'kind': 'cat', 'limit': 1}",
        '{"kind": "cat", "limit": 1',
        '{"kind": "cat", "limit": 1,}',
        '{"kind": "cat", "limit": 01}',
        '{"kind": "cat\n", "limit": 1}',
        '{"kind": "cat", "limit": NaN}',
        '{"kind": "cat", "limit": -Infinity}',
        '{"kind": "cat", "limit": 1e999}',
        pytest.param('{"limit": ' + "9" * 5000 + "}", id="huge integer"),
        pytest.param('{"limit": ' * 100_000 + "1" + "}" * 100_000, id="deep nesting"),
        pytest.param('{"limit": ' + "[" * 100_000, id="deep and open"),
    ],
)
def test_invalid_json_scores_zero(task: ToolUseTask, values: str) -> None:
    # The second call alone would be right: a block that is not JSON is not skipped.
    right = 'Action: find\nAction Input: {"kind": "cat", "limit": 1}'
    for response in (f"Action Input: {values}\n{right}", f"{right}\nAction Input: {values}"):
        assert task.score(CAT, right) == 1.0
        assert task.score(CAT, response) == 0.0
        assert task.extract(response) is None
        assert task.feedback(CAT, response) == "An Action Input is not a valid JSON object."


def test_nested_objects_score(task: ToolUseTask) -> None:
    values = {"where": {"city": {"name": "Zürich}{"}}, "tags": [{"a": 1}, {}]}
    question = ask(("find", values))
    assert task.score(question, respond(("find", values))) == 1.0
    assert task.score(question, respond(("find", {**values, "tags": [{"a": True}, {}]}))) == 0.0
    assert task.score(question, respond(("find", {**values, "tags": [{}, {"a": 1}]}))) == 0.0


def test_markers_inside_a_string_are_text(task: ToolUseTask) -> None:
    values = {"query": "Action: run, then Action Input: {"}
    assert task.score(ask(("find", values)), respond(("find", values))) == 1.0


def test_several_calls_names_as_multiset_arguments_merged(task: ToolUseTask) -> None:
    small, large = ("find", {"size": "small", "page": 1}), ("find", {"size": "large", "page": 1})
    tidy = ("tidy", {"deep": False})
    question = ask(small, large, tidy)
    assert task.score(question, respond(small, large, tidy)) == 1.0
    assert task.score(question, respond(tidy, small, large)) == 1.0
    # The last value of a repeated argument stands, so order matters there and only there.
    assert task.score(question, respond(large, small, tidy)) == 0.0
    assert task.score(question, respond(large, tidy)) == 0.0
    assert task.score(question, respond(small, large, tidy, tidy)) == 0.0


def test_reference_as_text_or_objects(task: ToolUseTask) -> None:
    calls = [{"Action": "find ", "Action_Input": {"limit": 1.0}}]
    as_text = [{"Action": "find", "Action_Input": json.dumps({"limit": 1})}]
    for answer in (calls, as_text, json.dumps(calls), json.dumps(as_text)):
        question = Question("x", answer, None, "0")
        assert task.score(question, 'Action: find\nAction Input: {"limit": 1}') == 1.0
        assert task.score(question, 'Action: find\nAction Input: {"limit": true}') == 0.0


def test_votes_agree_exactly_where_the_calls_do(task: ToolUseTask) -> None:
    vote = task.extract(respond(("find", {"a": 1, "b": [2.0]}), ("tidy", {})))
    assert vote is not None
    assert vote == task.extract(respond(("tidy", {}), ("find", {"b": [2], "a": 1.0})))
    assert vote != task.extract(respond(("tidy", {}), ("find", {"b": [2], "a": True})))
    assert task.extract("I cannot help with that.") is None


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


def same(left: Any, right: Any) -> bool:
    """JSON equality, written out: the oracle of the scorer."""
    if isinstance(left, bool) or isinstance(right, bool) or left is None or right is None:
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def reordered(value: Any) -> Any:
    """Reverse the order of keys at every depth, and write whole numbers as the other type."""
    match value:
        case dict():
            return {key: reordered(value[key]) for key in reversed(value)}
        case list():
            return [reordered(item) for item in value]
        case int() if not isinstance(value, bool) and abs(value) < 2**53:
            return float(value)
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


@settings(max_examples=30)
@given(values=OBJECTS)
def test_equality_is_reflexive_and_blind_to_key_order(
    task: ToolUseTask, values: dict[str, Any]
) -> None:
    question = ask(("find", values))
    assert task.score(question, respond(("find", values))) == 1.0
    assert task.score(question, respond(("find", reordered(values)))) == 1.0


@pytest.mark.parametrize(
    ("values", "response", "strict", "as_published"),
    [
        ({"a": 1}, 'Action: find\nAction Input: {"a": 1}', 1.0, 1.0),
        ({"a": 1}, 'Action: find(\nAction Input: {"a": 1}', 0.0, 1.0),
        ({"a": 1}, 'Action: find, please\nAction Input: {"a": 1}', 0.0, 1.0),
        ({"a": 1}, 'Action:\nfind\nAction Input: {"a": 1}', 0.0, 1.0),  # on the next line
        ({"a": 1}, 'Action: find\nAction Input:\n{"a": 1}', 1.0, 1.0),
        ({"a": 1}, 'Action: find\nAction Input: ```json\n{"a": 1}\n```', 1.0, 0.0),  # fenced
        ({}, "Action: find\nAction Input: ```json\n{}\n```", 1.0, 1.0),
        ({"a": {"b": 1}}, 'Action: find\nAction Input: {"a": {"b": 1}}', 1.0, 0.0),  # nested
        ({}, 'Action: find\nAction Input: {"a": {"b": 1}}', 0.0, 1.0),
        ({"a": "}"}, 'Action: find\nAction Input: {"a": "}"}', 1.0, 0.0),
        ({"a": 1}, 'Action: find\nAction Input: {"a": 1}\nAction Input: {oh}', 0.0, 1.0),
        ({}, "Action: find", 1.0, 1.0),
        ({}, "Action: find\nAction Input: none", 0.0, 1.0),
        ({"a": 1}, 'Action: find\nAction Input: {"a": true}', 0.0, 1.0),
        ({"a": 1}, 'Action: find\nAction Input: {"a": 1.0}', 1.0, 1.0),
        ({"a": "1"}, 'Action: find\nAction Input: {"a": 1}', 0.0, 0.0),
        ({"a": "Action: x"}, 'Action: find\nAction Input: {"a": "Action: x"}', 1.0, 0.0),
        ({"a": 1}, 'Action: find\nAction: find\nAction Input: {"a": 1}', 0.0, 0.0),
        ({"a": 1}, 'Action Input: {"a": 1}', 0.0, 0.0),
        ({"a": [1]}, 'Action: find\nAction Input: {"a": ' + "[" * 100_000 + "}", 0.0, 0.0),
    ],
)
def test_what_differs_between_the_scorers(
    task: ToolUseTask,
    reference: ToolUseTask,
    values: dict[str, Any],
    response: str,
    strict: float,
    as_published: float,
) -> None:
    question = ask(("find", values))
    for scorer, score in ((task, strict), (reference, as_published)):
        assert scorer.score(question, response) == score
        assert (scorer.feedback(question, response) is None) == bool(score)


def test_blanks_around_a_name_of_the_row(task: ToolUseTask, reference: ToolUseTask) -> None:
    """The published scorer compares them, and reads no name that has any."""
    for name in ("find ", " find"):
        response = respond(("find", {"a": 1}))
        scores = [scorer.score(ask((name, {"a": 1})), response) for scorer in (task, reference)]
        assert scores == [1.0, 0.0]


NEAR = st.sampled_from([None, True, False, 0, 1, -0.0, 1.0, 1.5, "", "1", "true", [], [1], {}])
NEAR_OBJECTS = st.dictionaries(
    st.sampled_from("ab"),
    NEAR | st.lists(NEAR, max_size=2) | st.dictionaries(st.sampled_from("ab"), NEAR),
)


@given(left=OBJECTS | NEAR_OBJECTS, right=OBJECTS | NEAR_OBJECTS)
def test_equality_is_that_of_json_and_symmetric(
    task: ToolUseTask, left: dict[str, Any], right: dict[str, Any]
) -> None:
    expected = float(same(left, right))
    assert task.score(ask(("find", left)), respond(("find", right))) == expected
    assert task.score(ask(("find", right)), respond(("find", left))) == expected


@given(response=st.text(alphabet='Action Input:{}"[]1\n\r') | st.text())
def test_no_response_breaks_the_scorer(task: ToolUseTask, response: str) -> None:
    for text in (response, f"Action: find\nAction Input: {{{response}"):
        assert task.score(CAT, text) == 0.0
        vote = task.extract(text)
        assert vote is None or vote.isascii()
        assert task.feedback(CAT, text)


def test_real_sample(tmp_path: Path) -> None:
    if "SODFAST_REAL_DATA" not in os.environ:
        pytest.skip("SODFAST_REAL_DATA is unset: no real data to read")
    sample = Path(os.environ["SODFAST_REAL_DATA"]) / "tool_use" / "sample.jsonl"
    copy = shutil.copyfile(sample, tmp_path / "test.jsonl")
    task = build_task(ToolUseConfig(train=str(sample), test=str(copy)))
    assert len(task.train) == 12
    for question in task.train:
        calls = [
            (call["Action"], json.loads(call["Action_Input"]))
            for call in json.loads(question.answer)
        ]
        assert task.score(question, respond(*calls)) == 1.0
        assert task.feedback(question, respond(*calls)) is None
        assert task.score(question, respond(*calls, ("unheard_of", {}))) == 0.0
        assert task.score(question, respond(*calls, (calls[0][0], {}))) == 0.0
