"""How often do gates open although nothing has improved? By simulation, before a run.

The student of the simulation never learns: each prompt of a step has a success rate of its own,
drawn anew from one distribution, and each of its rollouts succeeds independently. Every refresh of
such a run is a false one. The gates are those of `schedule.CGTR` (arXiv 2606.03532 §4) and of
`schedule.Evidence`.

Shapes: R runs, T steps, P prompts of a step, L observed steps, K probes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sodfast.config import (
    CGTRConfig,
    Config,
    EvidenceConfig,
    load_config,
    read_overrides,
    validate,
)
from sodfast.errors import UsageError
from sodfast.rng import Stream, generator
from sodfast.run.records import read_metrics
from sodfast.success import Array, Success, fit_success, parse_success

RUNS = 4_000
# Prompts of a simulated run, of which a step counts for 100 at least: RUNS of these take minutes
# and a gigabyte.
MOST_PROMPTS = 2_500_000
OPENING = 30
# Windows that a margin is given for, in steps.
WINDOWS = (5, 10, 15, 30, 60)
# True gains of the copy's reward, and steps by which it may have been taken, that a power is for.
GAINS, POWER_STEPS = (0.02, 0.05, 0.1), (30, 60, 150, 300)


@dataclass(frozen=True)
class Rates:
    """Shares of simulated runs and checks in which a gate opened.

    `checks`: of all checks, gate by gate; `runs`: of all runs, those with at least one check that
    it let through once `min_isolation` had passed, under "all" those with at least one refresh.
    `refreshes`: mean number of a run. A gate that was not simulated is missing.
    """

    checks: dict[str, float]
    runs: dict[str, float]
    refreshes: float


def observed(
    lines: Sequence[Mapping[str, Any]], config: Config, given: Success | None = None
) -> tuple[Success, Array | None]:
    """Success rates, unless they are `given`, and lengths [L, 2] of a run's first steps: those
    before its first refresh, at most `OPENING`. Lengths are those that the length gate of `config`
    looks at, where the run has them.

    Raises `UsageError` where none are given and the run has no finished step or its rewards are all
    alike.
    """
    opening: list[Mapping[str, Any]] = []
    for line in lines:
        if "reward/mean" in line:
            opening.append(line)
        if line.get("teacher/refreshed") or len(opening) == OPENING:
            break
    if not opening and given is None:
        raise UsageError("the run has no finished step to measure: give --success instead")
    unit = "length/shard_" if config.length_shards else "length/"
    names = f"{unit}mean", f"{unit}max"
    lengths = None
    if opening and all(name in line for line in opening for name in names):
        lengths = np.array([[line[name] for name in names] for line in opening], dtype=np.float64)
    if given is not None:
        return given, lengths
    mean, solved = (
        float(np.mean([line[key] for line in opening]))
        for key in ("reward/mean", "reward/success_group_fraction")
    )
    return fit_success(mean, solved, config.rollout.samples_per_prompt), lengths


class Simulation:
    """Runs without improvement: mean rewards of each step and, where lengths were observed, each
    step's mean and longest length, drawn from those of `lengths` [L, 2]."""

    def __init__(
        self, config: Config, success: Success, lengths: Array | None = None, runs: int = RUNS
    ) -> None:
        rng = generator(config.seed, Stream.CALIBRATE)
        prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
        shape = (config.steps, prompts)
        rewards = [
            rng.binomial(samples, success.draw(rng, shape)).sum(1) / (prompts * samples)
            for _ in range(runs)
        ]
        self.reward_RT: Array = np.stack(rewards)
        self.length_RT2: Array | None = None
        if lengths is not None:
            self.length_RT2 = lengths[rng.integers(len(lengths), size=(runs, config.steps))]

    def reward(self, step: int, window: int) -> Array:
        """Mean reward of the `window` steps up to `step`, or of as many as there are, [R]."""
        return np.asarray(self.reward_RT[:, max(step - window, 0) : step].mean(1))

    def tail(self, step: int, window: int) -> Array:
        """Longest over mean length of the same steps, [R]."""
        assert self.length_RT2 is not None
        length_RW2 = self.length_RT2[:, max(step - window, 0) : step]
        longest, mean = length_RW2[:, :, 1].max(1), length_RW2[:, :, 0].mean(1)
        return np.asarray(longest / mean)

    def checks(self, config: CGTRConfig) -> range:
        return range(config.check_every, self.reward_RT.shape[1] + 1, config.check_every)

    def rates(self, config: CGTRConfig) -> Rates:
        """What the gates let through; the length gate only where lengths were observed."""
        active: list[str] = list(config.gates)
        if self.length_RT2 is None:
            active = [gate for gate in active if gate != "length"]
        runs = len(self.reward_RT)
        reference, last_copy = self.reward(config.window, config.window), np.zeros(runs, int)
        passed = {gate: 0.0 for gate in active}
        opened = {gate: np.zeros(runs, bool) for gate in (*active, "all")}
        refreshes = 0
        for step in self.checks(config):
            reward = self.reward(step, config.window)
            gates = {"isolation": step - last_copy >= config.min_isolation}
            gates["reward"] = (reward > reference + config.reward_margin) & (step >= config.window)
            if "length" in active:
                gates["length"] = self.tail(step, config.window) <= config.max_tail_ratio
            gates["all"] = np.all([np.ones(runs, bool), *(gates[gate] for gate in active)], 0)
            for gate in active:
                passed[gate] += float(gates[gate].mean())
            for gate, which in opened.items():
                which |= gates[gate] & (gates["isolation"] | (gate == "all"))
            reference[gates["all"]], last_copy[gates["all"]] = reward[gates["all"]], step
            refreshes += int(gates["all"].sum())
        return Rates(
            {gate: share / max(len(self.checks(config)), 1) for gate, share in passed.items()},
            {gate: float(which.mean()) for gate, which in opened.items()},
            refreshes / runs,
        )

    def margin(self, config: CGTRConfig, window: int, rate: float) -> float | None:
        """The reward margin with which isolation and reward gate let at least one refresh through
        in a share `rate` of the runs; None where no check comes late enough."""
        first = max(config.min_isolation, window)
        steps = [step for step in self.checks(config) if step >= first]
        if not steps:
            return None
        reference = self.reward(window, window)
        gains = np.max([self.reward(step, window) - reference for step in steps], axis=0)
        return float(np.quantile(gains, 1 - rate, method="higher"))

    def tail_limit(self, config: CGTRConfig, rate: float) -> float | None:
        """The tail limit that blocks a share `rate` of the checks of a student whose lengths do not
        change; None where no lengths were observed or nothing is checked."""
        if self.length_RT2 is None or not self.checks(config):
            return None
        tails = [self.tail(step, config.window) for step in self.checks(config)]
        return float(np.quantile(tails, 1 - rate))


def observed_probes(lines: Sequence[Mapping[str, Any]], samples: int) -> Success | None:
    """Success rates in the teacher's contexts, as a run's probes show them: the Beta with the
    incumbent's mean reward and with the mean squared gain of a question, which is
    2·E[p(1−p)] / samples where the answers of both are independent. As both answer under the same
    keys, they are less than independent, and this Beta is wider than that of the questions.

    None where nothing was probed or the rewards are all alike.
    """
    probes = [line for line in lines if line.get("probe/questions")]
    names = ("questions", "incumbent_reward", "gain_squared")
    questions, reward, squared = (sum(line[f"probe/{name}"] for line in probes) for name in names)
    if not questions or not 0 < reward / questions < 1 or not squared:
        return None
    mean = reward / questions
    share = squared / questions * samples / 2 / (mean * (1 - mean))
    if share >= 1:
        return Success(mean, np.inf)
    concentration = share / (1 - share)
    return Success(mean * concentration, (1 - mean) * concentration)


class ProbeSimulation:
    """Runs in which the copy's reward is above the teacher's by a constant `gain`, from the first
    step on; by nothing where `gain` is 0. Each of a probe's answers succeeds independently."""

    def __init__(
        self, config: Config, success: Success, gain: float = 0.0, runs: int = RUNS
    ) -> None:
        schedule = config.schedule
        assert isinstance(schedule, EvidenceConfig)
        self.config = schedule
        rng = generator(config.seed, Stream.CALIBRATE)
        probes, samples = config.steps // schedule.probe_every, schedule.probe_samples
        questions = min(schedule.probe_questions, config.rollout.prompts_per_step)
        self.steps = schedule.probe_every * np.arange(1, probes + 1)
        sums = []
        for _ in range(runs):
            rate_KP = success.draw(rng, (probes, questions))
            right_KP = rng.binomial(samples, np.clip(rate_KP + gain, 0, 1))
            gain_KP = (right_KP - rng.binomial(samples, rate_KP)) / samples
            sums.append(np.stack([gain_KP.sum(1), (gain_KP**2).sum(1)]))
        self.gain_RK, self.squared_RK = (np.stack(part) for part in zip(*sums, strict=True))

    def z(self, probe: int, first: NDArray[np.int_]) -> Array:
        """z at the probe of number `probe` over the last `probes`, those before `first` [R] left
        out, [R]."""
        numbers = np.arange(max(probe + 1 - self.config.probes, 0), probe + 1)
        since = numbers >= first[:, None]
        gain, squared = (
            np.where(since, sums[:, numbers], 0.0).sum(1)
            for sums in (self.gain_RK, self.squared_RK)
        )
        return np.asarray(gain / np.sqrt(np.where(squared > 0, squared, 1.0)))

    def refreshes(self, gates: Sequence[str]) -> NDArray[np.bool_]:
        """Where isolation and reward gate, as far as `gates` names them, let a copy through,
        [R, K]."""
        runs = len(self.gain_RK)
        last_copy, first = np.zeros(runs, int), np.zeros(runs, int)
        copied = np.zeros((runs, len(self.steps)), bool)
        for probe, step in enumerate(self.steps):
            through = np.ones(runs, bool)
            if "isolation" in gates:
                through &= step - last_copy >= self.config.min_isolation
            if "reward" in gates:
                through &= self.z(probe, first) >= self.config.min_z
            copied[:, probe] = through
            last_copy[through], first[through] = step, probe + 1
        return copied

    def limit(self, rate: float) -> float | None:
        """The z with which isolation and reward gate let at least one refresh through in a share
        `rate` of the runs at most; None where no probe comes late enough."""
        start = np.zeros(len(self.gain_RK), int)
        late = [k for k, step in enumerate(self.steps) if step >= self.config.min_isolation]
        if not late:
            return None
        highest = np.max([self.z(probe, start) for probe in late], axis=0)
        return float(np.nextafter(np.quantile(highest, 1 - rate, method="higher"), np.inf))


def calibrate_source(
    source: str | None, overrides: list[str], success: str | None, rate: float
) -> "Calibration | ProbeCalibration":
    """Calibrate for a run directory, whose first steps give success rates and lengths, or for a
    preset or file, for which `success` gives the rates; by default Beta(1, 1), every rate alike.
    Under evidence they are those in the teacher's contexts, and probes show them where there are
    some."""
    file = Path(source or "", "config.yaml")
    if source is None or not os.path.isfile(file):
        config = load_config(source, overrides)
        return calibrate(config, parse_success(success or "1,1"), None, rate)
    config = validate(read_overrides(file, overrides))
    lines = read_metrics(file.parent)
    given = parse_success(success) if success else None
    rates, lengths = observed(lines, config, given)
    if given is None and isinstance(config.schedule, EvidenceConfig):
        rates = observed_probes(lines, config.schedule.probe_samples) or rates
    return calibrate(config, rates, lengths, rate)


def calibrate(
    config: Config, success: Success, lengths: Array | None, rate: float, runs: int = RUNS
) -> "Calibration | ProbeCalibration":
    """Simulate `runs` runs of the configuration. Raises `UsageError` for a schedule without gates,
    and for runs that would take hours or more memory than there is.

    `lengths` [L, 2] are for CGTR's length gate alone.
    """
    if not 0 < rate < 1:
        raise UsageError(f"--rate={rate:g}: give a share of runs such as 0.1")
    prompts = config.rollout.prompts_per_step
    if config.steps * max(prompts, 100) > MOST_PROMPTS:
        raise UsageError(
            f"{config.steps} steps of {prompts} prompts are too many to simulate: lower steps to "
            f"{MOST_PROMPTS // max(prompts, 100)} or less, or rollout.prompts_per_step"
        )
    if isinstance(config.schedule, EvidenceConfig):
        return _calibrate_probes(config, config.schedule, success, rate, runs)
    cgtr = config.schedule
    if not isinstance(cgtr, CGTRConfig):
        raise UsageError(
            f"schedule.kind={cgtr.kind} has no gates: set schedule.kind to cgtr or evidence"
        )
    simulation = Simulation(config, success, lengths, runs)
    margins = {window: simulation.margin(cgtr, window, rate) for window in WINDOWS}
    return Calibration(
        config,
        success,
        rate,
        runs,
        simulation.rates(cgtr),
        {cgtr.window: simulation.margin(cgtr, cgtr.window, rate), **margins},
        simulation.tail_limit(cgtr, rate),
    )


def _calibrate_probes(
    config: Config, schedule: EvidenceConfig, success: Success, rate: float, runs: int
) -> "ProbeCalibration":
    null = ProbeSimulation(config, success, 0.0, runs)
    refreshed = null.refreshes(schedule.gates)
    steps = [step for step in POWER_STEPS if step <= config.steps]
    power = {}
    for gain in GAINS:
        taken = ProbeSimulation(config, success, gain, ceil(runs / 4)).refreshes(schedule.gates)
        power[gain] = {t: float(taken[:, null.steps <= t].any(1).mean()) for t in steps}
    return ProbeCalibration(
        config,
        success,
        rate,
        runs,
        float(refreshed.any(1).mean()),
        float(refreshed.sum(1).mean()),
        null.limit(rate),
        power,
    )


@dataclass(frozen=True)
class ProbeCalibration:
    """What `calibrate` found for evidence, by isolation and reward gate; the length and the tail
    gate can only take refreshes away. `false`: share of runs with a refresh although copy and
    teacher are equal; `refreshes`: mean number of a run; `limit`: the `min_z` that holds `rate`;
    `power`: gain → step → share of runs that have refreshed by then."""

    config: Config
    success: Success
    rate: float
    runs: int
    false: float
    refreshes: float
    limit: float | None
    power: dict[float, dict[int, float]]

    def text(self) -> list[str]:
        schedule = self.config.schedule
        assert isinstance(schedule, EvidenceConfig)
        lines = [
            f"{self.runs} simulated runs of {self.config.steps} steps in which the copy is no "
            f"better a teacher: {schedule.probe_questions} questions × {schedule.probe_samples} "
            f"answers every {schedule.probe_every} steps, success rates {self.success.text()}",
            "",
            f"isolation and reward gate         {self.false:.1%} of runs refresh, "
            f"{self.refreshes:.2f} false refreshes a run",
            "length, tail                      not simulated: they can only take refreshes away",
        ]
        if self.limit is not None:
            above = ceil(1e2 * self.limit) / 1e2
            lines.append(f"schedule.min_z={above:.2f} holds {self.rate:.0%} of runs")
        lines += [
            "",
            "A copy that is better from the first step on is taken in this share of runs:",
        ]
        for gain, shares in self.power.items():
            each = ", ".join(f"{share:.2f} by step {step}" for step, share in shares.items())
            lines.append(f"  reward + {gain:g}: {each}")
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "simulated": self.runs,
            "success": self.success.to_json(),
            "rate": self.rate,
            "runs": {"all": self.false},
            "refreshes": self.refreshes,
            "min_z": self.limit,
            "power": {f"{gain:g}": shares for gain, shares in self.power.items()},
        }


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found. `margins`: window → the margin that holds `rate`; `tail_limit`: the
    one that blocks a student of unchanged lengths at a share `rate` of checks."""

    config: Config
    success: Success
    rate: float
    runs: int
    rates: Rates
    margins: dict[int, float | None]
    tail_limit: float | None

    def text(self) -> list[str]:
        config, cgtr = self.config, self.config.schedule
        assert isinstance(cgtr, CGTRConfig)
        rollout = config.rollout
        lines = [
            f"{self.runs} simulated runs of {config.steps} steps in which nothing improves: "
            f"{rollout.prompts_per_step} prompts × {rollout.samples_per_prompt} rollouts, "
            f"success rates {self.success.text()}",
            "",
            "gate         opens at a check   ... at least once after isolation, of all runs",
        ]
        for gate, share in self.rates.checks.items():
            lines.append(f"{gate:12} {share:16.1%}   {self.rates.runs[gate]:.1%}")
        if "length" in cgtr.gates and "length" not in self.rates.checks:
            lines.append(
                "length       not simulated: no lengths were observed; give a run directory"
            )
        lines += [
            f"all together                    {self.rates.runs['all']:.1%}, "
            f"{self.rates.refreshes:.2f} false refreshes a run",
            "",
            f"For a false refresh in {self.rate:.0%} of runs by isolation and reward gate:",
        ]
        for window, margin in sorted(self.margins.items()):
            if margin is not None:
                above = ceil(1e4 * margin) / 1e4  # never below the exact one
                lines.append(f"  schedule.window={window} schedule.reward_margin={above:.4f}")
        if self.tail_limit is not None:
            lines.append(
                f"schedule.max_tail_ratio={self.tail_limit:.2f} blocks lengths as they were at "
                f"{self.rate:.0%} of the checks."
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "simulated": self.runs,
            "success": self.success.to_json(),
            "rate": self.rate,
            **asdict(self.rates),
            "margins": {str(window): margin for window, margin in self.margins.items()},
            "tail_limit": self.tail_limit,
        }
