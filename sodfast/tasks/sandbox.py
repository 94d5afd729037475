"""Runs a model's Python programs where they can harm nothing: the host's side of it.

`sandbox_runner.py` says how they are kept apart, SECURITY.md what is not.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sodfast.errors import UsageError
from sodfast.tasks.worker import Worker, WorkerEnded

PROGRAM = Path(__file__).with_name("sandbox_runner.py")
STARTING = 60.0  # seconds that building a sandbox may take on a busy machine
GRACE = 10.0  # seconds beyond a limit after which the sandbox itself is given up


@dataclass(frozen=True)
class Limits:
    """What a sandbox keeps its programs to: `memory` in bytes, of each process and of all of them
    together; `processes` at once."""

    isolation: Literal["namespaces", "rlimits"]
    memory: int
    processes: int


@dataclass(frozen=True)
class Outcome:
    """How a program ended: by itself ("exit", with its code), at a limit, or with its sandbox
    ("lost"). Its output and errors are cut at 64 KiB each. `passed`: all its tests have passed."""

    ended: Literal["exit", "time", "memory", "processes", "output", "lost"]
    code: int | None = None
    stdout: str = ""
    stderr: str = ""
    passed: bool = False


class Sandbox:
    """A sandbox for the programs of one answer, which run one after the other within `seconds` in
    all. When its block ends, none of their processes is left.

    Raises:
        WorkerEnded: there can be no sandbox here; the message says why.
    """

    def __init__(self, limits: Limits, seconds: float) -> None:
        # The interpreter itself and its standard library: no packages, no environment.
        python = os.path.realpath(sys.executable)
        command = [python, "-I", "-S", "-B", "-X", "utf8", str(PROGRAM), json.dumps(asdict(limits))]
        self._worker = Worker(command, {})
        self._worker.ask({"hello": True}, STARTING)
        self._deadline = time.monotonic() + seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.close()

    def run(self, program: str, stdin: str = "") -> Outcome:
        """Run a program that reads `stdin`."""
        return self._ask({"program": program, "stdin": stdin})

    def test(self, program: str, tests: list[str]) -> Outcome:
        """Run a program as a module, then `tests` in it, each a piece of Python that may raise."""
        return self._ask({"program": program, "tests": tests})

    def _ask(self, request: dict[str, Any]) -> Outcome:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            return Outcome("time")
        try:
            return Outcome(**self._worker.ask({**request, "seconds": seconds}, seconds + GRACE))
        except WorkerEnded:
            return Outcome("lost")


def require_sandbox(limits: Limits) -> None:
    """Raise `UsageError` where this system does not let a program be kept apart so."""
    try:
        with Sandbox(limits, STARTING) as sandbox:
            outcome = sandbox.run("print('ready')")
        reason = outcome.stderr if outcome.stdout != "ready\n" else None
    except WorkerEnded as error:
        reason = str(error)
    if reason is not None:
        remedy = "allow user namespaces, or set task.options.isolation=rlimits, which protects less"
        if limits.isolation == "rlimits":
            remedy = "is this Linux?"
        raise UsageError(
            f"task.name=code: a model's programs cannot be kept apart here ({reason}): {remedy} "
            "(SECURITY.md)"
        )
