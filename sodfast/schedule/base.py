"""What every schedule sees and answers: a step's statistics, a decision, and the replay."""

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Of a metrics line: what a step has when its teacher is about to move, and a resume repeats bit for
# bit. Evaluations and what becomes of the teacher come later; time, memory and passes are costs.
KNOWN = ("reward/", "length/", "distill/", "policy/", "optim/")

Action = Literal["keep", "copy", "average"]


@dataclass(frozen=True)
class StepStatistics:
    """What a schedule may look at: one training step, all rollouts.

    `reward_mean` and the lengths are `reward/mean` and `length/*` of the step's metrics line.
    Under `length_unit=shard` the lengths are the summed response lengths of each shard. `metrics`:
    the values of `KNOWN`, which the line has when the teacher is about to move.
    """

    step: int
    reward_mean: float
    length_mean: float
    length_max: float
    metrics: Mapping[str, Any] = field(
        default_factory=dict, compare=False, repr=False, kw_only=True
    )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the step, as JSON values."""
        return {key: value for key, value in vars(self).items() if key != "metrics"}


@dataclass(frozen=True)
class Decision:
    """What the teacher does now, and why.

    `action`: keep, copy (φ ← θ) or average (φ ← (1−rate)φ + rate·θ). `age` is the number of steps
    since the last copy, before this decision is carried out; None where there are no copies.
    `gates` is the event of a check, `metrics` what the check adds to the step's line.
    """

    action: Action
    age: int | None = None
    rate: float = 0.0
    gates: dict[str, dict[str, Any]] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Schedule(ABC):
    """Observes steps 1, 2, … in order. Stateless unless it overrides the two state methods.

    `inputs` names what `observe_line` reads of every metrics line beside its step, in the order of
    `StepStatistics`.
    """

    inputs: tuple[str, str, str] = ("reward/mean", "length/mean", "length/max")

    @abstractmethod
    def observe(self, statistics: StepStatistics) -> Decision: ...

    def reads(self, step: int) -> tuple[str, ...]:
        """What `observe_line` reads of the metrics line of `step`."""
        return self.inputs

    def observe_line(self, line: Mapping[str, Any]) -> Decision:
        """`observe` what a metrics line says of its step."""
        return self.observe(self._statistics(line))

    def _statistics(self, line: Mapping[str, Any]) -> StepStatistics:
        known = {key: line[key] for key in line if key == "step" or key.startswith(KNOWN)}
        reward, mean, most = (line[name] for name in self.inputs)
        return StepStatistics(line["step"], reward, mean, most, metrics=known)

    def follow(self, lines: Sequence[Mapping[str, Any]], copies: Container[int]) -> None:
        """Take over from another schedule under which a run has come this far: `lines` are its
        metrics lines, `copies` the steps after which it has copied the student.

        Raises KeyError where the lines lack one of `inputs`.
        """
        for line in trained(lines):
            self._statistics(line)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {sorted(state)}")


def replay(schedule: Schedule, lines: Sequence[Mapping[str, Any]]) -> list[Decision]:
    """Feed recorded metrics lines (steps 1…, in order) to a schedule; one decision per line.

    The lines must carry `schedule.inputs`; a line of step 0 is passed over.
    """
    return [schedule.observe_line(line) for line in trained(lines)]


def trained(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of training steps: all but that of step 0, which is an evaluation alone."""
    return [line for line in lines if "reward/mean" in line]
