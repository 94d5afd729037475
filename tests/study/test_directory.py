"""Study directories: what holds them, the statuses of their trials, and the table."""

import csv
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from marks import slow

from sodfast.errors import UsageError
from sodfast.files import is_held
from sodfast.study.definition import load_study
from sodfast.study.directory import (
    LAST_STEPS,
    failure_path,
    hold,
    lock_path,
    open_study,
    read_runs,
    run_path,
    write_table,
)

SCHEDULES = [{"kind": "hard", "every": 50}, {"kind": "ema", "rate": 0.04}]


def write(folder: Path, **study: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"base": "lab", **study}, sort_keys=False))
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A study directory of four trials without any run."""
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    axes = {"schedule": SCHEDULES, "seed": [0, 1]}
    write(out, axes=axes, overrides={"steps": 8, "eval.samples": 2})
    return out


Fill = Callable[..., None]


@pytest.fixture
def fill(directory: Path) -> Fill:
    """Write a run by hand: rewards of no interest, lengths 10 t, an evaluation every 4 steps."""

    def fill(name: str, steps: int, refreshes: bool, **summary: Any) -> None:
        run = run_path(directory, name)
        run.mkdir(parents=True)
        lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@2": 0.25}]
        for step in range(1, steps + 1):
            line = {"step": step, "length/mean": 10.0 * step, "policy/entropy": float(step)}
            if refreshes:
                line["teacher/refreshed"] = int(step % 3 == 0)
            if step % 4 == 0:
                line["eval/mean@2"] = 0.5 if step == 4 else 0.375
            line["time/step"] = step * 0.1
            lines.append(line)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "config.yaml").write_text("steps: 8\n")
        if summary:
            (run / "summary.json").write_text(json.dumps({"steps": steps, **summary}))

    return fill


def table(directory: Path) -> list[dict[str, str]]:
    with write_table(directory).open() as stream:
        return list(csv.DictReader(stream))


def test_the_table_holds_hand_computed_numbers(directory: Path, fill: Fill) -> None:
    fill("hard-every50,seed0", 8, True, status="done")
    fill("ema-rate0.04,seed1", 8, False, status="collapsed")
    collapse = {"step": 7, "event": "collapse", "reason": "length"}
    events = [{"step": 3, "event": "refresh", "shock": 1, "age": 3}, collapse]
    (run_path(directory, "ema-rate0.04,seed1") / "events.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events)
    )
    first, missing, _, collapsed = table(directory)
    assert LAST_STEPS == 5
    assert first == {
        "name": "hard-every50,seed0",
        "schedule": "hard-every50",
        "seed": "0",
        "status": "done",
        "steps": "8",
        "final": "0.375",
        "peak": "0.5",
        "peak_step": "4",
        "refreshes": "2",
        "refresh_steps": "3 6",
        "collapse_step": "",
        "entropy_mean": "4.5",
        "entropy_final": "8.0",
        "length_last5": "60.0",
    }
    assert missing["status"] == "missing" and missing["steps"] == missing["final"] == ""
    assert collapsed["status"] == "collapsed" and collapsed["collapse_step"] == "7"
    assert collapsed["refreshes"] == collapsed["refresh_steps"] == ""  # it never copies


def test_the_table_does_not_depend_on_the_clock(directory: Path, fill: Fill) -> None:
    fill("hard-every50,seed0", 8, True, status="done")
    before = write_table(directory).read_bytes()
    metrics = run_path(directory, "hard-every50,seed0") / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"time/step": 0.1', '"time/step": 9.9'))
    assert write_table(directory).read_bytes() == before


def test_statuses(directory: Path, fill: Fill) -> None:
    def status() -> str:
        return read_runs(directory)[0].status

    name = read_runs(directory)[0].trial.name
    assert status() == "missing"
    run_path(directory, name).mkdir(parents=True)
    assert status() == "missing"  # killed before there was anything to resume
    run_path(directory, name).rmdir()
    fill(name, 4, True)
    summary = run_path(directory, name) / "summary.json"
    assert status() == "interrupted"
    for text, expected in (
        ({"steps": 4, "status": "interrupted"}, "interrupted"),
        ({"steps": 4, "status": "failed"}, "interrupted"),  # the next sweep tries it again
        ({"steps": 4, "status": "done"}, "interrupted"),  # of a shorter run
        ({"steps": 4, "status": "collapsed"}, "interrupted"),  # collapse.stop is false
        ({"steps": 8, "status": "collapsed"}, "collapsed"),
        ({"steps": 8, "status": "done"}, "done"),
    ):
        summary.write_text(json.dumps(text))
        assert status() == expected
    failure_path(directory, name).write_text("why")
    assert status() == "failed"
    with lock_path(directory, name).open("w") as lock:
        assert status() == "failed"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status() == "running"
    assert status() == "failed"


def test_a_run_that_its_detector_stopped_is_finished(directory: Path, fill: Fill) -> None:
    write(directory, axes={"seed": [0]}, overrides={"steps": 8, "collapse.stop": True})
    fill("seed0", 5, True, status="collapsed")
    assert [run.status for run in read_runs(directory)] == ["collapsed"]


def test_a_cut_last_line_is_left_out_and_a_damaged_one_is_named(
    directory: Path, fill: Fill
) -> None:
    fill("hard-every50,seed0", 5, True)
    run = read_runs(directory)[0]
    metrics = run.path / "metrics.jsonl"
    with metrics.open("a") as stream:
        stream.write('{"step": 6, "len')
    (run, *_) = read_runs(directory)
    assert [line["step"] for line in run.lines] == [0, 1, 2, 3, 4, 5]
    assert table(directory)[0]["steps"] == "5"
    with metrics.open("a") as stream:
        stream.write('\n{"step": 7}\n')
    damaged = read_runs(directory)[0]
    assert (damaged.status, damaged.lines) == ("damaged", [])
    assert damaged.damage.startswith(f"{metrics}:7: not JSON")
    row = table(directory)[0]
    assert row["status"] == "damaged" and row["steps"] == row["final"] == ""


DAMAGE = {
    "summary.json": [b"{", b"[]", b"null", b"\xff", b"", b"{}", b"[" * 100_000],
    "metrics.jsonl": [
        b'{"step": 0}\n{"step": 1, "length/mean": "long"}\n',
        b'{"step": 0}\n{"step": 1, "length/mean": ' + b"9" * 400 + b"}\n",
        b'{"step": 0, "\xc3\n{"step": 1}\n',
        b"[" * 100_000 + b'\n{"step": 1}\n',
        b"null\n",
    ],
    "events.jsonl": [
        b'{"step": 3}\n',
        b'{"step": 3, "event": "refresh"}\n',
        b'{"step": 3, "event": "gate", "gates": {}, "refresh": false}\n',
        b'{"event": "collapse"}\n',
    ],
}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, each[0]) for file, each in DAMAGE.items()),
        *slow(*((file, damage) for file, each in DAMAGE.items() for damage in each[1:])),
    ],
)
def test_a_damaged_trial_is_named_and_takes_no_other(
    directory: Path, fill: Fill, file: str, damage: bytes
) -> None:
    fill("hard-every50,seed0", 8, True, status="done")
    fill("hard-every50,seed1", 8, True, status="done")
    sound = table(directory)
    path = run_path(directory, "hard-every50,seed0")
    (path / file).write_bytes(damage)
    run = read_runs(directory)[0]
    assert run.status == "damaged" and run.lines == run.events == []
    assert run.damage.startswith(f"{path / file}:") and "\n" not in run.damage
    rows = table(directory)
    assert rows[0]["status"] == "damaged" and not any(list(rows[0].values())[4:])
    assert rows[1:] == sound[1:]


def test_a_lock_that_is_a_directory_holds_nothing(directory: Path, fill: Fill) -> None:
    fill("hard-every50,seed0", 8, True, status="done")
    lock_path(directory, "hard-every50,seed0").mkdir()
    assert read_runs(directory)[0].status == "done"


def test_no_label_of_the_table_is_a_formula(directory: Path) -> None:
    values = ["=cmd|' /C calc'!A1", "@SUM(1)", "a,b"]
    write(directory, axes={"log.project": values, "optimizer.lr": [0.1]})
    rows = table(directory)
    assert [row["log.project"] for row in rows] == [f"'{values[0]}", f"'{values[1]}", "a,b"]
    assert [row["name"] for row in rows] == [trial.name for trial in open_study(directory).trials]
    assert {row["optimizer.lr"] for row in rows} == {"0.1"}


def test_a_directory_without_a_study(tmp_path: Path) -> None:
    for read in (open_study, read_runs, write_table):
        with pytest.raises(UsageError, match=r"study\.yaml"):
            read(tmp_path)


# ---------------------------------------------------------------- holding it


def test_a_held_directory_is_the_studys_and_nobody_elses(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, axes={"seed": [0, 1]}))
    out = tmp_path / "deep" / "out"
    with hold(out, study):
        assert sorted(path.name for path in out.iterdir()) == [
            *(".lock", "base.yaml", "logs", "runs", "study.yaml")
        ]
        assert [t.config for t in open_study(out).trials] == [t.config for t in study.trials]
        assert is_held(out / ".lock")
        with pytest.raises(UsageError, match="another process"), hold(out, study):
            pass
    assert not is_held(out / ".lock")


def test_a_held_directory_gains_trials_and_loses_none(tmp_path: Path) -> None:
    few, many = (load_study(write(tmp_path, axes={"seed": list(range(count))})) for count in (2, 3))
    for study in (few, many):
        with hold(tmp_path / "out", study):
            assert len(open_study(tmp_path / "out").trials) == len(study.trials)
    before = (tmp_path / "out" / "study.yaml").read_bytes()
    with pytest.raises(UsageError, match="it has no trial seed2"), hold(tmp_path / "out", few):
        pass
    assert (tmp_path / "out" / "study.yaml").read_bytes() == before


def test_what_a_killed_beginning_left_is_no_obstacle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".lock", "base.yaml", "base.yaml.tmp", "study.yaml.tmp"):
        (out / name).write_text("half")
    with hold(out, load_study(write(tmp_path, axes={"seed": [0]}))):
        assert len(read_runs(out)) == 1


@pytest.mark.parametrize(
    "name", [".lock", "runs", "logs", "runs/seed0", "logs/seed0.log", "logs/seed0.lock"]
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_link_is_not_followed(tmp_path: Path, name: str, begun: bool) -> None:
    """Neither one to a file, a folder, nor one that names nothing yet."""
    study = load_study(write(tmp_path, axes={"seed": [0]}))
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if begun:
        with hold(out, study):
            pass
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).unlink(missing_ok=True)
    else:
        (out / name).parent.mkdir(parents=True)
        (out / "study.yaml").write_text(study.to_yaml())
    (out / name).symlink_to(elsewhere)
    with pytest.raises(UsageError, match=f"{name} is a symbolic link"), hold(out, study):
        pass
    assert not elsewhere.exists() and not elsewhere.is_symlink()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(write(tmp_path, axes={"seed": [0]}))

    def full(file: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr("sodfast.study.directory.replace_text", full)
    with (
        pytest.raises(UsageError, match="cannot be used: No space left"),
        hold(tmp_path / "o", study),
    ):
        pass
