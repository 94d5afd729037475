"""Compares answers with math-verify, as a program of its own: SymPy may take for ever over what a
model writes, and its big numbers cannot be interrupted.

Each line of standard input is {"answer": str or null, "response": str}; the line that comes back is
{"reward": 0.0 or 1.0, "read": the response's final expression or null}.
"""

import json
import logging
import os
import resource
import sys
from decimal import Decimal, InvalidOperation
from typing import Any

MEMORY = 4 << 30  # bytes of address space
LONGEST = 200  # characters of an expression that are given back


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    for line in sys.stdin:
        print(json.dumps(compare(**json.loads(line))), file=replies, flush=True)


def compare(answer: str | None, response: str) -> dict[str, Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # The limits of math-verify rely on SIGALRM; the process that asks has a limit of its own.
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    found = parse(last_boxed(response) or response, kinds, parsing_timeout=None)
    if not found:
        return {"reward": 0.0, "read": None}
    right = False
    if answer is not None:
        right = verify(
            parse(as_latex(answer), kinds, parsing_timeout=None), found, timeout_seconds=None
        )
    return {"reward": float(right), "read": str(found[0])[:LONGEST]}


def last_boxed(response: str) -> str | None:
    """The last \\boxed{…} of a response, None where there is none that is closed. math-verify by
    itself takes all boxes of a response as one set."""
    start = response.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), len(response)):
            depth += {"{": 1, "}": -1}.get(response[position], 0)
            if depth == 0:
                return response[start : position + 1]
        start = response.rfind("\\boxed{", 0, start)
    return None


def as_latex(answer: str) -> str:
    """A row's answer, a number or LaTeX with or without dollar signs, as math-verify reads it."""
    try:
        number = Decimal(answer.strip())
        if number.is_finite():
            answer = format(number, "f")
    except InvalidOperation:
        pass
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"


if __name__ == "__main__":
    main()
