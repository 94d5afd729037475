"""The committed counts: growth and missed targets are seen, and a change keeps what was before."""

import json

import compiled_table
import pytest

REPORT = {
    "name": "full_jsd_fp32",
    "arch": "sm_90",
    "registers": 56,
    "instructions_of_loops": {"add_tile": 50.0},
    "instructions": 80.0,
    "bytes": 18.0,
    "programs": 9,
    "warps": 36,
    "predicted": {"H200": {"picoseconds": 4.0, "share": 0.9, "over_the_products": 1.1}},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_table, "FOLDER", tmp_path)
    return tmp_path


def test_growth_of_more_than_a_twentieth_is_a_problem():
    compiled_table.update([REPORT], "1.0")
    assert compiled_table.grown(REPORT | {"instructions": 83.9}, "1.0") == []
    (problem,) = compiled_table.grown(REPORT | {"instructions": 84.1}, "1.0")
    assert "84.1" in problem and "80.0" in problem
    (problem,) = compiled_table.grown(REPORT | {"name": "another"}, "1.0")
    assert "--update" in problem


def test_counts_of_another_triton_and_counts_that_came_or_went_ask_for_an_update():
    """Otherwise nothing would be compared from then on, and no kernel would ever have grown."""
    compiled_table.update([REPORT], "1.0")
    (problem,) = compiled_table.grown(REPORT, "2.0")
    assert "Triton 1.0" in problem and "--update" in problem
    compiled_table.update([REPORT | {"name": "another"}], "2.0")
    (problem,) = compiled_table.grown(REPORT, "2.0")
    assert "not counted" in problem
    compiled_table.update([REPORT], "1.0")
    uncounted = {key: value for key, value in REPORT.items() if key != "instructions"}
    (problem,) = compiled_table.grown(uncounted, "1.0")
    assert "--update" in problem
    compiled_table.update([uncounted], "1.0")
    assert compiled_table.grown(uncounted, "1.0") == []
    (problem,) = compiled_table.grown(REPORT, "1.0")
    assert "--update" in problem


def test_an_update_keeps_what_was_before_the_last_change(folder):
    for instructions in (99.0, 80.0, 80.0):
        compiled_table.update([REPORT | {"instructions": instructions}], "1.0")
    kernels = json.loads((folder / "compiled.json").read_text())["kernels"]
    assert kernels["full_jsd_fp32 sm_90"]["before"] == 99.0
    assert "**80.0** (99.0)" in (folder / "compiled.md").read_text()


@pytest.mark.parametrize(
    "change, word",
    [
        ({"instructions": 92.1}, "instructions"),
        ({"bytes": 26.0}, "bytes"),
        ({"programs": 3}, "once"),
        ({"predicted": {"H200": {"over_the_products": 1.16}}}, "products"),
    ],
)
def test_a_missed_target_is_said(change, word):
    assert compiled_table.missed_targets(REPORT) == []
    (problem,) = compiled_table.missed_targets(REPORT | change)
    assert word in problem
    assert compiled_table.missed_targets(REPORT | change | {"arch": "sm_80"}) == []
    assert compiled_table.missed_targets(REPORT | change | {"name": "top_1024_jsd_fp32"}) == []
