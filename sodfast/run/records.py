"""What a run has recorded, checked as it is read: its metrics, its events and its summary.

Each reader raises `UsageError` with one line that names the file, the place in it and what is
wrong there, whatever a fault or a hand has made of the file.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sodfast.errors import UsageError
from sodfast.files import read_lines, read_object

_STATUS = ("done", "collapsed", "interrupted", "failed")


def require_run(path: Path) -> None:
    """Raise `UsageError` unless `path` is a run directory."""
    if not os.path.isfile(path / "config.yaml"):
        raise UsageError(
            f"{path} is not a run directory: it has no config.yaml; a run starts with "
            f"sodfast train out={path}"
        )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: ascending steps, and every value a finite number. None where the
    file is missing; a last line cut short is left out."""
    file, before = run / "metrics.jsonl", -1
    lines = read_lines(file)
    for number, line in enumerate(lines, start=1):
        step = line["step"]
        if step <= before:
            raise UsageError(f"{file}:{number}: step {step} follows step {before}")
        for key, value in line.items():
            if not _is_number(value):
                raise UsageError(f"{file}:{number}: {key} of step {step} is not a number")
            if not _is_finite(value):
                raise UsageError(f"{file}:{number}: {key} of step {step} is not finite")
        before = step
    return lines


def read_events(run: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl: each has an `event` and whatever that event must have."""
    file = run / "events.jsonl"
    events = read_lines(file)
    for number, event in enumerate(events, start=1):
        lacking = _lacking(event)
        if lacking:
            raise UsageError(f"{file}:{number}: an event without a proper {lacking}")
    return events


def read_summary(run: Path) -> dict[str, Any] | None:
    """summary.json, which has `steps` and a `status`; None where there is none yet."""
    file = run / "summary.json"
    try:
        summary = read_object(file)
    except FileNotFoundError:
        return None
    if type(summary.get("steps")) is not int or summary.get("status") not in _STATUS:
        raise UsageError(f"{file}: no steps, or a status that is none of {', '.join(_STATUS)}")
    return summary


def _lacking(event: Mapping[str, Any]) -> str | None:
    """The field that an event of its kind must have, and this one has not."""
    kind = event.get("event")
    if not isinstance(kind, str):
        return "event"
    if kind == "refresh":
        return None if _is_finite(event.get("shock")) else "shock"
    if kind == "gate":
        gates = event.get("gates")
        if not isinstance(event.get("refresh"), bool):
            return "refresh"
        if not isinstance(gates, dict) or not all(map(_is_gate, gates.values())):
            return "gates"
    return None


def _is_gate(gate: Any) -> bool:
    """What is undefined is left out: CGTR's threshold while there is no reference yet, and a value
    of `evidence` while nothing has been probed."""
    return (
        isinstance(gate, dict)
        and all(_is_finite(gate[key]) for key in ("value", "threshold") if key in gate)
        and ("value" in gate or "threshold" in gate)
        and all(isinstance(gate.get(key), bool) for key in ("pass", "active"))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Whether this is a number that a float holds, and so does the sum of all squares of a run's
    such numbers; JSON has integers of any length."""
    return _is_number(value) and abs(value) < (2**63 if type(value) is int else 1e100)
