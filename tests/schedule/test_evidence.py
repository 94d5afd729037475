"""`schedule.kind=evidence`: by hand, against a second implementation, and in runs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sodfast.commands import train_fork
from sodfast.config import EvidenceConfig
from sodfast.errors import UsageError
from sodfast.files import read_lines
from sodfast.report.page import write_report
from sodfast.report.replay import replay_run
from sodfast.schedule import PROBE_KEYS, Decision, Evidence, ProbedStep, StepStatistics, replay

EVERYTHING = ("isolation", "reward", "length", "tail")
OPEN = {"min_isolation": 0, "probe_every": 1, "min_z": 1.0, "probes": 2}


def evidence(**keys: Any) -> Evidence:
    return Evidence(EvidenceConfig(**{**OPEN, **keys}))


def probed(
    step: int,
    gains: tuple[float, ...] = (1.0, 1.0),
    lengths: tuple[float, float] = (20.0, 20.0),
    longest: float = 30.0,
) -> ProbedStep:
    total, squares = math.fsum(gains), math.fsum(gain * gain for gain in gains)
    return ProbedStep(step, 0.5, 10.0, 40.0, len(gains), total, squares, *lengths, longest)


def gate(decision: Decision, name: str) -> dict[str, Any]:
    assert decision.gates is not None
    return decision.gates[name]


def copies(decisions: list[Decision]) -> list[int]:
    return [step for step, one in enumerate(decisions, start=1) if one.action == "copy"]


# ---------------------------------------------------------------- by hand


def test_what_each_gate_compares() -> None:
    schedule = evidence(min_z=1.5, min_isolation=5)
    schedule.observe(probed(1, (1.0, 0.0, -0.5), (30.0, 20.0), longest=20.0))
    decision = schedule.observe(probed(2, (0.5, 0.5), (20.0, 20.0), longest=40.0))
    assert decision.gates == {
        "isolation": {"value": 2, "threshold": 5, "pass": False, "active": True},
        "reward": {
            "value": 1.5 / math.sqrt(1.75),
            "threshold": 1.5,
            "pass": False,
            "active": True,
        },
        "length": {"value": 50 / 40, "threshold": 1.15, "pass": False, "active": True},
        "tail": {"value": 1.0, "threshold": 1.25, "pass": True, "active": True},
    }
    assert decision.metrics == {
        "gate/gain_z": 1.5 / math.sqrt(1.75),
        "gate/length_ratio": 1.25,
        "gate/tail_growth": 1.0,
    }
    # The first probe has left; the longest 5 % grow from (20 + 40) / 20 to (40 + 45) / 20.
    decision = schedule.observe(probed(3, (1.0,), (10.0, 10.0), longest=45.0))
    assert gate(decision, "reward")["value"] == pytest.approx(2 / math.sqrt(1.5))
    assert gate(decision, "reward")["pass"] and gate(decision, "length")["pass"]
    assert gate(decision, "tail")["value"] == pytest.approx(85 / 60)
    assert not gate(decision, "tail")["pass"]


@pytest.mark.parametrize("blocked", EVERYTHING)
def test_each_gate_blocks_alone_and_can_be_switched_off(blocked: str) -> None:
    keys = {
        "isolation": {"min_isolation": 99},
        "reward": {"min_z": 1.99},
        "length": {"max_length_ratio": 0.99},
        "tail": {"max_tail_growth": 0.99},
    }[blocked]
    steps = [probed(step) for step in range(1, 7)]
    others = tuple(name for name in EVERYTHING if name != blocked)
    for gates, opens in ((EVERYTHING, False), ((blocked,), False), (others, True)):
        decisions = [evidence(gates=gates, **keys).observe(step) for step in steps[:1]]
        schedule = evidence(gates=gates, probes=1, **keys)
        decisions = [schedule.observe(step) for step in steps]
        assert copies(decisions) == ([1, 2, 3, 4, 5, 6] if opens else [])
        for decision in decisions:
            assert decision.gates is not None and tuple(decision.gates) == EVERYTHING
            assert [name for name in EVERYTHING if gate(decision, name)["active"]] == list(gates)
    assert copies([evidence(probes=1).observe(step) for step in steps[:1]]) == [1]


def test_what_a_copy_was_measured_against_is_forgotten_with_it() -> None:
    schedule = evidence(probes=4, gates=("isolation", "reward"), min_isolation=2)
    decisions = [schedule.observe(probed(step)) for step in (1, 2)]
    assert copies(decisions) == [2]
    decision = schedule.observe(probed(3, gains=(0.5, -0.5)))
    assert gate(decision, "reward")["value"] == 0.0 and decision.age == 1
    # The tail's opening is that of the run, across copies.
    assert "value" not in gate(decision, "tail")
    assert gate(schedule.observe(probed(4)), "tail")["value"] == 1.0


def test_without_a_question_there_is_no_value_and_no_copy() -> None:
    schedule = evidence(gates=("reward",), min_z=-9.0)
    decision = schedule.observe(probed(1, gains=(), lengths=(0.0, 0.0)))
    assert gate(decision, "reward") == {"threshold": -9.0, "pass": False, "active": True}
    assert gate(decision, "length") == {"threshold": 1.15, "pass": False, "active": False}
    assert decision.action == "keep" and decision.metrics == {}
    assert schedule.observe(probed(2, gains=(0.0, 0.0))).action == "copy"  # z = 0


def test_z_is_at_most_the_root_of_the_questions() -> None:
    """So a limit of 2.9 asks for nine questions at least, however clear they are."""
    schedule = evidence(probes=9, min_z=2.9, gates=("reward",))
    assert copies([schedule.observe(probed(step, gains=(0.1,))) for step in range(1, 12)]) == [9]


def test_between_probes_nothing_is_decided() -> None:
    schedule = evidence(probe_every=3)
    lines = [{"step": step, **line(probed(step))} for step in range(1, 7)]
    decisions = replay(schedule, [without_probe(one) if one["step"] % 3 else one for one in lines])
    assert [decision.gates is not None for decision in decisions] == [False, False, True] * 2
    with pytest.raises(KeyError, match="probe/questions"):
        replay(evidence(probe_every=3), [without_probe(one) for one in lines])


# ---------------------------------------------------------------- resume and replay


def line(statistics: StepStatistics) -> dict[str, Any]:
    names = ["step", "reward/mean", "length/mean", "length/max", *PROBE_KEYS]
    return dict(zip(names, vars(statistics).values(), strict=False))


def without_probe(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if not key.startswith("probe/")}


CONFIGS = st.builds(
    EvidenceConfig,
    min_isolation=st.integers(0, 8),
    probe_every=st.integers(1, 3),
    probes=st.integers(1, 5),
    min_z=st.sampled_from([-1.0, 0.0, 1.0]),
    max_length_ratio=st.sampled_from([0.9, 1.15]),
    max_tail_growth=st.sampled_from([0.9, 1.25]),
    gates=st.lists(st.sampled_from(EVERYTHING), unique=True).map(tuple),
)
GAINS = st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0]), max_size=4).map(tuple)
LENGTHS = st.tuples(st.floats(1, 50), st.floats(1, 50))
RUNS = st.lists(st.tuples(GAINS, LENGTHS, st.floats(10, 90)), max_size=25).map(
    lambda steps: [line(probed(t, *values)) for t, values in enumerate(steps, start=1)]
)


def as_recorded(config: EvidenceConfig, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Through JSON, with `probe/*` at the schedule's own steps alone."""
    cut = [without_probe(one) if one["step"] % config.probe_every else one for one in lines]
    return [json.loads(json.dumps(one)) for one in cut]


@given(CONFIGS, RUNS)
def test_resuming_at_any_step_changes_no_decision(
    config: EvidenceConfig, lines: list[dict[str, Any]]
) -> None:
    lines = as_recorded(config, lines)
    live = Evidence(config)
    decisions, states = [], [json.dumps(live.state_dict())]
    for one in lines:
        decisions.append(live.observe_line(one))
        states.append(json.dumps(live.state_dict()))
    for done, state in enumerate(states):
        resumed = Evidence(config)
        resumed.observe(probed(77))  # whatever it held before is gone
        resumed.load_state_dict(json.loads(state))
        assert [resumed.observe_line(one) for one in lines[done:]] == decisions[done:]
        assert json.dumps(resumed.state_dict()) == states[-1]


@given(CONFIGS, RUNS)
def test_a_schedule_that_takes_over_itself_goes_on(
    config: EvidenceConfig, lines: list[dict[str, Any]]
) -> None:
    lines = as_recorded(config, lines)
    live = Evidence(config)
    refreshed = set(copies([live.observe_line(one) for one in lines]))
    other = Evidence(config)
    other.follow([{"step": 0}, *lines], refreshed)
    assert other.state_dict() == live.state_dict()


@given(CONFIGS, RUNS)
def test_every_check_follows_from_the_lines_alone(
    config: EvidenceConfig, lines: list[dict[str, Any]]
) -> None:
    """A second implementation, from the definition: no state, everything read off the lines."""
    lines = as_recorded(config, lines)
    decisions = replay(Evidence(config), lines)
    refreshed = copies(decisions)
    everything = [one for one in lines if "probe/gain" in one]

    def tail(some: list[dict[str, Any]]) -> float:
        longest = math.fsum(one["probe/longest"] for one in some)
        return longest / math.fsum(one["length/mean"] for one in some)

    for t, decision in enumerate(decisions, start=1):
        last = max((step for step in refreshed if step < t), default=0)
        assert decision.age == t - last
        if t % config.probe_every:
            assert decision.gates is None and decision.action == "keep"
            continue
        known = [one for one in everything if one["step"] <= t]
        window = known[-config.probes :]
        since = [one for one in window if one["step"] > last and one["probe/questions"]]
        sums = {key: math.fsum(one[key] for one in since) for key in PROBE_KEYS}
        z = ratio = growth = None
        if since:
            squares = math.sqrt(sums["probe/gain_squared"])
            z = sums["probe/gain"] / squares if squares else 0.0
            ratio = sums["probe/candidate_length"] / sums["probe/incumbent_length"]
        if len(known) >= config.probes:
            growth = tail(window) / tail(known[: config.probes])
        passes = {
            "isolation": t - last >= config.min_isolation,
            "reward": z is not None and z >= config.min_z,
            "length": ratio is not None and ratio <= config.max_length_ratio,
            "tail": growth is not None and growth <= config.max_tail_growth,
        }
        assert {name: gate(decision, name)["pass"] for name in passes} == passes
        values = [gate(decision, name).get("value") for name in passes]
        assert values == [t - last, z, ratio, growth]
        assert (decision.action == "copy") == all(passes[name] for name in config.gates)


# ---------------------------------------------------------------- runs

RUN = [
    "schedule.kind=evidence",
    "schedule.min_isolation=2",
    "schedule.probe_questions=3",
    "schedule.probe_samples=2",
    "schedule.probes=2",
    "schedule.min_z=-1",
    "schedule.max_length_ratio=9",
    "schedule.max_tail_growth=9",
    "task.train=12",
]


@pytest.fixture(scope="module")
def source(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 steps, of which every second is checked and some refresh. To look at, not to touch."""
    out = tmp_path_factory.mktemp("evidence") / "run"
    run = train(out, *RUN, "steps=9", "checkpoint.every=2", "checkpoint.keep=9")
    assert run.summary["refresh_steps"]
    return out


def test_a_run_says_why_and_can_be_replayed(source: Path) -> None:
    lines, events = read_lines(source / "metrics.jsonl"), read_lines(source / "events.jsonl")
    checks = [event for event in events if event["event"] == "gate"]
    assert [check["step"] for check in checks] == [2, 4, 6, 8]
    decisions = replay(Evidence(EvidenceConfig(**keys_of(source))), lines)
    assert [one.gates for one in decisions if one.gates] == [check["gates"] for check in checks]
    assert [one.get("teacher/refreshed") for one in lines[1:]] == [
        int(one.action == "copy") for one in decisions
    ]
    replayed = replay_run(source, ["schedule.min_z=99"])
    assert replayed.refreshes == [] and replayed.first_difference in replayed.recorded_refreshes
    assert "reward" in replayed.blocked and "none yet" in "\n".join(replayed.text())
    with pytest.raises(UsageError, match=r"has no probe/.*: only a run"):
        replay_run(source, ["schedule.probe_every=1"])


def keys_of(run: Path) -> dict[str, Any]:
    names = (text.partition("=") for text in RUN if text.startswith("schedule."))
    return {
        key.removeprefix("schedule."): json.loads(value)
        for key, _, value in names
        if key != "schedule.kind"
    }


@pytest.mark.slow
def test_a_fork_goes_on_and_one_of_a_clock_begins_without_evidence(
    source: Path, train: Callable[..., Any], tmp_path: Path, read_run: Callable[[Path], Any]
) -> None:
    train_fork(source, [f"out={tmp_path / 'same'}", "step=4"])
    same, original = read_run(tmp_path / "same"), read_run(source)
    assert same.lines == original.lines
    clock = tmp_path / "clock"
    train(clock, "schedule.kind=hard", "schedule.every=3", "steps=4", "checkpoint.every=4")
    train_fork(clock, [f"out={tmp_path / 'taken'}", "step=4", "steps=6", *RUN[:-1]])
    taken = read_run(tmp_path / "taken")
    assert taken.lines[:5] == read_run(clock).lines[:5]
    (check,) = [event for event in taken.events if event["event"] == "gate"]
    assert check["step"] == 6 and check["gates"]["isolation"]["value"] == 3
    assert "value" in check["gates"]["reward"] and "value" not in check["gates"]["tail"]


@pytest.mark.slow
def test_stopping_changes_nothing(
    train: Callable[..., Any], source: Path, tmp_path: Path, read_run: Callable[[Path], Any]
) -> None:
    for steps in (3, 6, 9):
        run = train(tmp_path / "run", *(RUN if steps == 3 else []), f"steps={steps}")
    assert run == read_run(source)


@pytest.mark.slow
def test_a_report_shows_the_gates(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "summary.json"):
        (copy / name).write_bytes((source / name).read_bytes())
    page = write_report(copy, None).read_text()
    assert "tail blocks" in page and "z of the gain" in page
    header = (copy / "tables" / "blocked.csv").read_text().splitlines()[0]
    assert "blocked_tail" in header
