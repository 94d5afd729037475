"""The report of a run and of a study: its numbers against the metrics, its refusals, its bytes."""

import csv
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from math import pi, sqrt, tan
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from marks import slow
from synthetic import SCHEDULES, lab_run, schedule_study, simulate, write_run, write_study

from sodfast import cli
from sodfast.errors import RunFailed, UsageError
from sodfast.report.page import _write_report, write_comparison, write_report
from sodfast.report.runs import Group, Run, Source

CUT = {"cgtr,seed2": 40, "fixed,seed1": None}
SHORT = schedule_study(seeds=3, steps=60)


class Page(HTMLParser):
    """The tables of a page by name, its text, and every address it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.figures: list[str] = []
        self.text = ""
        self._rows: list[list[str]] | None = None
        self._cell = False
        self.feed(path.read_text())
        self.text = " ".join(self.text.split())  # as a browser shows it

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.links += [v for k, v in attributes if v and k in ("href", "src", "xlink:href")]
        if tag == "table":
            self._rows = self.tables.setdefault(str(values["data-name"]), [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
            self._cell = True
        elif tag == "svg" and values.get("class") == "plot":
            self.figures.append(str(values["data-name"]))

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._rows = None
        elif tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell and self._rows:
            self._rows[-1][-1] += data.strip()

    def rows(self, name: str) -> dict[str, dict[str, str]]:
        head, *rows = self.tables[name]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def read_table(directory: Path, name: str) -> list[dict[str, str]]:
    with (directory / "tables" / f"{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def files(directory: Path) -> dict[str, bytes]:
    """What a report has written."""
    found = [
        directory / "report.html",
        *sorted((directory / "tables").glob("*")),
        *sorted((directory / "figures").glob("*")),
    ]
    return {path.name: path.read_bytes() for path in found if path.is_file()}


def last_score(directory: Path, trial: str) -> float:
    lines = (directory / "runs" / trial / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["eval/mean@16"])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six schedules, three seeds; one trial unfinished, one never started; reported."""
    directory = tmp_path_factory.mktemp("studies") / "schedules"
    write_study(directory, SHORT, CUT)
    write_report(directory)
    return directory


@pytest.mark.slow
def test_means_errors_and_differences_are_those_of_the_metrics(study: Path) -> None:
    """By hand: three seeds of hard 50; against fixed, whose seed 1 is missing, two pairs."""
    scores = [last_score(study, f"hard-every50,seed{seed}") for seed in range(3)]
    mean = sum(scores) / 3
    error = sqrt(sum((score - mean) ** 2 for score in scores) / 2 / 3)
    pairs = [scores[seed] - last_score(study, f"fixed,seed{seed}") for seed in (0, 2)]
    row = {row["group"]: row for row in read_table(study, "results")}["hard, every 50"]
    assert float(row["final_mean"]) == pytest.approx(mean)
    assert float(row["final_error"]) == pytest.approx(error)
    assert float(row["difference"]) == pytest.approx(sum(pairs) / 2)
    half = abs(pairs[0] - pairs[1]) / 2 * tan(0.475 * pi)  # Student's, of one degree of freedom
    assert float(row["difference_low"]) == pytest.approx(sum(pairs) / 2 - half)
    assert float(row["difference_high"]) == pytest.approx(sum(pairs) / 2 + half)
    assert (row["baseline"], row["pairs"]) == ("fixed", "2")
    assert row["pairs_above"] == str(sum(pair > 0 for pair in pairs))


def test_the_page_shows_the_numbers_of_the_csv(study: Path) -> None:
    shown = Page(study / "report.html").rows("results")
    rows = read_table(study, "results")
    assert list(shown) == [row["group"] for row in rows]
    for row in rows:
        mean, error = float(row["final_mean"]), float(row["final_error"])
        assert shown[row["group"]]["final"] == f"{mean:.3f} ± {error:.3f}"
        low, high = float(row["collapse_low"]), float(row["collapse_high"])
        rate = f"{row['collapsed']} of {row['n']} [{low:.2f}, {high:.2f}]"
        assert shown[row["group"]]["collapsed [95 %]"] == rate
    assert shown["fixed"]["difference [95 %]"] == "baseline"


@pytest.mark.slow
def test_collapses_are_counted_with_wilsons_interval(tmp_path: Path) -> None:
    write_study(tmp_path / "s", schedule_study(seeds=2, steps=250))
    write_report(tmp_path / "s")
    rows = {row["group"]: row for row in read_table(tmp_path / "s", "results")}
    row = rows["hard, every 1"]
    assert (row["collapsed"], row["n"]) == ("2", "2")
    # 2 of 2: the lower end is 1 / (1 + z²/2) and the upper 1
    assert float(row["collapse_low"]) == pytest.approx(1 / (1 + 1.959963984540054**2 / 2))
    assert float(row["collapse_high"]) == pytest.approx(1.0)
    assert rows["fixed"]["collapsed"] == "0"
    page = Page(tmp_path / "s" / "report.html")
    assert {"collapses", "forecast"} <= set(page.figures)
    assert "length tail" in page.rows("forecast")


def test_unfinished_and_missing_trials_are_listed_and_labelled(study: Path) -> None:
    page = Page(study / "report.html")
    status = {name: row["status"] for name, row in page.rows("runs").items()}
    assert len(status) == 18
    assert (status["cgtr,seed2"], status["fixed,seed1"]) == ("interrupted", "missing")
    shown = page.rows("results")
    assert (shown["CGTR"]["n"], shown["fixed"]["n"]) == ("2 of 3", "2 of 3")
    assert shown["hard, every 50"]["n"] == "3"
    assert "1 of 18 trials are missing and in no mean: fixed,seed1" in page.text
    assert "1 of 18 trials are interrupted and in no mean: cgtr,seed2" in page.text


def test_gates_and_refreshes_are_those_of_the_events(study: Path) -> None:
    events = []
    for seed in range(2):  # the finished ones
        file = study / "runs" / f"cgtr,seed{seed}" / "events.jsonl"
        events.append([json.loads(line) for line in file.read_text().splitlines()])
    row = next(row for row in read_table(study, "blocked"))
    for gate in ("isolation", "reward", "length"):
        counts = [
            sum(e["event"] == "gate" and not e["gates"][gate]["pass"] for e in run)
            for run in events
        ]
        assert float(row[f"blocked_{gate}_mean"]) == pytest.approx(sum(counts) / 2)
    steps = [
        (str(event["step"]), event["shock"])
        for run in events
        for event in run
        if event["event"] == "refresh"
    ]
    found = [
        (row["step"], float(row["shock"]))
        for row in read_table(study, "refreshes")
        if row["run"] in ("cgtr,seed0", "cgtr,seed1")
    ]
    assert found == steps


def test_every_figure_is_there_and_has_its_numbers_beside_it(study: Path) -> None:
    curves = {"score", "drift", "divergence", "reward", "entropy", "length", "tail"}
    figures = set(Page(study / "report.html").figures)
    assert curves | {"ranking", "gates", "shock", "marks"} <= figures
    for name in curves:
        rows = read_table(study, f"curve_{name}")
        assert {row["group"] for row in rows} == {
            row["group"] for row in read_table(study, "results")
        }


def test_the_page_is_self_contained(study: Path) -> None:
    """References are to the page's own ids or to data that stands in it."""
    page = Page(study / "report.html")
    assert page.links
    assert all(link.startswith(("#", "data:")) for link in page.links)
    text = (study / "report.html").read_text()
    assert not re.search(r"@import|<script|url\((?!#)", text)


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(study: Path, tmp_path: Path) -> None:
    write_study(tmp_path / study.name, SHORT, CUT)
    write_report(tmp_path / study.name)
    assert files(tmp_path / study.name) == files(study)
    assert len(files(study)) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tables", *slow("figures")])
def test_a_link_is_not_followed(study: Path, tmp_path: Path, name: str) -> None:
    linked, elsewhere = tmp_path / study.name, tmp_path / "elsewhere"
    shutil.copytree(study, linked)
    shutil.rmtree(linked / name)
    elsewhere.mkdir()
    (linked / name).symlink_to(elsewhere)
    with pytest.raises(UsageError, match=f"{name} is a symbolic link"):
        write_report(linked)
    assert not list(elsewhere.iterdir())


def test_every_figure_is_also_a_file_of_its_own(study: Path) -> None:
    page = (study / "report.html").read_text()
    drawn = re.findall(r'data-name="([^"]+)"', page)
    saved = {path.stem: path.read_text() for path in (study / "figures").glob("*.svg")}
    assert "score" in saved and set(saved) <= set(drawn)
    for name, text in saved.items():
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("data-name") == name
        assert text.removeprefix("<svg ").partition(" data-name")[2].strip() in page


@pytest.mark.slow
def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    write_study(tmp_path / "s", schedule_study(seeds=1, steps=60))
    page = Page(write_report(tmp_path / "s"))
    assert "no errors, no intervals and no bands" in page.text
    for name in ("results", "teacher", "diagnostics", "lengths"):
        for row in page.tables[name][1:]:
            assert not any("±" in cell or "[" in cell for cell in row)
    for row in read_table(tmp_path / "s", "results"):
        assert row["final_error"] == row["collapse_low"] == row["difference_low"] == ""
    assert not any(row["low"] for row in read_table(tmp_path / "s", "curve_score"))


@pytest.mark.slow
def test_a_baseline_differs_in_one_axis_only(tmp_path: Path) -> None:
    """schedule × lr: each group is compared at its own learning rate."""
    axes = {"schedule": SCHEDULES[:2], "optimizer.lr": [1e-5, 1e-4], "seed": [0, 1]}
    write_study(tmp_path / "s", {"base": "lab", "overrides": {"steps": 20}, "axes": axes})
    write_report(tmp_path / "s")
    found = {row["group"]: row["baseline"] for row in read_table(tmp_path / "s", "results")}
    assert found == {
        "fixed, lr 1e-05": "fixed, lr 1e-05",
        "fixed, lr 0.0001": "fixed, lr 0.0001",
        "hard, every 1, lr 1e-05": "fixed, lr 1e-05",
        "hard, every 1, lr 0.0001": "fixed, lr 0.0001",
    }
    write_report(tmp_path / "s", baseline="optimizer.lr=0.0001")
    found = {row["group"]: row["baseline"] for row in read_table(tmp_path / "s", "results")}
    assert found["hard, every 1, lr 1e-05"] == "hard, every 1, lr 0.0001"


@pytest.mark.slow
@pytest.mark.parametrize("count", [9, 25])
def test_many_groups_get_panels_or_a_map(tmp_path: Path, count: int) -> None:
    axes = {"schedule": [{"kind": "hard", "every": m + 1} for m in range(count)]}
    study = {"base": "lab", "overrides": {"steps": 12, "eval.every": 4}, "axes": axes}
    write_study(tmp_path / "s", study)
    page = Page(write_report(tmp_path / "s"))
    assert len(page.rows("results")) == count
    assert len(page.figures) == len(set(page.figures)) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
@pytest.mark.parametrize("steps", [0, 1, 3, 220])
def test_a_run_of_any_schedule_and_length(
    tmp_path: Path, schedule: dict[str, Any], steps: int
) -> None:
    """Only the line of step 0, a run too short for a window, and one that may have collapsed."""
    config = lab_run("steps=220", *(f"schedule.{key}={value}" for key, value in schedule.items()))
    write_run(tmp_path / "run", config, steps)
    page = Page(write_report(tmp_path / "run"))
    assert ("This run is not finished" in page.text) == (steps < 220)
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
    for name in files(tmp_path / "run"):
        if name.endswith(".csv"):
            assert "nan" not in (tmp_path / "run" / "tables" / name).read_text()
    collapsed = schedule.get("every") == 1 and steps == 220
    assert ("the dotted line marks its collapse" in page.text) == collapsed
    assert ("gates" in page.figures) == (schedule["kind"] == "cgtr" and steps == 220)


@pytest.mark.slow
def test_a_truncated_last_line_is_as_if_it_had_not_been_written(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        write_run(tmp_path / name / "run", lab_run("steps=30"), 20)
    for file in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / "cut" / "run" / file).open("a") as stream:
            stream.write('{"step": 21, "reward/mea')
    for name in ("whole", "cut"):
        write_report(tmp_path / name / "run")
    assert files(tmp_path / "cut" / "run") == files(tmp_path / "whole" / "run")


@pytest.mark.slow
def test_a_trained_run_is_reported_by_the_command(
    tmp_path: Path,
    train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = train(tmp_path / "run", "schedule.check_every=2", "schedule.window=2")
    monkeypatch.setattr(sys, "argv", ["sodfast", "report", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    (row,) = read_table(tmp_path / "run", "results")
    assert float(row["final_mean"]) == found.summary["final"]
    assert float(row["peak_mean"]) == found.summary["peak"]


@pytest.mark.slow
def test_a_damaged_trial_is_named_and_left_out(tmp_path: Path) -> None:
    """The page is that of a study to which the trial has not come yet, but for its name."""
    study = {"base": "lab", "overrides": {"steps": 9}, "axes": {"seed": [0, 1, 2]}}
    for name, cut in (("damaged", {}), ("missing", {"seed1": None})):
        write_study(tmp_path / name, study, cut)
    (tmp_path / "damaged" / "runs" / "seed1" / "summary.json").write_text("[]")
    pages = {name: Page(write_report(tmp_path / name)) for name in ("damaged", "missing")}
    found, expected = pages["damaged"], pages["missing"]
    assert "1 of 3 trials are damaged and in no mean: seed1" in found.text
    assert "seed1 is damaged: runs/seed1/summary.json: no JSON object" in found.text
    assert str(tmp_path) not in found.text
    for name in expected.tables.keys() - {"runs"}:
        assert found.tables[name] == expected.tables[name]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "[]", '{"threads": 1}'])
def test_a_damaged_environment_is_no_obstacle(tmp_path: Path, text: str) -> None:
    write_run(tmp_path / "run", lab_run("steps=4"))
    (tmp_path / "run" / "environment.json").write_text(text)
    page = Page(write_report(tmp_path / "run"))
    assert ("environment.json is damaged" in page.text) == (text != '{"threads": 1}')
    assert ("versions unknown" in page.text) == (text == '{"threads": 1}')


def test_half_a_surrogate_pair_is_shown_as_its_escape(tmp_path: Path) -> None:
    """JSON may name one, also for a byte of a path that is not UTF-8, and a page cannot hold it."""
    write_run(tmp_path / "run", lab_run("steps=3"))
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"processor": "x\ud800y"}))
    assert r"x\ud800y" in Page(write_report(tmp_path / "run")).text


@pytest.mark.slow
def test_lines_may_lack_what_others_have(tmp_path: Path) -> None:
    """A release may stop to record a metric, or record one that a name cannot be read from."""
    write_run(tmp_path / "run", lab_run("steps=6"))
    file = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for key in ("length/max", "reward/mean", "distill/divergence"):
        del lines[3][key]
    lines[-1] |= {"eval/best@many": 1.0, "eval/maj@": 1.0}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "lengths" in Page(write_report(tmp_path / "run")).tables


def scored(directory: Path, finals: dict[str, float]) -> Page:
    """The page of fixed and CGTR in two seeds over 9 steps, with these final scores."""
    axes = {"schedule": [{"kind": "fixed"}, {"kind": "cgtr"}], "seed": [0, 1]}
    write_study(directory, {"base": "lab", "overrides": {"steps": 9}, "axes": axes})
    for name, final in finals.items():
        file = directory / "runs" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[-1]["eval/mean@16"] = final
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Page(write_report(directory))


@pytest.mark.slow
def test_a_gated_teacher_that_never_moved_is_called_a_fixed_one(tmp_path: Path) -> None:
    fixed = {"fixed,seed0": 0.5, "fixed,seed1": 0.5}
    page = scored(tmp_path / "s", {**fixed, "cgtr,seed0": 0.7, "cgtr,seed1": 0.71})
    assert (
        "Highest mean final score: CGTR (never refreshed: a fixed teacher in effect), 0.705"
        in page.text
    )
    assert "Lowest: fixed, 0.500" in page.text
    assert "lies above zero for CGTR and below zero for none" in page.text


def test_a_teacher_that_moved_is_not(study: Path) -> None:
    text = Page(study / "report.html").text
    assert "Highest mean final score" in text and "hard, every 1 (never" not in text


@pytest.mark.slow
def test_intervals_around_zero_detect_no_difference(tmp_path: Path) -> None:
    fixed = {"fixed,seed0": 0.5, "fixed,seed1": 0.6}
    page = scored(tmp_path / "s", {**fixed, "cgtr,seed0": 0.6, "cgtr,seed1": 0.5})
    assert "Against fixed, no difference of the final score is detectable" in page.text
    assert "above zero for none" not in page.text


def answer(directory: Path, finals: dict[str, tuple[float, ...]], lab_seeds: int = 1) -> Page:
    """The page of a study of one regime, from the final scores of each schedule's seeds."""
    kinds = {"fixed": {"kind": "fixed"}, "ema": {"kind": "ema"}, "cgtr": {"kind": "cgtr"}}
    count = len(next(iter(finals.values()))) // lab_seeds
    axes: dict[str, Any] = {"schedule": [kinds[name] for name in finals]}
    axes |= {"lab.seed": list(range(lab_seeds)), "seed": list(range(count))}
    write_study(directory, {"base": "lab", "overrides": {"steps": 9}, "axes": axes})
    for name, scores in finals.items():
        for index, score in enumerate(scores):
            trial = f"{name},lab.seed{index // count},seed{index % count}"
            file = directory / "runs" / trial / "metrics.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            lines[-1]["eval/mean@16"] = score
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Page(write_report(directory))


def test_the_page_says_which_schedule_ends_highest_and_by_how_much(tmp_path: Path) -> None:
    """Pairs are over both seeds: the labs differ by more than the schedules do."""
    cgtr, fixed = (0.30, 0.32, 0.70, 0.72), (0.20, 0.20, 0.60, 0.60)
    page = answer(tmp_path / "s", {"fixed": fixed, "cgtr": cgtr}, lab_seeds=2)
    assert (
        "CGTR ends highest, above fixed (+0.110 [+0.092, +0.128]). Mean paired differences over 4 "
        "seeds; the 95 % intervals hold together." in page.text
    )
    (row,) = read_table(tmp_path / "s", "comparisons")
    assert (row["highest"], row["other"], row["pairs"]) == ("CGTR", "fixed", "4")


@pytest.mark.slow
def test_the_page_says_where_it_cannot_tell(tmp_path: Path) -> None:
    level = {"fixed": (0.1,) * 4, "ema": (0.5, 0.6) * 2, "cgtr": (0.7, 0.5) * 2}
    page = answer(tmp_path / "s", level)
    assert (
        "Not apart: CGTR; EMA 0.04. CGTR has the highest mean, but no interval separates it from "
        "EMA 0.04 (+0.050 [−0.371, +0.471]). It ends above fixed (+0.500 [+0.220, +0.780])."
        in page.text
    )
    single = answer(tmp_path / "one", {"fixed": (0.1,), "cgtr": (0.9,)})
    assert "Cannot tell which ends highest: no two groups have two seeds" in single.text
    assert "CGTR ends highest" not in single.text


@pytest.mark.slow
def test_studies_become_one_report_with_a_regime_each(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    for name, better in (("A", "cgtr"), ("B", "fixed")):
        finals = {kind: (0.8, 0.9) if kind == better else (0.1, 0.2) for kind in ("fixed", "cgtr")}
        answer(tmp_path / name, finals)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = tmp_path / "map"
    studies = [str(tmp_path / "A"), str(tmp_path / "B")]
    assert cli("report", *studies, "--out", str(out)).out.strip() == str(out / "report.html")
    page = Page(out / "report.html")
    assert "In A: CGTR ends highest, above fixed (+0.700 [+0.700, +0.700])" in page.text
    assert "In B: fixed ends highest, above CGTR" in page.text
    assert "phase" in page.figures and (out / "figures" / "phase.svg").is_file()
    rows = read_table(out, "runs")
    assert [(row["regime"], row["schedule"], row["seed"]) for row in rows[:3]] == [
        ("A", "fixed", "0"),
        ("A", "fixed", "1"),
        ("A", "CGTR", "0"),
    ]
    assert {row["final"] for row in rows} == {"0.8", "0.9", "0.2", "0.1"}
    assert before == {path: path.read_bytes() for path in before}
    outcome = cli("report", *studies)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert cli("report", *studies, "--out", str(tmp_path / "file")).code == 2


@pytest.mark.slow
def test_forks_are_answered_by_their_effect(tmp_path: Path) -> None:
    groups = []
    for arm in ("now", "never"):
        runs = []
        for seed in range(3):
            config = lab_run("steps=60", f"seed={seed}", "schedule.kind=fixed")
            lines, _ = simulate(config, 60)
            events: list[dict[str, Any]] = [
                {"event": "fork", "step": 20, "source": f"/runs/source {seed}"}
            ]
            if arm == "now":
                events.append({"event": "refresh", "step": 20, "shock": 0.1, "age": 20})
                for line in lines[21:]:
                    line["reward/mean"] += 0.1
                    line["length/mean"] *= 1 + 0.1 * (seed - 1)
            name = f"{arm},{seed}"
            point = {"fork.step": "20", "teacher.refresh": arm}
            runs.append(Run(name, tmp_path, config, "done", point, lines, events))
        groups.append(Group(f"refresh {arm}", runs, runs))
    runs = [run for group in groups for run in group.runs]
    source = Source(tmp_path, "forks", runs, groups, None, None, "base: lab")
    page = Page(_write_report(source, tmp_path))
    assert "One refresh raises the reward and has no effect on the length of answers" in page.text
    assert "reward +0.100 [+0.100, +0.100]" in page.text and "(3 pairs of forks in 3" in page.text
    assert "ends highest" not in page.text and "forks" in page.figures
    rows = read_table(tmp_path, "forks")
    assert [(row["run"], row["step"], row["seed"]) for row in rows] == [
        (f"source {seed}", "20", seed) for seed in "012"
    ]
    assert page.rows("effects")["step 20"]["pairs"] == "3"


def test_refreshes_and_collapses_are_attributed(study: Path) -> None:
    page = Page(study / "report.html")
    rows = read_table(study, "refreshes")
    verdicts = [row["verdict"] for row in rows if row["group"] == "hard, every 50"]
    assert len(verdicts) == 3 and set(verdicts) <= {"corrective", "neutral", "contaminating"}
    row = {row["group"]: row for row in read_table(study, "attribution")}["hard, every 50"]
    assert int(row["judged"]) == sum(int(row[one]) for one in set(verdicts)) == 3
    shown = page.rows("attribution")["hard, every 50"]
    assert shown["judged"] == "3 of 3" and "[" in shown["effect on reward"]
    assert "attribution" in page.figures


def test_figures_and_tables_scroll_where_they_do_not_fit(study: Path) -> None:
    text = (study / "report.html").read_text()
    boxes = re.findall(
        r'<div class="scroll" tabindex="0">\s*(.*?)</div>\s*<figcaption>', text, re.S
    )
    assert sum(box.count('<svg class="plot"') for box in boxes) == text.count('<svg class="plot"')
    assert sum(box.count("<table") for box in boxes) == text.count("<table") > 0
    assert "scroll sideways" in text


# ---------------------------------------------------------------- refusals


# ---------------------------------------------------------------- runs side by side


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    """Another schedule and another seed; the second is not finished."""
    write_run(tmp_path / "a" / "hard", lab_run("steps=30", "schedule.kind=hard"))
    write_run(tmp_path / "b" / "gated", lab_run("steps=30", "seed=3"), 20)
    return [tmp_path / "a" / "hard", tmp_path / "b" / "gated"]


@pytest.mark.slow
def test_runs_stand_side_by_side_with_their_differing_keys_first(
    two_runs: list[Path], tmp_path: Path
) -> None:
    before = {file: file.read_bytes() for run in two_runs for file in run.iterdir()}
    page = Page(write_comparison(two_runs, tmp_path / "page.html"))
    assert next(iter(page.tables)) == "keys"
    assert page.tables["keys"][0] == ["key", "hard", "gated"]
    keys = page.rows("keys")
    assert keys["seed"] == {"key": "seed", "hard": "0", "gated": "3"}
    assert keys["schedule.kind"]["gated"] == '"cgtr"'
    assert keys["schedule.every"] == {"key": "schedule.every", "hard": "50", "gated": "–"}
    assert not {"steps", "out", "optimizer.lr"} & keys.keys()
    for run in two_runs:
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        shown = page.rows("lengths")[run.name]["length, end"]
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines()[-5:])
        assert float(shown) == pytest.approx(sum(one["length/mean"] for one in lines) / 5, abs=0.06)
        assert line["step"] == (30 if run.name == "hard" else 20)
    assert "gated is not finished: it stands at step 20 of its 30" in page.text
    assert "score" in page.figures and "study" not in page.text.lower()
    assert before == {file: file.read_bytes() for run in two_runs for file in run.iterdir()}


@pytest.mark.slow
def test_runs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    for folder in "ab":
        write_run(tmp_path / folder / "run", lab_run("steps=6"))
    page = Page(
        write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "p.html")
    )
    head, *rows = page.tables["keys"]
    assert head == ["key", str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    assert rows == [["none", "–", "–"]]


@pytest.mark.slow
def test_what_cannot_stand_side_by_side(two_runs: list[Path], study: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere.html")
    for runs, file, match in (
        ([two_runs[0], two_runs[0]], out, "named twice"),
        ([two_runs[0], study], out, "is not a run directory"),
        ([two_runs[0], tmp_path / "no"], out, "is not a run directory"),
        (two_runs, two_runs[0] / "metrics.jsonl", "name a file of the form"),
        (two_runs, tmp_path / "link.html", "name a file of the form"),
        (two_runs, tmp_path / "no" / "folder" / "page.html", "cannot be written"),
    ):
        with pytest.raises(UsageError, match=match):
            write_comparison(runs, file)
    assert not out.exists() and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_the_command_takes_several_runs(
    two_runs: list[Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    out, names = tmp_path / "page.html", list(map(str, two_runs))
    assert cli("report", *names, "--out", str(out)).out.strip() == str(out)
    assert out.is_file()
    for arguments in ([*names, "--baseline", "seed=0"], [names[0], "--out", str(out)]):
        outcome = cli("report", *arguments)
        assert outcome.code == 2 and outcome.err.count("\n") == 1


def refuse(directory: Path, match: str, baseline: str | None = None) -> None:
    """One line that says what to change, and nothing of an earlier report is touched."""
    before = files(directory)
    with pytest.raises(UsageError, match=match) as error:
        write_report(directory, baseline)
    assert "\n" not in str(error.value)
    assert files(directory) == before


def test_a_directory_that_is_neither(tmp_path: Path) -> None:
    refuse(tmp_path, "neither a run nor a study directory")
    refuse(tmp_path / "absent", "neither a run nor a study directory")


@pytest.mark.slow
def test_a_run_without_metrics(tmp_path: Path) -> None:
    write_run(tmp_path / "run", lab_run("steps=4"), 0)
    write_report(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    refuse(tmp_path / "run", "no metrics yet: continue it with sodfast train --resume")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    refuse(tmp_path / "run", "no metrics yet")


def test_a_study_without_any_metrics(tmp_path: Path) -> None:
    names = [f"{kind},seed0" for kind in ("fixed", "cgtr")]
    axes = {"schedule": [{"kind": "fixed"}, {"kind": "cgtr"}], "seed": [0]}
    study = {"base": "lab", "axes": axes}
    assert write_study(tmp_path / "s", study, dict.fromkeys(names)) == names
    refuse(tmp_path / "s", "no trial of .* has metrics yet: run sodfast sweep")


def test_a_baseline_that_is_not_in_the_study(study: Path) -> None:
    refuse(study, "it can be schedule=fixed, schedule=hard-every1", baseline="schedule=hard")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("not JSON", r"metrics.jsonl:2: not JSON"),
        *slow(
            ("[1, 2]", r"metrics.jsonl:2: no object with a step"),
            ('{"reward/mean": 0.5}', r"metrics.jsonl:2: no object with a step"),
            ('{"step": 1, "reward/mean": NaN}', r"reward/mean of step 1 is not finite"),
        ),
    ],
)
def test_a_damaged_line(tmp_path: Path, line: str, match: str) -> None:
    write_run(tmp_path / "run", lab_run("steps=9"))
    write_report(tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    refuse(tmp_path / "run", match)


@pytest.mark.slow
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run", lab_run("steps=4"))
    (tmp_path / "run" / "tables").write_text("in the way")
    refuse(tmp_path / "run", r"tables/\w+.csv cannot be written: .*tables cannot be a folder")
    (tmp_path / "run" / "tables").unlink()
    write_report(tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "report.html").mkdir()
    for file in (tmp_path / "run" / "tables").iterdir():
        file.write_text("earlier")
    refuse(tmp_path / "run", r"report.html cannot be written: it is a directory")


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No refused argument: some files may be written, each of them whole."""
    write_run(tmp_path / "run", lab_run("steps=4"))

    def refuse_all(file: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr("sodfast.report.page.replace_bytes", refuse_all)
    with pytest.raises(RunFailed, match="cannot be written: No space left on device"):
        write_report(tmp_path / "run")


def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sodfast", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "neither a run nor a study" in message
