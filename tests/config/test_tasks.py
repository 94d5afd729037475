"""The tasks' keys: paths in full, other examinations, and what of theirs is refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from configurations import refusal

from sodfast.config import EvalConfig, load_config


def test_paths_of_a_users_task_are_kept_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["task.train=a.jsonl", "task.test=org/name"]
    task = load_config("lab", ["task.name=python", "task.source=own.py:reward", *rows]).task
    assert task.source == f"{tmp_path}/own.py:reward"
    assert (task.train, task.test) == (f"{tmp_path}/a.jsonl", "org/name")
    task = load_config("lab", ["task.name=python", "task.source=package.own:reward"]).task
    assert task.source == "package.own:reward"
    for source in ("own.py", ":reward", "own.py:a.b"):
        message = refusal("task.name=python", f"task.source={source}")
        assert message.startswith("task.source: must be FILE.py:NAME or module.submodule:NAME")
    assert "did you mean memory_mib?" in refusal(
        "task.name=code", "task.train=a.jsonl", "model.path=m", "task.options.memory=3"
    )
    # What a task's rewards are compared with may be on their own scale, where they are the user's.
    keys = ["task.name=python", "task.source=package.own:reward", "collapse.eval_floor=-1"]
    assert load_config("lab", keys).collapse.eval_floor == -1


def test_other_tasks_are_tasks(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    given = {"chem": {"name": "math", "train": str(rows)}, "sums": {"name": "arithmetic"}}
    config = load_config("base", ["model.path=m"], eval={"tasks": given})
    assert config.eval.tasks["chem"].name == "math" and config.eval.tasks["sums"].name
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(str(again)) == config


def test_noise_and_later_phases_are_bounded() -> None:
    assert "first=9 comes after last=3" in refusal(
        "task.label_noise={share: 0.1, first: 9, last: 3}"
    )
    for text in ("{share: 1.1}", "{share: 0.1, first: 0}", "{first: 3}"):
        assert refusal(f"task.label_noise={text}").startswith("task.label_noise.")
    for text in ("{step: 0}", "{step: 3, share: 0.0}", "{step: 3, share: 1.0}"):
        assert refusal(f"task.arrival={text}").startswith("task.arrival.")
    assert load_config("lab", ["task.arrival.step=3"]).task.arrival.share == 0.5  # type: ignore[union-attr]
    assert "unknown key task.arrival" in refusal(
        "task.name=math", "task.train=a.jsonl", "model.path=m", "task.arrival={step: 3}"
    )


@pytest.mark.parametrize(
    ("every", "due", "due_at_the_end"), [(0, [], []), (3, [0, 3], [1, 2, 4]), (1, range(5), [])]
)
def test_each_step_is_evaluated_for_one_reason(
    every: int, due: Sequence[int], due_at_the_end: Sequence[int]
) -> None:
    config = EvalConfig(every=every)
    assert [step for step in range(5) if config.due(step)] == list(due)
    assert [step for step in range(5) if config.due_at_the_end(step)] == list(due_at_the_end)
