"""The task `math` on golden answers, as math-verify judges them."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sodfast.config import MathConfig
from sodfast.errors import UsageError
from sodfast.tasks.base import Question, grade
from sodfast.tasks.math import MathTask


def rows(folder: Path, *answers: Any) -> dict[str, str]:
    files = {name: folder / f"{name}.jsonl" for name in ("train", "test")}
    for file in files.values():
        lines = [json.dumps({"prompt": "How many?", "answer": answer}) for answer in answers]
        file.write_text("\n".join(lines) + "\n")
    return {name: str(file) for name, file in files.items()}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> MathTask:
    pytest.importorskip("math_verify", reason="the package math-verify is not installed")
    return MathTask(MathConfig(**rows(tmp_path_factory.mktemp("rows"), "1"), timeout=30))


def test_without_the_package_the_user_is_told(tmp_path: Path) -> None:
    try:
        import math_verify  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UsageError, match=r"pip install 'sodfast\[math\]'"):
            MathTask(MathConfig(**rows(tmp_path, "1")))
    else:
        pytest.skip("the package math-verify is installed")


RIGHT = [
    ("1/2", r"It is \boxed{0.5}."),
    (r"\frac{1}{2}", r"It is \boxed{\frac{2}{4}}."),
    (0.5, "So the answer is $1/2$"),
    (2, r"first \boxed{1}, no, \boxed{2}"),
    (1000, r"\boxed{1{,}000}"),
    ("1,000", "in all 1000"),
    ("12 cm", r"\boxed{12\text{ cm}}"),
    ("12", r"\boxed{12\text{ m}}"),  # units are not compared
    ("[1, 2)", r"\boxed{[1,2)}"),
    (r"\{1, 2\}", r"\boxed{2, 1}"),
    (r"\sqrt{2}/2", r"$\boxed{\frac{1}{\sqrt{2}}}$"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    ("3", r"\boxed{x = 3}"),
    (1e20, r"\boxed{10^{20}}"),
    ("-3", "Therefore the result is -3"),
]
WRONG = [
    ("1/3", r"\boxed{0.333}", "0.333"),
    ("[1, 2)", r"\boxed{(1,2)}", "Interval.open(1, 2)"),
    ("(1, 2)", r"\boxed{(2, 1)}", "(2, 1)"),
    ("1", r"first \boxed{1}, no, \boxed{2}", "2"),
    ("3", "first 3, then 4", "4"),
]


@pytest.mark.slow  # SymPy takes seconds to start
def test_golden_answers(task: MathTask) -> None:
    questions = [Question("How many?", answer) for answer, _ in RIGHT]
    for given, case in zip(grade(task, questions, [r for _, r in RIGHT]), RIGHT, strict=True):
        assert (given.reward, given.feedback) == (1.0, None), case
        assert given.answer is not None

    questions = [Question("How many?", answer) for answer, *_ in WRONG]
    for given, case in zip(grade(task, questions, [c[1] for c in WRONG]), WRONG, strict=True):
        assert given.reward == 0.0, case
        assert given.feedback is not None and "which is not right" in given.feedback
        assert "read as" in given.feedback and given.answer is not None
    assert task.extract(r"\boxed{\frac{2}{4}}") == "1/2"


@pytest.mark.slow
def test_a_response_without_an_answer(task: MathTask) -> None:
    question = Question("How many?", "1")
    for response in ("", "I do not know.", r"\boxed{}", r"\boxed{"):
        (given,) = grade(task, [question], [response])
        assert (given.reward, given.answer) == (0.0, None), response
        assert given.feedback == "No final answer was found: write it as \\boxed{answer}."


@pytest.mark.slow
def test_what_takes_for_ever_is_ended_and_the_next_goes_on(
    task: MathTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "_seconds", 3.0)
    start = time.monotonic()
    question = Question("How many?", "1")
    (given,) = grade(task, [question], [r"\boxed{9^{9^{9^{9}}}+1}"])
    assert given.reward == 0.0 and given.feedback is not None
    assert time.monotonic() - start < 20
    monkeypatch.setattr(task, "_seconds", 60.0)
    assert task.score(question, r"\boxed{1}") == 1.0


@pytest.mark.slow
def test_it_works_in_a_thread(task: MathTask) -> None:
    """math-verify's own limits would not: they are signals, which only the main thread gets."""
    found: list[float] = []
    question = Question("How many?", "1")
    thread = threading.Thread(target=lambda: found.append(task.score(question, r"\boxed{1}")))
    thread.start()
    thread.join()
    assert found == [1.0]


@pytest.mark.slow
def test_a_long_response_without_a_box(task: MathTask) -> None:
    text = "Let $x = 3$ and so on, which gives 17 of them. " * 600
    assert task.extract(text) == "17"


@pytest.mark.parametrize("answer", [True, ["1"], " ", {"x": 1}])
def test_an_answer_that_is_neither_number_nor_text(
    tmp_path: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: os)
    with pytest.raises(UsageError, match="line 1: field 'answer' must be a number or LaTeX"):
        MathTask(MathConfig(**rows(tmp_path, answer)))
