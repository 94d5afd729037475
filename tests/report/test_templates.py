"""The templates: what is escaped, and that nothing is left out in silence."""

from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import UndefinedError

from sodfast.config import HardConfig
from sodfast.report.tables import WRITERS
from sodfast.report.templates import template


def test_html_is_escaped_and_text_is_not() -> None:
    tables: Any = template("tables.html.j2", *WRITERS).module
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
