"""SIGINT and SIGTERM as an exception that never tears a step apart."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The user or the cluster wants the process to end. Not an `Exception`, so that no library's
    error handling swallows it."""


class Interruption:
    """While entered, a signal raises `Interrupted`: at once in code that changes nothing lasting,
    after the block in `shielded` code."""

    def __init__(self) -> None:
        self._shielded = False
        self._pending = False

    def __enter__(self) -> "Interruption":
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self._pending:
            self._pending = False
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._shielded:
            self._pending = True
        else:
            raise Interrupted
