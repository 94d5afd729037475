"""Reading question rows: files, the hub, and everything that cannot be used."""

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from sodfast.config import MultipleChoiceConfig, TaskConfig, ToolUseConfig
from sodfast.errors import UsageError
from sodfast.tasks import build_task
from sodfast.tasks.base import Task

CHOICE = {"prompt": "2 + 2?\nA: 3\nB: 4", "answer": "B"}
CALL = {"prompt": "Find a cat.", "answer": [{"Action": "find", "Action_Input": {"kind": "cat"}}]}


def write(path: Path, *rows: Any) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(text.encode())
    return str(path)


@pytest.fixture
def good(tmp_path: Path) -> str:
    return write(tmp_path / "good.jsonl", CHOICE)


def multiple_choice(train: str, test: str | None = None, **keys: Any) -> Task:
    return build_task(MultipleChoiceConfig(train=train, test=test, **keys))


def test_fields_of_a_file_row(tmp_path: Path, good: str) -> None:
    rows = [
        CHOICE | {"system": "Be brief.", "idx": 7, "elo": 1500, "tests": None},
        CHOICE | {"system": None, "id": "first", "idx": 8},
        CHOICE,
    ]
    task = multiple_choice(write(tmp_path / "train.jsonl", *rows), good)
    assert [question.id for question in task.train] == ["7", "first", "line 3"]
    assert [question.system for question in task.train] == ["Be brief.", None, None]
    assert {question.prompt for question in task.train} == {CHOICE["prompt"]}
    assert {question.answer for question in task.train} == {"B"}
    assert len(task.test) == 1


def test_bom_crlf_blank_lines_and_line_separators_inside_strings(tmp_path: Path, good: str) -> None:
    path = tmp_path / "train.jsonl"
    row = json.dumps(CHOICE | {"system": "a\u2028b\u0085c"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n{row}".encode())
    train = multiple_choice(str(path), good).train
    assert [question.id for question in train] == ["line 1", "line 3"]
    assert train[0].system == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "2?"', "not JSON"),
        ("{'prompt': '2?'}", "not JSON"),
        ('{"elo": NaN}', "NaN is not JSON"),
        ('{"prompt": "2?", "answer": "B", "prompt": "3?"}', "one of its keys twice"),
        ('{"meta": {"a": 1, "a": 1}}', "one of its keys twice"),
        ('{"elo": 1e999}', "out of range"),
        pytest.param('{"elo": ' + "9" * 5000 + "}", "not JSON", id="huge integer"),
        pytest.param("[" * 100_000 + "]" * 100_000, "not JSON", id="deep nesting"),
        ("[]", "must be a JSON object, not a list"),
        ("3", "must be a JSON object, not a number"),
        ({"answer": "B"}, "'prompt' must be text, not nothing"),
        (CHOICE | {"prompt": ["2?"]}, "'prompt' must be text, not a list"),
        (CHOICE | {"prompt": " "}, "'prompt' must be text, not empty text"),
        ({"prompt": CHOICE["prompt"]}, "'answer' is missing"),
        (CHOICE | {"answer": None}, "'answer' is missing"),
        (CHOICE | {"system": {"role": "x"}}, "'system' must be text or null, not an object"),
        (CHOICE | {"id": 1.5}, "'id' must be text or a whole number, not a number"),
        (CHOICE | {"id": True}, "'id' must be text or a whole number, not true or false"),
        (CHOICE | {"id": "a\ud800"}, r"id 'a\ud800' is no Unicode text"),
        (CHOICE | {"answer": "C"}, "one of the prompt's options A, B, not 'C'"),
        (CHOICE | {"answer": "b"}, "one of the prompt's options A, B, not 'b'"),
        (CHOICE | {"answer": 1}, "one of the prompt's options A, B, not '1'"),
        (CHOICE | {"answer": ["B"]}, "one of the prompt's options A, B, not"),
        (CHOICE | {"prompt": "2 + 2? A: 3 B. 4"}, "lists no options"),
    ],
)
def test_bad_row_is_named_by_file_and_line(
    tmp_path: Path, good: str, row: Any, message: str
) -> None:
    path = write(tmp_path / "rows.jsonl", CHOICE, row)
    for train, test in ((path, good), (good, path)):
        with pytest.raises(UsageError) as error:
            multiple_choice(train, test)
        assert str(error.value).startswith(f"{path}, line 2: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < len(path) + 250


def test_two_rows_of_a_file_have_two_ids(tmp_path: Path, good: str) -> None:
    path = write(tmp_path / "rows.jsonl", CHOICE | {"id": 7}, CHOICE, CHOICE | {"idx": "7"})
    for train, test in ((path, good), (good, path)):
        with pytest.raises(UsageError, match=r"rows\.jsonl, line 3: id 7 is also that of line 1"):
            multiple_choice(train, test)
    # The same id may stand in both files, since they are never asked for together.
    both = write(tmp_path / "both.jsonl", CHOICE | {"id": 7})
    again = write(tmp_path / "again.jsonl", CHOICE | {"id": 7})
    assert multiple_choice(both, again).train[0].id == "7"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("not json", "Expecting value"),
        ({"Action": "find", "Action_Input": {}}, "not a list of calls"),
        ("{}", "not a list of calls"),
        ([], "not a list of calls"),
        (["find"], "a call is not an object"),
        ([{"Action_Input": {}}], "'Action' is missing"),
        ([{"Action": "find"}], "'Action_Input' is missing"),
        ([{"Action": " ", "Action_Input": {}}], "not the name of a tool"),
        ([{"Action": 3, "Action_Input": {}}], "not the name of a tool"),
        ([{"Action": "find", "Action_Input": "cat"}], "Expecting value"),
        ([{"Action": "find", "Action_Input": "{} {}"}], "Extra data"),
        ([{"Action": "find", "Action_Input": '{"a": NaN}'}], "NaN is not JSON"),
        ([{"Action": "find", "Action_Input": ["cat"]}], "not an object"),
        ([{"Action": "find", "Action_Input": None}], "not an object"),
        (7, "not a list of calls"),
    ],
)
def test_unparsable_tool_use_reference(tmp_path: Path, answer: Any, message: str) -> None:
    good = write(tmp_path / "good.jsonl", CALL)
    path = write(tmp_path / "rows.jsonl", CALL | {"answer": answer})
    with pytest.raises(UsageError) as error:
        build_task(ToolUseConfig(train=path, test=good))
    assert str(error.value).startswith(f"{path}, line 1: field 'answer' must be a list of calls")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unusable_files(tmp_path: Path, good: str) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    for path, message in (
        (tmp_path / "missing.jsonl", "No such file"),
        (write(tmp_path / "empty.jsonl"), "holds no rows"),
        (write(tmp_path / "blank.jsonl", "", "  "), "holds no rows"),
        (latin, "not UTF-8"),
        (folder, "Is a directory"),
        (tmp_path / "missing.json", "not a hub id"),
        ("", "not a hub id"),
    ):
        with pytest.raises(UsageError, match=message):
            multiple_choice(str(path), good)


def test_a_training_file_needs_other_rows_to_test_on(good: str) -> None:
    with pytest.raises(UsageError, match=r"task\.test"):
        multiple_choice(good)
    with pytest.raises(UsageError, match=r"task\.test"):
        multiple_choice(good, good)


def test_an_existing_path_is_a_file_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: str
) -> None:
    (tmp_path / "org").mkdir()
    write(tmp_path / "org" / "name", CHOICE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(multiple_choice("org/name", good).train) == 1


def test_columns_rename_what_rows_hold(tmp_path: Path, good: str) -> None:
    row = {"question": CHOICE["prompt"], "answer": "worked out", "letter": "B", "n": 1}
    path = write(tmp_path / "train.jsonl", row)
    columns = {"prompt": "question", "answer": "letter"}
    test = write(tmp_path / "test.jsonl", row)
    (question,) = multiple_choice(path, test, columns=columns).train
    assert (question.prompt, question.answer) == (CHOICE["prompt"], "B")
    assert question.columns == {"prompt": CHOICE["prompt"], "answer": "B", "n": 1}
    with pytest.raises(UsageError, match=r"line 1: no column 'q' \(there are question, answer, "):
        multiple_choice(path, test, columns={"prompt": "q"})


def test_system_and_request_are_worded_by_keys(tmp_path: Path, good: str) -> None:
    path = write(tmp_path / "train.jsonl", CHOICE, CHOICE | {"system": "Own."})
    train = multiple_choice(path, good, request="Only the letter.").train
    assert {q.prompt for q in train} == {CHOICE["prompt"] + "\n\nOnly the letter."}
    assert [q.system for q in train] == [None, "Own."]
    assert [q.system for q in multiple_choice(path, good, system="Ours.").train] == ["Ours."] * 2
    train = multiple_choice(path, good, system="", request="").train
    assert {(q.prompt, q.system) for q in train} == {(CHOICE["prompt"], "")}


def test_a_prompt_may_be_a_conversation(tmp_path: Path, good: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": CHOICE["prompt"]},
    ]
    path = write(
        tmp_path / "train.jsonl", CHOICE | {"prompt": messages}, CHOICE | {"prompt": messages[3:]}
    )
    first, second = multiple_choice(path, good, request="Go.").train
    assert (first.prompt, first.system) == (CHOICE["prompt"] + "\n\nGo.", "Be brief.")
    assert list(first.history) == messages[1:3]
    assert (second.prompt, second.system, second.history) == (first.prompt, None, ())
    for row, message in (
        ({"prompt": messages[:3]}, "the last one the user's"),
        ({"prompt": []}, "the last one the user's"),
        ({"prompt": [{"role": "user"}]}, "'role' and 'content'"),
        ({"prompt": [{"role": "user", "content": " "}]}, "not empty text"),
        ({"prompt": messages, "system": "Two."}, "leave one out"),
    ):
        path = write(tmp_path / "bad.jsonl", CHOICE | row)
        with pytest.raises(UsageError, match=message):
            multiple_choice(path, good)


def test_configuration_is_discriminated_frozen_and_closed() -> None:
    adapter: TypeAdapter[TaskConfig] = TypeAdapter(TaskConfig)
    config = adapter.validate_python({"name": "tool_use", "train": "a/b"})
    assert config == ToolUseConfig(train="a/b", test=None)
    with pytest.raises(ValidationError):
        config.train = "c/d"
    for wrong in (
        {"name": "tool_use"},
        {"name": "tool_use", "train": "a/b", "subject": "physics"},
        {"name": "multiple_choice", "train": "a/b", "subject": "alchemy"},
        {"name": "chess", "train": "a/b"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def hub_row(number: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "question": f"What is {number} + 1?",
        "choices": {"text": [f"{number}", f"{number + 1}"], "label": ["A", "B"]},
        "answerKey": "B",
        "answer": "",
        "prompt": {"default": "Pick one."},
        "type": "mcq-2-choices",
        "domain": "Chemistry",
        "details": {"level": "L3", "task": "sum"},
    }
    return row | changes


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, list[Any]]]:
    """Stand in for the module `datasets`: a dictionary from hub id to splits."""
    contents: dict[str, dict[str, list[Any]]] = {}

    def load_dataset(name: str, *subset: str) -> dict[str, list[Any]]:
        name = ":".join((name, *subset))
        if name not in contents:
            raise FileNotFoundError(f"no data set\n{name}")
        return contents[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return contents


def test_sciknoweval_from_the_hub(hub: dict[str, Any]) -> None:
    others = [
        hub_row(-1, domain="Physics"),
        hub_row(-2, details={"level": "L2"}),
        hub_row(-3, type="true_or_false"),
    ]
    hub["org/sci"] = {"test": [row for i in range(25) for row in (hub_row(i), others[i % 3])]}
    task = multiple_choice("org/sci")
    order = np.random.default_rng(42).permutation(25)
    assert [question.id for question in task.test] == [f"row {2 * i}" for i in order[:3]]
    assert [question.id for question in task.train] == [f"row {2 * i}" for i in order[3:]]
    question = task.test[0]
    first = int(question.id.split()[1]) // 2
    assert question.prompt.startswith(
        f"What is {first} + 1?\n\nA: {first}\nB: {first + 1}\n\nWork it out"
    )
    assert question.answer == "B"
    assert question.system is not None
    for part in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"):
        assert part in question.system
    assert [question.id for question in multiple_choice("org/sci", subject="physics").test]


def test_hub_rows_with_incomplete_options_are_dropped_after_the_split(
    hub: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [hub_row(i) for i in range(20)]
    rows[3] = hub_row(3, choices={"text": ["3"], "label": ["A", "B"]})
    hub["org/sci"] = {"test": rows}
    with caplog.at_level(logging.WARNING):
        task = multiple_choice("org/sci")
    assert "org/sci: dropped 1 flawed rows" in caplog.text
    order = [i for i in np.random.default_rng(42).permutation(20) if i != 3]
    ids = [question.id for question in [*task.test, *task.train]]
    assert ids == [f"row {i}" for i in order]


def test_tool_use_from_the_hub(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["org/tools"] = {"train": [CALL | {"id": i} for i in range(10)], "test": [CALL]}
    task = build_task(ToolUseConfig(train="org/tools"))
    assert (len(task.train), len(task.test)) == (9, 1)
    hub["org/held-out"] = hub["org/tools"]
    task = build_task(ToolUseConfig(train="org/tools", test="org/held-out"))
    assert (len(task.train), len(task.test)) == (10, 1)
    task = build_task(ToolUseConfig(train=write(tmp_path / "a.jsonl", CALL), test="org/tools"))
    assert [question.id for question in task.test] == ["row 0"]


def test_splits_and_columns_of_any_data_set(hub: dict[str, Any]) -> None:
    def rows(*numbers: int) -> list[dict[str, Any]]:
        return [{"q": CHOICE["prompt"], "a": "B", "id": number} for number in numbers]

    hub["org/any:main"] = {"dev": rows(*range(10)), "test": rows(10), "held_out": rows(11, 12)}
    columns = {"prompt": "q", "answer": "a"}

    def ids(test: str | None = None, **keys: Any) -> tuple[list[str], list[str]]:
        task = multiple_choice("org/any:main", test, columns=columns, **keys)
        return [q.id for q in task.train], [q.id for q in task.test]

    assert ids(split={"train": "test", "test": "held_out"}) == (["10"], ["11", "12"])
    train, test = ids(split="dev")
    assert len(train) == 9 and sorted(train + test) == sorted(map(str, range(10)))
    hub["org/other"] = {"test": rows(7)}
    assert ids("org/other", split="held_out") == (["11", "12"], ["7"])
    hub["org/single"] = {"dev": rows(1, 2)}
    with pytest.raises(UsageError, match="has no split 'validation', only dev"):
        multiple_choice("org/single", split="validation", columns=columns)


def test_a_request_of_the_user_replaces_the_shipped_one(hub: dict[str, Any]) -> None:
    hub["org/sci"] = {"test": [hub_row(i) for i in range(10)]}
    prompts = {q.prompt for q in multiple_choice("org/sci", request="Only the letter.").train}
    assert all(prompt.endswith("\n\nOnly the letter.") for prompt in prompts)
    assert not any("Work it out" in prompt for prompt in prompts)


def test_a_folder_is_read_by_datasets(tmp_path: Path) -> None:
    """As `datasets` itself writes and reads it, where it is installed."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = [CHOICE | {"id": str(number)} for number in range(10)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    task = multiple_choice(str(tmp_path / "one"))
    assert (len(task.train), len(task.test)) == (9, 1)
    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:2])}
    )
    saved.save_to_disk(str(tmp_path / "two"))
    splits = {"train": "train", "test": "test"}
    task = multiple_choice(str(tmp_path / "two"), split=splits)
    assert ([q.id for q in task.test], len(task.train)) == (["0", "1"], 10)
    (tmp_path / "files").mkdir()
    for name, count in (("train", 10), ("test", 2)):
        write(tmp_path / "files" / f"{name}.jsonl", *rows[:count])
    task = multiple_choice(str(tmp_path / "files"), split=splits)
    assert ([q.id for q in task.test], len(task.train)) == (["0", "1"], 10)


def test_unusable_hub_ids(hub: dict[str, Any], good: str) -> None:
    hub["org/other"] = {"test": [{"text": "hello"}]}
    hub["org/one"] = {"test": [hub_row(1)]}
    hub["org/splits"] = {"dev": [hub_row(1)], "validation": [hub_row(1)]}
    hub["org/wrong"] = {"test": [hub_row(1, answerKey="C")]}
    for name, message in (
        ("org/absent", "the hub gives no such data set"),
        ("org/other", "no column 'domain'"),
        ("org/one", "cannot be split"),
        ("org/splits", "no split 'train', only dev, validation"),
    ):
        with pytest.raises(UsageError, match=f"^{name}: .*{message}") as error:
            multiple_choice(name)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"^org/one: no row of 1"):
        multiple_choice("org/one", good, subject="material")
    with pytest.raises(UsageError, match=r"^org/wrong, row 0: .* options A, B, not 'C'"):
        multiple_choice("org/wrong", good)


def test_a_hub_id_without_datasets_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, good: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"org/name: .*pip install 'sodfast\[datasets\]'"):
        multiple_choice("org/name", good)


@pytest.fixture
def chemistry() -> Path:
    if "SODFAST_REAL_DATA" not in os.environ:
        pytest.skip("SODFAST_REAL_DATA is unset: no real data to read")
    return Path(os.environ["SODFAST_REAL_DATA"]) / "sciknoweval" / "chemistry"


def test_real_chemistry_rows(chemistry: Path) -> None:
    task = multiple_choice(str(chemistry / "train.jsonl"), str(chemistry / "test.jsonl"))
    assert (len(task.train), len(task.test)) == (1890, 210)
    for question in [*task.train, *task.test]:
        response = f"<reasoning>\nA? No.\n</reasoning>\n<answer>\n{question.answer}\n</answer>"
        assert task.score(question, response) == 1.0
        assert task.score(question, question.answer) == 1.0
        other = "ABCD"["ABCD".index(question.answer) - 1]
        assert task.score(question, response.replace(f"\n{question.answer}\n", other)) == 0.0


def test_the_hub_split_is_the_published_one(hub: dict[str, Any], chemistry: Path) -> None:
    hub["org/sci"] = {"test": [hub_row(i) for i in range(2100)]}
    task = multiple_choice("org/sci")
    for questions, file in ((task.train, "train.jsonl"), (task.test, "test.jsonl")):
        with open(chemistry / file) as lines:
            published = [json.loads(line)["idx"] for line in lines]
        assert [question.id for question in questions] == [f"row {i}" for i in published]
