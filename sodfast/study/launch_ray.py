"""Trials as tasks of a Ray cluster, of which the study directory is the shared storage.

A task runs the same `run_trial` as a local sweep, on whichever node has room. A node or worker
that dies takes its trial's process with it (the leash of `__main__.py`); Ray runs the task again,
and it resumes from the trial's checkpoint. Every node needs sodfast and the study directory at the
same path, with flock (NFS has it).
"""

import os
import signal
import socket
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
    Launcher,
    Outcome,
    run_trial,
    thread_environment,
    trial_threads,
)

# Workers lost by one trial before it is given up. Nodes come and go through no fault of a trial;
# the trial's own crashes are counted by `run_trial`.
LOST_WORKERS = 10
CONNECT_SECONDS = 5.0
_OBJECT_STORE_BYTES = 80 * 2**20  # about Ray's least: trials pass nothing but their configuration


@contextmanager
def ray_launcher(configs: Sequence[Config], address: str | None) -> Iterator[Launcher]:
    """Connected until the context is left. `address`: a cluster's, or "auto"; None starts a Ray on
    this machine.

    Raises `UsageError` where Ray is not installed, nobody answers, or no GPU is there to be used.
    """
    if find_spec("ray") is None:
        raise UsageError("--launcher ray needs a package: pip install 'sodfast[ray]'")
    import ray

    _connect(address)
    try:
        yield RayLauncher(ray.remote(_run).options(**_resources(configs)))
    finally:
        ray.shutdown()


class RayLauncher:
    def __init__(self, task: Any) -> None:
        self._task = task
        self._started: dict[Path, Any] = {}  # by the lock that a trial's process holds

    def start(self, directory: Path, trial: Trial) -> Future[Outcome]:
        reference = self._task.remote(directory, trial, os.getcwd())
        self._started[lock_path(directory, trial.name)] = reference
        return _future(reference)

    def stop(self) -> None:
        import ray

        for reference in self._started.values():
            ray.cancel(reference)  # KeyboardInterrupt in `run_trial`; ended tasks: nothing
        while any(map(is_held, self._started)):
            time.sleep(POLL_SECONDS)


def _run(directory: Path, trial: Trial, cwd: str) -> Outcome:
    threads = trial.config.threads
    environment = thread_environment(threads) if threads else {}
    return run_trial(directory, trial, environment, cwd, Event())


def _connect(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address}
    if address is None:
        store = _OBJECT_STORE_BYTES
        options = {"address": "local", "include_dashboard": False, "object_store_memory": store}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address or "")
        ray.init(**options, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"--address {address}: {' '.join(str(error).split())}") from error
    # Ray ends the driver at SIGTERM; a sweep lets its trials save first.
    signal.signal(signal.SIGTERM, handler)


def _knock(address: str) -> None:
    """Raise `OSError` where nobody listens at HOST:PORT: Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


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
