"""The templates: what is escaped, that no name is left out in silence, how numbers are written."""

from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import UndefinedError

from sodfast.config import HardConfig
from sodfast.report.templates import number, significant, template, with_error


def test_html_is_escaped_and_text_is_not() -> None:
    tables: Any = template("tables.html.j2").module
    assert tables.plain({"group": "a < b"}, "group") == "a &lt; b"
    replay = SimpleNamespace(run="a < b", first_difference=None, blocked={})
    for name in ("decisions", "recorded", "refreshes", "recorded_refreshes"):
        setattr(replay, name, [])
    replay.schedule = replay.recorded_schedule = HardConfig(every=3)
    text = template("replay.txt.j2").render(replay=replay, shown=[])
    assert text.splitlines()[:2] == ["a < b: 0 steps", "recorded under hard (every 3)"]


def test_a_name_that_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="replay"):
        template("replay.txt.j2").render(shown=[])


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0.12345, "0.123"), (-0.5, "−0.500"), (-0.0001, "0.000")],
)
def test_numbers(value: float | None, expected: str) -> None:
    assert number(value) == expected


def test_signs_and_significant_digits() -> None:
    assert (number(0.5, 1, sign=True), number(0.0, 1, sign=True)) == ("+0.5", "0.0")
    assert [significant(x) for x in (0.0, 123.4, 0.0123, 1.5e-6, None)] == [
        "0",
        "123",
        "0.0123",
        "1.50e−06",
        "–",
    ]


def test_an_error_has_the_digits_of_its_mean() -> None:
    row = {"x_mean": 12.345, "x_error": 0.0666, "y_mean": 0.5, "y_error": None}
    assert with_error(row, "x") == "12.345 ± 0.067"
    assert with_error(row, "x", None) == "12.3 ± 0.1"
    assert with_error(row, "y") == "0.500"
