"""Lines of samples/ are read whole, or refused in one line that names the place."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from synthetic import answer, lab_run, write_samples

from sodfast.errors import RunFailed, UsageError
from sodfast.run import directory
from sodfast.run.directory import RunDirectory
from sodfast.run.samples import iterate_samples, read_samples, remove_later, sampled_steps
from sodfast.run.samples import shown_hint as hint

FIELDS = [
    *("step", "id", "prompt", "response", "tokens", "text", "reward", "feedback", "length"),
    *("capped", "hint", "hint_source", "teacher_prompt", "advantage", "logprob", "entropy"),
]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rollouts = [answer(3, ["ü", "\x1b", "\u2028\n", ""]), answer(3, ["a"], divergence=None)]
    evaluated = [answer(3, ["4", ""], evaluation=True)]
    write_samples(tmp_path, 3, rollouts)
    write_samples(tmp_path, 3, evaluated, evaluation=True)
    assert read_samples(tmp_path, 3) == [rollout.model_dump() for rollout in rollouts]
    assert read_samples(tmp_path, 3, evaluation=True) == [evaluated[0].model_dump()]
    assert list(read_samples(tmp_path, 3)[0]) == [*FIELDS, "divergence"]
    assert list(read_samples(tmp_path, 3, evaluation=True)[0]) == FIELDS
    for line in (tmp_path / "samples" / "step-3.jsonl").read_bytes().splitlines():
        assert json.loads(line)["step"] == 3


def test_steps_are_ascending_and_told_apart(tmp_path: Path) -> None:
    assert sampled_steps(tmp_path) == []
    for step in (10, 9, 0):
        write_samples(tmp_path, step, [answer(step, ["a"])])
    write_samples(tmp_path, 4, [answer(4, ["a"], evaluation=True)], evaluation=True)
    for name in ("step-7.jsonl.0123456789abcdef.tmp", "step-07.jsonl", "step-x.jsonl", "mine.txt"):
        (tmp_path / "samples" / name).touch()
    assert sampled_steps(tmp_path) == [0, 9, 10]
    assert sampled_steps(tmp_path, evaluation=True) == [4]
    remove_later(tmp_path, rollouts=9, evaluations=3)
    assert sampled_steps(tmp_path) == [0, 9] and sampled_steps(tmp_path, evaluation=True) == []
    left = {"step-0.jsonl", "step-9.jsonl", "step-07.jsonl", "step-x.jsonl", "mine.txt"}
    assert set(os.listdir(tmp_path / "samples")) == left


def test_a_step_without_answers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no answers of step 3, nor of any other; log\.samples"):
        read_samples(tmp_path, 3)
    write_samples(tmp_path, 2, [answer(2, ["a"])])
    with pytest.raises(UsageError, match=r"of step 3, only of 2;"):
        read_samples(tmp_path, 3)
    with pytest.raises(UsageError, match="of the evaluation after step 2, nor"):
        read_samples(tmp_path, 2, evaluation=True)


def damaged(**changes: Any) -> bytes:
    return json.dumps({**answer(1, ["a", "b"]).model_dump(), **changes}).encode()


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (damaged()[:-40], "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"", "Invalid JSON"),
        (b"[1]", "should be an object"),
        (b"[" * 100_000, "Invalid JSON"),
        (damaged(step=2), "an answer of step 2"),
        (damaged(step="1"), "step: "),
        (damaged(reward=None), "reward: "),
        (damaged(reward=float("nan")), "reward: "),
        (damaged(length=3), "lists of different lengths"),
        (damaged(divergence=[0.5]), "lists of different lengths"),
        (damaged(text=["a", "c"]), "does not join"),
        (damaged(text=["a", "\ud800"]), "Invalid JSON"),
        (damaged(hint="secret"), "hint: "),
        (damaged(more=1), "more: "),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, wrong: str) -> None:
    file = write_samples(tmp_path, 1, [answer(1, ["a"])])
    with file.open("ab") as stream:
        stream.write(line + b"\n")
    with pytest.raises(UsageError) as error:
        read_samples(tmp_path, 1)
    assert str(error.value).startswith(f"{file}:2: ") and wrong in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert next(iterate_samples(tmp_path, 1))["text"] == ["a"]  # a line is read when it is wanted


def test_an_answer_without_a_token_is_damage(tmp_path: Path) -> None:
    write_samples(tmp_path, 3, [answer(3, ["a"])])
    file = tmp_path / "samples" / "step-3.jsonl"
    lists = {name: [] for name in ("tokens", "text", "logprob", "entropy", "divergence")}
    file.write_text(
        json.dumps(json.loads(file.read_text()) | lists | {"response": "", "length": 0})
    )
    with pytest.raises(UsageError, match=r"step-3\.jsonl:1: tokens: List should have at least 1"):
        read_samples(tmp_path, 3)


def test_what_is_no_regular_file_is_said_to_be_none(tmp_path: Path) -> None:
    write_samples(tmp_path, 3, [answer(3, ["a"])])
    file = tmp_path / "samples" / "step-3.jsonl"
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"step-3\.jsonl is no regular file"):
        read_samples(tmp_path, 3)


def test_an_answer_that_contradicts_itself_is_not_written() -> None:
    for wrong in ({"length": 3}, {"reward": float("nan")}, {"response": "c"}):
        with pytest.raises(ValidationError):
            answer(1, ["a"], **wrong)


@pytest.mark.parametrize(
    ("prompt", "teacher_prompt", "expected"),
    [
        ("2*3=", None, ""),
        ("2*3=", "2*3=", ""),
        ("2*3=", "2*3=6|2*3=", "6|"),
        ("<u>Q<a>", "<u>Q\n\nsolution: 4\n<a>", "solution: 4"),
        ("2*3=", "6|", "6|"),
    ],
)
def test_the_hint_is_what_the_teachers_prompt_adds(
    prompt: str, teacher_prompt: str | None, expected: str
) -> None:
    assert hint({"prompt": prompt, "teacher_prompt": teacher_prompt}) == expected


# ---------------------------------------------------------------- written whole


@pytest.fixture
def run(tmp_path: Path) -> Any:
    run = RunDirectory.create(tmp_path / "run", lab_run(), {})
    yield run
    run.close()


def killed(act: Callable[[], None]) -> None:
    """Call `act` in a process that must not survive it."""
    if not (child := os.fork()):
        act()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("when", ["sync", "rename"])
def test_a_file_is_whole_or_absent_when_its_writer_is_killed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before and after the bytes get the file's name; what is left goes with a resume."""
    rows = [answer(1, ["word "] * 2000)] * 5
    replace = os.replace

    def die(*arguments: Any) -> None:
        if when == "rename":
            replace(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        monkeypatch.setattr(os, "fsync" if when == "sync" else "replace", die)
        run.write_samples(1, rows)

    (run.path / "samples").mkdir()
    killed(write)
    assert sampled_steps(run.path) == ([1] if when == "rename" else [])
    if when == "rename":
        assert read_samples(run.path, 1) == [row.model_dump() for row in rows]
    else:
        assert len(os.listdir(run.path / "samples")) == 1
        run.rewind(0, lab_run(), without_evaluation=False)
        assert os.listdir(run.path / "samples") == []


def test_a_full_disk_fails_the_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, "replace_text", full)
    with pytest.raises(RunFailed, match=r"samples/step-1\.jsonl could not be written: No space"):
        run.write_samples(1, [answer(1, ["a"])])


def test_samples_are_not_written_through_a_link(run: RunDirectory, tmp_path: Path) -> None:
    run.close()
    (run.path / "samples").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="samples is a symbolic link"):
        RunDirectory.open(run.path)
