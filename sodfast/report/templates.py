"""What the report says stands in its templates: here they are opened, and numbers are written."""

from collections.abc import Mapping
from math import floor, log10
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape


def template(file: str) -> Template:
    """A template that may call the functions below. HTML is escaped, text is not, and a name that
    is not given is an error (`jinja2.UndefinedError`)."""
    environment = Environment(
        loader=PackageLoader("sodfast.report", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write in (number, significant, with_error, runs_of):
        environment.globals[write.__name__] = write
    return environment.get_template(file)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """With a true minus sign; a dash where there is no value."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not text.strip("+-0."):  # no sign before a rounded zero
        text = text.lstrip("+-")
    return text.replace("-", "−")


def significant(value: float | None, digits: int = 3) -> str:
    """With this many significant digits, for quantities of any magnitude."""
    if not value:
        return "0" if value == 0 else number(value)
    exponent = floor(log10(abs(value)))
    if exponent < -4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return number(value, max(0, digits - 1 - exponent))


def with_error(row: Mapping[str, Any], key: str, digits: int | None = 3) -> str:
    """mean ± standard error to the mean's last digit; the mean alone where there is no error.
    Without `digits` the mean has three significant ones."""
    mean, error = row[f"{key}_mean"], row[f"{key}_error"]
    text = significant(mean) if digits is None else number(mean, digits)
    if error is None:
        return text
    decimals = len(text.partition(".")[2]) if "e" not in text else 0
    return f"{text} ± {number(error, decimals) if decimals else significant(error)}"


def runs_of(row: Mapping[str, Any]) -> str:
    """How many runs a group's means are over, and of how many."""
    return str(row["n"]) if row["n"] == row["listed"] else f"{row['n']} of {row['listed']}"
