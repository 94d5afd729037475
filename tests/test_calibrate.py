"""False refreshes by simulation: the schedule itself on the same numbers, and known cases."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import slow
from typer.testing import CliRunner

from sodfast.calibrate import (
    ProbeSimulation,
    Simulation,
    calibrate,
    calibrate_source,
    observed,
    observed_probes,
)
from sodfast.cli import app
from sodfast.config import CGTRConfig, Config, EvidenceConfig, load_config
from sodfast.errors import UsageError
from sodfast.schedule import CGTR, Evidence, ProbedStep, replay
from sodfast.success import Success

EVEN = Success(1, 1)
LENGTHS = np.random.default_rng(0).uniform((8, 20), (12, 45), (40, 2))


def configured(*overrides: str) -> tuple[Config, CGTRConfig]:
    rollout = ["rollout.prompts_per_step=16", "rollout.samples_per_prompt=4"]
    config = load_config("lab", [*rollout, *overrides])
    assert isinstance(config.schedule, CGTRConfig)
    return config, config.schedule


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule.window=8", "schedule.min_isolation=3", "schedule.check_every=3"],
        ["schedule.gates=[length]", "schedule.max_tail_ratio=3.6", "schedule.window=7"],
        ["schedule.gates=[reward]", "schedule.reward_margin=0.0"],
        ["schedule.gates=[]"],
    ],
    ids=",".join,
)
@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["lengths", "none"])
def test_the_simulation_is_the_schedule_on_each_run(overrides: list[str], lengths: Any) -> None:
    config, cgtr = configured("steps=60", *overrides)
    if lengths is None and "length" in cgtr.gates:
        cgtr = cgtr.model_copy(update={"gates": tuple(g for g in cgtr.gates if g != "length")})
    simulation = Simulation(config, Success(2, 3), lengths, runs=60)
    rates = simulation.rates(cgtr)
    refreshes, some, checks = 0, 0, dict.fromkeys(cgtr.gates, 0)
    for run in range(60):
        pairs = np.ones((60, 2)) if simulation.length_RT2 is None else simulation.length_RT2[run]
        rewards = simulation.reward_RT[run].tolist()
        lines = [
            {"step": t, "reward/mean": reward, "length/mean": mean, "length/max": longest}
            for t, (reward, (mean, longest)) in enumerate(zip(rewards, pairs, strict=True), 1)
        ]
        decisions = replay(CGTR(cgtr), lines)
        copies = sum(decision.action == "copy" for decision in decisions)
        refreshes, some = refreshes + copies, some + (copies > 0)
        for decision in decisions:
            for gate in cgtr.gates if decision.gates else ():
                assert decision.gates is not None
                checks[gate] += decision.gates[gate]["pass"]
    assert rates.refreshes == refreshes / 60 and rates.runs["all"] == some / 60
    asked = 60 * (60 // cgtr.check_every)
    for gate in cgtr.gates:
        assert rates.checks[gate] == pytest.approx(checks[gate] / asked, abs=1e-12)


@pytest.mark.parametrize(
    ("success", "share"),
    [(Success(0.4, math.inf), 0.654), *slow((Success(2, 3), 0.760), (Success(0.4, 0.6), 0.846))],
)
def test_the_papers_margin_is_within_noise(success: Success, share: float) -> None:
    """16 × 4 rollouts, 300 steps, isolation and reward gate: 40,000 runs of an earlier simulation,
    written by others, gave these shares of runs with a false refresh."""
    config, _ = configured("steps=300", "schedule.gates=[isolation,reward]")
    result = calibrate(config, success, None, 0.1, runs=1500)
    assert result.rates.runs["all"] == pytest.approx(share, abs=0.03)


def test_the_margin_holds_its_rate_and_a_smaller_one_does_not() -> None:
    config, cgtr = configured("steps=200", "schedule.gates=[isolation,reward]")
    simulation = Simulation(config, EVEN, runs=500)
    for window in (5, 10, 20):
        margin = simulation.margin(cgtr, window, 0.1)
        assert margin is not None

        def share(margin: float, window: int = window) -> float:
            changed = cgtr.model_copy(update={"window": window, "reward_margin": margin})
            return simulation.rates(changed).runs["all"]

        # Rewards are multiples of 1/64, windows' means of 1/(64·window): ties are many.
        assert share(margin) <= 0.1 < share(margin - 1 / (64 * window) - 1e-9)
    assert simulation.margin(cgtr, 500, 0.1) is None


def test_the_tail_limit_blocks_its_share() -> None:
    config, cgtr = configured("steps=100", "schedule.gates=[length]")
    simulation = Simulation(config, EVEN, LENGTHS, runs=300)
    limit = simulation.tail_limit(cgtr, 0.2)
    rates = simulation.rates(cgtr.model_copy(update={"max_tail_ratio": limit}))
    assert rates.checks["length"] == pytest.approx(0.8, abs=0.01)
    assert Simulation(config, EVEN, runs=3).tail_limit(cgtr, 0.2) is None


def test_a_runs_opening_ends_at_its_first_refresh() -> None:
    config, _ = configured()
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@4": 0.1}]
    for step in range(1, 50):
        line = {"step": step, "reward/mean": 0.3, "reward/success_group_fraction": 0.6}
        lines.append(
            line | {"length/mean": 10.0 + step, "length/max": 20.0, "teacher/refreshed": 0}
        )
    success, lengths = observed(lines, config)
    assert success.mean == pytest.approx(0.3) and lengths is not None and len(lengths) == 30
    lines[7]["teacher/refreshed"] = 1
    _, lengths = observed(lines, config)
    assert lengths is not None and lengths[:, 0].tolist() == [11, 12, 13, 14, 15, 16, 17]
    shards, _ = configured("schedule.length_unit=shard", "schedule.shards=2")
    assert observed(lines, shards)[1] is None  # the run did not count by shards
    with pytest.raises(UsageError, match="no finished step"):
        observed(lines[:1], config)
    with pytest.raises(UsageError, match="nothing to simulate"):
        observed([line | {"reward/mean": 0.0} for line in lines[1:]], config)


def test_given_rates_need_no_reward_of_the_run() -> None:
    config, _ = configured()
    line = {"step": 1, "reward/mean": 0.0, "length/mean": 2.0, "length/max": 5.0}
    rates, lengths = observed([line], config, EVEN)
    assert rates == EVEN and lengths is not None and lengths.tolist() == [[2.0, 5.0]]
    assert observed([], config, EVEN) == (EVEN, None)


@pytest.mark.parametrize("override", ["steps=1000000", "rollout.prompts_per_step=100000000"])
@pytest.mark.parametrize("kind", ["cgtr", "evidence"])
def test_what_would_take_all_memory_is_refused(kind: str, override: str) -> None:
    config = load_config("lab", ["steps=300", f"schedule.kind={kind}", override])
    with pytest.raises(UsageError, match="too many to simulate"):
        calibrate(config, EVEN, None, 0.1)


def test_a_run_says_how_its_rewards_and_lengths_vary(finished: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", str(finished), "steps=40", "--rate", "0.2"])
    assert result.exit_code == 0, result.output
    *text, last = result.output.splitlines()
    found = json.loads(last)
    assert found["rate"] == 0.2 and found["tail_limit"] >= 1 and "length" in found["checks"]
    assert any("false refreshes a run" in line for line in text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lab", ["schedule.kind=hard"], None, 0.1), "no gates"),
        (("lab", [], None, 1.5), "--rate"),
        (("nowhere", [], None, 0.1), "nowhere"),
    ],
)
def test_what_cannot_be_calibrated(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate_source(*arguments)


# ---------------------------------------------------------------- evidence


def probing(*overrides: str) -> tuple[Config, EvidenceConfig]:
    config = load_config("lab", ["schedule.kind=evidence", *overrides])
    assert isinstance(config.schedule, EvidenceConfig)
    return config, config.schedule


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.min_z=1"],
        ["schedule.min_isolation=3", "schedule.min_z=0.8", "schedule.probe_every=3"],
        ["schedule.gates=[reward]", "schedule.min_z=1.5", "schedule.probe_questions=2"],
        ["schedule.gates=[isolation]", "schedule.min_isolation=7"],
        ["schedule.gates=[]"],
    ],
    ids=",".join,
)
def test_the_simulated_probes_are_the_schedule_on_each_run(overrides: list[str]) -> None:
    config, schedule = probing("steps=60", *overrides)
    simulation = ProbeSimulation(config, Success(2, 3), runs=60)
    gates = tuple(gate for gate in schedule.gates if gate in ("isolation", "reward"))
    refreshes = simulation.refreshes(gates)
    for run in range(60):
        live = Evidence(schedule.model_copy(update={"gates": gates}))
        decisions = [
            live.observe(ProbedStep(int(step), 0.5, 9.0, 9.0, 16, gain, squared, 9.0, 9.0, 9.0))
            for step, gain, squared in zip(
                simulation.steps,
                simulation.gain_RK[run],
                simulation.squared_RK[run],
                strict=True,
            )
        ]
        assert [one.action == "copy" for one in decisions] == refreshes[run].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "success", [Success(2, 3), *slow((Success(0.4, math.inf),), (Success(9, 1),))]
)
def test_the_default_limit_lets_a_false_refresh_through_in_a_tenth_of_runs(
    success: Success,
) -> None:
    """300 steps; whatever the success rates, since z is normalised by what was measured."""
    config, schedule = probing("steps=300")
    simulation = ProbeSimulation(config, success, runs=1000)
    share = simulation.refreshes(schedule.gates).any(1).mean()
    assert share == pytest.approx(0.1, abs=0.03)
    for rate in (0.05, 0.2):
        limit = simulation.limit(rate)
        assert limit is not None
        simulation.config = schedule.model_copy(update={"min_z": limit})
        assert simulation.refreshes(schedule.gates).any(1).mean() <= rate
        simulation.config = schedule.model_copy(update={"min_z": limit - 0.1})
        assert simulation.refreshes(schedule.gates).any(1).mean() > rate
    simulation.config = schedule.model_copy(update={"min_isolation": 301})
    assert simulation.limit(0.1) is None


@pytest.mark.slow
def test_a_true_gain_is_found() -> None:
    """The design's power for a gain of 0.05 by step 30 and 150, 0.17 and 0.97, of questions whose
    rates are Beta(2, 3), 16 × 4 answers a probe. By step 60 it has 0.69 and this 0.57."""
    config, schedule = probing("steps=150")
    simulation = ProbeSimulation(config, Success(2, 3), gain=0.05, runs=1500)
    taken = simulation.refreshes(schedule.gates)
    shares = [taken[:, simulation.steps <= step].any(1).mean() for step in (30, 60, 150)]
    assert shares == pytest.approx([0.17, 0.57, 0.95], abs=0.04)


def test_a_runs_probes_give_the_success_rates_in_the_teachers_contexts() -> None:
    rng = np.random.default_rng(0)
    rate_NP = rng.beta(6, 2, (400, 16))
    right, other = (rng.binomial(4, rate_NP) / 4 for _ in range(2))
    lines = [
        {
            "probe/questions": 16,
            "probe/incumbent_reward": float(other[n].sum()),
            "probe/gain_squared": float(((right - other)[n] ** 2).sum()),
        }
        for n in range(400)
    ]
    found = observed_probes([{"step": 1}, *lines], samples=4)
    assert found is not None and found.mean == pytest.approx(0.75, abs=0.01)
    assert found.a + found.b == pytest.approx(8, rel=0.2)
    assert observed_probes([{"probe/questions": 0}], 4) is None
    assert observed_probes([lines[0] | {"probe/gain_squared": 0.0}], 4) is None
    noisy = observed_probes([lines[0] | {"probe/gain_squared": 16.0}], 4)
    assert noisy is not None and noisy.b == math.inf


def test_evidence_is_calibrated_by_the_command() -> None:
    overrides = ["schedule.kind=evidence", "steps=40", "schedule.probe_questions=4"]
    arguments = ["calibrate", "lab", *overrides, "--success", "0.5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    assert found["power"].keys() == {"0.02", "0.05", "0.1"} and found["min_z"] > 1
    assert "length, tail" in result.output


def test_the_text_warns_of_what_was_not_simulated() -> None:
    text = "\n".join(calibrate_source("lab", ["steps=20"], "0.4", 0.1).text())
    assert "length       not simulated" in text


def test_a_damaged_line_of_a_run_is_named(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 900, "reward/mean": "high"}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl:\d+: reward/mean of step 900"):
        calibrate_source(str(run), [], None, 0.1)
