"""Study files: how they expand, what they are called, and what is refused."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sodfast.config import FixedConfig, load_config
from sodfast.errors import UsageError
from sodfast.study.definition import (
    STUDIES,
    ForkPoint,
    Study,
    find_study,
    flatten,
    load_study,
)

SCHEDULES = [{"kind": "fixed"}, {"kind": "hard", "every": 50}, {"kind": "ema", "rate": 0.04}]


def write(folder: Path, **study: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"base": "lab", **study}, sort_keys=False))
    return path


def names(study: Study) -> list[str]:
    return [trial.name for trial in study.trials]


# ---------------------------------------------------------------- expansion


def test_trials_are_the_product_in_file_order(tmp_path: Path) -> None:
    axes = {"schedule": SCHEDULES, "seed": [3, 1]}
    study = load_study(write(tmp_path, axes=axes, overrides={"steps": 7}))
    assert names(study) == [
        "fixed,seed3",
        "fixed,seed1",
        "hard-every50,seed3",
        "hard-every50,seed1",
        "ema-rate0.04,seed3",
        "ema-rate0.04,seed1",
    ]
    third = study.trials[2]
    assert third.point == {"schedule": "hard-every50", "seed": "3"}
    assert load_config("lab", third.overrides) == third.config
    assert third.config == load_config(
        "lab", ["steps=7", "schedule.kind=hard", "schedule.every=50", "seed=3"]
    )


def test_overrides_may_be_nested_or_dotted_and_change_only_what_they_name(tmp_path: Path) -> None:
    nested = {"optimizer": {"lr": 1e-3}, "schedule": {"kind": "hard", "every": 3}}
    dotted = {"optimizer.lr": 1e-3, "schedule.kind": "hard", "schedule.every": 3}
    (first,) = load_study(write(tmp_path, overrides=nested, axes={"seed": [0]})).trials
    (second,) = load_study(write(tmp_path, overrides=dotted, axes={"seed": [0]})).trials
    assert first == second and first.config == second.config
    plain = load_config("lab", [])
    assert first.config.optimizer == plain.optimizer.model_copy(update={"lr": 1e-3})


def test_texts_of_the_command_line_join_the_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, overrides={"steps": 7, "eval.every": 3}, axes={"seed": [0]})
    (trial,) = load_study(path, ["steps=9", "optimizer.lr=1e-5", "log.sinks=[]"]).trials
    assert (trial.config.steps, trial.config.eval.every) == (9, 3)
    assert trial.config.optimizer.lr == 1e-5


def test_a_base_file_lies_beside_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "mine.yaml").write_text("steps: 11\ntask: {name: arithmetic}\n")
    write(folder, base="mine.yaml", axes={"seed": [0]})
    monkeypatch.chdir(tmp_path)
    (trial,) = load_study(Path("studies/study.yaml")).trials
    assert trial.config.steps == 11


def test_variants_change_several_keys_together(tmp_path: Path) -> None:
    """They are the first axis, called by their names; the others multiply with them."""
    variants = {"plain": {}, "long run": {"steps": 9, "optimizer": {"lr": 0.1}}}
    study = load_study(write(tmp_path, base="lab", axes={"seed": [0, 1]}, variants=variants))
    assert names(study) == ["plain,seed0", "plain,seed1", "long-run,seed0", "long-run,seed1"]
    last = study.trials[-1]
    assert last.point == {"variant": "long run", "seed": "1"}
    assert (last.config.steps, last.config.optimizer.lr, last.config.seed) == (9, 0.1, 1)
    assert study.trials[0].config == load_config("lab", ["seed=0"])
    (tmp_path / "again.yaml").write_text(study.to_yaml())
    assert load_study(tmp_path / "again.yaml").trials == study.trials


@pytest.mark.parametrize(
    ("variants", "match"),
    [
        ({"a": {"seed": 1}}, "seed is changed by variants and elsewhere"),
        ({"a": {"steps": 1}}, "steps is changed by variants and elsewhere"),
        ({"a": {"out": "x"}}, "out is no key of a study"),
        ({"a": {}, "A": {"optimizer.lr": 1}}, "two trials are named"),
        ({"a": {}, "b": {}}, "have the same configuration"),
        ({"a": {"stepps": 1}}, "unknown key stepps"),
        ({"a": 3}, "variants.a"),
        ([1], "variants"),
    ],
)
def test_variants_that_cannot_be(tmp_path: Path, variants: Any, match: str) -> None:
    file = write(
        tmp_path, base="lab", overrides={"steps": 3}, axes={"seed": [0]}, variants=variants
    )
    with pytest.raises(UsageError, match=match) as refused:
        load_study(file)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------- forks

FORKS: dict[str, Any] = {
    "overrides": {"optimizer.lr": 1e-3, "checkpoint.every": 0},
    "fork": {"from": {"schedule": {"kind": "hard"}, "seed": 5}, "step": [4, 20], "further": 3},
    "axes": {"teacher.refresh": ["now", "never"], "seed": [1, 2]},
}


def test_forks_go_on_from_a_source_that_the_study_makes(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, **FORKS))
    (source,) = study.sources
    assert source.name == "source" and source.fork is None
    assert source.config == load_config("lab", source.overrides)
    assert (source.config.steps, source.config.seed, source.config.optimizer.lr) == (20, 5, 1e-3)
    assert source.config.schedule.kind == "hard" and source.config.checkpoint.at == (4, 20)
    assert names(study)[:3] == [
        "step4,refresh-now,seed1",
        "step4,refresh-now,seed2",
        "step4,refresh-never,seed1",
    ]
    last = study.trials[-1]
    assert last.point == {"fork.step": "20", "teacher.refresh": "never", "seed": "2"}
    assert last.fork == ForkPoint("source", 20)
    config = source.config
    changed = {"steps": 23, "seed": 2, "schedule": FixedConfig()}
    without = {"checkpoint": config.checkpoint.model_copy(update={"at": ()})}
    assert last.config == config.model_copy(update=changed | without)
    (tmp_path / "again.yaml").write_text(study.to_yaml())
    again = load_study(tmp_path / "again.yaml")
    assert (again.trials, again.sources) == (study.trials, study.sources)


@pytest.mark.slow
def test_each_variant_and_each_source_has_its_own_forks(tmp_path: Path) -> None:
    sources = [{"seed": 5}, {"seed": 6, "schedule": {"kind": "fixed"}}]
    study = load_study(
        write(
            tmp_path,
            **FORKS | {"fork": {"from": sources, "step": [4], "further": 3}},
            variants={"a": {}, "b": {"lab.stubborn": 0.5}},
        )
    )
    assert [source.name for source in study.sources] == [
        "source,a,from-seed5",
        "source,a,from-seed6-schedule-fixed",
        "source,b,from-seed5",
        "source,b,from-seed6-schedule-fixed",
    ]
    assert len(study.trials) == 16
    for trial in study.trials:
        assert trial.fork is not None
        (source,) = (one for one in study.sources if one.name == trial.fork.source)
        assert source.point.items() <= trial.point.items()
        assert trial.config.lab == source.config.lab
    assert list(study.trials[-1].point) == [
        *("variant", "fork.from", "fork.step", "teacher.refresh", "seed")
    ]


@pytest.mark.slow
def test_a_run_that_is_there_can_be_forked(tmp_path: Path) -> None:
    """Its configuration is the base; overrides and variants change its forks alone."""
    run = tmp_path / "run"
    run.mkdir()
    config = load_config("lab", ["seed=5", "steps=9", "eval.every=3", f"out={run}"])
    (run / "config.yaml").write_text(config.to_yaml())
    fork = {"from": "run", "step": [4], "further": 3}
    values = {
        "overrides": {"optimizer.lr": 1e-3},
        "fork": fork,
        "axes": {"teacher.refresh": ["now", "never"]},
        "variants": {"plain": {}, "warm": {"rollout.temperature": 0.5}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    study = load_study(path)
    assert not study.sources and len(study.trials) == 4
    trial = study.trials[2]
    assert trial.fork == ForkPoint(str(run), 4)
    assert (trial.config.seed, trial.config.eval.every, trial.config.steps) == (5, 3, 7)
    assert (trial.config.optimizer.lr, trial.config.rollout.temperature) == (1e-3, 0.5)
    assert trial.config.out is None
    # A study directory has a copy of the base, and goes by it where the run has gone.
    (tmp_path / "base.yaml").write_text((run / "config.yaml").read_text())
    path.write_text(study.model_copy(update={"base": "base.yaml"}).to_yaml())
    (run / "config.yaml").write_text(config.model_copy(update={"steps": 12}).to_yaml())
    assert load_study(path).trials == study.trials
    (run / "config.yaml").write_text(config.model_copy(update={"seed": 6}).to_yaml())
    with pytest.raises(UsageError, match="base is not the configuration of"):
        load_study(path)
    (run / "config.yaml").unlink()
    assert load_study(path).trials == study.trials
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match="is not a run directory"):
        load_study(path)


@pytest.mark.parametrize(
    ("section", "value", "match"),
    [
        ("fork", {"from": 3, "step": [4], "further": 3}, "fork.from: .*a mapping of keys"),
        ("fork", {"from": [], "step": [4], "further": 3}, "fork.from: .*a mapping of keys"),
        ("fork", {"from": {}, "step": [], "further": 3}, "fork.step is empty"),
        ("fork", {"from": {}, "step": [True], "further": 3}, "fork.step.0"),
        ("fork", {"from": {}, "step": [-1], "further": 3}, "fork.step.0"),
        ("fork", {"from": {}, "step": [4], "further": 0}, "fork.further"),
        ("fork", {"from": {}, "step": [4, 4], "further": 3}, "two trials are named step4"),
        ("fork", {"from": {}, "step": [4], "further": 3, "ahead": 1}, r"fork.ahead \(known: from"),
        ("fork", {"from": {"sed": 1}, "step": [4], "further": 3}, "trial source: unknown key sed"),
        ("fork", {"from": {"steps": 9}, "step": [4], "further": 3}, "steps follows from"),
        ("fork", {"from": {"optimizer.lr": 1}, "step": [4], "further": 3}, "by fork.from and else"),
        ("fork", {"from": {"lab": {3: 4}}, "step": [4], "further": 3}, "unknown key lab.3"),
        ("fork", {"from": {}, "step": [10**30], "further": 3}, "trial source: "),
        ("fork", None, "unknown key teacher.refresh"),
        ("overrides", {"steps": 9}, "steps follows from fork.step and fork.further"),
        ("overrides", {"teacher.refresh": "now"}, "teacher.refresh is an axis and an override"),
        ("axes", {"checkpoint.at": [[1]]}, "checkpoint.at follows from"),
        ("axes", {"teacher.refresh": ["soon"]}, "choose now or never"),
        ("axes", {"lab.seed": [3]}, "the student of its source: no lab"),
        ("axes", {"task.test": [3]}, "the task of its source: no task"),
    ],
)
def test_forks_that_cannot_be(tmp_path: Path, section: str, value: Any, match: str) -> None:
    values = {key: item for key, item in {**FORKS, section: value}.items() if item is not None}
    with pytest.raises(UsageError, match=match) as refused:
        load_study(write(tmp_path, **values))
    assert "\n" not in str(refused.value)


def test_a_later_axis_may_refine_the_group_of_an_earlier_one(tmp_path: Path) -> None:
    axes = {"schedule": [{"kind": "ema"}, {"kind": "trust_region"}], "schedule.rate": [0.1, 0.2]}
    study = load_study(write(tmp_path, axes=axes))
    assert names(study)[:2] == ["ema,rate0.1", "ema,rate0.2"]
    assert [trial.config.schedule.rate for trial in study.trials] == [0.1, 0.2] * 2  # type: ignore[union-attr]


values = {
    "seed": st.integers(0, 2**63 - 1),
    "optimizer.lr": st.floats(0, 1e3),
    "collapse.eval_floor": st.floats(0, 1),
    "objective.top_k": st.none() | st.integers(1, 9),
    "collapse.stop": st.booleans(),
    "log.project": st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="$")),
    "schedule": st.fixed_dictionaries({"kind": st.just("hard"), "every": st.integers(1, 99)}),
}


def _written(value: Any) -> str:
    """Equal for mappings that differ in the order of their keys alone."""
    return json.dumps(value, sort_keys=True)


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3, unique=True).flatmap(
        lambda keys: st.fixed_dictionaries(
            {key: st.lists(values[key], min_size=1, max_size=2, unique_by=_written) for key in keys}
        )
    )
)
def test_every_value_arrives_unchanged_and_every_name_is_a_distinct_folder(
    axes: dict[str, list[Any]],
) -> None:
    study = Study(base="lab", axes=axes)
    try:
        trials = study.trials
    except UsageError as error:  # labels that differ only in characters no folder should have
        assert "two trials are named" in str(error) or "too long" in str(error)
        return
    assert len({trial.name for trial in trials}) == len(trials)
    for trial, point in zip(trials, itertools.product(*axes.values()), strict=True):
        assert "/" not in trial.name and not trial.name.startswith((".", "-"))
        assert "=" not in trial.name and trial.name.isascii()
        for key, value in zip(axes, point, strict=True):
            found: Any = trial.config.model_dump(mode="json")
            for part in key.split("."):
                found = found[part]
            assert found == value


@pytest.mark.slow
@settings(max_examples=10)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True), st.integers(100, 200))
def test_more_values_leave_the_names_of_the_others(seeds: list[int], more: int) -> None:
    fewer = Study(base="lab", axes={"seed": seeds, "schedule": SCHEDULES[:1]})
    longer = Study(base="lab", axes={"seed": [*seeds, more], "schedule": SCHEDULES})
    assert {trial.name: trial.config for trial in fewer.trials}.items() <= {
        trial.name: trial.config for trial in longer.trials
    }.items()


NAMES = {
    "a group": ({"optimizer": [{"lr": 0.1, "clip_norm": 2.0}]}, "lr0.1-clip_norm2.0"),
    "a whole default": ({"eval": [{}]}, "eval-default"),
    "words": ({"teacher.context": ["none"]}, "context-none"),
    "a list": ({"schedule.gates": [["reward", "length"]]}, "gates-reward+length"),
    "an empty list": ({"schedule.gates": [[]]}, "gates-none"),
    "nothing": ({"objective.top_k": [None]}, "top_k-null"),
    "the same last word": (
        {"eval.temperature": [0.5], "rollout.temperature": [1.0]},
        "eval.temperature0.5,rollout.temperature1.0",
    ),
    "a path": ({"log.project": ["a/b c"]}, "project-a-b-c"),
    "a nested group": (
        {"schedule": [{"kind": "cgtr", "gates": ["reward"]}]},
        "cgtr-gates-reward",
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_say_what_is_varied(tmp_path: Path, case: str) -> None:
    axes, name = NAMES[case]
    assert names(load_study(write(tmp_path, axes=axes))) == [name]


def test_long_values_are_told_apart(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, axes={"log.project": ["x" * 99 + "a", "x" * 99 + "b"]}))
    first, second = names(study)
    assert first != second and max(len(first), len(second)) <= 60


# ---------------------------------------------------------------- refusals


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an axis that names no key": ({"axes": {"optimizer.lrr": [1]}}, ["optimizer.lrr", "lr?"]),
    "an axis of no group": ({"axes": {"sede": [1]}}, ["sede", "seed"]),
    "an empty axis": ({"axes": {"seed": []}}, ["axes.seed", "empty"]),
    "no axes": ({"axes": {}}, ["axes", "empty"]),
    "axes left out": ({}, ["axes"]),
    "a value for a list": ({"axes": {"seed": 3}}, ["axes.seed", "list", "3"]),
    "a nested axis": ({"axes": {"optimizer": {"lr": [1]}}}, ["axes.optimizer", "dotted"]),
    "a wrong type": ({"axes": {"seed": [0, "one"]}}, ["seed", "one"]),
    "an unknown section": ({"axis": {"seed": [0]}, "axes": {"seed": [0]}}, ["axis", "axes"]),
    "an unknown override": (
        {"overrides": {"stepz": 3}, "axes": {"seed": [0]}},
        ["stepz", "steps"],
    ),
    "a value twice": ({"axes": {"seed": [4, 4]}}, ["seed4", "seed=4"]),
    "two spellings of one value": (
        {"axes": {"optimizer.lr": [1, 1.0]}},
        ["lr1 ", "lr1.0", "same configuration"],
    ),
    "values that differ in a slash": (
        {"axes": {"log.project": ["a/b", "a b"]}},
        ["project-a-b", "a/b", "a b"],
    ),
    "values that differ in case": (
        {"axes": {"log.project": ["a", "A"]}},
        ["named project-A", 'project="a"', 'project="A"'],
    ),
    "a default spelled out": (
        {"axes": {"schedule": [{"kind": "hard"}, {"kind": "hard", "every": 50}]}},
        ["hard ", "hard-every50", "same configuration"],
    ),
    "an axis that is overridden": (
        {"axes": {"seed": [0]}, "overrides": {"seed": 1}},
        ["seed", "axis", "override"],
    ),
    "a group over its own override": (
        {"axes": {"schedule": SCHEDULES}, "overrides": {"schedule": {"min_isolation": 3}}},
        ["axis schedule", "schedule.min_isolation"],
    ),
    "a group after its own key": (
        {"axes": {"schedule.every": [1, 2], "schedule": SCHEDULES[1:2]}},
        ["axis schedule", "schedule.every"],
    ),
    "out as an axis": ({"axes": {"out": ["a", "b"]}}, ["out="]),
    "out as an override": ({"axes": {"seed": [0]}, "overrides": {"out": "a"}}, ["out="]),
    "a missing base": ({"base": "nowhere.yaml", "axes": {"seed": [0]}}, ["nowhere.yaml"]),
    "an impossible combination": (
        {"axes": {"rollout.samples_per_prompt": [4, 1]}},
        ["samples_per_prompt1", "teacher.context"],
    ),
    "a key of another kind": (
        {"axes": {"schedule.kind": ["hard", "fixed"]}, "overrides": {"schedule.every": 2}},
        ["schedule.every"],
    ),
    "too many long values": (
        {"axes": {f"teacher.{k}template": ["{" + n + "}" + "x" * 99] for k, n in (
            ("demonstration_", "demonstration"), ("feedback_", "feedback"))}
            | {"log.project": ["y" * 99], "model.path": ["z" * 99]}},
        ["too long"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(tmp_path: Path, case: str) -> None:
    study, named = MISTAKES[case]
    path = write(tmp_path, **study)
    with pytest.raises(UsageError) as caught:
        load_study(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for text in named:
        assert text in message


TEXTS = {
    "empty": "",
    "a list": "- base\n",
    "broken": "base: [lab\naxes: }",
    "a key twice": "base: lab\naxes: {seed: [0], seed: [1]}\n",
    "bytes": "base: lab\naxes: {log.project: [!!binary aGk=]}\n",
    "numbers as keys": "base: lab\naxes: {1: [0]}\n",
    "an unknown reference": "base: lab\naxes: {seed: ['${nothing}']}\n",
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_file_that_is_no_study(tmp_path: Path, case: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(TEXTS[case])
    with pytest.raises(UsageError, match=r"study\.yaml"):
        load_study(path)


@pytest.mark.parametrize("text", ["seed=3", "steps", "stepz=3", "out=x"])
def test_a_text_that_cannot_join(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=text.partition("=")[0]):
        load_study(write(tmp_path, axes={"seed": [0, 1]}), [text])


def test_find_study(tmp_path: Path) -> None:
    path = write(tmp_path, axes={"seed": [0]})
    assert find_study(str(path)) == path
    for name in ("nowhere", str(tmp_path)):
        with pytest.raises(UsageError, match="no study file"):
            find_study(name)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_found_by_name(path: Path) -> None:
    assert find_study(path.stem) == path


def test_flat_keys_name_every_value_once() -> None:
    nested = {"a": {"b": 1, "c": {"d": [2]}}, "e": {}, "f.g": None}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [2], "f.g": None}
    assert flatten(flatten(nested)) == flatten(nested)


def test_expanding_needs_no_torch() -> None:
    code = (
        "import sodfast.study.definition, sodfast.study.sweep, sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_resolved_study_reads_back(tmp_path: Path) -> None:
    path = write(tmp_path, axes={"seed": [0], "schedule": SCHEDULES})
    study = load_study(path, ["eval.every=2", "optimizer.lr=1e-5", "log.project='1e5'"])
    path.write_text(study.to_yaml())
    again = load_study(path)
    assert again == study and again.trials == study.trials
