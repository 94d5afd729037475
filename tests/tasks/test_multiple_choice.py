"""The multiple-choice scorer on golden cases (reward of arXiv 2601.20802)."""

from pathlib import Path
from typing import Any

import pytest

from sodfast.config import MultipleChoiceConfig
from sodfast.tasks import build_task
from sodfast.tasks.base import Question, Task

QUESTION = Question("2 + 2?\nA: 3\nB: 4", "B", None, "0")


def built(tmp_path_factory: pytest.TempPathFactory, scorer: Any) -> Task:
    folder = tmp_path_factory.mktemp("rows")
    paths = [Path(folder, name) for name in ("train.jsonl", "test.jsonl")]
    for path in paths:
        path.write_text('{"prompt": "2 + 2?\\nA: 3\\nB: 4", "answer": "B"}\n')
    files = {"train": str(paths[0]), "test": str(paths[1])}
    return build_task(MultipleChoiceConfig(**files, scorer=scorer))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return built(tmp_path_factory, "strict")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return built(tmp_path_factory, "reference")


@pytest.mark.parametrize(
    ("response", "strict", "as_published"),
    [
        ("<answer>B</answer>", 1.0, 1.0),
        ("<answer>A</answer> No. <answer>B</answer>", 1.0, 1.0),
        ("<answer>B", 1.0, 1.0),
        ("B", 1.0, 1.0),
        ("B</answer>", 0.0, 1.0),  # the opening tag is missing
        (" B </answer> A</answer>", 0.0, 1.0),
        ("It is B</answer>", 0.0, 0.0),
        ("<answer>(B)</answer>", 0.0, 0.0),
        ("<answer>b</answer>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_what_differs_between_the_scorers(
    task: Task, reference: Task, response: str, strict: float, as_published: float
) -> None:
    for scorer, score in ((task, strict), (reference, as_published)):
        assert scorer.score(QUESTION, response) == score
        assert (scorer.extract(response) == "B") == bool(score)  # type: ignore[misc]
        assert (scorer.feedback(QUESTION, response) is None) == bool(score)


@pytest.mark.parametrize(
    "response",
    [
        "<answer>B</answer>",
        "<answer>\nB\n</answer>",
        "<answer>\r\n B \r\n</answer>\r\n",
        "<reasoning>It is A.</reasoning><answer>B</answer> and that is final",
        "<answer>A</answer> No. <answer>B</answer>",
        "<answer><answer>B</answer>",
        "<answer>B</answer></answer>",
        "<answer>B",
        "B",
        " \nB\n",
    ],
)
def test_right(task: Task, response: str) -> None:
    assert task.score(QUESTION, response) == 1.0
    assert task.extract(response) == "B"
    assert task.feedback(QUESTION, response) is None


@pytest.mark.parametrize(
    ("response", "vote", "hint"),
    [
        ("<answer>A</answer>", "A", None),
        ("<answer>B</answer> No. <answer>A</answer>", "A", None),
        ("<answer>b</answer>", None, "holds something else"),
        ("<answer>B: 4</answer>", None, "holds something else"),
        ("<answer>(B)</answer>", None, "holds something else"),
        ("<answer>B.</answer>", None, "holds something else"),
        ("<answer>A B</answer>", None, "holds something else"),
        ("<answer></answer>", None, "holds something else"),
        ("<answer>B</answer> <answer>", None, "holds something else"),
        ("<answer>B</Answer>", None, "holds something else"),
        ("<Answer>B</Answer>", None, "no <answer> tag"),
        ("B</answer>", None, "no <answer> tag"),
        ("b", None, "no <answer> tag"),
        ("The answer is B", None, "no <answer> tag"),
        ("", None, "no <answer> tag"),
    ],
)
def test_wrong(task: Task, response: str, vote: str | None, hint: str | None) -> None:
    assert task.score(QUESTION, response) == 0.0
    assert task.extract(response) == vote
    feedback = task.feedback(QUESTION, response)
    assert feedback is None if hint is None else hint in str(feedback)
