"""The user's own Python: found, listed with the files that it imports, and loaded."""

import ast
import importlib
import importlib.util
import inspect
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any

from sodfast.errors import Interrupted, RunFailed, UsageError

# The source whose modules are in sys.modules, none or one: another may have other modules of the
# same names in another folder.
_PRESENT: list["Source"] = []
_AGAIN = 0.1  # seconds of processor time between two signals of a limit that has come early


@dataclass(frozen=True)
class Source:
    """The object `name` of the module `module`, whose file is below the folder `root`; `key` is the
    one that names it in the configuration.

    `root` is where imports of the user's other files are searched: the folder of a file, and the
    folder above the outermost package of a module.
    """

    file: Path
    module: str
    name: str
    root: Path
    key: str = "task.source"
    _files: set[str] = field(default_factory=set, init=False, compare=False, repr=False)
    _away: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def files(self) -> list[Path]:
        """The file and all files below `root` that it imports, directly or through another.

        Imports are read from the text, so nothing is run, and those inside functions count, too.
        Where modules are installed, only those of the source's own package are the user's.
        """
        installed = self.root.name in ("site-packages", "dist-packages")
        found: dict[Path, None] = {}
        waiting = [(self.file, self.module)]
        while waiting:
            file, module = waiting.pop()
            if file in found:
                continue
            found[file] = None
            for name in _imports(file, module):
                if not installed or name.split(".")[0] == self.module.split(".")[0]:
                    waiting += self._modules(name)
        return sorted(found)

    def _modules(self, dotted: str) -> Iterator[tuple[Path, str]]:
        """The files that an import of `dotted` runs: of every package on the way, and its own."""
        parts = dotted.split(".")
        for count in range(1, len(parts) + 1):
            path = self.root.joinpath(*parts[:count])
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if file.is_file():
                    yield file, ".".join(parts[:count])

    def load(self) -> Any:
        """Run the module anew, as its files are now, and return the object.

        Raises:
            UsageError: the module cannot be imported, or has no such name.
        """
        self._files.update(str(file) for file in self.files())
        self._be_present()
        self._take_modules()
        importlib.invalidate_caches()
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            with self.running(self.unusable):
                module = importlib.import_module(self.module)
        finally:
            sys.dont_write_bytecode = writes
        if getattr(module, "__file__", None) != str(self.file):
            raise UsageError(
                f"{self.key}: a module named {self.module} is imported already: rename {self.file}"
            )
        if not hasattr(module, self.name):
            names = ", ".join(n for n in vars(module) if not n.startswith("_")) or "nothing"
            raise UsageError(f"{self.key}: {self.file} has no {self.name!r} (it has {names})")
        return getattr(module, self.name)

    def _be_present(self) -> None:
        """Put this source's modules where imports and pickle find them, instead of another's."""
        if _PRESENT and _PRESENT[0] is self:
            return
        for other in _PRESENT:
            other._away.update(other._take_modules())
        _PRESENT[:] = [self]
        sys.path[:] = [str(self.root), *(path for path in sys.path if path != str(self.root))]
        sys.modules.update(self._away)

    def _take_modules(self) -> dict[str, Any]:
        """Take the modules of this source's files out of `sys.modules`, and return them."""
        names = [
            name
            for name, module in list(sys.modules.items())
            if getattr(module, "__file__", None) in self._files and name != "__main__"
        ]
        return {name: sys.modules.pop(name) for name in names}

    @contextmanager
    def running(
        self, failure: Callable[[str], Exception], limit: tuple[str, float] | None = None
    ) -> Iterator[None]:
        """The user's code runs in the block. Whatever it raises becomes `failure` of a text of one
        line that begins with the place; so does a block that takes longer than `limit`, the
        seconds and the key that sets them. `UsageError`, `RunFailed` and interruptions pass.

        The working directory and the standard streams are afterwards what they were before: what
        is written from then on goes to where it was meant to go. The user's other source, where
        there is one, has modules of its own.
        """
        self._be_present()
        # O_PATH needs no right to read the directory, but not every system has it.
        directory = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))
        streams = sys.stdout, sys.stderr
        key, seconds = limit or ("", inf)
        try:
            with time_limit(seconds):
                yield
        except (UsageError, RunFailed, Interrupted, KeyboardInterrupt):
            raise
        except TimeUp as error:
            where = describe_error(error, self.files()).rpartition(":")[0]
            raise failure(f"{where}: took longer than {key}={seconds:g} seconds") from error
        except BaseException as error:
            raise failure(describe_error(error, self.files())) from error
        finally:
            os.fchdir(directory)
            os.close(directory)
            sys.stdout, sys.stderr = streams

    def place(self, function: Callable[..., Any]) -> str:
        """`FILE:LINE` where this function of the source begins; its file alone where that cannot be
        told, as of an object that can be called."""
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is None or code.co_filename not in self._files:
            return str(self.file)
        return f"{code.co_filename}:{code.co_firstlineno}"

    def unusable(self, text: str) -> UsageError:
        """The error that names the key."""
        return UsageError(f"{self.key}: {text}")


class TimeUp(BaseException):
    """A call has taken too long. Not an `Exception`, so that the user's code does not handle it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the block with `TimeUp` when it takes longer, also one that sleeps or waits.

    A thread ends a block that waits. One that never lets another thread run, such as a regular
    expression that backtracks, is ended by the kernel's timer of the processor time that this
    process takes; it may come early, since it counts all threads, and then comes again.

    Python's signals reach the main thread alone: in another one there is no limit. SIGVTALRM is
    taken because libraries that users call, math-verify among them, take SIGALRM themselves.
    """
    if seconds == inf or threading.current_thread() is not threading.main_thread():
        yield
        return
    armed, deadline = True, time.monotonic() + seconds

    def up(number: int, frame: FrameType | None) -> None:
        nonlocal armed
        if armed and time.monotonic() >= deadline:
            armed = False  # the user's code may take its time to end
            raise TimeUp

    previous = signal.signal(signal.SIGVTALRM, up)
    arguments = (threading.get_ident(), signal.SIGVTALRM)
    timer = threading.Timer(seconds, signal.pthread_kill, arguments)
    timer.daemon = True
    timer.start()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        timer.cancel()
        timer.join()  # a signal that it has sent is handled before the handler goes
        signal.signal(signal.SIGVTALRM, previous)


def find_source(text: str, key: str = "task.source") -> Source:
    """The source that `FILE.py:NAME` or `module.submodule:NAME` means, for the key that holds it. A
    module is searched where Python searches, and in the current folder.

    Raises:
        UsageError: there is no such file or module.
    """
    place, _, name = text.rpartition(":")
    if place.endswith(".py"):
        file = Path(os.path.abspath(place))
        if not os.path.isfile(file):
            raise UsageError(f"{key}: there is no file {place}")
        return Source(file, file.stem, name, file.parent, key)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(place)
    except (Exception, SystemExit) as error:  # the packages above it are imported
        raise UsageError(f"{key}: {place}: {type(error).__name__}: {error}") from error
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise UsageError(
            f"{key}: there is no module {place}: name a file as FILE.py:{name}, or a module "
            "that is installed or lies in the current folder"
        )
    file = Path(os.path.abspath(found.origin))
    depth = len(place.split(".")) - (file.stem != "__init__")
    return Source(file, place, name, file.parents[depth], key)


def describe_error(error: BaseException, files: list[Path]) -> str:
    """`FILE:LINE: Type: message`, with the last line of the user's `files` that was running."""
    frames = traceback.extract_tb(error.__traceback__)
    own = {str(file) for file in files}
    frame = next((f for f in reversed(frames) if f.filename in own), frames[-1])
    place = f"{frame.filename}:{frame.lineno}"
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
    try:
        message = " ".join(str(error).split())[:300]
    except Exception:  # the text of the user's own exception is the user's code, too
        message = ""
    return f"{place}: {type(error).__name__}" + (f": {message}" if message else "")


def _imports(file: Path, module: str) -> Iterator[str]:
    """Dotted names that a file imports; none where it is not Python, as its import will say."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            parts = [*(above if node.level else []), *([node.module] if node.module else [])]
            base = ".".join(part for part in parts if part)
            yield from (".".join(filter(None, (base, alias.name))) for alias in node.names)
