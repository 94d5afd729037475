"""The rules of the house (CONTRIBUTING.md), read off every import, those inside functions too.

Imports for type checkers alone do not count. There is no list of exceptions.
"""

import ast
import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up; a module imports from its own floor and from those before it.
FLOORS = [
    {"errors", "rng", "files", "source", "success"},
    {"config"},
    {"tasks", "schedule", "collapse", "summary", "attribution"},
    {"model", "lab"},
    {"parallel", "run", "context", "calibrate"},
    {"rollout", "teacher", "optimizer", "rewards"},
    {"objective", "evaluate", "metrics", "answers", "probe"},
    {"student", "state"},
    {"trainer", "memory", "study"},
    {"commands", "report", "integrations"},
    {"cli", "api"},
    {"__main__"},
]
MACHINES = {"tasks", "lab", "model", "rollout", "parallel", "run", "memory", "study", "report"}
LONGEST_WAY = 11

Graph = Mapping[str, set[str]]


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def module_files(package: Path) -> dict[str, Path]:
    """Every module below a package: dotted name → file."""
    names = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All import statements but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from imports(node)


def imported(name: str, file: Path) -> Iterator[str]:
    """Dotted names that the module `name` imports; `from a import b` gives a.b."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in imports(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*above, node.module] if node.module else above)
            source = base if node.level else node.module
            yield from (f"{source}.{alias.name}" for alias in node.names)


@cache
def graph(package: str) -> Graph:
    """module → the modules of the same package that it imports."""
    folder = ROOT / package
    files = module_files(folder)

    def module_of(dotted: str) -> str | None:
        return next((n for n in (dotted, dotted.rpartition(".")[0]) if n in files), None)

    return {
        name: {m for dotted in imported(name, file) if (m := module_of(dotted))} - {name}
        for name, file in files.items()
    }


def room(module: str) -> str:
    """The folder of sodfast that a module is in, or the root module itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def order(of: Graph) -> list[str]:
    """Topological; raises graphlib.CycleError, which names the circle."""
    return list(TopologicalSorter(of).static_order())


@pytest.mark.parametrize("package", ["sodfast", "kernels/sodfast_kernels"])
def test_no_module_is_part_of_a_circle(package: str) -> None:
    assert len(order(graph(package))) == len(graph(package)) > 10


def rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, others in graph("sodfast").items():
        if room(module):
            found.setdefault(room(module), set()).update(room(other) for other in others)
    return {name: others - {name, ""} for name, others in found.items()}


def test_rooms_import_downwards_and_without_a_circle() -> None:
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    assert floor.keys() == rooms().keys(), "a new room needs a floor and a sentence"
    upwards = [
        f"{name} → {other}"
        for name, others in rooms().items()
        for other in others
        if floor[other] > floor[name]
    ]
    assert upwards == []
    assert set(order(rooms())) == floor.keys()


def test_machines_import_neither_the_trainer_nor_the_commands() -> None:
    for name in MACHINES:
        assert not rooms()[name] & {"trainer", "commands", "cli"}, name


def test_the_longest_way_of_imports() -> None:
    height: dict[str, int] = {}
    for module in order(graph("sodfast")):
        height[module] = 1 + max((height[m] for m in graph("sodfast")[module]), default=0)
    assert max(height.values()) <= LONGEST_WAY, max(height, key=lambda name: height[name])


def test_kernel_folders_are_used_through_their_init_alone() -> None:
    kernels = ROOT / "kernels" / "sodfast_kernels"
    files = module_files(kernels)
    folders = {
        f"sodfast_kernels.{p.name}" for p in kernels.iterdir() if (p / "__init__.py").is_file()
    }
    assert len(folders) >= 3
    offered = {
        f"{folder}.{name}" for folder in folders for name in importlib.import_module(folder).__all__
    }
    reached = []
    for name, file in {**files, **module_files(ROOT / "sodfast")}.items():
        for dotted in imported(name, file):
            inner = next((m for m in (dotted, dotted.rpartition(".")[0]) if m in files), "")
            folder = inner.rpartition(".")[0]
            inside = name == folder or name.startswith(f"{folder}.")
            if folder in folders and not inside and dotted not in offered:
                reached.append(f"{name} → {dotted}")
    assert reached == []


def test_kernels_import_nothing_of_sodfast() -> None:
    for name, file in module_files(ROOT / "kernels" / "sodfast_kernels").items():
        assert not [one for one in imported(name, file) if one.split(".")[0] == "sodfast"], name
