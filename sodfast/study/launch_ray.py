"""Trials as tasks of a Ray cluster, of which the study directory is the shared storage.

A task runs the same `run_trial` as a local sweep, on whichever node has room. A node or worker
that dies takes its trial's process with it (the leash of `__main__.py`); Ray runs the task again,
and it resumes from the trial's checkpoint. Every node needs sodfast and the study directory at the
same path, with flock (NFS has it).
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

from sodfast.config import Config
from sodfast.errors import RunFailed, UsageError
from sodfast.files import is_held
from sodfast.study.definition import Trial
from sodfast.study.directory import lock_path
from sodfast.study.launch import (
    POLL_SECONDS,
    Launch,
    Outcome,
    run_trial,
    thread_environment,
    trial_threads,
)

# Workers lost by one trial before it is given up. Nodes come and go through no fault of a trial;
# the trial's own crashes are counted by `run_trial`.
LOST_WORKERS = 10
_OBJECT_STORE_BYTES = 80 * 2**20  # about Ray's least: trials pass nothing but their configuration


def ray_launcher(configs: Sequence[Config], address: str | None) -> Launch:
    """`address`: a cluster's, or "auto"; None starts a Ray on this machine.

    Raises `UsageError` where Ray is not installed.
    """
    if find_spec("ray") is None:
        raise UsageError("--launcher ray needs a package: pip install 'sodfast[ray]'")

    @contextmanager
    def launch(directory: Path, trials: list[Trial]) -> Iterator[dict[str, Future[Outcome]]]:
        import ray

        _connect(address)
        try:
            task = ray.remote(_run).options(**_resources(configs))
            references = {
                trial.name: task.remote(directory, trial, os.getcwd()) for trial in trials
            }
            try:
                yield {name: _future(reference) for name, reference in references.items()}
            finally:
                for reference in references.values():
                    ray.cancel(reference)  # KeyboardInterrupt in `run_trial`; ended tasks: nothing
                locks = [lock_path(directory, trial.name) for trial in trials]
                while any(map(is_held, locks)):
                    time.sleep(POLL_SECONDS)
        finally:
            ray.shutdown()

    return launch


def _run(directory: Path, trial: Trial, cwd: str) -> Outcome:
    threads = trial.config.threads
    environment = thread_environment(threads) if threads else {}
    return run_trial(directory, trial, environment, cwd, Event())


def _connect(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**({"address": address} if address else local), log_to_driver=False)
    except ConnectionError as error:
        raise UsageError(f"--address {address}: {' '.join(str(error).split())}") from error
    # Ray ends the driver at SIGTERM; a sweep lets its trials save first.
    signal.signal(signal.SIGTERM, handler)


def _resources(configs: Sequence[Config]) -> dict[str, Any]:
    """A GPU where a trial may use one and the cluster has any; otherwise its CPU threads."""
    import ray

    devices = {config.device for config in configs}
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    if "cuda" in devices and not has_gpus:
        raise UsageError("device=cuda: the Ray cluster has no GPU")
    return {
        "num_cpus": trial_threads(configs) or 1,
        "num_gpus": 1 if has_gpus and devices != {"cpu"} else 0,
        "max_retries": LOST_WORKERS,
    }


def _future(reference: Any) -> Future[Outcome]:
    """The task's outcome; what Ray itself could not do becomes `RunFailed`."""
    future: Future[Outcome] = Future()

    def settle(task: Future[Outcome]) -> None:
        error = task.exception()
        if error is None:
            future.set_result(task.result())
        else:
            future.set_exception(
                RunFailed(f"Ray gave the trial up: {' '.join(str(error).split())}")
            )

    reference.future().add_done_callback(settle)
    return future
