"""The published schedules: fixed, hard refresh, EMA and CGTR (arXiv 2606.03532 §3.1 and §4), and
trust region (arXiv 2601.20802)."""

from collections import deque
from collections.abc import Container, Mapping, Sequence
from math import fsum
from typing import Any

from sodfast.config import CGTRConfig
from sodfast.schedule.base import Decision, Schedule, StepStatistics, trained


class Fixed(Schedule):
    """φ = θ₀ for ever; where it took over from another schedule, as it was then."""

    def __init__(self) -> None:
        self.start = 0  # the step after which it took over, and the last copy until then
        self.copied = 0

    def observe(self, statistics: StepStatistics) -> Decision:
        return Decision("keep", age=statistics.step - self.copied)

    def follow(self, lines: Sequence[Mapping[str, Any]], copies: Container[int]) -> None:
        steps = [line["step"] for line in lines]
        self.start = max(steps, default=0)
        self.copied = max((step for step in steps if step in copies), default=0)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "copied": self.copied} if self.start else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.start, self.copied = state["start"], state["copied"]


class Hard(Fixed):
    """φ ← θ when t mod `every` = 0."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def observe(self, statistics: StepStatistics) -> Decision:
        step = statistics.step
        last = (step - 1) // self.every * self.every
        age = step - (last if last > self.start else self.copied)
        return Decision("keep" if step % self.every else "copy", age=age)


class EMA(Schedule):
    """φ ← (1−rate)φ + rate·θ after every step."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def observe(self, statistics: StepStatistics) -> Decision:
        return Decision("average", rate=self.rate)


class TrustRegion(Schedule):
    """The initial weights stay; scoring mixes their logits with the student's: `student_share`."""

    def observe(self, statistics: StepStatistics) -> Decision:
        return Decision("keep")


class CGTR(Schedule):
    """Consolidation-Gated Teacher Refresh (arXiv 2606.03532 §4, App. C, Table 9).

    Every `check_every` steps φ ← θ iff every active gate passes:

        isolation  t − t_last ≥ min_isolation, with t_last = 0 at the start
        reward     mean reward of the last `window` steps > r_ref + reward_margin; r_ref starts as
                   the mean of the first `window` steps and becomes the window's mean at each
                   refresh; blocks while fewer than `window` steps exist
        length     max(length) / mean(length) pooled over the last `window` steps ≤ max_tail_ratio

    Every step holds equally many rollouts, so the mean of the steps' means is the pooled mean;
    it is formed that way (float64, exact sum) so that a check can be recomputed from the metrics
    lines to the last bit.
    """

    def __init__(self, config: CGTRConfig) -> None:
        self.config = config
        if config.length_shards is not None:
            self.inputs = ("reward/mean", "length/shard_mean", "length/shard_max")
        self.window: deque[StepStatistics] = deque(maxlen=config.window)
        self.last_copy = 0
        self.reward_reference: float | None = None

    def observe(self, statistics: StepStatistics) -> Decision:
        self._see(statistics)
        age = statistics.step - self.last_copy
        if statistics.step % self.config.check_every:
            return Decision("keep", age=age)

        gates = self._gates(age)
        refresh = all(gate["pass"] for gate in gates.values() if gate["active"])
        metrics = {
            "gate/reward_window": self._reward_mean(),
            "gate/tail_window": gates["length"]["value"],
        }
        if refresh:
            self._copied(statistics.step)
        return Decision("copy" if refresh else "keep", age=age, gates=gates, metrics=metrics)

    def follow(self, lines: Sequence[Mapping[str, Any]], copies: Container[int]) -> None:
        for line in trained(lines):
            self._see(self._statistics(line))
            if line["step"] in copies:
                self._copied(line["step"])

    def _see(self, statistics: StepStatistics) -> None:
        self.window.append(statistics)
        if len(self.window) == self.config.window and self.reward_reference is None:
            self.reward_reference = self._reward_mean()

    def _copied(self, step: int) -> None:
        self.last_copy = step
        self.reward_reference = self._reward_mean()

    def _gates(self, age: int) -> dict[str, dict[str, Any]]:
        config = self.config
        length_mean = fsum(step.length_mean for step in self.window) / len(self.window)
        tail = max(step.length_max for step in self.window) / length_mean
        gates: dict[str, dict[str, Any]] = {
            "isolation": {
                "value": age,
                "threshold": config.min_isolation,
                "pass": age >= config.min_isolation,
            },
            "reward": {"value": self._reward_mean(), "pass": False},
            "length": {
                "value": tail,
                "threshold": config.max_tail_ratio,
                "pass": tail <= config.max_tail_ratio,
            },
        }
        # Without a reference there is no threshold: the bar is undefined, and it blocks.
        if self.reward_reference is not None:
            threshold = self.reward_reference + config.reward_margin
            full = len(self.window) == config.window
            passes = full and gates["reward"]["value"] > threshold
            gates["reward"] |= {"threshold": threshold, "pass": passes}
        for name, gate in gates.items():
            gate["active"] = name in config.gates
        return gates

    def _reward_mean(self) -> float:
        return fsum(step.reward_mean for step in self.window) / len(self.window)

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": [step.state() for step in self.window],
            "last_copy": self.last_copy,
            "reward_reference": self.reward_reference,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window.clear()
        self.window.extend(StepStatistics(**step) for step in state["window"])
        self.last_copy = state["last_copy"]
        self.reward_reference = state["reward_reference"]
