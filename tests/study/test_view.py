"""What a sweep shows: progress read from files that grow, the live table, the plain lines."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.live import Live

from sodfast.files import try_lock
from sodfast.run.records import read_metrics
from sodfast.study.definition import load_study
from sodfast.study.directory import failure_path, lock_path, run_path
from sodfast.study.view import Progress, View


def append(file: Path, *lines: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines))


def test_progress_follows_a_file_that_grows_is_cut_and_vanishes(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    progress = Progress(tmp_path, eval_samples=2)

    def seen() -> tuple[Any, ...]:
        progress.update()
        return progress.step, progress.reward, progress.eval, progress.refreshes

    assert seen() == (0, None, None, None)
    append(file, {"step": 0, "eval/mean@2": 0.25})
    assert seen() == (0, None, 0.25, None)
    append(file, {"step": 1, "reward/mean": 0.5, "teacher/refreshed": 1})
    assert seen() == (1, 0.5, 0.25, 1)
    with file.open("a") as stream:
        stream.write('{"step": 2, "rewa')
    assert seen() == (1, 0.5, 0.25, 1)
    with file.open("a") as stream:
        stream.write('rd/mean": 0.75, "teacher/refreshed": 1}\n')
    assert seen() == (2, 0.75, 0.25, 2)
    aside = tmp_path / "aside"  # a resumed run puts a shorter file in its place
    append(aside, {"step": 0, "eval/mean@2": 0.25}, {"step": 1, "teacher/refreshed": 0})
    os.replace(aside, file)
    assert seen() == (1, None, 0.25, 0)
    file.write_text('{"step": 0, "eval/mean@2": 0.5, "note": 0.' + "5" * 200 + "}\n")
    # the same inode, longer, and no line where one was
    assert seen() == (0, None, 0.5, None)
    file.unlink()
    assert seen() == (0, None, None, None)


def test_progress_reads_a_file_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics.jsonl"
    append(file, *({"step": step} for step in range(1000)))
    progress = Progress(tmp_path, eval_samples=2)
    progress.update()
    read: list[Path] = []
    monkeypatch.setattr(
        "sodfast.study.view.read_metrics", lambda run: read.append(run) or read_metrics(run)
    )
    progress.update()
    assert read == []
    append(file, {"step": 1000})
    progress.update()
    progress.update()
    assert read == [tmp_path] and progress.step == 1000


@pytest.mark.parametrize("text", [b"[]\n{}\n", b'{"step": "x"}\n', b"\xff\n{}\n", b"[" * 10**5])
def test_progress_keeps_what_it_saw_of_a_damaged_file(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    append(file, {"step": 3})
    progress = Progress(tmp_path, eval_samples=2)
    progress.update()
    with file.open("ab") as stream:
        stream.write(text)
    progress.update()
    assert progress.step == 3
    append(tmp_path / "aside", {"step": 2})
    os.replace(tmp_path / "aside", file)
    progress.update()
    assert progress.step == 2


def many(tmp_path: Path) -> tuple[Path, Any]:
    (tmp_path / "logs").mkdir()
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"base": "lab", "axes": {"seed": list(range(200))}}))
    return tmp_path, load_study(study).trials


@pytest.mark.slow
def test_the_live_table_shows_what_matters_of_200_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, trials = many(tmp_path)
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = Console(width=100, height=20, record=True, force_terminal=True)
    finished = {f"seed{seed}": "done" for seed in range(50)}
    with Live(console=console, auto_refresh=False) as live:
        view = View(directory, trials, finished, live)
        failure_path(directory, "seed60").write_text("why\n")
        view.ended("seed60", "failed")
        lock = try_lock(lock_path(directory, "seed150"))
        assert lock is not None
        view.refresh()
        run_path(directory, "seed150").mkdir(parents=True)
        metrics = run_path(directory, "seed150") / "metrics.jsonl"
        append(metrics, {"step": 0, "eval/mean@16": 0.25})
        append(metrics, *({"step": s, "reward/mean": 0.125} for s in range(1, 31)))
        now = 60.0
        view.refresh()
        lock.close()
    text = console.export_text()
    assert "seed60: failed" in text and "(why)" in text
    rows = [line.split() for line in text.splitlines()]
    # 30 of 150 steps in a minute: 4 minutes to go.
    assert ["seed150", "running", "30/150", "0.125", "0.250", "4m00s"] in rows
    assert "200 trials: 50 done, 148 waiting, 1 failed, 1 running; eta" in text
    console.print(view.table(rows=6))
    shown = [line.split()[0] for line in console.export_text().splitlines() if "seed" in line]
    assert shown == ["seed150", "seed60", "seed49", "seed48", "seed47", "seed46"]


@pytest.mark.slow
def test_plain_lines_are_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, trials = many(tmp_path)
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    view = View(directory, trials, {})
    for now in range(0, 150):  # noqa: B007
        view.show()
    assert len(capsys.readouterr().out.splitlines()) == 2
