"""Figures as SVG: what is drawn is there, labels keep apart, bytes repeat, nothing is random."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import slow
from synthetic import lab_run

from sodfast.report.canvas import OVERLAID, style_of, swatch
from sodfast.report.early_warning import DIAGNOSTICS, Alarm, DiagnosticForecast
from sodfast.report.intervals import Curve, Series, group_curve
from sodfast.report.plots import (
    GATES,
    PANELS,
    curve_figure,
    forecast_figure,
    gate_figure,
    lane_figure,
    ranking_figure,
    scatter_figure,
)
from sodfast.report.runs import Group, Run


def curve(level: float, runs: int = 3, last: int = 20) -> Curve:
    steps = np.arange(last + 1.0)
    return group_curve([Series(steps, level + 0.1 * run + 0 * steps) for run in range(runs)], [], 1)


def curves(count: int) -> dict[str, Curve]:
    return {f"group {index}": curve(index) for index in range(count)}


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [
        "".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")
    ]


def shapes(svg: str, color: str) -> int:
    """Drawn elements of a colour, as stroke or fill."""
    return len(re.findall(f"(?:stroke|fill): {color.lower()}", svg))


@pytest.mark.parametrize("count", [1, 2, OVERLAID, OVERLAID + 1, *slow(PANELS, PANELS + 1, 60)])
def test_every_group_is_named_in_every_layout(count: int) -> None:
    found = texts(curve_figure("f", "label", curves(count), 20))
    assert "label" in found and "step" in found
    if count > 1:
        assert {f"group {index}" for index in range(count)} <= set(found)


def test_rows_too_many_to_name_are_numbered_as_in_the_table() -> None:
    found = texts(curve_figure("f", "label", curves(120), 20))
    assert {"10", "120", "row of the table"} <= set(found)


def test_a_group_looks_the_same_in_every_figure_and_unlike_the_others() -> None:
    styles = [style_of(index) for index in range(OVERLAID)]
    for attribute in ("color", "ls", "marker"):
        assert len({str(style[attribute]) for style in styles}) == OVERLAID
    svg = curve_figure("f", "label", curves(3), 20)
    for index in range(3):
        assert shapes(svg, styles[index]["color"])
        assert shapes(swatch(index), styles[index]["color"])
    assert not shapes(svg, styles[3]["color"])


def test_a_band_is_drawn_only_for_several_runs() -> None:
    several = curve_figure("f", "label", {"a": curve(0, runs=3)}, 20)
    single = curve_figure("f", "label", {"a": curve(0, runs=1)}, 20)
    assert "opacity: 0.14" in several
    assert "opacity: 0.14" not in single


def test_a_threshold_is_drawn_where_the_data_come_near() -> None:
    near = curve_figure("f", "label", {"a": curve(2)}, 20, thresholds={"limit 3.2": 3.2})
    far = curve_figure("f", "label", {"a": curve(2)}, 20, thresholds={"limit 3.2": 3.2e3})
    assert "limit 3.2" in texts(near)
    assert "limit 3.2" not in texts(far)


@pytest.mark.parametrize("values", [[], *slow([(0, 0.0)], [(0, 5.0), (1, 5.0)])])
def test_little_data_makes_a_figure(values: list[tuple[float, float]]) -> None:
    steps, numbers = np.array(values).reshape(-1, 2).T
    found = group_curve([Series(steps, numbers)], [], 1)
    for count in (1, 9, 30):
        svg = curve_figure("f", "label", {f"g{i}": found for i in range(count)}, 0)
        ElementTree.fromstring(svg)
        assert "nan" not in svg.lower().replace("dominant", "")


def test_labels_are_text_not_markup() -> None:
    svg = curve_figure("f", "x < y & $z$", {"<b>$a$": curve(0), "&": curve(1)}, 20)
    assert {"x < y & $z$", "<b>$a$", "&"} <= set(texts(svg))


def test_the_same_figure_has_the_same_bytes_and_no_date() -> None:
    first, second = (curve_figure("f", "label", curves(3), 20) for _ in range(2))
    assert first == second
    assert "<metadata" not in first and "<dc:date" not in first


def test_ids_of_two_figures_of_a_page_do_not_clash() -> None:
    one, other = (curve_figure(name, "label", curves(3), 20) for name in ("one", "other"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0] and not ids[0] & ids[1]
    for svg, known in zip((one, other), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= known


def record(score: float, collapsed: bool = False, checks: Any = (), refresh: int = 0) -> Run:
    """A run of 30 steps with its last score and events."""
    events: list[dict[str, Any]] = [*checks]
    events += [{"event": "refresh", "step": refresh}] if refresh else []
    events += [{"event": "collapse", "step": 30}] if collapsed else []
    lines = [{"step": 30, "eval/mean@16": score}]
    return Run("r", Path("r"), lab_run(), "done", {}, lines, events)


def test_gates_are_filled_where_they_blocked() -> None:
    blocked = {"isolation": [5, 10, 15, 30], "reward": [], "length": [20]}
    checks = [
        {"event": "gate", "step": step}
        | {"gates": {gate: {"pass": step not in at} for gate, at in blocked.items()}}
        for step in range(5, 35, 5)
    ]
    run = record(0.8, checks=checks, refresh=25)
    svg = gate_figure("gates", {"CGTR, seed 0": run, "CGTR, seed 1": run}, 30)
    legend = {gate: 1 for gate in GATES}
    filled = {gate: shapes(svg, color) for gate, color in GATES.items()}
    # 5, 10 and 15 are neighbours and one bar; 30 is another; two runs
    assert filled["isolation"] > filled["length"] > filled["reward"] >= legend["reward"]
    assert {"CGTR, seed 0", "isolation blocks", "refresh"} <= set(texts(svg))


def ranked(name: str, scores: list[float], mean: float, *bounds: float, lost: bool = False) -> Any:
    """A group, and its row of the results with difference, low and high."""
    runs = [record(score, lost) for score in scores]
    keys = ("difference", "difference_low", "difference_high")
    row = {"group": name, "n": len(runs), "listed": len(runs), "collapsed": lost * len(runs)}
    row |= {"final_mean": mean, "final_error": 0.01 if len(runs) > 1 else None}
    return Group(name, runs, runs), row | dict(zip(keys, bounds or (None,) * 3, strict=True))


def test_a_ranking_puts_a_group_that_collapsed_as_a_whole_at_the_edge() -> None:
    base = ranked("base", [0.8, 0.82], 0.81)
    near = ranked("near", [0.81, 0.83], 0.82, 0.01, 0.0, 0.02)
    lost = ranked("lost", [0.0, 0.0], 0.0, -0.81, -0.82, -0.8, lost=True)
    groups, rows = zip(base, near, lost, strict=True)
    found = texts(ranking_figure("r", "score", groups, rows, "difference to base"))
    assert {"base (2)", "near (2)", "lost (2)", "difference to base", "−0.810"} <= set(found)
    group, row = ranked("base", [0.8], 0.8)
    alone = ranking_figure("r", "s", [group], [row], "difference to base")
    assert "difference to base" not in texts(alone)


def test_scatters_lanes_and_forecasts() -> None:
    points = {"a": [(3, 0.5), (9, 2.0)], "b": [(4, 1.0)], "none": []}
    assert {"a", "b"} <= set(texts(scatter_figure("s", "ratio", points, 10, ratio=True)))
    many = {f"g{index}": [(1, 0.5 + index)] for index in range(12)}
    assert set(many) <= set(texts(scatter_figure("s", "shock", many, 10)))
    assert {"a", "b", "none"} <= set(
        texts(lane_figure("l", "refreshes", {"a": [1], "b": [], "none": []}, 9, labelled=True))
    )
    roc = [(1.0, 0.0, 0.0), (0.5, 0.5, 1.0), (0.0, 1.0, 1.0)]
    alarms = [Alarm("a", 0.7, 8, 8, 12, 12), Alarm("b", 0.8, 5, None, 30, None)]
    rise = DiagnosticForecast(DIAGNOSTICS[1], {"AUC": 0.75}, roc, alarms)
    assert "entropy rise  (AUC 0.75)" in "  ".join(texts(forecast_figure("f", [rise]))).replace(
        "\xa0", " "
    )
