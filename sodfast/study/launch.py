"""Trials as processes on this machine: started, watched, started again where they crash."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import IO, Literal, Protocol

from sodfast.config import Config
from sodfast.errors import RunFailed, UsageError
from sodfast.files import try_lock
from sodfast.study.definition import Trial
from sodfast.study.directory import (
    failure_path,
    finished_status,
    lock_path,
    log_path,
    read_records,
    run_path,
)

RETRIES = 2
POLL_SECONDS = 0.2

Outcome = Literal["done", "collapsed", "failed", "interrupted"]


class Launcher(Protocol):
    """Where trials run. `stop` returns when those that still ran have saved and ended."""

    def start(self, directory: Path, trial: Trial) -> Future[Outcome]: ...

    def stop(self) -> None: ...


class LocalLauncher:
    """Processes of this machine, one trial at a time for each of `environments`."""

    def __init__(self, environments: Sequence[dict[str, str]]) -> None:
        self._free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in environments:
            self._free.put(environment)
        self._pool = ThreadPoolExecutor(len(environments))
        self._stop = Event()

    def start(self, directory: Path, trial: Trial) -> Future[Outcome]:
        return self._pool.submit(self._run, directory, trial)

    def stop(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, directory: Path, trial: Trial) -> Outcome:
        environment = self._free.get()
        try:
            return run_trial(directory, trial, environment, os.getcwd(), self._stop)
        finally:
            self._free.put(environment)


def outcome_of(directory: Path, trial: Trial) -> Literal["done", "collapsed"] | None:
    """How a trial ended that has nothing left to do. One whose files are damaged has: resuming it
    writes the summary anew, or says what is wrong."""
    path = run_path(directory, trial.name)
    try:
        read_records(path, trial.config)
        return finished_status(path, trial.config)
    except UsageError:
        return None


def run_trial(
    directory: Path, trial: Trial, environment: dict[str, str], cwd: str, stop: Event
) -> Outcome:
    """Run a trial to its end in processes of its own, until `stop` is set.

    It starts where the last process left off, and again up to `RETRIES` times after a crash. A
    failed run (a loss that is not finite, a full disk) is retried as well: the state before the
    failing step is a checkpoint, so that costs little and a full disk may have room again. Exit
    code 2 means arguments that no retry can change. Where a process that an earlier sweep started
    is still saving, its end is waited for.

    Raises `RunFailed` when the study directory cannot be written.
    """
    try:
        while (lock := try_lock(lock_path(directory, trial.name))) is None:
            if stop.wait(POLL_SECONDS):
                return "interrupted"
        with lock:
            failure_path(directory, trial.name).unlink(missing_ok=True)
            for _ in range(1 + RETRIES):
                code = _run_process(directory, trial, environment, cwd, lock, stop)
                outcome = outcome_of(directory, trial)
                if outcome is not None:
                    return outcome
                if stop.is_set():
                    return "interrupted"
                if code == 2:
                    break
            mark_failed(directory, trial.name, _reason(log_path(directory, trial.name), code))
            return "failed"
    except OSError as error:
        raise RunFailed(f"{trial.name}: {error}") from error


def _run_process(
    directory: Path,
    trial: Trial,
    environment: dict[str, str],
    cwd: str,
    lock: IO[str],
    stop: Event,
) -> int:
    """One process of the trial from start to end; its exit code."""
    if stop.is_set():
        return 130
    arguments = _arguments(directory, trial)
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w") as leash:
        with log_path(directory, trial.name).open("a") as log:
            print(f"$ sodfast {shlex.join(arguments)}", file=log, flush=True)
            process = subprocess.Popen(
                [sys.executable, "-m", "sodfast", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **environment, "SODFAST_LEASH": str(reading)},
                pass_fds=(reading, lock.fileno()),
                # Ctrl-C reaches the sweep alone: a second signal would cut the saving short.
                start_new_session=True,
            )
        try:
            lock.truncate(0)
            print(process.pid, file=lock, flush=True)  # for whoever wants to know which it is
            while process.poll() is None and not stop.wait(POLL_SECONDS):
                pass
        finally:
            leash.close()
            process.wait()
    return process.returncode


def _arguments(directory: Path, trial: Trial) -> list[str]:
    """How to continue the trial from whatever a process that may have been killed has left."""
    run = run_path(directory, trial.name)
    if (run / "config.yaml").exists():
        return ["train", "--resume", str(run)]
    out = f"out={json.dumps(str(run), ensure_ascii=False)}"
    if trial.fork is not None:  # takes the place of one that was killed while it was made
        return ["fork", str(run_path(directory, trial.fork.source)), *trial.overrides, out]
    if run.exists():  # killed while it was made: config.yaml comes last, before any result
        for file in (run / ".lock", run / "environment.json", *run.glob("*.tmp")):
            file.unlink(missing_ok=True)
        run.rmdir()  # refuses if there is anything else
    base = str(directory / "base.yaml")
    return ["train", base, *trial.overrides, out]


def mark_failed(directory: Path, name: str, reason: str) -> None:
    failure_path(directory, name).write_text(reason + "\n")


def _reason(log: Path, code: int) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1]}"


def slots(configs: Sequence[Config], jobs: int | None) -> list[dict[str, str]]:
    """The environment variables of each trial that runs at a time: its GPU, or its share of the
    cores. `jobs` None: one per visible GPU, or as many as have cores for their `threads`."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: at least 1")
    devices = {config.device for config in configs}
    gpus = [] if devices == {"cpu"} else visible_gpus()
    if "cuda" in devices and not gpus:
        raise UsageError("device=cuda: this machine has no GPU")
    threads = trial_threads(configs)
    count = jobs or len(gpus) or max(1, cores() // (threads or cores()))
    environment = thread_environment(threads or max(1, cores() // count))
    if not gpus:
        return [environment] * count
    return [
        {**environment, "CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(count)
    ]


def trial_threads(configs: Sequence[Config]) -> int | None:
    """The most CPU threads that a trial asks for; None where one leaves that to torch."""
    threads = [config.threads for config in configs]
    return None if None in threads else max(count for count in threads if count)


def thread_environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [name.strip() for name in named.split(",")][:count]
