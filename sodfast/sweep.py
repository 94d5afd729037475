"""Sweeps: each trial of a study a `sodfast train` process of its own, started, watched, resumed.

Everything a sweep knows is on disk (`study.py` shows the layout), so it can be stopped or killed
at any time and started again. Two locks keep a trial from running twice: one on the study
directory, held by the sweep, and one per trial, which the trial's process inherits and holds from
before its first instruction until it has ended.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import IO, Any, Literal

from sodfast.config import PRESETS, Config
from sodfast.errors import RunFailed, UsageError
from sodfast.files import replace_text, try_lock
from sodfast.study import (
    Study,
    Trial,
    failure_path,
    find_study,
    finished_status,
    load_study,
    lock_path,
    log_path,
    open_study,
    run_path,
    write_table,
)
from sodfast.sweep_view import build_view

RETRIES = 2
POLL_SECONDS = 0.2

Outcome = Literal["done", "collapsed", "failed", "interrupted"]
# Starts trials; leaving the context stops those that still run, which then save.
Launch = Callable[[Path, list[Trial]], AbstractContextManager[dict[str, Future[Outcome]]]]


def sweep(
    source: str,
    arguments: Sequence[str],
    launcher: Literal["local", "ray"] = "local",
    jobs: int | None = None,
    address: str | None = None,
) -> Path:
    """Run every trial of a study that is not finished; returns the path of its table.

    `source` is a study's name or file, `arguments` are `key=value` texts of which `out` is the
    study directory. Raises `UsageError` before anything is written, `RunFailed` at the end when a
    trial failed, `KeyboardInterrupt` after every trial has saved.
    """
    path = find_study(source)
    study = load_study(path, [text for text in arguments if not text.startswith("out=")])
    trials = study.trials()
    outs = [text.removeprefix("out=") for text in arguments if text.startswith("out=")]
    directory = Path(outs[-1] if outs else f"runs/{path.stem}").absolute()
    if "=" in str(directory) or outs == [""]:
        raise UsageError(f"out={directory} cannot be used: choose a directory without '='")
    launch = _choose(launcher, [trial.config for trial in trials], jobs, address)
    with _study_directory(directory, study):
        finished: dict[str, Outcome] = {}
        for trial in trials:
            status = finished_status(run_path(directory, trial.name), trial.config)
            if status is not None:
                finished[trial.name] = status
        outcomes = _run(directory, trials, finished, launch)
        table = write_table(directory)
        _write_report(directory)
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(trials)} trials failed: {' '.join(failed)} "
            f"(see {directory / 'logs'}; the same command tries them again)"
        )
    return table


def _write_report(directory: Path) -> None:
    """The report, of whatever there is: a study whose trials all failed has nothing to show."""
    from sodfast.report import write_report

    try:
        print(f"report: {write_report(directory)}")
    except UsageError as error:
        print(f"no report: {error}")


def _choose(
    launcher: str, configs: Sequence[Config], jobs: int | None, address: str | None
) -> Launch:
    for config in configs:
        if config.device.startswith("cuda:"):
            raise UsageError(f"device={config.device}: a sweep picks the GPUs, write device=cuda")
    if launcher == "ray":
        if jobs is not None:
            raise UsageError("--jobs is for --launcher local: the Ray cluster decides")
        from sodfast.ray_launcher import ray_launcher

        return ray_launcher(configs, address)
    if address is not None:
        raise UsageError("--address is for --launcher ray")
    return local_launcher(slots(configs, jobs))


def _run(
    directory: Path, trials: list[Trial], finished: dict[str, Outcome], launch: Launch
) -> dict[str, Outcome]:
    """Run the trials that are not `finished`; the outcome of each."""
    outcomes = dict(finished)
    waiting = [trial for trial in trials if trial.name not in finished]
    with build_view(directory, trials, finished) as view, launch(directory, waiting) as futures:
        try:
            pending = dict(futures)
            while pending:
                wait(pending.values(), timeout=view.seconds, return_when=FIRST_COMPLETED)
                for name in [name for name, future in pending.items() if future.done()]:
                    outcomes[name] = _outcome(directory, name, pending.pop(name))
                    view.ended(name, outcomes[name])
                view.refresh()
        except KeyboardInterrupt:
            # Once is enough: trials save now, and a second signal would only lose that.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            view.message("stopping: each trial saves its last finished step")
            raise
    return outcomes


def _outcome(directory: Path, name: str, future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except RunFailed as error:
        mark_failed(directory, name, str(error))
        return "failed"


# ---------------------------------------------------------------- the study directory


@contextmanager
def _study_directory(directory: Path, study: Study) -> Iterator[None]:
    """Hold the directory's lock, its study written or found to be this one."""
    # What a sweep killed while it began leaves.
    ours = {".lock", "base.yaml", "base.yaml.tmp", "study.yaml.tmp"}
    try:
        if directory.exists() and not (directory / "study.yaml").exists():
            others = sorted(set(os.listdir(directory)) - ours)
            if others:
                raise UsageError(
                    f"out={directory} holds {others[0]} and is no study directory: choose another"
                )
        directory.mkdir(parents=True, exist_ok=True)
        lock = try_lock(directory / ".lock")
    except OSError as error:
        raise UsageError(f"out={directory} cannot be used: {error.strerror}") from error
    if lock is None:
        raise UsageError(f"{directory} is being swept by another process: wait for it, or stop it")
    with lock:
        if (directory / "study.yaml").exists():
            _check_kept(directory, study)
        base = PRESETS / f"{study.base}.yaml"
        text = (base if base.is_file() else Path(study.base)).read_text()
        replace_text(directory / "base.yaml", text)
        stored = study.model_copy(update={"base": "base.yaml"})
        replace_text(directory / "study.yaml", stored.to_yaml())
        for folder in ("runs", "logs"):
            (directory / folder).mkdir(exist_ok=True)
        yield


def _check_kept(directory: Path, study: Study) -> None:
    """An existing directory may gain trials; those it has must stay what they are."""
    new = {trial.name: trial.config for trial in study.trials()}
    for trial in open_study(directory).trials():
        if trial.name not in new:
            difference = f"it has no trial {trial.name}"
        elif new[trial.name] != trial.config:
            difference = f"trial {trial.name}: {_difference(trial.config, new[trial.name])}"
        else:
            continue
        raise UsageError(
            f"the study is not the one in {directory} ({difference}): choose another out=, or "
            "restore it; an existing study may only gain values of its axes"
        )


def _difference(old: Config, new: Config) -> str:
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return f"{keys[0]} was {before.get(keys[0])}, is {after.get(keys[0])}"


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


# ---------------------------------------------------------------- one trial


def run_trial(
    directory: Path, trial: Trial, environment: dict[str, str], cwd: str, stop: Event
) -> Outcome:
    """Run a trial to its end in processes of its own, until `stop` is set.

    It starts where the last process left off, and starts again up to `RETRIES` times after a
    crash. A failed run (a loss that is not finite, a full disk) is retried as well: the state
    before the failing step is a checkpoint, so that costs little and a full disk may have room
    again. Exit code 2 means arguments that no retry can change. A process of the trial that still
    ends under an earlier sweep is waited for.

    Raises `RunFailed` when the study directory cannot be written.
    """
    run = run_path(directory, trial.name)
    try:
        while (lock := try_lock(lock_path(directory, trial.name))) is None:
            if stop.wait(POLL_SECONDS):
                return "interrupted"
        with lock:
            failure_path(directory, trial.name).unlink(missing_ok=True)
            for _ in range(1 + RETRIES):
                code = _run_process(directory, trial, environment, cwd, lock, stop)
                status = finished_status(run, trial.config)
                if status is not None:
                    return status
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
    """One `sodfast train` process from start to end; its exit code."""
    if stop.is_set():
        return 130
    arguments = _arguments(directory, trial)
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as leash:
        try:
            with log_path(directory, trial.name).open("a") as log:
                log.write(f"$ sodfast {shlex.join(arguments)}\n")
                log.flush()
                process = subprocess.Popen(
                    [sys.executable, "-m", "sodfast.trial", str(reading), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    env={**os.environ, **environment},
                    pass_fds=(reading, lock.fileno()),
                    # Ctrl-C reaches the sweep alone: a second signal would cut the saving short.
                    start_new_session=True,
                )
        finally:
            os.close(reading)
        lock.truncate(0)
        print(process.pid, file=lock, flush=True)  # for whoever wants to know which process it is
        try:
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
    if run.exists():  # killed while it was made: config.yaml comes last, before any result
        for name in (".lock", "environment.json", "config.yaml.tmp"):
            (run / name).unlink(missing_ok=True)
        run.rmdir()  # refuses if there is anything else
    base = str(directory / "base.yaml")
    return ["train", base, *trial.overrides, f"out={json.dumps(str(run), ensure_ascii=False)}"]


def mark_failed(directory: Path, name: str, reason: str) -> None:
    failure_path(directory, name).write_text(reason + "\n")


def _reason(log: Path, code: int) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1]}"


# ---------------------------------------------------------------- this machine


def local_launcher(environments: Sequence[dict[str, str]]) -> Launch:
    """One trial at a time for each of `environments`."""

    @contextmanager
    def launch(directory: Path, trials: list[Trial]) -> Iterator[dict[str, Future[Outcome]]]:
        stop = Event()
        free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in environments:
            free.put(environment)

        def work(trial: Trial) -> Outcome:
            environment = free.get()
            try:
                return run_trial(directory, trial, environment, os.getcwd(), stop)
            finally:
                free.put(environment)

        with ThreadPoolExecutor(len(environments)) as pool:
            futures: dict[str, Future[Outcome]] = {}
            try:
                for trial in trials:
                    futures[trial.name] = pool.submit(work, trial)
                yield futures
            finally:
                stop.set()
                for future in futures.values():
                    future.cancel()

    return launch


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

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return (
        [name.strip() for name in named.split(",")][:count] if named else [*map(str, range(count))]
    )
