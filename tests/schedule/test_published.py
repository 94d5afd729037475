"""The published schedules by hand, and CGTR against a second implementation."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sodfast.config import (
    CGTRConfig,
    EMAConfig,
    FixedConfig,
    HardConfig,
    TrustRegionConfig,
)
from sodfast.schedule import (
    CGTR,
    Decision,
    Schedule,
    StepStatistics,
    build_schedule,
    replay,
)


def step(number: int, reward: float = 0.5, mean: float = 10.0, top: float = 20.0) -> StepStatistics:
    return StepStatistics(number, reward, mean, top)


def run(schedule: Schedule, steps: int, **statistics: float) -> list[Decision]:
    return [schedule.observe(step(number, **statistics)) for number in range(1, steps + 1)]


def copies(decisions: list[Decision]) -> list[int]:
    return [
        number for number, decision in enumerate(decisions, start=1) if decision.action == "copy"
    ]


def cgtr(**keys: Any) -> CGTR:
    """Gates that are open at once and stay so, but for what `keys` says."""
    free = {"min_isolation": 0, "check_every": 1, "window": 1, "reward_margin": 0.0}
    return CGTR(CGTRConfig(**{**free, "max_tail_ratio": 1e9, **keys}))


def gate(decision: Decision, name: str) -> dict[str, Any]:
    assert decision.gates is not None
    return decision.gates[name]


# ---------------------------------------------------------------- clocks


def test_fixed_never_moves_and_ages() -> None:
    decisions = run(build_schedule(FixedConfig()), 100)
    assert {decision.action for decision in decisions} == {"keep"}
    assert [decision.age for decision in decisions] == list(range(1, 101))


@pytest.mark.parametrize("every", [1, 2, 3, 50])
def test_hard_copies_at_multiples(every: int) -> None:
    decisions = run(build_schedule(HardConfig(every=every)), 150)
    assert copies(decisions) == list(range(every, 151, every))
    assert [decision.age for decision in decisions] == [(t - 1) % every + 1 for t in range(1, 151)]


def test_ema_averages_every_step_and_has_no_age() -> None:
    for decision in run(build_schedule(EMAConfig(rate=0.1)), 5):
        assert (decision.action, decision.rate, decision.age) == ("average", 0.1, None)


def test_trust_region_keeps_and_has_no_age() -> None:
    for decision in run(build_schedule(TrustRegionConfig(rate=0.1)), 5):
        assert (decision.action, decision.age, decision.gates) == ("keep", None, None)


@pytest.mark.parametrize(
    "config", [FixedConfig(), HardConfig(every=3), EMAConfig(), TrustRegionConfig()]
)
def test_a_schedule_of_its_own_from_the_start_has_no_state(config: Any) -> None:
    schedule = build_schedule(config)
    run(schedule, 4)
    assert schedule.state_dict() == {}
    schedule.load_state_dict({})


# ---------------------------------------------------------------- taking over from another


def test_a_clock_that_takes_over_counts_from_the_last_copy() -> None:
    """Copies at 4 and 9, taken over after 11; a clock of 5 strikes at 15 and 20."""
    for config, copied, ages in (
        (HardConfig(every=5), [15, 20], [3, 4, 5, 6, 1, 2, 3, 4, 5]),
        (FixedConfig(), [], [3, 4, 5, 6, 7, 8, 9, 10, 11]),
    ):
        schedule = build_schedule(config)
        schedule.follow([{"step": step} for step in range(12)], {4, 9})
        other = build_schedule(config)
        other.load_state_dict(schedule.state_dict())
        for each in (schedule, other):
            decisions = [each.observe(StepStatistics(t, 0.5, 9.0, 9.0)) for t in range(12, 21)]
            assert [decision.age for decision in decisions] == ages
            moved = [t for t, d in zip(range(12, 21), decisions, strict=True) if d.action == "copy"]
            assert moved == copied


def test_cgtr_that_takes_over_has_the_state_of_one_that_copied_there() -> None:
    config = CGTRConfig(min_isolation=2, check_every=2, window=2, reward_margin=0.1)
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@4": 0.5}]
    for step in range(1, 31):
        reward = 0.5 + 0.02 * step
        line = {"step": step, "reward/mean": reward, "length/mean": 9.0, "length/max": 12.0}
        lines.append(line)
    own = CGTR(config)
    decisions = replay(own, lines)
    copies = [t for t, decision in enumerate(decisions, start=1) if decision.action == "copy"]
    assert len(copies) > 3
    other = CGTR(config)
    other.follow(lines, set(copies))
    assert other.state_dict() == own.state_dict()


# ---------------------------------------------------------------- CGTR by hand


def test_cgtr_by_hand() -> None:
    """Window 2, a check every 2 steps, isolation 4, margin 0.1, tail limit 2."""
    schedule = CGTR(
        CGTRConfig(min_isolation=4, check_every=2, window=2, reward_margin=0.1, max_tail_ratio=2.0)
    )
    statistics = [  # (reward, mean length, max length)
        (0.2, 10, 15),
        (0.3, 10, 15),  # check: r_ref = 0.25; isolation 2 < 4, reward 0.25
        (0.5, 10, 15),
        (0.5, 10, 25),  # check: reward 0.5 > 0.35, isolation 4; tail 25 / 10 = 2.5 blocks
        (0.4, 20, 25),
        (0.5, 20, 30),  # check: reward 0.45, tail 30 / 20 = 1.5, isolation 6: refresh, r_ref 0.45
        (0.9, 10, 11),
        (0.9, 10, 11),  # check: reward 0.9 > 0.55, isolation 2 blocks
        (0.5, 10, 11),
        (0.5, 10, 11),  # check: isolation 4, reward 0.5 ≤ 0.55 blocks
    ]
    decisions = [
        schedule.observe(StepStatistics(number, *values))
        for number, values in enumerate(statistics, start=1)
    ]
    assert copies(decisions) == [6]
    assert [decision.age for decision in decisions] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    assert [decision.gates is not None for decision in decisions] == [False, True] * 5
    assert decisions[1].gates == {
        "isolation": {"value": 2, "threshold": 4, "pass": False, "active": True},
        "reward": {"value": 0.25, "threshold": 0.35, "pass": False, "active": True},
        "length": {"value": 1.5, "threshold": 2.0, "pass": True, "active": True},
    }
    assert gate(decisions[3], "length") == {
        "value": 2.5,
        "threshold": 2.0,
        "pass": False,
        "active": True,
    }
    assert gate(decisions[3], "isolation")["pass"] and gate(decisions[3], "reward")["pass"]
    assert decisions[5].metrics == {
        "gate/reward_window": pytest.approx(0.45),
        "gate/tail_window": 1.5,
    }
    assert gate(decisions[7], "reward")["threshold"] == pytest.approx(0.55)
    assert [gate(decisions[7], name)["pass"] for name in ("isolation", "reward", "length")] == [
        False,
        True,
        True,
    ]
    assert [gate(decisions[9], name)["pass"] for name in ("isolation", "reward", "length")] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("blocked", "keys"),
    [
        ("isolation", {"min_isolation": 10**6}),
        ("reward", {"reward_margin": 10.0}),
        ("length", {"max_tail_ratio": 1.0}),
    ],
)
def test_each_gate_blocks_alone_and_only_while_active(blocked: str, keys: dict[str, Any]) -> None:
    rising = [step(number, reward=number / 100) for number in range(1, 11)]
    everything = ("isolation", "reward", "length")
    others = tuple(name for name in everything if name != blocked)
    for gates, opens in ((everything, False), ((blocked,), False), (others, True)):
        schedule = cgtr(gates=gates, **keys)
        decisions = [schedule.observe(statistics) for statistics in rising]
        # Step 1 is the bar itself, so the reward gate opens from step 2 on.
        first = 2 if "reward" in gates else 1
        assert copies(decisions) == (list(range(first, 11)) if opens else [])
        for decision in decisions:
            assert decision.gates is not None and set(decision.gates) == set(everything)
            assert not gate(decision, blocked)["pass"]
            assert [name for name in everything if gate(decision, name)["active"]] == list(gates)


def test_without_gates_every_check_refreshes() -> None:
    assert copies(run(cgtr(gates=(), check_every=5), 23)) == [5, 10, 15, 20]
    # ... also those before the window is full.
    assert copies(run(cgtr(gates=(), check_every=2, window=9), 6)) == [2, 4, 6]


def test_the_first_bar_is_the_mean_of_the_first_window() -> None:
    schedule = cgtr(window=4, check_every=3, min_isolation=1000)
    rewards = [0.1, 0.2, 0.4, 0.9, 0.7, 0.7, 0.7, 0.7, 0.7]
    decisions = [schedule.observe(step(t, r)) for t, r in enumerate(rewards, start=1)]
    assert schedule.reward_reference == pytest.approx(0.4)
    # Step 3 is a check, but 4 steps do not exist yet: no threshold, and the gate blocks.
    assert gate(decisions[2], "reward") == {
        "value": pytest.approx(0.7 / 3),
        "pass": False,
        "active": True,
    }
    assert gate(decisions[5], "reward")["threshold"] == pytest.approx(0.4)
    assert gate(decisions[5], "reward")["value"] == pytest.approx((0.4 + 0.9 + 0.7 + 0.7) / 4)
    assert gate(decisions[5], "reward")["pass"]


def test_only_the_reward_gate_needs_a_full_window() -> None:
    for gates, expected in ((("reward",), []), (("isolation", "length"), [1, 2, 3])):
        assert copies(run(cgtr(window=4, gates=gates), 3)) == expected


def test_the_bar_only_rises() -> None:
    schedule = cgtr(reward_margin=0.05)
    bars = []
    for number, reward in enumerate([0.3, 0.5, 0.4, 0.6, 0.1, 0.62, 0.7], start=1):
        decision = schedule.observe(step(number, reward))
        bars.append((decision.action, schedule.reward_reference))
    assert bars == [
        ("keep", 0.3),
        ("copy", 0.5),
        ("keep", 0.5),
        ("copy", 0.6),
        ("keep", 0.6),
        ("keep", 0.6),
        ("copy", 0.7),
    ]


def test_reward_must_exceed_and_isolation_and_tail_may_equal_their_thresholds() -> None:
    # 0.25 + 0.25 is exact in binary.
    schedule = cgtr(reward_margin=0.25, gates=("reward",))
    schedule.observe(step(1, 0.25))
    assert schedule.observe(step(2, 0.5)).action == "keep"
    assert schedule.observe(step(3, math.nextafter(0.5, 1))).action == "copy"
    assert copies(run(cgtr(min_isolation=3, gates=("isolation",)), 9)) == [3, 6, 9]
    tail = cgtr(max_tail_ratio=2.0, gates=("length",))
    assert tail.observe(step(1, mean=10, top=20)).action == "copy"
    assert tail.observe(step(2, mean=10, top=math.nextafter(20, 30))).action == "keep"


def test_a_run_whose_reward_never_improves_never_refreshes() -> None:
    assert copies(run(CGTR(CGTRConfig(reward_margin=0.0)), 300, reward=0.7)) == []


def test_the_tail_is_pooled_over_the_window() -> None:
    schedule = cgtr(window=3, check_every=3)
    schedule.observe(step(1, mean=4, top=30))
    schedule.observe(step(2, mean=8, top=9))
    decision = schedule.observe(step(3, mean=12, top=13))
    assert decision.metrics["gate/tail_window"] == 30 / 8


# ---------------------------------------------------------------- resume and replay

CONFIGS = st.builds(
    CGTRConfig,
    min_isolation=st.integers(0, 8),
    check_every=st.integers(1, 4),
    window=st.integers(1, 6),
    reward_margin=st.sampled_from([0.0, 0.05, 0.2]),
    max_tail_ratio=st.sampled_from([1.2, 2.0, 3.2]),
    gates=st.lists(st.sampled_from(["isolation", "reward", "length"]), unique=True).map(tuple),
    length_unit=st.sampled_from(["sequence", "shard"]),
)
STEP = st.tuples(st.floats(0, 1), st.floats(1, 100), st.floats(1, 4)).map(
    lambda drawn: (drawn[0], drawn[1], drawn[1] * drawn[2])
)
RUNS = st.lists(STEP, max_size=30).map(
    lambda steps: [StepStatistics(t, *values) for t, values in enumerate(steps, start=1)]
)


@given(CONFIGS, RUNS)
def test_resuming_at_any_step_changes_no_decision(
    config: CGTRConfig, steps: list[StepStatistics]
) -> None:
    live = CGTR(config)
    decisions, states = [], [json.dumps(live.state_dict())]
    for statistics in steps:
        decisions.append(live.observe(statistics))
        states.append(json.dumps(live.state_dict()))
    for done, state in enumerate(states):
        resumed = CGTR(config)
        resumed.observe(step(77, reward=0.9))  # whatever it held before is gone
        resumed.load_state_dict(json.loads(state))
        assert [resumed.observe(statistics) for statistics in steps[done:]] == decisions[done:]
        assert json.dumps(resumed.state_dict()) == states[-1]


def recorded(config: CGTRConfig, steps: list[StepStatistics]) -> tuple[list[Decision], list[Any]]:
    """Live decisions, and the metrics lines a run would have written, read back from JSON."""
    schedule = CGTR(config)
    unit = "length/shard_" if config.length_unit == "shard" else "length/"
    # The other unit's keys hold values that would give other decisions.
    other = {"length/mean": 1.0, "length/max": 1e6}
    decisions, lines = [], [{"step": 0, "eval/mean@4": 0.4}]
    for statistics in steps:
        decision = schedule.observe(statistics)
        decisions.append(decision)
        lines.append(
            {
                "step": statistics.step,
                "reward/mean": statistics.reward_mean,
                **other,
                f"{unit}mean": statistics.length_mean,
                f"{unit}max": statistics.length_max,
                **decision.metrics,
                "teacher/age": decision.age,
                "teacher/refreshed": int(decision.action == "copy"),
            }
        )
    return decisions, [json.loads(json.dumps(line)) for line in lines]


@given(CONFIGS, RUNS)
def test_replay_equals_live(config: CGTRConfig, steps: list[StepStatistics]) -> None:
    decisions, lines = recorded(config, steps)
    assert replay(CGTR(config), lines) == decisions


@given(CONFIGS, RUNS)
def test_every_check_follows_from_the_lines_alone(
    config: CGTRConfig, steps: list[StepStatistics]
) -> None:
    """A second implementation, from the definition: no state, everything read off the lines."""
    decisions, lines = recorded(config, steps)
    unit = "length/shard_" if config.length_unit == "shard" else "length/"
    w = config.window
    for t, decision in enumerate(decisions, start=1):
        if t % config.check_every:
            assert decision.gates is None and decision.metrics == {}
            assert lines[t]["teacher/refreshed"] == 0
            continue
        refreshes = [s for s in range(1, t) if lines[s]["teacher/refreshed"]]
        last = refreshes[-1] if refreshes else 0
        window = lines[max(1, t - w + 1) : t + 1]
        reward = math.fsum(line["reward/mean"] for line in window) / len(window)
        length = math.fsum(line[unit + "mean"] for line in window) / len(window)
        tail = max(line[unit + "max"] for line in window) / length
        if refreshes:
            bar = lines[last]["gate/reward_window"]
        elif t >= w:
            bar = math.fsum(line["reward/mean"] for line in lines[1 : w + 1]) / w
        else:
            bar = None
        passes = {
            "isolation": t - last >= config.min_isolation,
            # A refresh of an ablated run can come before the window is full: it sets a bar,
            # and the gate stays closed.
            "reward": bar is not None and t >= w and reward > bar + config.reward_margin,
            "length": tail <= config.max_tail_ratio,
        }
        assert {name: value["pass"] for name, value in decision.gates.items()} == passes
        assert [gate(decision, name)["value"] for name in passes] == [t - last, reward, tail]
        assert lines[t]["gate/reward_window"] == reward
        assert lines[t]["gate/tail_window"] == tail
        assert lines[t]["teacher/age"] == t - last
        assert lines[t]["teacher/refreshed"] == all(passes[name] for name in config.gates)
