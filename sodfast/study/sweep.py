"""Sweeps: each trial of a study a `sodfast train` process of its own, started, watched, resumed.

Everything a sweep knows is on disk (`study.py` shows the layout), so it can be stopped or killed
at any time and started again. Two locks keep a trial from running twice: one on the study
directory, held by the sweep, and one per trial, which the trial's process inherits and holds from
before its first instruction until it has ended.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sodfast.config import PRESETS, Config
from sodfast.errors import RunFailed, UsageError
from sodfast.files import replace_text, try_lock
from sodfast.study.definition import (
    Study,
    Trial,
    find_study,
    finished_status,
    load_study,
    open_study,
    run_path,
    write_table,
)
from sodfast.study.launch import Launch, Outcome, local_launcher, mark_failed, slots
from sodfast.study.view import build_view


def sweep(
    source: str,
    arguments: Sequence[str],
    launcher: Literal["local", "ray"] = "local",
    jobs: int | None = None,
    address: str | None = None,
    conclude: Callable[[Path], object] = lambda directory: None,
) -> Path:
    """Run every trial of a study that is not finished; returns the path of its table.

    `source` is a study's name or file, `arguments` are `key=value` texts of which `out` is the
    study directory. `conclude` is called with that directory when the table is written, while no
    other sweep can use it.

    Raises `UsageError` before anything is written, `RunFailed` at the end when a trial failed,
    `KeyboardInterrupt` after every trial has saved.
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
        conclude(directory)
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(trials)} trials failed: {' '.join(failed)} "
            f"(see {directory / 'logs'}; the same command tries them again)"
        )
    return table


def _choose(
    launcher: str, configs: Sequence[Config], jobs: int | None, address: str | None
) -> Launch:
    for config in configs:
        if config.device.startswith("cuda:"):
            raise UsageError(f"device={config.device}: a sweep picks the GPUs, write device=cuda")
    if launcher == "ray":
        if jobs is not None:
            raise UsageError("--jobs is for --launcher local: the Ray cluster decides")
        from sodfast.study.launch_ray import ray_launcher

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


@contextmanager
def _study_directory(directory: Path, study: Study) -> Iterator[None]:
    """Hold the directory's lock, its study written or found to be this one."""
    try:
        if directory.exists() and not (directory / "study.yaml").exists():
            # What a sweep that was killed while it began has left is no other's.
            names = set(os.listdir(directory)) - {".lock", "base.yaml"}
            others = sorted(name for name in names if not name.endswith(".tmp"))
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
