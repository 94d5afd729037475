"""The rollout part judges what the bench measures; a rival that failed is a miss."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import suite_rollout
import torch
from suite_record import Plan

FULL = Plan(torch.device("cpu"), full=True)


def engine(monkeypatch: pytest.MonkeyPatch, **bench: Any) -> suite_rollout.Engine:
    """With a bench and a model that answer at once."""
    found = suite_rollout.Engine(FULL)
    monkeypatch.setitem(vars(found), "bench", SimpleNamespace(**bench))
    monkeypatch.setitem(vars(found), "model", None)
    monkeypatch.setitem(vars(found), "rates", {"copy": 4e12, "read": 4.1e12})
    return found


def test_rivals_are_beaten_missed_or_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "native": {"seconds": 1.0},
        "generate": {"seconds": 2.0, "ours_is_faster": 2.0},
        "slower": {"seconds": 0.5, "ours_is_faster": 0.5},
        "continuous batching": {"failed": "RuntimeError: no answers"},
    }
    found = engine(monkeypatch, whole_answers=lambda *given, **named: rows).answers(64, 256, 256)
    met = {row["check"]: row["met"] for row in found["checks"]}
    assert met == {
        "native over generate": True,
        "native over slower": False,
        "native over continuous batching": False,
    }
    assert math.isnan(found["checks"][-1]["value"])
    assert [row["name"] for row in found["rows"]] == list(rows)


@pytest.mark.parametrize(
    ("share", "peak", "met"), [(0.71, 79e9, [True] * 2), (0.69, 81e9, [False] * 2)]
)
def test_a_decode_step_is_judged_by_its_share_and_memory(
    monkeypatch: pytest.MonkeyPatch, share: float, peak: float, met: list[bool]
) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peak)
    step = {"share_of_roofline": share, "milliseconds": 4.0}
    found = engine(monkeypatch, decode_step=lambda *given: step).decode(64, 2048, 128)
    assert [row["met"] for row in found["checks"]] == met


def test_the_benchs_own_targets_become_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"target": "equal", "value": 0.9, "limit": 1.0, "at_most": False, "met": False}
    (check,) = engine(monkeypatch, check_equality=lambda device: [dict(row)]).equality()["checks"]
    assert check == {"check": "equal", "value": 0.9, "limit": 1.0, "at_most": False, "met": False}
