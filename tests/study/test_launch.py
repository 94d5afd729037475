"""Trials as processes: their environment, what is tried again, and the locks they hold."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from sodfast.config import Config, load_config
from sodfast.errors import RunFailed
from sodfast.files import try_lock
from sodfast.study import launch
from sodfast.study.definition import Trial, load_study
from sodfast.study.directory import failure_path, lock_path, log_path, run_path
from sodfast.study.launch import Outcome, run_trial, slots, thread_environment

# ---------------------------------------------------------------- one trial


@pytest.fixture
def trial(stand_in: Callable[..., Path], tmp_path: Path) -> Callable[[str], tuple[Path, Trial]]:
    """A study directory and its one trial, to which happens what `log.project` says."""

    def build(project: str) -> tuple[Path, Trial]:
        out = tmp_path / "out"
        for folder in ("runs", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        (out / "base.yaml").write_text("base: lab\n")
        (only,) = load_study(stand_in(project=[project])).trials
        return out, only

    return build


def run(directory: Path, trial: Trial, stop: Event | None = None) -> Outcome:
    environment = thread_environment(1)
    return run_trial(directory, trial, environment, str(directory), stop or Event())


@pytest.mark.slow
def test_a_trial_says_how_it_ended_and_its_log_how_it_began(
    trial: Callable[[str], tuple[Path, Trial]],
) -> None:
    out, only = trial("crash 1")
    failure_path(out, only.name).write_text("an earlier one\n")
    assert run(out, only) == "done"
    commands = [
        line
        for line in log_path(out, only.name).read_text().splitlines()
        if line.startswith("$ sodfast")
    ]
    path = run_path(out, only.name)
    assert commands[0].startswith(f"$ sodfast train {out / 'base.yaml'} ")
    assert commands[1:] == [f"$ sodfast train --resume {path}"]
    assert not failure_path(out, only.name).exists()
    assert int(lock_path(out, only.name).read_text()) > 1  # of the last process


@pytest.mark.slow
def test_arguments_that_cannot_be_used_are_tried_once(
    trial: Callable[[str], tuple[Path, Trial]],
) -> None:
    out, only = trial("usage")
    assert run(out, only) == "failed"
    assert log_path(out, only.name).read_text().count("$ sodfast") == 1
    reason = "exit code 2: sodfast: these arguments cannot be used\n"
    assert failure_path(out, only.name).read_text() == reason


def test_a_stopped_launcher_starts_nothing(trial: Callable[[str], tuple[Path, Trial]]) -> None:
    out, only = trial("fine")
    stop = Event()
    stop.set()
    assert run(out, only, stop) == "interrupted"
    assert not run_path(out, only.name).exists() and not log_path(out, only.name).exists()
    with try_lock(lock_path(out, only.name)) as held:  # type: ignore[union-attr]
        assert not held.closed
        assert run(out, only, stop) == "interrupted"  # nor does it wait for another's lock


def test_a_directory_that_cannot_be_written_fails_the_trial(
    trial: Callable[[str], tuple[Path, Trial]],
) -> None:
    out, only = trial("fine")
    (out / "logs").rmdir()
    with pytest.raises(RunFailed, match=rf"^{only.name}: .*No such file"):
        run(out, only)


@pytest.mark.parametrize(
    "left", [[], [".lock"], [".lock", "environment.json"], [".lock", "config.yaml.tmp"]]
)
def test_what_a_process_left_that_was_killed_early_is_cleared_away(
    trial: Callable[[str], tuple[Path, Trial]], left: list[str]
) -> None:
    out, only = trial("fine")
    path = run_path(out, only.name)
    path.mkdir(parents=True)
    for name in left:
        (path / name).touch()
    command, base, *overrides = launch._arguments(out, only)
    assert (command, base) == ("train", str(out / "base.yaml")) and not path.exists()
    assert overrides == [*only.overrides, f'out="{path}"']
    path.mkdir()
    (path / "config.yaml").touch()
    assert launch._arguments(out, only) == ["train", "--resume", str(path)]


def test_a_lock_is_the_processs_not_the_drivers(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "lock")
    assert lock is not None
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = subprocess.Popen(command, pass_fds=(lock.fileno(),))
    lock.close()
    assert try_lock(tmp_path / "lock") is None
    process.kill()
    process.wait()
    freed = try_lock(tmp_path / "lock")
    assert freed is not None
    freed.close()


# ---------------------------------------------------------------- cores and GPUs


def configs(*overrides: str) -> list[Config]:
    return [load_config("lab", list(overrides))]


def test_slots_on_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cores", lambda: 6)
    cpu = "device=cpu"

    def found(*overrides: str, jobs: int | None = None) -> tuple[int, str]:
        environments = slots(configs(cpu, *overrides), jobs)
        assert all("CUDA_VISIBLE_DEVICES" not in environment for environment in environments)
        return len(environments), environments[0]["OMP_NUM_THREADS"]

    assert found() == (6, "1")  # the lab asks for one thread
    assert found("threads=2") == (3, "2")
    assert found("threads=4") == (1, "4")
    assert found("threads=9") == (1, "9")
    assert found("threads=null") == (1, "6")
    assert found("threads=null", jobs=3) == (3, "2")
    assert found(jobs=20) == (20, "1")
    assert len(slots([*configs(cpu, "threads=3"), *configs(cpu)], None)) == 2


def test_slots_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cores", lambda: 6)
    monkeypatch.setattr(launch, "visible_gpus", lambda: ["4", "7"])

    def gpus(jobs: int | None = None, device: str = "auto") -> list[str | None]:
        environments = slots(configs(f"device={device}"), jobs)
        return [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments]

    assert gpus() == gpus(device="cuda") == ["4", "7"]
    assert gpus(1) == ["4"]
    assert gpus(3) == ["4", "7", "4"]
    assert gpus(device="cpu") == [None] * 6
    assert slots(configs("threads=null"), None)[0]["OMP_NUM_THREADS"] == "3"


def test_threads_are_the_most_that_a_trial_asks_for() -> None:
    assert launch.trial_threads([*configs("threads=3"), *configs("threads=2")]) == 3
    assert launch.trial_threads([*configs("threads=3"), *configs("threads=null")]) is None
    assert thread_environment(3) == {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}


def test_visible_gpus_are_those_that_cuda_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7,9")  # 9 does not exist
    assert launch.visible_gpus() == ["4", "7"]
