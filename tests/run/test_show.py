"""Answers in a terminal: within its width, without colour where there is none, and harmless."""

import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from synthetic import answer, lab_run, write_run, write_samples

from sodfast.errors import UsageError
from sodfast.run.samples import Answer
from sodfast.run.show import END, chosen_answers, describe_answers, inert, shaded

HOSTILE = (
    "\x1b[31m\x1b]0;owned\x07\r\x9b2J\x08\u202edetrever\u2028\x00\x7f<script>alert(1)</script>"
)


@pytest.fixture
def kept(tmp_path: Path) -> Callable[..., Path]:
    """`kept(answers, ...)`: a run with these answers of step 4."""

    def kept(answers: list[Answer], step: int = 4, evaluation: bool = False) -> Path:
        run = tmp_path / "run"
        if not run.exists():
            write_run(run, lab_run("steps=4"))
        write_samples(run, step, answers, evaluation)
        return run

    return kept


def lines(*answers: Answer, width: int = 80, colour: bool = False) -> list[str]:
    console = Console(
        file=StringIO(),
        width=width,
        force_terminal=colour,
        color_system="256" if colour else None,
        no_color=not colour,
    )
    return describe_answers([(i, one.model_dump()) for i, one in enumerate(answers)], console)


def test_the_numbers_of_an_answer_and_its_hint() -> None:
    shown = lines(
        answer(
            4,
            ["2", "+", "3", ""],
            id="q-7",
            reward=0.5,
            capped=False,
            divergence=[0.0, 0.02, 0.4, 0.06],
            hint="demonstration",
            hint_source=3,
            teacher_prompt="1*2+3=2+3=5|1*2+3=",
            feedback="no number",
        )
    )
    assert shown[0] == (
        "digits: divergence of the token above from 1: 0.01, 2: 0.03, 3: 0.1, 4: 0.3 nats"
    )
    assert " ".join(shown).count("step 4  q-7  answer 0  reward 0.5  length 4") == 1
    assert "divergence 0.12" in " ".join(shown) and "advantage +0.25" in " ".join(shown)
    at = shown.index("answer")
    assert shown[at + 1 : at + 3] == [f"  2+3{END}", "   142"]
    assert shown[shown.index("feedback") + 1] == "  no number"
    assert shown[shown.index("hint (demonstration, answer 3)") + 1] == "  2+3=5|"


def test_an_evaluation_has_neither_shades_nor_a_hint() -> None:
    shown = lines(answer(4, ["2+3", ""], evaluation=True))
    assert shown[-1] == f"  2+3{END}"
    assert not [line for line in shown if "digits" in line or "hint" in line or "adv" in line]


def test_an_answer_that_the_cap_ended_has_no_end() -> None:
    assert lines(answer(4, ["2", ""], capped=True, divergence=None))[-1] == "  2"


@settings(max_examples=15)
@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=8),
    st.integers(20, 100),
)
def test_no_line_is_wider_than_the_screen_and_no_character_acts(
    text: list[str], width: int
) -> None:
    one = answer(1, text, prompt="".join(text), capped=True, divergence=[0.2] * len(text))
    shown = lines(one, width=width)
    assert max(map(cell_len, shown)) <= width
    for letter in "".join(shown):
        assert letter in "\u200c\u200d" or unicodedata.category(letter) not in ("Cc", "Cf", "Zl")
    coloured = lines(one, width=width, colour=True)
    assert max(cell_len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in coloured) <= width
    body = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in coloured[coloured.index("answer") + 1 :]]
    joined = "".join(inert(part) for part in text)
    assert "".join(line.removeprefix("  ") for line in body) == joined.replace("\n", "")


def test_marks_stand_below_their_tokens() -> None:
    """Wide characters take two columns, and a long answer breaks behind a space."""
    shown = lines(answer(4, ["你", "好 ", "ab ", "cd"], divergence=[0.5, 0.0, 0.2, 0.02]), width=9)
    at = shown.index("answer")
    assert shown[at + 1 : at + 5] == ["  你好 ", "  44", "  ab cd", "  33311"]


def test_colours_are_backgrounds_and_change_no_letter() -> None:
    one = answer(4, ["2", "+", "3", ""], divergence=[0.0, 0.02, 0.4, 0.06])
    shown = lines(one, colour=True)
    (line,) = [line for line in shown if END in line]
    assert re.sub(r"\x1b\[[\d;]*m", "", line) == f"  2+3{END}"
    assert len(re.findall(r"\x1b\[30;48;5;\d+m", line)) == 3
    assert not [line for line in lines(one) if "\x1b" in line]


def test_hostile_answers_are_spelled_out() -> None:
    one = answer(4, [HOSTILE], prompt=HOSTILE, id=HOSTILE, feedback=HOSTILE, response=HOSTILE)
    shown = "\n".join(lines(one, width=200))
    assert "\\x1b[31m" in shown and "\\x9b2J" in shown and "\\u202edetrever" in shown
    assert not set(shown) & set("\x1b\x07\r\x9b\x08\u202e\u2028\x00\x7f")


def test_shades_are_the_steps_of_the_scale() -> None:
    row = answer(4, list("abcdef"), divergence=[0.0, 0.0099, 0.01, 0.03, 0.1, 0.3]).model_dump()
    assert [shade for _, shade, _ in shaded(row)] == [0, 0, 1, 2, 3, 4]


# ---------------------------------------------------------------- which answers


def test_answers_are_chosen_and_sorted(kept: Callable[..., Path]) -> None:
    run = kept(
        [
            answer(4, ["a"], reward=0.5, id="q-0", divergence=None),
            answer(4, ["a", "b"], reward=1.0, id="q-0", divergence=[0.1, 0.1]),
            answer(4, ["a", "b", "c"], reward=0.0, id="q-1", divergence=[0.0, 0.0, 0.0]),
        ]
    )

    def order(**choice: Any) -> list[int]:
        return [index for index, _ in chosen_answers(run, None, **choice)]

    assert order() == [0, 1, 2] and order(limit=2) == [0, 1]
    assert order(sort="reward") == [1, 0, 2]
    assert order(sort="length") == [2, 1, 0]
    assert order(sort="divergence") == [1, 2, 0]
    assert order(question="q-1") == [2]
    kept([answer(2, ["x"])], step=2)
    assert chosen_answers(run, 2)[0][1]["response"] == "x"
    assert chosen_answers(run, None)[0][1]["step"] == 4
    for choice, match in (
        ({"question": "q-9"}, "no question 'q-9' at that step, which asked q-0, q-1"),
        ({"limit": 0}, "--limit=0"),
        ({"evaluation": True}, "the answers of no evaluation"),
    ):
        with pytest.raises(UsageError, match=match):
            order(**choice)


def test_the_command_in_a_pipe(kept: Callable[..., Path], cli: Command) -> None:
    run = kept([answer(4, [HOSTILE, ""], divergence=[0.2, 0.0])])
    outcome = cli("show", str(run), "--step", "4", "--sort", "divergence")
    assert outcome.code == 0 and outcome.err == "" and "\x1b" not in outcome.out
    assert max(map(cell_len, outcome.out.splitlines())) <= 80
    kept([answer(4, ["3"], evaluation=True)], evaluation=True)
    assert f"  3{END}" not in cli("show", str(run)).out.splitlines()
    assert "  3" in cli("show", str(run), "--eval").out.splitlines()


@pytest.mark.parametrize(("name", "coloured"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
def test_colour_is_asked_for_or_refused(
    kept: Callable[..., Path],
    cli: Command,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    coloured: bool,
) -> None:
    run = kept([answer(4, ["3"], divergence=[0.2])])
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv(name, "1")
    assert ("\x1b[" in cli("show", str(run)).out) == coloured


def test_refusals_are_one_line(kept: Callable[..., Path], cli: Command, tmp_path: Path) -> None:
    run = kept([answer(4, ["3"])])
    for arguments, said in (
        ([str(tmp_path)], "is not a run directory"),
        ([str(run), "--step", "3"], "no answers of step 3, only of 4"),
        ([str(run), "--question", "x"], "no question 'x'"),
        ([str(run), "--sort", "beauty"], "beauty"),
    ):
        outcome = cli("show", *arguments)
        assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err
    (run / "samples" / "step-4.jsonl").write_text('{"step": 4')
    outcome = cli("show", str(run))
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "step-4.jsonl:1: Invalid JSON" in outcome.err


@pytest.mark.slow
def test_an_output_that_nobody_can_read_is_one_line(kept: Callable[..., Path]) -> None:
    run = kept([answer(4, ["3"])])
    show = [sys.executable, "-m", "sodfast", "show", str(run)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(show, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sodfast: standard output cannot be written")
