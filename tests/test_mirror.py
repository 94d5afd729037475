"""Tests mirror the tree: every module with logic has a test file of its own, in the same folder.

`sodfast/room/module.py` is tested by `tests/room/test_module.py`, a module at the root by
`tests/test_module.py`, and `sodfast_kernels/…` below `tests/kernels/`. Modules that only declare
(an exception, a protocol, a dataclass without methods) have nothing to test.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {ROOT / "sodfast": "", ROOT / "kernels" / "sodfast_kernels": "kernels"}
MODULES = [file for root in SOURCES for file in sorted(root.rglob("*.py"))]


def has_logic(source: str) -> bool:
    """Whether any function says more than what it is for."""
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    return any(isinstance(node, ast.Lambda) or not _declares(node.body) for node in functions)


def _declares(body: list[ast.stmt]) -> bool:
    """A docstring or `...` alone."""
    return (
        len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    )


def mirrored(module: Path) -> Path:
    """Where a module's tests stand: `__main__` in test_main.py, a package's own logic in
    test_package.py."""
    root = next(root for root in SOURCES if module.is_relative_to(root))
    name = "package" if module.stem == "__init__" else module.stem.strip("_")
    folder = ROOT / "tests" / SOURCES[root] / module.relative_to(root).parent
    return folder / f"test_{name}.py"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class E(Exception):\n    alone = False\n", False),
        ("class P(Protocol):\n    def f(self) -> int:\n        '''What it gives.'''\n", False),
        ("class P(Protocol):\n    def f(self) -> int: ...\n", False),
        ("@dataclass\nclass D:\n    x: int = 3\n", False),
        ("X = 3\n", False),
        ("def f() -> int:\n    '''What it gives.'''\n    return 3\n", True),
        ("class C:\n    def f(self) -> int:\n        raise NotImplementedError\n", True),
        ("f = lambda x: x + 1\n", True),
    ],
)
def test_what_counts_as_logic(source: str, expected: bool) -> None:
    assert has_logic(source) == expected


def test_a_module_with_logic_has_a_test_file() -> None:
    assert len(MODULES) > 100
    for tests in (mirrored(module) for module in MODULES if has_logic(module.read_text())):
        assert tests.is_file(), f"{tests.relative_to(ROOT)} is missing"
        assert "def test_" in tests.read_text()
