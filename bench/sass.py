"""What the machine code of a kernel says: its loops, their instructions and the bytes they move.

A loop is a backward branch of nvdisasm's listing; only the innermost ones that touch global memory
are of interest, since they run once for every few elements and all else once a program. A kernel
that has none of them is straight through, and counts as a loop that is run once. Which loop of the
source one of them is, the functions tell that its instructions come from.
"""

import ast
import functools
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass
class Loop:
    """Once around a loop, for one thread.

    instructions: issued, those under a predicate included.
    bytes: of global memory, read or written.
    wide: whether all of these accesses have at least 8 bytes.
    functions: names of the functions its instructions come from.
    in_flight: groups of asynchronous copies that its strictest wait leaves unfinished; None without
        such copies.
    """

    instructions: int = 0
    bytes: int = 0
    wide: bool = True
    functions: set[str] = field(default_factory=set)
    in_flight: int | None = None


def memory_loops(nvdisasm: Path, cubin: Path) -> list[Loop]:
    """The innermost loops with global accesses of a cubin that has line information."""
    command = [str(nvdisasm), "-c", "-g", str(cubin)]
    return read_listing(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read_listing(listing: str) -> list[Loop]:
    """The innermost loops with global accesses of a listing by `nvdisasm -c -g`; where there is
    none, all of it."""
    code: list[tuple[str, str, str | None]] = []  # opcode, operands, function
    labels: dict[str, int] = {}
    function = None
    for text in listing.splitlines():
        text = text.strip()
        if found := re.match(r"(\.L_\w+):", text):
            labels[found[1]] = len(code)
        elif found := re.match(r'//## File "([^"]*)", line (\d+)', text):
            function = function_at(found[1], int(found[2]))
        elif found := re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", text):
            code.append((found[1], found[2], function))
    spans = []
    for end, (opcode, operands, _) in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", operands)
        if opcode.startswith("BRA") and target and labels.get(target[1], end + 1) <= end:
            spans.append((labels[target[1]], end + 1))
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]
    loops = [loop for begin, end in innermost if (loop := _loop(code[begin:end])).bytes]
    return loops or [loop for loop in [_loop(code)] if loop.bytes]


def _loop(body: list[tuple[str, str, str | None]]) -> Loop:
    loop = Loop()
    copies = any(opcode.startswith("LDGSTS") for opcode, _, _ in body)
    for opcode, operands, function in body:
        loop.instructions += opcode != "NOP"
        if function is not None:
            loop.functions.add(function)
        name, *suffixes = opcode.split(".")
        if name in ("LDG", "LDGSTS", "STG"):
            width = next((WIDTHS[suffix] for suffix in suffixes if suffix in WIDTHS), 4)
            loop.bytes += width
            loop.wide &= width >= 8
        elif copies and opcode.startswith("DEPBAR.LE"):
            groups = int(operands.split(",")[1].strip(" ;"), 0)
            loop.in_flight = groups if loop.in_flight is None else min(loop.in_flight, groups)
    return loop


def function_at(path: str, line: int) -> str | None:
    """The innermost function of a Python file around a line; None outside of all."""
    return next((name for name, begin, end in _functions(path) if begin <= line <= end), None)


@functools.cache
def _functions(path: str) -> list[tuple[str, int, int]]:
    if not Path(path).is_file():
        return []
    nodes = [
        node
        for node in ast.walk(ast.parse(Path(path).read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    nodes.sort(key=lambda node: -node.lineno)
    return [(node.name, node.lineno, node.end_lineno or node.lineno) for node in nodes]
