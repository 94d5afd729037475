"""Sweeps: each trial of a study a `sodfast train` process of its own, started, watched, resumed.

A trial that is a fork is a `sodfast fork` process, and waits until the run that it forks has ended.

Everything a sweep knows is on disk (directory.py shows the layout), so it can be stopped or killed
at any time and started again. Two locks keep a trial from running twice: one on the study
directory, held by the sweep, and one per trial, which the trial's process inherits and holds from
before its first instruction until it has ended.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

from sodfast.errors import RunFailed, UsageError
from sodfast.run.records import require_run
from sodfast.study.definition import Trial, find_study, load_study
from sodfast.study.directory import hold, write_table
from sodfast.study.launch import Launcher, LocalLauncher, Outcome, mark_failed, outcome_of, slots
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

    Raises `UsageError` before anything is written, `RunFailed` at the end when a trial failed and
    at once when the study directory cannot be written, `KeyboardInterrupt` after every trial has
    saved.
    """
    path = find_study(source)
    study = load_study(path, [text for text in arguments if not text.startswith("out=")])
    trials = [*study.sources, *study.trials]
    if not study.sources:
        for given in {trial.fork.source for trial in trials if trial.fork}:
            require_run(Path(given))
    outs = [text.removeprefix("out=") for text in arguments if text.startswith("out=")]
    directory = Path(outs[-1] if outs else f"runs/{path.stem}").absolute()
    if "=" in str(directory) or outs == [""]:
        raise UsageError(f"out={directory} cannot be used: choose a directory without '='")
    with _choose(launcher, trials, jobs, address) as chosen, hold(directory, study):
        try:
            outcomes = _run(directory, trials, chosen)
            table = write_table(directory)
        except OSError as error:
            raise RunFailed(f"{directory} cannot be written: {error}") from error
        conclude(directory)
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(trials)} trials failed: {' '.join(failed)} "
            f"(see {directory / 'logs'}; the same command tries them again)"
        )
    return table


def _choose(
    launcher: str, trials: Sequence[Trial], jobs: int | None, address: str | None
) -> AbstractContextManager[Launcher]:
    configs = [trial.config for trial in trials]
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
    return nullcontext(LocalLauncher(slots(configs, jobs)))


def _run(directory: Path, trials: Sequence[Trial], launcher: Launcher) -> dict[str, Outcome]:
    """Run the trials that are not finished; the outcome of each."""
    ended = {trial.name: outcome_of(directory, trial) for trial in trials}
    outcomes: dict[str, Outcome] = {name: found for name, found in ended.items() if found}
    with build_view(directory, trials, outcomes) as view:
        try:
            waiting = [trial for trial in trials if trial.name not in outcomes]
            pending: dict[Future[Outcome], str] = {}
            while waiting or pending:
                unfinished = {*pending.values(), *(trial.name for trial in waiting)}
                for trial in list(waiting):
                    if trial.fork is None or trial.fork.source not in unfinished:
                        waiting.remove(trial)
                        pending[_start(launcher, directory, trial, outcomes)] = trial.name
                wait(pending, timeout=view.seconds, return_when=FIRST_COMPLETED)
                for future in [future for future in pending if future.done()]:
                    name = pending.pop(future)
                    try:
                        outcomes[name] = future.result()
                    except RunFailed as error:
                        mark_failed(directory, name, str(error))
                        outcomes[name] = "failed"
                    view.ended(name, outcomes[name])
                view.refresh()
        except KeyboardInterrupt:
            # Once is enough: trials save now, and a second signal would only lose that.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            view.message("stopping: each trial saves its last finished step")
            raise
        finally:
            launcher.stop()
    return outcomes


def _start(
    launcher: Launcher, directory: Path, trial: Trial, outcomes: Mapping[str, Outcome]
) -> Future[Outcome]:
    """Start a trial; a fork of a source that failed fails at once."""
    if trial.fork is None or outcomes.get(trial.fork.source) != "failed":
        return launcher.start(directory, trial)
    future: Future[Outcome] = Future()
    future.set_exception(RunFailed(f"{trial.fork.source}, of which it is a fork, failed"))
    return future
