"""What ruff cannot count: how long a function is. Its complexity is ruff's rule C901."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(file for root in ("sodfast", "kernels") for file in (ROOT / root).rglob("*.py"))
LONGEST = 80


def long_functions(source: str) -> dict[str, int]:
    """Functions of more than `LONGEST` lines, from `def` to the last one. A Triton kernel may be
    longer: whatever it would call takes the same dozens of pointers and strides again."""
    return {
        node.name: lines
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > LONGEST
        and not any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def test_no_function_is_longer_than_a_screen_or_two() -> None:
    found = {file.relative_to(ROOT): long_functions(file.read_text()) for file in FILES}
    assert {file: functions for file, functions in found.items() if functions} == {}


def test_lines_are_counted_from_def_to_the_end() -> None:
    body = "    x = 1\n" * (LONGEST - 1)
    assert long_functions(f"@cache\ndef f():\n{body}") == {}
    assert long_functions(f"def f():\n{body}    return x\n") == {"f": LONGEST + 1}
    assert long_functions(f"class C:\n  def f(self):\n{body}    return x\n") == {"f": LONGEST + 1}
    assert long_functions(f"@triton.jit\ndef f():\n{body}    return x\n") == {}
    assert long_functions(f"@triton.jit(debug=True)\ndef f():\n{body}    return x\n") == {}
