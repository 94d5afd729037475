"""How often do CGTR's gates open although nothing has improved? By simulation, before a run.

The student of the simulation never learns: each prompt of a step has a success rate of its own,
drawn anew from one distribution, and each of its rollouts succeeds independently. Every refresh of
such a run is a false one. The gates are those of `schedule.CGTR` (arXiv 2606.03532 §4).

Shapes: R runs, T steps, P prompts of a step, L observed steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, exp, lgamma
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sodfast.config import CGTRConfig, Config, load_config, read_overrides, validate
from sodfast.errors import UsageError
from sodfast.files import read_lines
from sodfast.rng import Stream, generator

Array = NDArray[np.float64]
RUNS = 4_000
OPENING = 30
# Windows that a margin is given for, in steps.
WINDOWS = (5, 10, 15, 30, 60)


class Success(NamedTuple):
    """Success rates of prompts: Beta(a, b), or with b = ∞ the rate `a` for all of them."""

    a: float
    b: float

    @property
    def mean(self) -> float:
        return self.a if self.b == np.inf else self.a / (self.a + self.b)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return np.full(shape, self.a) if self.b == np.inf else rng.beta(self.a, self.b, shape)


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


def parse_success(text: str) -> Success:
    """`0.4`, one rate for all prompts, or `2,3`, Beta(2, 3). Raises `UsageError`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    match values:
        case [rate] if 0 < rate < 1:
            return Success(rate, np.inf)
        case [a, b] if 0 < a < np.inf and 0 < b < np.inf:
            return Success(a, b)
    raise UsageError(f"--success={text}: give a rate such as 0.4, or a and b of a Beta such as 2,3")


def observed(lines: Sequence[Mapping[str, Any]], config: Config) -> tuple[Success, Array | None]:
    """Success rates and lengths [L, 2] of a run's first steps: those before its first refresh, at
    most `OPENING`. Lengths are those that the length gate of `config` looks at, where the run has
    them.

    Raises `UsageError` where the run has no finished step or its rewards are all alike.
    """
    opening: list[Mapping[str, Any]] = []
    for line in lines:
        if "reward/mean" in line:
            opening.append(line)
        if line.get("teacher/refreshed") or len(opening) == OPENING:
            break
    if not opening:
        raise UsageError("the run has no finished step to measure: give --success instead")
    mean, solved = (
        float(np.mean([line[key] for line in opening]))
        for key in ("reward/mean", "reward/success_group_fraction")
    )
    unit = "length/shard_" if config.length_shards else "length/"
    names = f"{unit}mean", f"{unit}max"
    lengths = None
    if all(name in line for line in opening for name in names):
        lengths = np.array([[line[name] for name in names] for line in opening], dtype=np.float64)
    return fit_success(mean, solved, config.rollout.samples_per_prompt), lengths


def fit_success(mean: float, solved: float, samples: int) -> Success:
    """The Beta whose mean is `mean` and whose prompts have a success among `samples` rollouts with
    probability `solved`; one rate for all where prompts differ by no more than chance.

    E[(1−p)ⁿ] = B(a, b+n) / B(a, b) falls as a + b grows, towards (1−mean)ⁿ; found by bisection.
    Raises `UsageError` where every rollout, or none, succeeds.
    """
    if not 0 < mean < 1:
        raise UsageError(f"the rewards' mean is {mean:g}: there is nothing to simulate")

    def unsolved(concentration: float) -> float:
        a, b = mean * concentration, (1 - mean) * concentration
        return exp(lgamma(b + samples) - lgamma(b) + lgamma(a + b) - lgamma(a + b + samples))

    low, high = 1e-3, 1e4
    if 1 - solved <= unsolved(high):
        return Success(mean, np.inf)
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if unsolved(middle) > 1 - solved else (low, middle)
    return Success(mean * low, (1 - mean) * low)


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


def calibrate_source(
    source: str | None, overrides: list[str], success: str | None, rate: float
) -> "Calibration":
    """Calibrate for a run directory, whose first steps give success rates and lengths, or for a
    preset or file, for which `success` gives the rates; by default Beta(1, 1), every rate alike."""
    file = Path(source or "", "config.yaml")
    if source is None or not file.is_file():
        config = load_config(source, overrides)
        return calibrate(config, parse_success(success or "1,1"), None, rate)
    config = validate(read_overrides(file, overrides))
    found, lengths = observed(read_lines(file.with_name("metrics.jsonl")), config)
    return calibrate(config, parse_success(success) if success else found, lengths, rate)


def calibrate(
    config: Config, success: Success, lengths: Array | None, rate: float, runs: int = RUNS
) -> "Calibration":
    """Simulate `runs` runs of the configuration. Raises `UsageError` unless it is CGTR's."""
    cgtr = config.schedule
    if not isinstance(cgtr, CGTRConfig):
        raise UsageError(f"schedule.kind={cgtr.kind} has no gates: set schedule.kind=cgtr")
    if not 0 < rate < 1:
        raise UsageError(f"--rate={rate:g}: give a share of runs such as 0.1")
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
        of = f"Beta({self.success.a:.2f}, {self.success.b:.2f})"
        if self.success.b == np.inf:
            of = f"{self.success.mean:.3f} for every prompt"
        lines = [
            f"{self.runs} simulated runs of {config.steps} steps in which nothing improves: "
            f"{rollout.prompts_per_step} prompts × {rollout.samples_per_prompt} rollouts, "
            f"success rates {of}",
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
            "success": {
                "a": self.success.a,
                "b": None if self.success.b == np.inf else self.success.b,
            },
            "rate": self.rate,
            **asdict(self.rates),
            "margins": {str(window): margin for window, margin in self.margins.items()},
            "tail_limit": self.tail_limit,
        }
