"""When the teacher moves: a group of keys for each kind of schedule."""

from typing import Annotated, Any, Literal, Union

from pydantic import Field, field_validator

from sodfast.config.types import (
    AboveZero,
    Fraction,
    Interval,
    NonNegative,
    Number,
    Positive,
    Section,
    SourceText,
)


def _different(gates: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(gates)) != len(gates):
        raise ValueError("a gate is named twice")
    return gates


class FixedConfig(Section):
    kind: Literal["fixed"] = "fixed"
    """The teacher keeps the weights that the run starts from."""


class HardConfig(Section):
    kind: Literal["hard"] = "hard"
    """The student is copied to the teacher at a fixed interval."""
    every: Positive = 50
    """Steps from one copy to the next."""


class EMAConfig(Section):
    kind: Literal["ema"] = "ema"
    """After every step the teacher becomes an exponential moving average of the student's weights,
    φ ← (1 − rate)·φ + rate·θ."""
    rate: Fraction = 0.04
    """Share of the student in each average."""


class TrustRegionConfig(Section):
    kind: Literal["trust_region"] = "trust_region"
    """The teacher's logits are those of the initial weights, mixed with the student's own (arXiv
    2601.20802)."""
    rate: Fraction = 0.04
    """Share τ of the student's logits in the mixture."""


class CGTRConfig(Section):
    """Defaults of Table 9, arXiv 2606.03532."""

    kind: Literal["cgtr"] = "cgtr"
    """Consolidation-Gated Teacher Refresh (arXiv 2606.03532): the student is copied to the teacher
    at a check where every active gate passes."""
    min_isolation: Interval = 30
    """The isolation gate passes from this many steps after the last copy on."""
    check_every: Positive = 5
    """Steps from one check of the gates to the next."""
    window: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Steps whose rewards and lengths a check pools."""
    reward_margin: NonNegative = 0.05
    """The reward gate passes where the window's mean reward exceeds that at the last copy (at
    first, that of the first window) by more than this."""
    max_tail_ratio: AboveZero = 3.2
    """The length gate passes where the window's longest answer is at most so many times its mean
    answer."""
    gates: tuple[Literal["isolation", "reward", "length"], ...] = ("isolation", "reward", "length")
    """The gates that must pass; one that is left out is only recorded."""
    length_unit: Literal["sequence", "shard"] = "sequence"
    """What the length gate compares: single answers, or the summed lengths of `shards` groups."""
    shards: Positive = 4
    """With length_unit=shard, groups of answers in a step whose lengths are summed."""

    @property
    def length_shards(self) -> int | None:
        """Groups of sequences whose summed lengths the length gate sees; None: sequences."""
        return self.shards if self.length_unit == "shard" else None

    _gates_differ = field_validator("gates")(_different)


class EvidenceConfig(Section):
    kind: Literal["evidence"] = "evidence"
    """The student is copied to the teacher where the copy would be the better teacher, as measured
    by probes in which both answer the same questions in the teacher's contexts."""
    min_isolation: Interval = 30
    """The isolation gate passes from this many steps after the last copy on."""
    probe_every: Positive = 2
    """Steps from one probe, and decision, to the next."""
    probe_questions: Positive = 16
    """Questions of the step that a probe asks, at most."""
    probe_samples: Positive = 4
    """Answers to each question of a probe from each of the two teachers."""
    probes: Annotated[int, Field(ge=1, le=10_000)] = 10
    """The last so many probes are what a decision looks at."""
    min_z: Number = 2.9
    """The reward gate passes from this z-score of the paired rewards on; at 2.9 one of ten runs of
    300 steps refreshes without a gain, and `sodfast calibrate` has the value for another rate."""
    max_length_ratio: AboveZero = 1.15
    """The length gate passes where the copy's mean answer is at most so many times that of the
    teacher as it is."""
    max_tail_growth: AboveZero = 1.25
    """The tail gate passes where the rollouts' longest 5 %, divided by their mean length, is at
    most so many times what it was in the first probes."""
    gates: tuple[Literal["isolation", "reward", "length", "tail"], ...] = (
        "isolation",
        "reward",
        "length",
        "tail",
    )
    """The gates that must pass; one that is left out is only recorded."""

    _gates_differ = field_validator("gates")(_different)


class PythonScheduleConfig(Section):
    kind: Literal["python"] = "python"
    """The user's own schedule decides after every step."""
    source: SourceText
    """`FILE.py:NAME` or `module.submodule:NAME` of a class with `observe(statistics) ->
    Decision`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keywords that the class is built from."""
    timeout: AboveZero = 60.0
    """Seconds for a call; a longer one fails the run, which nothing else could interrupt."""


ScheduleConfig = Annotated[
    Union[  # noqa: UP007
        FixedConfig,
        HardConfig,
        EMAConfig,
        CGTRConfig,
        EvidenceConfig,
        TrustRegionConfig,
        PythonScheduleConfig,
    ],
    Field(discriminator="kind"),
]


def gate_names(schedule: ScheduleConfig) -> tuple[str, ...]:
    """The gates of a schedule's checks, those that are switched off included; none where it has
    no checks."""
    return type(schedule)().gates if isinstance(schedule, CGTRConfig | EvidenceConfig) else ()
