"""The page's numbers are those of its CSVs, which a study's report gives, and it has no others."""

import re
from pathlib import Path
from typing import Any

import pytest
import teacher_map
from synthetic import SCHEDULES, write_study
from teacher_map import (
    BLOCKS,
    EARLIER,
    MARKED,
    PAGE,
    README,
    claims,
    collect,
    fill,
    read,
    with_earlier,
)
from teacher_map import SCHEDULES as FILES

EMPTY = "\n".join(f"<!-- {name} -->\nold\n<!-- end -->" for name in BLOCKS)
INTERVAL = re.compile(r"\[[−+-]?\d*\.\d")


def run(schedule: str, seed: int, final: float, regime: str = "A", collapsed: int = 0) -> Any:
    names = {"regime": regime, "schedule": schedule, "seed": seed, "lab_seed": 0}
    return {**names, "final": final, "collapsed": collapsed, "status": "done", "steps": 9}


def test_the_pages_are_what_their_data_say() -> None:
    data, names = with_earlier(read(PAGE.with_suffix(""))), []
    for page in (PAGE, README):
        assert fill(page.read_text(), data) == page.read_text()
        names += [found[2] for found in MARKED.finditer(page.read_text())]
    assert sorted(names) == sorted(BLOCKS)


@pytest.mark.parametrize("arguments", [["nosuch"], ["study", "--forks", "nosuch"]])
def test_a_study_that_cannot_be_used_changes_nothing(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher_map, "PAGE", tmp_path / "page.md")
    write_study(
        tmp_path / "study", {"base": "lab", "overrides": {"steps": 4}, "axes": {"seed": [0]}}
    )
    monkeypatch.setattr("sys.argv", ["teacher_map", *arguments])
    with pytest.raises(SystemExit) as end:
        teacher_map.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("teacher_map: nosuch ") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_what_has_an_interval_stands_between_marks() -> None:
    page = PAGE.read_text()
    prose = MARKED.sub("", page)
    assert INTERVAL.search(page) and not INTERVAL.search(prose)
    before, _, later = prose.partition("## Measured before the release")
    assert "±" not in before and "±" not in later.partition("## ")[2]


def test_without_data_the_page_says_so() -> None:
    assert fill(EMPTY, {}).count("Not measured yet.") == len(BLOCKS)


def test_claims_are_judged_by_intervals_over_pairs_of_both_seeds() -> None:
    scores = {"CGTR": (0.84, 0.86), "hard, every 50": (0.7, 0.7), "fixed": (0.9, 0.8)}
    runs = [run(name, seed, s) for name, own in scores.items() for seed, s in enumerate(own)]
    runs += [run("hard, every 1", seed, 0.0, collapsed=1) for seed in range(5)]
    runs += [run("EMA 0.04", seed, 0.9, "B") for seed in range(2)]
    rows = {line.split(" | ")[0][2:]: line for line in claims({"runs": runs}).splitlines()}
    assert rows["claim"] == "| claim | A | B |"
    assert (
        "in most runs: 5 of 5 [0.57, 1.00] | not measured" in rows["M = 1 collapses (at step 10)"]
    )
    found = {text[:25]: line for text, line in rows.items()}
    assert "holds: +0.150 [+0.023, +0.277], 2 pairs" in found["CGTR ends above M = 50 at"]
    assert "cannot tell: −0.150 [−0.785, +0.485]" in found["M = 50 ends above fixed ("]
    assert (
        "cannot tell: 0.000 [−0.762, +0.762], 2 pairs"
        in rows["not a claim of the paper: CGTR ends above fixed"]
    )
    assert "not measured" in found["CGTR ends above EMA .04 a"]


def test_it_says_where_our_schedules_lead() -> None:
    def rows(regime: str, highest: str, *lows: float | None) -> list[dict[str, Any]]:
        others = [name for name in ("CGTR", "fixed", "EMA") if name != highest]
        keys = {"difference": 0.1, "difference_high": 0.2, "pairs": 5}
        return [
            {"regime": regime, "highest": highest, "other": other, "difference_low": low, **keys}
            for other, low in zip(others, lows, strict=True)
        ]

    data = {"comparisons": [*rows("A", "CGTR", 0.1, 0.1), *rows("B", "CGTR", 0.1, -0.1)]}
    first, second, *_ = teacher_map.answers(data).split("\n\n")
    assert (
        first == "`CGTR` ends above every other schedule in 1 of 2 regimes with several seeds: A."
    )
    assert second == "`evidence` has not been measured over several seeds in any regime."
    data = {"comparisons": rows("A", "fixed", 0.1, 0.1)}
    assert "in 0 of 1 regime with" in teacher_map.answers(data)


def test_cells_of_a_csv_are_what_they_were(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("a,b,c,d,e\n1,0.5,,False,x y\n")
    assert read(tmp_path) == {"one": [{"a": 1, "b": 0.5, "c": None, "d": False, "e": "x y"}]}


def test_the_earlier_study_is_turned_to_its_highest_schedule() -> None:
    data = with_earlier({}, EARLIER)
    assert {row["highest"] for row in data["comparisons"]} == {"fixed"}
    differences = [row["difference"] for row in data["comparisons"]]
    assert differences == sorted(differences) and differences[0] > 0
    assert all(row["difference_low"] < row["difference_high"] for row in data["comparisons"])
    assert sum(row["collapsed"] for row in data["runs"]) == 10


@pytest.mark.slow
def test_a_study_becomes_the_pages_data(tmp_path: Path) -> None:
    axes = {"schedule": [SCHEDULES[0], SCHEDULES[-1]], "seed": [0, 1]}
    write_study(tmp_path / "A", {"base": "lab", "overrides": {"steps": 60}, "axes": axes})
    collect([tmp_path / "A"], FILES, tmp_path / "data")
    data = read(tmp_path / "data")
    assert {"runs", "results", "comparisons", "curve_score"} <= set(data)
    assert (tmp_path / "data" / "phase.svg").is_file()
    text = fill(EMPTY, data)
    for row in data["results"]:
        assert f"{row['final_mean']:.3f} ± {row['final_error']:.3f}" in text
    assert "A: 4 of 4 runs have finished, of 60 steps, over 2 seeds on 1 warm start." in text
    assert fill(text, data) == text
