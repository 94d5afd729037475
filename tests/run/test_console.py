"""What a person sees: plain lines without a terminal, the run's table and its curves."""

import os
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

import pytest
from rich.console import Console
from rich.table import Table

from sodfast.run.console import (
    BarReporter,
    PlainReporter,
    Reporter,
    Screen,
    build_reporter,
    curves,
    describe,
    print_run,
    run_table,
)

SUMMARY = {"schedule": "cgtr", "seed": 0, "status": "done", "refresh_steps": [4]}


def _lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@2": 0.25, "eval/best@2": 0.5}]
    for step in range(1, 9):
        lines.append(
            {
                "step": step,
                "reward/mean": step / 8,
                "length/mean": 10.0,
                "policy/entropy": 1 - step / 10,
                "teacher/refreshed": int(step == 4),
            }
        )
    lines[-1] |= {"eval/mean@2": 0.75, "eval/best@2": 1.0}
    return lines


def _text(table: Table) -> list[str]:
    console = Console(file=StringIO(), width=120)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def _row(rows: list[str], name: str) -> str:
    return next(row for row in rows if row.strip().startswith(name))


def test_curves_run_from_least_to_greatest_and_mark_refreshes() -> None:
    rows = _text(curves(_lines()))
    assert _row(rows, "reward/mean").split() == ["reward/mean", "0.125", "1.000", "▁▂▃▄▅▆▇█"]
    assert _row(rows, "policy/entropy").split()[-1] == "█▇▆▅▄▃▂▁"
    assert _row(rows, "length/mean").split()[-1] == "▁" * 8  # constant, not a division by zero
    marks = _row(rows, "refresh").index("v") - _row(rows, "reward/mean").index("▁")
    assert marks == 3
    assert not any(row.strip().startswith("distill") for row in rows)  # never measured


def test_curves_average_the_steps_of_a_column() -> None:
    rows = _text(curves(_lines(), width=2))
    assert _row(rows, "reward/mean").split() == ["reward/mean", "0.312", "0.812", "▁█"]


def test_a_run_without_steps_has_no_curves() -> None:
    assert not any("reward" in row for row in _text(curves(_lines()[:1])))


def test_the_table_lists_evaluations_refreshes_and_collapse() -> None:
    rows = _text(run_table({**SUMMARY, "collapse_step": 7}, _lines()))
    assert _row(rows, "0 ").split() == ["0", "0.250", "0.500"]
    assert _row(rows, "8 ").split()[:4] == ["8", "0.750", "1.000", "1.000"]
    assert any("refreshes: 4" in row and "collapse step: 7" in row for row in rows)


def test_without_a_terminal_every_step_is_one_plain_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = build_reporter()
    assert isinstance(reporter, PlainReporter)
    reporter.start(0, 8)
    for line in _lines():
        reporter.line(line)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 9
    assert printed[4].startswith("step 4/8  reward 0.500")
    assert "eta" in printed[4] and "\x1b" not in printed[4]


def test_a_line_says_reward_evaluation_and_refresh() -> None:
    assert describe(_lines()[4]).endswith("teacher refreshed")
    assert describe(_lines()[0]) == "eval/mean@2 0.250"


# ---------------------------------------------------------------- an output that breaks


def _full_disk() -> TextIO:
    return Path("/dev/full").open("w")


def _pipe_without_a_reader() -> TextIO:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def test_a_descriptor_that_the_users_code_closes_is_switched_off_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The next file that is opened gets its number, be it the one that discards what is written."""
    stream = (tmp_path / "out").open("w")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        screen = Screen()
        os.close(stream.fileno())
        for _ in range(3):
            print("text", file=screen, flush=True)
    stream.close()
    said = capsys.readouterr().err
    assert screen.off and said.count("\n") == 1 and "(Bad file descriptor)" in said


def test_an_output_that_the_users_code_closes_is_switched_off_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        screen = Screen()
        stream.close()
        reporter = PlainReporter(screen)
        for line in _lines():
            reporter.line(line)
        print_run(Path("run"), {**SUMMARY, "collapse_step": None}, _lines(), screen)
    said = capsys.readouterr().err
    assert screen.off and said.count("\n") == 1
    assert said.startswith("sodfast: standard output cannot be written (it has been closed)")


@pytest.mark.parametrize("kind", [PlainReporter, BarReporter])
@pytest.mark.parametrize("broken", [_full_disk, _pipe_without_a_reader])
def test_an_output_that_cannot_be_written_is_switched_off_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: Callable[[], TextIO],
    kind: Callable[..., Reporter],
) -> None:
    """At its end the with block flushes the stream: what was left in its buffer fails no more."""
    with broken() as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        screen = Screen()
        reporter = kind(screen)
        reporter.start(0, 8)
        reporter.phase("rollout", 1, 2)
        for line in _lines():
            reporter.line(line)
        reporter.stop()
        print_run(Path("run"), {**SUMMARY, "collapse_step": None}, _lines(), screen)
    said = capsys.readouterr().err
    assert said.startswith("sodfast: standard output cannot be written (")
    assert said.count("\n") == 1


@pytest.mark.parametrize("broken", [_full_disk, _pipe_without_a_reader])
def test_where_standard_error_is_broken_too_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[], TextIO]
) -> None:
    with broken() as out, broken() as err, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        reporter = build_reporter(Screen())
        reporter.message("one")
        reporter.message("two")
        assert all(os.path.samestat(os.fstat(s.fileno()), os.stat(os.devnull)) for s in (out, err))


@pytest.mark.parametrize("broken", [_full_disk, _pipe_without_a_reader])
def test_a_result_that_cannot_be_written_is_an_error(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[], TextIO]
) -> None:
    """Without a `Screen`, for whoever has nothing but that result to give."""
    with broken() as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        with pytest.raises(OSError):
            build_reporter().message("one")
        Screen().flush()  # so that the stream can be closed
