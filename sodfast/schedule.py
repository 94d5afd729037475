"""WHEN the teacher moves: state machines over numbers, no torch.

A schedule sees a step's statistics after the step's update and answers with a `Decision` that
explains itself. It can be replayed on the lines of a recorded metrics.jsonl. `teacher.py`
carries the decision out.

The schedules are those of arXiv 2606.03532 §3.1 and §4 (fixed, hard refresh, EMA, CGTR), of
arXiv 2601.20802 (trust region), one of our own (evidence), and whatever the user writes
(`PythonSchedule`).
"""

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import fsum, isfinite, sqrt
from typing import Any, Literal, get_args

from sodfast.config import (
    CGTRConfig,
    EMAConfig,
    EvidenceConfig,
    FixedConfig,
    HardConfig,
    PythonScheduleConfig,
    ScheduleConfig,
    TrustRegionConfig,
)
from sodfast.errors import RunFailed, UsageError
from sodfast.source import describe_error, find_source

# Of a metrics line: what a step has when its teacher is about to move. The others come later.
KNOWN = ("reward/", "length/", "distill/", "policy/", "optim/")

Action = Literal["keep", "copy", "average"]


@dataclass(frozen=True)
class StepStatistics:
    """What a schedule may look at: one training step, all rollouts.

    `reward_mean` and the lengths are `reward/mean` and `length/*` of the step's metrics line.
    Under `length_unit=shard` the lengths are the summed response lengths of each shard. `metrics`:
    every value that the line has when the teacher is about to move, those of `KNOWN`.
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
    reward     mean reward of the last `window` steps > r_ref + reward_margin; r_ref starts as the
               mean of the first `window` steps and becomes the window's mean at each refresh;
               blocks while fewer than `window` steps exist
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


class PythonSchedule(Schedule):
    """A class of the user's: `observe(statistics) -> Decision`, called after every step.

    `state_dict() -> JSON values` and `load_state_dict(state)` let a resumed run go on exactly;
    without both, it begins as it was built. Where it takes over from another schedule in a fork,
    `follow(lines, copies)` is called as `Schedule.follow` is or, without one, `observe` for each
    step so far, whose decisions are not carried out. Ages are counted here.

    Raises:
        UsageError: the class is not there, cannot be built, or lacks a method.
        RunFailed: a call has failed or returned what is no decision.
    """

    def __init__(self, config: PythonScheduleConfig) -> None:
        self.config = config
        self._source = source = find_source(config.source, "schedule.source")
        kind = source.load()
        try:
            self._own = kind(**config.options)
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            raise UsageError(f"{source.key}: {describe_error(error, source.files())}") from error
        both = "state_dict", "load_state_dict"
        needed = ("observe", *(both if any(hasattr(self._own, name) for name in both) else ()))
        for name in needed:
            if not callable(getattr(self._own, name, None)):
                raise UsageError(f"{source.key}: the class {source.name} has no method {name}")
        self.last_copy = 0

    def __deepcopy__(self, memo: object) -> "PythonSchedule":
        return PythonSchedule(self.config)

    def observe(self, statistics: StepStatistics) -> Decision:
        decision: Decision = self._ask("observe", statistics)
        if wrong := _unusable(decision):
            raise RunFailed(f"{self._source.file}, {self._source.name}.observe: {wrong}")
        age = statistics.step - self.last_copy
        if decision.action == "copy":
            self.last_copy = statistics.step
        return replace(decision, age=age)

    def follow(self, lines: Sequence[Mapping[str, Any]], copies: Container[int]) -> None:
        if hasattr(self._own, "follow"):
            self._ask("follow", lines, copies)
        else:
            for line in trained(lines):
                self._ask("observe", self._statistics(line))
        steps = [line["step"] for line in lines]
        self.last_copy = max((step for step in steps if step in copies), default=0)

    def state_dict(self) -> dict[str, Any]:
        own = self._ask("state_dict") if hasattr(self._own, "state_dict") else None
        try:  # a copy, which no later step changes
            own = json.loads(json.dumps(own, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            place = f"{self._source.file}, {self._source.name}.state_dict"
            raise RunFailed(f"{place}: must return JSON values: {error}") from error
        return {"last_copy": self.last_copy, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_copy = state["last_copy"]
        if hasattr(self._own, "load_state_dict"):
            self._ask("load_state_dict", state["own"])

    def _ask(self, method: str, *arguments: Any) -> Any:
        call: Callable[..., Any] = getattr(self._own, method)
        try:
            return call(*arguments)
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            raise RunFailed(describe_error(error, self._source.files())) from error


def _unusable(decision: Any) -> str | None:
    """Why this is no decision of a user's schedule; None where it is one."""
    if not isinstance(decision, Decision):
        return f"must return a sodfast.schedule.Decision, not {str(decision)[:40]!r}"
    if decision.action not in get_args(Action):
        return f"action must be one of {', '.join(get_args(Action))}, not {decision.action!r}"
    if not isinstance(decision.rate, int | float) or not 0 <= decision.rate <= 1:
        return f"rate must lie in [0, 1], not {decision.rate!r}"
    if decision.gates is not None:
        return "gates are CGTR's: say in metrics what was decided upon"
    for name, value in decision.metrics.items():
        if not str(name).startswith("schedule/"):
            return f"names in metrics begin with schedule/, unlike {name!r}"
        if not isinstance(value, int | float) or not isfinite(value):
            return f"metrics: {name} must be a finite number, not {str(value)[:40]!r}"
    return None


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


def build_schedule(config: ScheduleConfig) -> Schedule:
    """Raises `UsageError` where a user's schedule cannot be loaded."""
    match config:
        case FixedConfig():
            return Fixed()
        case HardConfig():
            return Hard(config.every)
        case EMAConfig():
            return EMA(config.rate)
        case TrustRegionConfig():
            return TrustRegion()
        case CGTRConfig():
            return CGTR(config)
        case EvidenceConfig():
            return Evidence(config)
        case PythonScheduleConfig():
            return PythonSchedule(config)


def student_share(config: ScheduleConfig) -> float | None:
    """τ of a teacher whose logits are (1−τ)·initial + τ·student (trust region, arXiv 2601.20802),
    where τ = 0 counts too; None where the teacher has logits of its own alone."""
    return config.rate if isinstance(config, TrustRegionConfig) else None


def average_rate(config: ScheduleConfig) -> float:
    """The rate of φ ← (1−rate)φ + rate·θ after every step (EMA); 0 where nothing is averaged. A
    user's schedule may average at any rate: a half stands for it."""
    if isinstance(config, PythonScheduleConfig):
        return 0.5
    return config.rate if isinstance(config, EMAConfig) else 0.0


def replay(schedule: Schedule, lines: Sequence[Mapping[str, Any]]) -> list[Decision]:
    """Feed recorded metrics lines (steps 1…, in order) to a schedule; one decision per line.

    The lines must carry `schedule.inputs`; a line of step 0 is passed over.
    """
    return [schedule.observe_line(line) for line in trained(lines)]


def trained(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of training steps: all but that of step 0, which is an evaluation alone."""
    return [line for line in lines if "reward/mean" in line]
