"""Marks of values, for `parametrize`."""

import pytest


def slow(*values: object) -> list[object]:
    """The same values, a tuple standing for several arguments, left out by `make quick`."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]
