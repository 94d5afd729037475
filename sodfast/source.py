"""The user's own Python: found, listed with the files that it imports, and loaded."""

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sodfast.errors import UsageError

# Names of the modules that the last `Source.load` has imported. The next one may have others of the
# same names in another folder.
_LOADED: set[str] = set()


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
        files = {str(file) for file in self.files()}
        for name, module in list(sys.modules.items()):
            if name in _LOADED or getattr(module, "__file__", None) in files:
                del sys.modules[name]
        _LOADED.clear()
        sys.path[:] = [str(self.root), *(path for path in sys.path if path != str(self.root))]
        importlib.invalidate_caches()
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            module = importlib.import_module(self.module)
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            raise UsageError(f"{self.key}: {describe_error(error, self.files())}") from error
        finally:
            sys.dont_write_bytecode = writes
            _LOADED.update(
                name
                for name, found in list(sys.modules.items())
                if getattr(found, "__file__", None) in files
            )
        if getattr(module, "__file__", None) != str(self.file):
            raise UsageError(
                f"{self.key}: a module named {self.module} is imported already: rename {self.file}"
            )
        if not hasattr(module, self.name):
            names = ", ".join(n for n in vars(module) if not n.startswith("_")) or "nothing"
            raise UsageError(f"{self.key}: {self.file} has no {self.name!r} (it has {names})")
        return getattr(module, self.name)


def find_source(text: str, key: str = "task.source") -> Source:
    """The source that `FILE.py:NAME` or `module.submodule:NAME` means, for the key that holds it. A
    module is searched where Python searches, and in the current folder.

    Raises:
        UsageError: there is no such file or module.
    """
    place, _, name = text.rpartition(":")
    if place.endswith(".py"):
        file = Path(os.path.abspath(place))
        if not file.is_file():
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
    message = " ".join(str(error).split())[:300]
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
