"""Commands of sodfast in processes that are forked off this one, so that none has to import torch.

A case that crashes, hangs or is killed ends its own process alone, and its exit status is a real
one. For programs, not for pytest's own process: what is forked must not have other threads.
"""

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CPU_SECONDS, WALL_SECONDS = 10, 120  # the second is for what waits; other work slows a machine
ADDRESS_SPACE = 16 * 2**30  # bytes, so that a case takes no other process's memory


class Ended(NamedTuple):
    """`code`: the exit status, or minus the signal that ended the process."""

    code: int
    out: str
    err: str
    seconds: float  # of processor time


def prepare() -> None:
    """Import what the commands import, once."""
    import torch

    torch.set_num_threads(1)
    import sodfast.calibrate
    import sodfast.cli
    import sodfast.commands
    import sodfast.lab.warm_start
    import sodfast.memory.plan
    import sodfast.report.page
    import sodfast.report.replay
    import sodfast.study.sweep  # noqa: F401


def load(model: Path) -> None:
    """Load a model, which imports what transformers imports only then, for all that is forked."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from sodfast.model.load import load_model

    disable_progress_bar()  # it has a thread
    load_model(str(model), torch.device("cpu"), torch.float32)


def run(
    arguments: list[str],
    folder: Path,
    before: Callable[[], object] = lambda: None,
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
) -> Ended:
    """`sodfast ARGUMENT…` in `folder`; `before` is called in its process first. It is killed after
    `wall_seconds`, and ended by the kernel after `cpu_seconds` of processor time."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            _become(arguments, folder, before, cpu_seconds)
        status, used = _wait(child, wall_seconds)
        for stream in (out, err):
            stream.seek(0)
        code = os.waitstatus_to_exitcode(status)
        texts = (stream.read().decode(errors="replace") for stream in (out, err))
        return Ended(code, *texts, used)


def _become(
    arguments: list[str], folder: Path, before: Callable[[], object], cpu_seconds: int
) -> None:
    """Never returns."""
    import torch

    from sodfast.cli import main

    code: object = 0
    try:
        torch.set_num_threads(1)  # makes its pool anew, which no two threads may do at once
        # The hard limit stays: what a command starts may set limits of its own.
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, hard))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        sys.argv = ["sodfast", *arguments]
        before()
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _wait(child: int, wall_seconds: float) -> tuple[int, float]:
    """Exit status and processor seconds of a child, which is killed when it takes too long."""
    end, pause = time.monotonic() + wall_seconds, 0.002
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            _kill_group(child)  # whatever it has started and left
            return status, usage.ru_utime + usage.ru_stime
        left = end - time.monotonic()
        if left <= 0:
            _kill_group(child)
        time.sleep(min(pause, max(left, 0.002)))
        pause = min(2 * pause, 0.05)


def _kill_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
