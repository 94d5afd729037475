"""Marks of values, for `parametrize`."""

import pytest


def slow(*values: object) -> list[object]:
    """The same values, a tuple standing for several arguments, left out by `make quick`."""
    return _marked(pytest.mark.slow, values)


def exhaustive(*values: object) -> list[object]:
    """The like, left out by `make test` too: for `make exhaustive`."""
    return _marked(pytest.mark.exhaustive, values)


def _marked(mark: pytest.MarkDecorator, values: tuple[object, ...]) -> list[object]:
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=mark) for row in rows]
