"""SIGINT and SIGTERM as an exception that never tears a step apart."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sodfast.errors import Interrupted


class Interruption:
    """Within its `with` block a signal raises `Interrupted`: at once in most code, but only after
    the block in code that is `shielded`, because it changes what lasts.

    With `agree`, which tells whether any of several ranks says True, it is raised at the next
    `boundary` and on all ranks: a rank that stopped alone would leave the others waiting.

    Python gives signals to the main thread alone: in any other one the block takes none.
    """

    def __init__(self, agree: Callable[[bool], bool] | None = None) -> None:
        self._agree = agree
        self._shielded = False
        self._pending = False

    def __enter__(self) -> "Interruption":
        main = threading.current_thread() is threading.main_thread()
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
            if main
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
        if self._pending and self._agree is None:
            self._pending = False
            raise Interrupted

    def boundary(self) -> None:
        """A point between two phases that all ranks reach and at which they may stop."""
        if self._agree is not None and self._agree(self._pending):
            self._pending = False
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._shielded or self._agree is not None:
            self._pending = True
        else:
            raise Interrupted
