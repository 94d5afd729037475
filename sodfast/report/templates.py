"""All that the report says stands in its templates: the page, its tables, the text of a replay."""

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape


def template(file: str, *functions: Callable[..., Any]) -> Template:
    """A template that may call these functions by their names. HTML is escaped, text is not, and a
    name that is not given is an error (`jinja2.UndefinedError`)."""
    environment = Environment(
        loader=PackageLoader("sodfast.report", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update({function.__name__: function for function in functions})
    return environment.get_template(file)
