"""Every kind of task that a configuration can name is built as that task."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from sodfast.config import (
    ArithmeticConfig,
    CodeConfig,
    MathConfig,
    MultipleChoiceConfig,
    PythonConfig,
    TaskConfig,
    ToolUseConfig,
    load_config,
)
from sodfast.errors import UsageError
from sodfast.tasks.arithmetic import ArithmeticTask
from sodfast.tasks.build import build_task
from sodfast.tasks.code import CodeTask
from sodfast.tasks.math import MathTask
from sodfast.tasks.multiple_choice import MultipleChoiceTask
from sodfast.tasks.python import FunctionTask
from sodfast.tasks.tool_use import ToolUseTask

CHOICE = {"prompt": "2 + 2?\nA: 3\nB: 4", "answer": "B"}
CALL = {"prompt": "Find a cat.", "answer": [{"Action": "find", "Action_Input": {"kind": "cat"}}]}
KINDS: dict[type, tuple[type, dict[str, Any] | None]] = {
    ArithmeticConfig: (ArithmeticTask, None),
    MultipleChoiceConfig: (MultipleChoiceTask, CHOICE),
    ToolUseConfig: (ToolUseTask, CALL),
    PythonConfig: (FunctionTask, CHOICE),
    CodeConfig: (CodeTask, {"prompt": "Add.", "tests": ["assert f() == 3"]}),
    MathConfig: (MathTask, {"prompt": "1 + 1?", "answer": "2"}),
}
NEEDS = {MathConfig: "math_verify"}
REWARD = """
def reward(prompts, completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]
"""


def test_every_configuration_of_a_task_is_known() -> None:
    assert set(get_args(get_args(TaskConfig)[0])) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_configuration_is_built_as_its_task(
    kind: type, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected, row = KINDS[kind]
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind], reason=f"{NEEDS[kind]} is not installed")
    if kind is CodeConfig:
        request.getfixturevalue("namespaces")
    keys: dict[str, Any] = {"train": 3, "test": 2}
    if row is not None:
        keys = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
        for file in keys.values():
            Path(file).write_text(json.dumps(row) + "\n")
    if kind is PythonConfig:
        (tmp_path / "own.py").write_text(REWARD)
        keys["source"] = f"{tmp_path / 'own.py'}:reward"
    config = kind(**keys)
    task = build_task(config)
    assert type(task) is expected and task.name == config.name
    assert (len(task.train), len(task.test)) == ((3, 2) if row is None else (1, 1))
    for question in task.test:
        assert question.prompt and task.score(question, "no answer at all") == 0.0


def test_a_preset_names_its_task() -> None:
    assert type(build_task(load_config("lab", []).task)) is ArithmeticTask


def test_what_a_task_cannot_use_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"task\.train=99999"):
        build_task(ArithmeticConfig(train=99999))
    with pytest.raises(UsageError, match=r"nowhere\.jsonl"):
        build_task(MultipleChoiceConfig(train="nowhere.jsonl", test="elsewhere.jsonl"))
