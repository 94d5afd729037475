"""The figures of the answers: every cell, verdict and effect that there is is drawn."""

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from sodfast.report.effects import fork_effects
from sodfast.report.maps import VERDICT_COLORS, attribution_figure, fork_figure, phase_figure


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(n.itertext()) for n in root.iter("{http://www.w3.org/2000/svg}text")]


def cell(regime: str, schedule: str, final: float | None, collapsed: int = 0) -> dict[str, Any]:
    names = {"regime": regime, "schedule": schedule}
    return {**names, "final_mean": final, "collapsed": collapsed, "n": 5}


def comparison(highest: str, other: str, low: float | None) -> dict[str, Any]:
    return {"regime": "A", "highest": highest, "other": other, "difference_low": low}


CELLS = [
    cell("A", "fixed", 0.5),
    cell("A", "CGTR", 0.9),
    cell("A", "EMA", 0.8),
    cell("A", "M=1", 0.02, 5),
    cell("B", "fixed", None),
]


def test_each_cell_has_its_number_and_its_collapses() -> None:
    found = texts(phase_figure("phase", "score", CELLS, [comparison("CGTR", "fixed", 0.3)]))
    assert {"A", "B", "fixed", "CGTR", "EMA", "M=1"} <= set(found)
    assert {"0.500", "0.900", "0.800", "0.020", "× 5 of 5"} <= set(found)
    assert sum("of 5" in text for text in found) == 1


@pytest.mark.parametrize(
    ("lows", "frames", "dashed"), [([0.3, 0.2], 1, 0), ([0.3, -0.1], 2, 2), ([None, None], 3, 3)]
)
def test_frames_say_what_is_not_apart(lows: list[float | None], frames: int, dashed: int) -> None:
    names = zip(("fixed", "EMA"), lows, strict=True)
    svg = phase_figure("phase", "score", CELLS, [comparison("CGTR", *one) for one in names])
    edges = [line for line in svg.splitlines() if "stroke: #d55e00" in line]
    assert len(edges) == frames
    assert sum("stroke-dasharray" in line for line in edges) == dashed


def test_refreshes_that_could_not_be_judged_are_left_out() -> None:
    judged = {f"{key}{end}": 0.1 for key in ("reward", "length") for end in ("", "_low", "_high")}
    rows = [{"step": step, "verdict": "corrective", **judged} for step in (5, 9)]
    rows.append({"step": 7, "verdict": None})
    svg = attribution_figure("attribution", rows, 20).lower()
    assert set(VERDICT_COLORS) <= set(texts(svg.replace("</svg>", "</svg>")))
    drawn = {kind: svg.count(color.lower()) for kind, color in VERDICT_COLORS.items()}
    assert drawn["corrective"] > drawn["contaminating"]


@pytest.mark.slow
def test_forks_of_every_regime_are_drawn_with_their_means() -> None:
    rows: list[dict[str, Any]] = [
        {"regime": regime, "run": run, "lab_seed": 0, "step": 20, "age": 20, "drift": 2.0}
        | {"tail": None, "reward": 0.1, "length": 0.0, "score": None}
        for regime in ("A", "B")
        for run in ("one", "other", "third")
    ]
    svg = fork_figure("forks", rows, [*fork_effects(rows)])
    found = texts(svg)
    assert {"A", "B", "step of the fork", "age in steps", "reward, now − never"} <= set(found)
    assert svg == fork_figure("forks", rows, [*fork_effects(rows)])
    assert "nan" not in svg.lower().replace("dominant", "")
