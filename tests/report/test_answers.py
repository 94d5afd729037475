"""The page of answers: which questions it compares, at which steps, and what stands in a cell."""

from pathlib import Path

import pytest
from synthetic import answer, lab_run, schedule_study, write_run, write_samples, write_study

from sodfast.errors import UsageError
from sodfast.report.answers import COLUMNS, LETTERS, QUESTIONS, TOKENS, compare
from sodfast.report.page import write_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", lab_run("steps=4"))
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_without_answers_compares_nothing(run: Path) -> None:
    assert compare(run) == compare(run, evaluation=True) == {}
    assert 'id="answers"' not in write_report(run).read_text()


def test_questions_that_come_again_go_first(run: Path) -> None:
    for step in (10, 20, 30):
        names = [f"q-{step}-{number}" for number in range(6)] + ["again"] * (step != 20)
        write_samples(run, step, [answer(step, ["a"], id=name) for name in names])
    found = compare(run)
    assert len(found) == QUESTIONS and next(iter(found)) == "again"
    assert [shown.step for shown in found["again"]] == [10, 30]
    assert {cells[0].step for name, cells in found.items() if name != "again"} == {10, 20, 30}


def test_steps_are_chosen_evenly(run: Path) -> None:
    for step in range(1, 31):
        write_samples(run, step, [answer(step, ["a"], id="q")])
        write_samples(run, step, [answer(step, ["a"], True, id="q")], evaluation=True)
    for evaluation in (False, True):
        steps = [shown.step for shown in compare(run, evaluation)["q"]]
        assert len(steps) == COLUMNS and (steps[0], steps[-1]) == (1, 30)


def test_a_distilled_answer_stands_for_its_group(run: Path) -> None:
    rows = [
        answer(1, ["a"], reward=1.0, divergence=None),
        answer(1, ["b", "c"], reward=0.0, divergence=[0.5, 0.1]),
    ]
    write_samples(run, 1, rows)
    (shown,) = compare(run)["question-0"]
    assert (shown.rewards, shown.reward, shown.divergence) == ([1.0, 0.0], 0.0, 0.3)
    assert shown.tokens == [("b", 4, 0.5), ("c", 3, 0.1)]
    write_samples(run, 1, rows[:1])
    assert compare(run)["question-0"][0].tokens == [("a", 0, None)]


def test_only_the_first_questions_of_an_evaluation_are_read(run: Path) -> None:
    rows = [answer(1, ["a"], True, id=f"q-{i // 2}") for i in range(2 * QUESTIONS + 2)]
    file = write_samples(run, 1, rows, evaluation=True)
    with file.open("a") as stream:
        stream.write("damaged\n")
    assert list(compare(run, evaluation=True)) == [f"q-{i}" for i in range(QUESTIONS)]


@pytest.mark.slow
def test_long_answers_are_cut(run: Path) -> None:
    write_samples(run, 1, [answer(1, ["ab "] * (TOKENS + 9), prompt="x" * 9999)])
    (shown,) = compare(run)["question-0"]
    assert len(shown.tokens) == TOKENS and shown.more == 9 and len(shown.prompt) == LETTERS
    assert "… 9 more tokens" in write_report(run).read_text()


def test_nothing_of_an_answer_is_markup(run: Path) -> None:
    text = "<script>alert(1)</script>\x00\u202e"
    write_samples(run, 1, [answer(1, [text, '"><b>'], id=text, prompt=text)])
    page = write_report(run).read_text()
    section = page[page.index('<section id="answers">') :]
    assert "<script" not in section and "<b>" not in section and "\x00" not in section
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x00\\u202e" in section
    assert '<a href="#answers">' in page


def test_a_damaged_file_refuses_the_report(run: Path) -> None:
    write_samples(run, 1, [answer(1, ["a"])]).write_text("[1]\n")
    with pytest.raises(UsageError, match=r"samples/step-1\.jsonl:1: "):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.slow
def test_a_study_has_no_answers(tmp_path: Path) -> None:
    names = write_study(tmp_path / "s", schedule_study(seeds=1, steps=4))
    write_samples(tmp_path / "s" / "runs" / names[0], 1, [answer(1, ["a"])])
    assert 'id="answers"' not in write_report(tmp_path / "s").read_text()
