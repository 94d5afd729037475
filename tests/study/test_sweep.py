"""Sweeps: what is started, skipped, resumed, retried, given up, and that nothing runs twice.

Most tests run a stand-in for training, a few lines that write what a run writes, so that a trial
takes a moment; the driver, the processes, the signals and the locks are the real ones. The slow
test at the end trains for real.
"""

import csv
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sodfast.errors import RunFailed, UsageError
from sodfast.files import try_lock
from sodfast.study import launch
from sodfast.study.definition import load_study
from sodfast.study.directory import (
    failure_path,
    lock_path,
    log_path,
    open_study,
    read_runs,
    run_path,
)
from sodfast.study.sweep import sweep

Write = Callable[..., Path]


def run(study: Path, out: Path, *overrides: str, jobs: int = 2) -> list[dict[str, str]]:
    table = sweep(str(study), [f"out={out}", *overrides], jobs=jobs)
    return list(csv.DictReader(table.open()))


def starts(out: Path, name: str) -> int:
    """How many processes of this trial have begun to train."""
    path = run_path(out, name) / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def steps(out: Path, name: str) -> list[int]:
    lines = (run_path(out, name) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def statuses(out: Path) -> dict[str, str]:
    return {run.trial.name: run.status for run in read_runs(out)}


# ---------------------------------------------------------------- from start to end


def test_every_trial_runs_once_and_a_second_sweep_runs_none(
    stand_in: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = stand_in(seed=[0, 1, 2]), tmp_path / "out"
    rows = run(study, out)
    assert [(row["name"], row["seed"], row["status"]) for row in rows] == [
        (f"seed{seed}", str(seed), "done") for seed in range(3)
    ]
    assert rows[0]["final"] == "0.625" and rows[0]["steps"] == "5"
    assert [steps(out, row["name"]) for row in rows] == [[0, 1, 2, 3, 4, 5]] * 3
    first = (out / "table.csv").read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 trials: 3 waiting; eta unknown"
    assert "seed1: done  step 5/5  reward 0.500  eval 0.625" in lines
    run(study, out)
    assert (out / "table.csv").read_bytes() == first
    assert [starts(out, row["name"]) for row in rows] == [1, 1, 1]
    assert capsys.readouterr().out == "3 trials: 3 done\n"


@pytest.mark.slow
def test_the_stored_study_is_the_sweep(stand_in: Write, tmp_path: Path) -> None:
    """Without the files it was made from, the study directory still says what it is."""
    base = tmp_path / "base.yaml"
    base.write_text("steps: 9\nthreads: 1\n")
    study, out = stand_in(seed=[0]), tmp_path / "out"
    text = study.read_text().replace("base: lab", "base: base.yaml")
    study.write_text(text)
    run(study, out, "eval.every=3")
    expected = load_study(study, ["eval.every=3"]).trials
    base.unlink()
    study.unlink()
    assert open_study(out).trials == expected
    assert [trial.config for trial in open_study(out).trials] == [
        trial.config for trial in expected
    ]
    run(out / "study.yaml", out)
    assert starts(out, "seed0") == 1


def forks(source: str = "fine", step: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    return {"from": {"log.project": source}, "step": [*step], "further": 2}


@pytest.mark.slow
def test_forks_run_when_their_source_has_ended(stand_in: Write, tmp_path: Path) -> None:
    axes: dict[str, Any] = {"teacher.refresh": ["now", "never"]}
    study, out = stand_in(fork=forks(), **axes), tmp_path / "out"
    rows = run(study, out)
    names = [f"step{step},refresh-{arm}" for step in (2, 3) for arm in ("now", "never")]
    assert [(row["name"], row["status"], row["steps"]) for row in rows] == [
        (name, "done", str(int(name[4]) + 2)) for name in names
    ]
    assert {row["fork.step"] for row in rows} == {"2", "3"} and rows[0]["reward_next30"] == "0.5"
    assert steps(out, "source") == [0, 1, 2, 3] and steps(out, names[0]) == [0, 1, 2, 3, 4]
    assert [starts(out, name) for name in ["source", *names]] == [1] * 5
    run(study, out)
    assert [starts(out, name) for name in ["source", *names]] == [1] * 5
    # A later step would need a longer source, which the directory does not have.
    with pytest.raises(UsageError, match="trial source: steps was 3, is 4"):
        run(stand_in(fork=forks(step=(2, 3, 4)), **axes), out)


def test_a_run_to_fork_must_be_there(stand_in: Write, tmp_path: Path) -> None:
    plan = {"from": "nowhere", "step": [2], "further": 2}
    study = stand_in(fork=plan, **{"teacher.refresh": ["now"]})
    for base in ("base: lab\n", ""):
        study.write_text(study.read_text().replace("base: lab\n", base))
        with pytest.raises(UsageError, match="nowhere is not a run directory"):
            run(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_forks_are_resumed_and_fail_with_their_source(stand_in: Write, tmp_path: Path) -> None:
    axes: dict[str, Any] = {"teacher.refresh": ["now", "never"]}
    out = tmp_path / "out"
    with pytest.raises(RunFailed, match="3 of 3 trials failed"):
        run(stand_in(fork=forks("usage", (2,)), **axes), out)
    failure = failure_path(out, "step2,refresh-now").read_text()
    assert failure == "source, of which it is a fork, failed\n"
    assert not run_path(out, "step2,refresh-now").exists()
    out = tmp_path / "again"
    run(stand_in(fork=forks("crash 1", (3,)), **axes), out)
    # The source crashes once, and goes on where it was; its forks wait for that.
    for name, last in (("source", 3), ("step3,refresh-now", 5), ("step3,refresh-never", 5)):
        assert steps(out, name) == [*range(last + 1)]
    log = log_path(out, "step3,refresh-now").read_text()
    assert f"$ sodfast fork {run_path(out, 'source')} step=3 " in log


@pytest.mark.slow
def test_out_defaults_to_the_studys_name(
    stand_in: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep(str(stand_in(seed=[0])), []) == tmp_path / "runs" / "study" / "table.csv"


@pytest.mark.slow
def test_crashes_are_retried_where_they_happened_and_the_sweep_goes_on(
    stand_in: Write, tmp_path: Path
) -> None:
    projects = ["crash 2", "crash 4", "usage", "fine"]
    study, out = stand_in(project=projects), tmp_path / "out"
    with pytest.raises(RunFailed) as caught:
        run(study, out, jobs=1)
    assert str(caught.value).startswith("2 of 4 trials failed: project-crash-4 project-usage ")
    assert statuses(out) == {
        "project-crash-2": "done",
        "project-crash-4": "failed",
        "project-usage": "failed",
        "project-fine": "done",
    }
    # Three tries of what crashes, one of arguments that no retry can change.
    assert [starts(out, f"project-{p.replace(' ', '-')}") for p in projects] == [3, 3, 1, 1]
    assert steps(out, "project-crash-2") == [0, 1, 2, 3, 4, 5]  # no step twice
    failure = failure_path(out, "project-crash-4").read_text()
    assert failure == f"exit code {-signal.SIGABRT}: it crashed\n"
    assert "these arguments" in failure_path(out, "project-usage").read_text()
    assert log_path(out, "project-crash-4").read_text().count("$ sodfast train") == 3
    rows = {row["name"]: row for row in csv.DictReader((out / "table.csv").open())}
    assert rows["project-crash-4"]["status"] == "failed" and rows["project-fine"]["steps"] == "5"

    # The same command tries the failed ones again, only these: one gets through.
    with pytest.raises(RunFailed, match="1 of 4 trials failed: project-usage "):
        run(study, out)
    assert [starts(out, f"project-{p.replace(' ', '-')}") for p in projects] == [3, 5, 2, 1]
    assert statuses(out)["project-crash-4"] == "done"


@pytest.mark.slow
def test_a_run_killed_before_it_could_be_resumed_starts_anew(
    stand_in: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_path(out, "seed0").mkdir(parents=True)
    for name in (".lock", "environment.json", "config.yaml.tmp"):
        (run_path(out, "seed0") / name).touch()
    study = load_study(stand_in(seed=[0]))
    (out / "study.yaml").write_text(study.to_yaml())
    assert [row["status"] for row in run(tmp_path / "study.yaml", out)] == ["done"]


def test_a_file_that_is_not_a_runs_is_kept(stand_in: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_path(out, "seed0").mkdir(parents=True)
    notes = run_path(out, "seed0") / "notes.txt"
    notes.write_text("mine")
    study = stand_in(seed=[0])
    (out / "study.yaml").write_text(load_study(study).to_yaml())
    with pytest.raises(RunFailed, match="1 of 1 trials failed"):
        run(study, out)
    assert notes.read_text() == "mine"
    assert "not empty" in failure_path(out, "seed0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff"])
def test_a_damaged_summary_is_written_anew(stand_in: Write, tmp_path: Path, text: bytes) -> None:
    study, out = stand_in(seed=[0, 1]), tmp_path / "out"
    run(study, out)
    before = (out / "table.csv").read_bytes()
    (run_path(out, "seed0") / "summary.json").write_bytes(text)
    run(study, out)
    assert (out / "table.csv").read_bytes() == before
    assert (starts(out, "seed0"), starts(out, "seed1")) == (2, 1)


@pytest.mark.slow
def test_a_damaged_trial_is_in_the_table_and_takes_no_other(
    stand_in: Write, tmp_path: Path
) -> None:
    study, out = stand_in(seed=[0, 1]), tmp_path / "out"
    run(study, out)
    (run_path(out, "seed0") / "metrics.jsonl").write_bytes(b'{"step": "x"}\n{}\n')
    with pytest.raises(RunFailed, match="1 of 2 trials failed: seed0 "):
        run(study, out)
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [(row["status"], row["final"]) for row in rows] == [("damaged", ""), ("done", "0.625")]
    assert starts(out, "seed1") == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", ["directory.replace_text", "sweep.mark_failed"])
def test_a_disk_that_is_full_later_is_one_line(
    stand_in: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """While the table is written, and while it is noted why a trial failed."""
    study, out = stand_in(seed=[0]), tmp_path / "out"
    run(study, out)
    (run_path(out, "seed0") / "summary.json").unlink()
    monkeypatch.setattr(launch, "log_path", lambda directory, name: directory / "no" / name)
    original = sys.modules["sodfast.study.directory"].replace_text

    def full(*arguments: Any) -> None:
        if place == "sweep.mark_failed" or arguments[0].name == "table.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments)

    monkeypatch.setattr(f"sodfast.study.{place}", full)
    with pytest.raises(RunFailed, match=r"out cannot be written: .*No space left") as caught:
        run(study, out)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("bytes_", [0, 20])
def test_a_full_disk_ends_the_command_in_one_line(
    stand_in: Write, tmp_path: Path, bytes_: int
) -> None:
    """No file may grow beyond a few bytes."""
    study = stand_in(seed=[0])
    done = subprocess.run(
        [sys.executable, "-m", "sodfast", "sweep", str(study), f"out={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_)),
        timeout=100,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("sodfast: out=") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- refusals


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(study: Path, out: Path, *named: str, **options: Any) -> None:
    before = tree(out.parent)
    with pytest.raises(UsageError) as caught:
        sweep(str(study), [f"out={out}"], **options)
    assert "\n" not in str(caught.value)
    for text in named:
        assert text in str(caught.value)
    assert tree(out.parent) == before


def test_an_unusable_out_leaves_nothing(stand_in: Write, tmp_path: Path) -> None:
    study = stand_in(seed=[0])
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    refused(study, tmp_path / "used", "notes.txt", "no study directory")
    refused(study, tmp_path / "file", "file")
    refused(study, tmp_path / "file" / "out", "file")
    refused(study, tmp_path / ("x" * 300), "out=")
    refused(study, tmp_path / "lr=1", "'='")
    with pytest.raises(UsageError, match="out="):
        sweep(str(study), ["out="])


def test_options_that_do_not_fit_leave_nothing(
    stand_in: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = stand_in(seed=[0]), tmp_path / "out"
    refused(study, out, "--jobs 0", jobs=0)
    refused(study, out, "--address", address="auto")
    refused(study, out, "--jobs", launcher="ray", jobs=2)
    study = stand_in(device=["cuda:1"])
    study.write_text(study.read_text().replace("device: cpu", "seed: 0"))
    refused(study, out, "device=cuda:1", "device=cuda")
    study.write_text(study.read_text().replace("cuda:1", "cuda"))
    monkeypatch.setattr(launch, "visible_gpus", lambda: [])
    refused(study, out, "no GPU")


@pytest.mark.slow
def test_a_changed_study_is_refused_and_more_values_are_not(
    stand_in: Write, tmp_path: Path
) -> None:
    study, out = stand_in(seed=[0, 1]), tmp_path / "out"
    run(study, out)
    refused(stand_in(seed=[1]), out, "no trial seed0", "another out=")
    refused(stand_in(seed=[0, 1], project=["a"]), out, "no trial seed0")
    text = stand_in(seed=[0, 1]).read_text()
    study.write_text(text.replace("steps: 5", "steps: 6"))
    refused(study, out, "seed0", "steps was 5, is 6")
    study.write_text(text.replace("device: cpu", "device: cpu\n  schedule: {kind: fixed}"))
    refused(study, out, "seed0", "schedule.kind was cgtr, is fixed")
    rows = run(stand_in(seed=[2, 0, 1]), out)
    assert [row["name"] for row in rows] == ["seed2", "seed0", "seed1"]
    assert [starts(out, row["name"]) for row in rows] == [1, 1, 1]


# ---------------------------------------------------------------- the driver as a process

Driver = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def driver() -> Iterator[Driver]:
    """`driver(study, out, ...)`: the command in a process of its own, killed after the test."""
    started = []

    def start(study: Path, out: Path, *arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "sodfast", "sweep", str(study), f"out={out}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Tests that run in the background of a script inherit that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def reaches(out: Path, name: str, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        path = run_path(out, name) / "metrics.jsonl"
        return path.exists() and len(path.read_text().splitlines()) > step

    return reached


def trial_pid(out: Path, name: str) -> int:
    return int(lock_path(out, name).read_text())


def ended(pid: int) -> Callable[[], bool]:
    """Gone, or a zombie that an init process without interest in orphans leaves."""

    def check() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"

    return check


@pytest.mark.slow
def test_trials_end_when_their_driver_is_killed_and_go_on_with_the_next(
    stand_in: Write, driver: Driver, tmp_path: Path
) -> None:
    study, out = stand_in(project=["slow"]), tmp_path / "out"
    process = driver(study, out)
    until(reaches(out, "project-slow", 3))
    pid = trial_pid(out, "project-slow")
    assert statuses(out) == {"project-slow": "running"}
    process.kill()
    process.wait()
    until(ended(pid))
    assert (run_path(out, "project-slow") / "saved").read_text() == "saved\n"
    assert statuses(out) == {"project-slow": "interrupted"}
    assert [row["status"] for row in run(study, out)] == ["done"]
    assert steps(out, "project-slow") == [0, 1, 2, 3, 4, 5]
    assert starts(out, "project-slow") == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_saves_and_continues(
    stand_in: Write, driver: Driver, tmp_path: Path, number: int
) -> None:
    study, out = stand_in(project=["slow"], seed=[0, 1]), tmp_path / "out"
    process = driver(study, out, "--jobs", "1")
    until(reaches(out, "project-slow,seed0", 3))
    process.send_signal(number)
    until((run_path(out, "project-slow,seed0") / "saved").exists)
    process.send_signal(number)  # the impatient user's second one changes nothing
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "stopping" in output and "Traceback" not in output
    assert statuses(out) == {"project-slow,seed0": "interrupted", "project-slow,seed1": "missing"}
    assert "Traceback" not in log_path(out, "project-slow,seed0").read_text()
    study.write_text(study.read_text())
    process = driver(study, out, "--jobs", "2")
    until(reaches(out, "project-slow,seed1", 3))
    process.send_signal(number)
    process.wait()
    assert {row["status"] for row in run(study, out)} == {"done"}
    assert steps(out, "project-slow,seed0") == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_second_driver_is_refused(stand_in: Write, driver: Driver, tmp_path: Path) -> None:
    study, out = stand_in(project=["slow"]), tmp_path / "out"
    process = driver(study, out)
    until(reaches(out, "project-slow", 3))
    with pytest.raises(UsageError, match="being swept by another process"):
        run(study, out)
    assert process.poll() is None and starts(out, "project-slow") == 1


@pytest.mark.slow
def test_a_trial_that_still_ends_is_waited_for(stand_in: Write, tmp_path: Path) -> None:
    study, out = stand_in(seed=[0, 1]), tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "study.yaml").write_text(load_study(study).to_yaml())
    lock = try_lock(lock_path(out, "seed0"))
    assert lock is not None
    thread = threading.Thread(target=run, args=(study, out))
    thread.start()
    until(lambda: statuses(out)["seed1"] == "done")
    assert statuses(out)["seed0"] == "running" and starts(out, "seed0") == 0
    lock.close()
    thread.join(60)
    assert statuses(out)["seed0"] == "done" and starts(out, "seed0") == 1


@pytest.mark.slow
def test_a_live_trial_never_runs_twice_under_any_kills(
    stand_in: Write, driver: Driver, tmp_path: Path
) -> None:
    """The stand-in dies with a traceback when another process of its run is alive."""
    study, out = stand_in(seed=[0, 1], project=["pace"]), tmp_path / "out"
    generator = random.Random(0)
    for _ in range(3):
        process = driver(study, out, "--jobs", "2")
        time.sleep(generator.uniform(0.5, 3.0))
        process.kill()
        process.wait()
    assert {row["status"] for row in run(study, out)} == {"done"}
    for name in statuses(out):
        assert "Traceback" not in log_path(out, name).read_text()
        assert steps(out, name) == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_trial_gets_its_slots_environment(stand_in: Write, tmp_path: Path) -> None:
    run(stand_in(threads=[3]), tmp_path / "out")
    assert (run_path(tmp_path / "out", "threads3") / "starts").read_text() == "3\n"


# ---------------------------------------------------------------- for real


@pytest.fixture
def real(tmp_path: Path, tiny_run: list[str]) -> Path:
    """A study of two tiny runs, one of which refreshes its teacher."""
    path = tmp_path / "study.yaml"
    overrides = dict(text.split("=", 1) for text in [*tiny_run, "device=cpu", "checkpoint.every=2"])
    axes = {"schedule": [{"kind": "ema", "rate": 0.3}, {"kind": "hard", "every": 2}]}
    text = "".join(f"  {key}: {value}\n" for key, value in overrides.items())
    path.write_text(f"base: lab\noverrides:\n{text}axes: {json.dumps(axes)}\n")
    return path


@pytest.mark.exhaustive
def test_a_sweep_killed_three_times_leaves_the_table_of_an_undisturbed_one(
    real: Path, driver: Driver, tmp_path: Path
) -> None:
    """SIGKILL for the driver and its trials at random moments, in either order."""
    undisturbed = driver(real, tmp_path / "undisturbed", "--jobs", "2")
    began = time.monotonic()
    output, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, output
    lasted = time.monotonic() - began
    expected = (tmp_path / "undisturbed" / "table.csv").read_text()
    assert [row["status"] for row in csv.DictReader(expected.splitlines())] == ["done"] * 2
    assert f"report: {tmp_path / 'undisturbed' / 'report.html'}" in output
    assert "EMA" in (tmp_path / "undisturbed" / "report.html").read_text()
    assert [row["refresh_steps"] for row in csv.DictReader(expected.splitlines())] == ["", "2 4 6"]

    out = tmp_path / "out"
    seed = time.time_ns()
    print("seed of the moments:", seed)  # pytest shows it when the test fails
    generator = random.Random(seed)
    names = [trial.name for trial in load_study(real).trials]
    for _ in range(3):
        process = driver(real, out, "--jobs", "2")
        time.sleep(generator.uniform(0.2, 0.9) * lasted)
        locks = {name: lock_path(out, name) for name in names}
        held = {name: lock.read_text() for name, lock in locks.items() if lock.exists()}
        running = {name for name, status in statuses(out).items() if status == "running"}
        # A lock is emptied before it is written.
        pids = [int(text) for name, text in held.items() if text.strip() and name in running]
        victims = [process.pid, *pids]
        generator.shuffle(victims)
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    last = driver(real, out, "--jobs", "2")
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert (out / "table.csv").read_text() == expected


@pytest.mark.exhaustive
def test_a_damaged_trial_of_real_training_is_mended_or_named(real: Path, tmp_path: Path) -> None:
    """Its summary follows from its lines and is written anew; its lines follow from nothing."""
    out = tmp_path / "out"
    expected = run(real, out)
    table = (out / "table.csv").read_bytes()
    (run_path(out, "hard-every2") / "summary.json").write_text("{")
    assert run(real, out) == expected and (out / "table.csv").read_bytes() == table
    metrics = run_path(out, "hard-every2") / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().replace(b'"step": 2', b'"step": "two"'))
    with pytest.raises(RunFailed, match="1 of 2 trials failed: hard-every2 "):
        run(real, out)
    reason = failure_path(out, "hard-every2").read_text()
    assert reason.startswith("exit code 2: sodfast: ") and f"{metrics}:3: " in reason
    statuses_ = [row["status"] for row in csv.DictReader((out / "table.csv").open())]
    assert statuses_ == [expected[0]["status"], "damaged"]
