"""A schedule of our own: refresh where a probe shows that the copy would be the better teacher."""

from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields
from math import fsum, sqrt
from typing import Any

from sodfast.config import EvidenceConfig
from sodfast.schedule.base import Decision, Schedule, StepStatistics, trained


@dataclass(frozen=True)
class ProbedStep(StepStatistics):
    """A step at which the copy that a refresh would make (the candidate) and the teacher as it is
    (the incumbent) answered the same questions in the teacher's contexts.

    `questions` that were asked. Sums over them, each a mean over the question's answers: `gain`,
    the candidate's reward minus the incumbent's; `gain_squared`; the lengths in tokens. `longest`:
    the mean length of the longest 5 % of the step's rollouts. All are 0 questions' where the
    teacher equals the student. In a metrics line they are `probe/*`.
    """

    questions: int
    gain: float
    gain_squared: float
    candidate_length: float
    incumbent_length: float
    longest: float


PROBE_KEYS = tuple(f"probe/{one.name}" for one in fields(ProbedStep)[len(fields(StepStatistics)) :])


class Evidence(Schedule):
    """Refresh where the copy would be the better teacher (our own; see `ProbedStep`).

    At every probe, which is every `probe_every` steps, φ ← θ iff every active gate passes:

        isolation  t − t_last ≥ min_isolation, with t_last = 0 at the start
        reward     z = Σd / √Σd² ≥ min_z, where d is a question's gain
        length     candidate's mean answer / incumbent's ≤ max_length_ratio
        tail       mean of the longest 5 % of the student's rollouts / their mean, over the last
                   `probes` probes, ≤ max_tail_growth · the same over the run's first `probes`

    Reward and length look at the probes since the last refresh, at most the last `probes`: earlier
    ones compared with another incumbent. Nothing is compared with a window of the past: the
    incumbent answers anew at each probe, so a lucky window can be no bar. A value of nothing (no
    question yet, no opening yet) is left out, and its gate blocks.

    Under equal teachers d is symmetric, whatever the rewards' scale, and P(z ≥ x) ≤ exp(−x²/2) at
    each probe: z is the sum that is normalised by itself (Efron 1969), never above √questions.
    """

    def __init__(self, config: EvidenceConfig) -> None:
        self.config = config
        self.window: deque[ProbedStep] = deque(maxlen=config.probes)
        self.last_copy = 0
        self.opening: float | None = None

    def reads(self, step: int) -> tuple[str, ...]:
        return self.inputs if step % self.config.probe_every else (*self.inputs, *PROBE_KEYS)

    def _statistics(self, line: Mapping[str, Any]) -> StepStatistics:
        values = [line[name] for name in self.reads(line["step"])]
        kind = ProbedStep if len(values) > len(self.inputs) else StepStatistics
        return kind(line["step"], *values)

    def observe(self, statistics: StepStatistics) -> Decision:
        """Decides at a `ProbedStep` alone."""
        age = statistics.step - self.last_copy
        if not isinstance(statistics, ProbedStep):
            return Decision("keep", age=age)
        self._see(statistics)
        gates = self._gates(age)
        refresh = all(gate["pass"] for gate in gates.values() if gate["active"])
        measured = {name: gate["value"] for name, gate in gates.items() if "value" in gate}
        names = {"reward": "gate/gain_z", "length": "gate/length_ratio", "tail": "gate/tail_growth"}
        metrics = {key: measured[name] for name, key in names.items() if name in measured}
        if refresh:
            self.last_copy = statistics.step
        return Decision("copy" if refresh else "keep", age=age, gates=gates, metrics=metrics)

    def follow(self, lines: Sequence[Mapping[str, Any]], copies: Container[int]) -> None:
        """A run without probes has no evidence yet, and its opening begins where this takes over.

        Raises KeyError as `Schedule.follow` does.
        """
        for line in trained(lines):
            values = [line[name] for name in self.inputs]
            if all(name in line for name in PROBE_KEYS):
                probed = [line[name] for name in PROBE_KEYS]
                self._see(ProbedStep(line["step"], *values, *probed))
            if line["step"] in copies:
                self.last_copy = line["step"]

    def _see(self, step: ProbedStep) -> None:
        self.window.append(step)
        if len(self.window) == self.config.probes and self.opening is None:
            self.opening = self._tail()

    def _tail(self) -> float:
        longest = fsum(step.longest for step in self.window)
        return longest / fsum(step.length_mean for step in self.window)

    def _gates(self, age: int) -> dict[str, dict[str, Any]]:
        config = self.config
        z = ratio = growth = None
        probes = [step for step in self.window if step.step > self.last_copy and step.questions]
        if probes:
            gain = fsum(step.gain for step in probes)
            z = gain / (sqrt(fsum(step.gain_squared for step in probes)) or 1.0)
            ratio = fsum(step.candidate_length for step in probes)
            ratio /= fsum(step.incumbent_length for step in probes)
        if self.opening is not None:
            growth = self._tail() / self.opening
        gates: dict[str, dict[str, Any]] = {
            "isolation": _gate(age, config.min_isolation, age >= config.min_isolation),
            "reward": _gate(z, config.min_z, z is not None and z >= config.min_z),
            "length": _gate(
                ratio,
                config.max_length_ratio,
                ratio is not None and ratio <= config.max_length_ratio,
            ),
            "tail": _gate(
                growth,
                config.max_tail_growth,
                growth is not None and growth <= config.max_tail_growth,
            ),
        }
        for name, gate in gates.items():
            gate["active"] = name in config.gates
        return gates

    def state_dict(self) -> dict[str, Any]:
        return {
            "probes": [step.state() for step in self.window],
            "last_copy": self.last_copy,
            "opening": self.opening,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window.clear()
        self.window.extend(ProbedStep(**step) for step in state["probes"])
        self.last_copy, self.opening = state["last_copy"], state["opening"]


def _gate(value: float | None, threshold: float, passes: bool) -> dict[str, Any]:
    known = {} if value is None else {"value": value}
    return {**known, "threshold": threshold, "pass": passes}
