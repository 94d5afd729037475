"""Processes that answer lines of JSON, for work that may hang, crash or take all memory."""

import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class WorkerEnded(Exception):
    """A worker gave no answer: its process has ended, or was ended because it took too long."""


class Worker:
    """A process that answers each line of JSON on its standard input with one on its output. It
    ends by itself when its input is closed, and so also when this process ends in any way."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            cwd="/",
            bufsize=0,
        )
        self._rest = b""

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to `request`. A process that gives none within `seconds` is killed.

        Raises:
            WorkerEnded: there is no answer, with the last line that the process has written to its
                standard error, or "" where it was killed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            return json.loads(self._line(time.monotonic() + seconds))
        except (BrokenPipeError, EOFError) as error:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise WorkerEnded(lines[-1] if lines else "") from error
        except TimeoutError as error:
            self._process.kill()
            self.close()
            raise WorkerEnded("") from error

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise EOFError
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def close(self) -> None:
        """End the process by closing its input, and wait for it."""
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()
        self._process.wait()


def parallel(function: Callable[..., T], *arguments: Sequence[Any]) -> list[T]:
    """`function` over the zipped `arguments`, as many calls at once as this process has cores."""
    with ThreadPoolExecutor(cores()) as pool:
        try:
            return list(pool.map(function, *arguments))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cores() -> int:
    return len(os.sched_getaffinity(0))
