"""What a report reads of a directory: runs, groups and what they are compared with."""

import json
from pathlib import Path

import pytest
from marks import slow
from synthetic import SCHEDULES, lab_run, schedule_study, write_run, write_study

from sodfast.errors import UsageError
from sodfast.report.load import load, load_studies


def test_a_run_is_a_group_of_its_own_in_any_state(tmp_path: Path) -> None:
    write_run(tmp_path / "run", lab_run("steps=30"), 12)
    source = load(tmp_path / "run")
    (group,), (run,) = source.groups, source.runs
    assert source.single and (source.axis, source.value, group.baseline) == (None, None, None)
    assert (group.label, group.used, run.finished, run.last_step) == ("CGTR", [run], False, 12)
    assert (source.steps, source.metric, source.baseline) == (12, "mean@16", None)


def test_groups_differ_in_more_than_their_seed(tmp_path: Path) -> None:
    """Only finished runs are used; the first schedule is the baseline."""
    study = schedule_study(seeds=2, steps=12)
    write_study(tmp_path / "s", study, {"cgtr,seed1": 3, "fixed,seed0": None})
    source = load(tmp_path / "s")
    groups = {group.label: group for group in source.groups}
    assert len(groups) == len(SCHEDULES) and not source.single
    assert [run.config.seed for run in groups["CGTR"].used] == [0]
    assert [run.status for run in groups["fixed"].runs] == ["missing", "done"]
    assert (source.axis, source.value) == ("schedule", "fixed")
    assert {group.baseline.label for group in source.groups if group.baseline} == {"fixed"}
    other = load(tmp_path / "s", "schedule=cgtr")
    assert {group.baseline.label for group in other.groups if group.baseline} == {"CGTR"}
    assert (source.baseline, other.baseline) == ("fixed", "CGTR")
    with pytest.raises(UsageError, match="it can be schedule=fixed, schedule=hard-every1"):
        load(tmp_path / "s", "schedule=none")


def test_lab_seeds_repeat_a_trial_as_seeds_do(tmp_path: Path) -> None:
    axes = {"lab.seed": [0, 1], "seed": [0, 1], "schedule": SCHEDULES[:2]}
    write_study(tmp_path / "s", {"base": "lab", "overrides": {"steps": 3}, "axes": axes})
    source = load(tmp_path / "s")
    assert [group.label for group in source.groups] == ["fixed", "hard, every 1"]
    for group in source.groups:
        pairs = [(run.replicate, run.seed_name) for run in group.used]
        assert pairs == [
            ((0, 0), "seed 0"),
            ((0, 1), "seed 1"),
            ((1, 0), "seed 0 of lab 1"),
            ((1, 1), "seed 1 of lab 1"),
        ]


def test_axes_beside_the_schedule_are_regimes(tmp_path: Path) -> None:
    study = {
        "base": "lab",
        "overrides": {"steps": 3},
        "variants": {"plain": {}, "fast": {"optimizer.lr": 1e-4}},
        "axes": {"schedule": SCHEDULES[:2], "seed": [0]},
    }
    write_study(tmp_path / "A", study)
    found = [(group.regime, group.called) for group in load(tmp_path / "A").groups]
    names = ["fixed", "hard, every 1"]
    assert found == [(regime, name) for regime in ("plain", "fast") for name in names]
    write_study(tmp_path / "B", schedule_study(seeds=1, steps=3))
    assert {(group.regime, group.label) for group in load(tmp_path / "B").groups} >= {("", "CGTR")}
    joined = load_studies([tmp_path / "A", tmp_path / "B"])
    assert list(dict.fromkeys(g.regime for g in joined.groups)) == ["A, plain", "A, fast", "B"]
    assert {g.baseline.label for g in joined.groups if g.baseline} == {
        "A, plain, fixed",
        "A, fast, fixed",
        "B, fixed",
    }
    assert len(joined.runs) == 4 + len(SCHEDULES)
    with pytest.raises(UsageError, match="two studies are called alike"):
        load_studies([tmp_path / "A", tmp_path / "x" / ".." / "A"])


def test_gates_of_a_schedule_without_gates_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", lab_run("steps=9", "schedule.kind=fixed"))
    check = {"step": 5, "event": "gate", "gates": {}, "refresh": False}
    (tmp_path / "run" / "events.jsonl").write_text(json.dumps(check) + "\n")
    with pytest.raises(UsageError, match="has gates but the schedule has none"):
        load(tmp_path / "run")


def test_a_metric_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", lab_run("steps=9"), 0)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "x": Infinity}\n')
    with pytest.raises(UsageError, match="x of step 1 is not finite"):
        load(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.jsonl", b"\xff\n{}\n"),
        *slow(
            ("summary.json", b"{"),
            ("summary.json", b"null"),
            ("metrics.jsonl", b'{"step": 0, "x": "y"}\n{"step": 1}\n'),
            ("events.jsonl", b'{"step": 1, "event": "refresh"}\n'),
            ("events.jsonl", b'{"step": 1, "event": "gate", "gates": {}, "refresh": false}\n'),
        ),
    ],
)
def test_a_damaged_trial_has_no_lines_and_a_damaged_run_is_refused(
    tmp_path: Path, file: str, text: bytes
) -> None:
    write_study(tmp_path / "s", schedule_study(seeds=2, steps=3))
    path = tmp_path / "s" / "runs" / "cgtr,seed1"
    (path / file).write_bytes(text)
    damaged = [run for run in load(tmp_path / "s").runs if run.status == "damaged"]
    assert [(run.name, run.lines, run.finished) for run in damaged] == [("cgtr,seed1", [], False)]
    with pytest.raises(UsageError) as caught:
        load(path)
    assert str(caught.value) == damaged[0].damage
    assert str(caught.value).startswith(f"{path / file}:")


def test_a_study_of_damaged_trials_says_what_is_wrong_with_the_first(tmp_path: Path) -> None:
    axes = {"seed": [0, 1]}
    write_study(tmp_path / "s", {"base": "lab", "overrides": {"steps": 1}, "axes": axes})
    for seed in axes["seed"]:
        (tmp_path / "s" / "runs" / f"seed{seed}" / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(UsageError, match=r"seed0/metrics.jsonl:1: no object with a step"):
        load(tmp_path / "s")
