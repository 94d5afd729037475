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


class HardConfig(Section):
    kind: Literal["hard"] = "hard"
    every: Positive = 50


class EMAConfig(Section):
    kind: Literal["ema"] = "ema"
    rate: Fraction = 0.04


class TrustRegionConfig(Section):
    kind: Literal["trust_region"] = "trust_region"
    rate: Fraction = 0.04


class CGTRConfig(Section):
    """Consolidation-Gated Teacher Refresh; defaults of Table 9, arXiv 2606.03532."""

    kind: Literal["cgtr"] = "cgtr"
    min_isolation: Interval = 30
    check_every: Positive = 5
    window: Annotated[int, Field(ge=1, le=10_000)] = 5
    reward_margin: NonNegative = 0.05
    max_tail_ratio: AboveZero = 3.2
    gates: tuple[Literal["isolation", "reward", "length"], ...] = ("isolation", "reward", "length")
    length_unit: Literal["sequence", "shard"] = "sequence"
    shards: Positive = 4  # length_unit=shard: groups of sequences whose lengths are summed

    @property
    def length_shards(self) -> int | None:
        """Groups of sequences whose summed lengths the length gate sees; None: sequences."""
        return self.shards if self.length_unit == "shard" else None

    _gates_differ = field_validator("gates")(_different)


class EvidenceConfig(Section):
    """Refresh where the copy would be the better teacher, as measured by a probe of both.

    A probe answers `probe_questions` of the step's prompts, `probe_samples` times each, with the
    student's and with the teacher's weights; a decision looks at the last `probes` of them.
    """

    kind: Literal["evidence"] = "evidence"
    min_isolation: Interval = 30
    probe_every: Positive = 2
    probe_questions: Positive = 16
    probe_samples: Positive = 4
    probes: Annotated[int, Field(ge=1, le=10_000)] = 10
    # Of the paired rewards. 2.9: a refresh without a gain in 10 % of runs of 300 steps; `sodfast
    # calibrate` has the limit for another rate.
    min_z: Number = 2.9
    max_length_ratio: AboveZero = 1.15  # mean answer of the copy / of the teacher as it is
    max_tail_growth: AboveZero = 1.25  # longest 5 % / mean of the rollouts, against the opening
    gates: tuple[Literal["isolation", "reward", "length", "tail"], ...] = (
        "isolation",
        "reward",
        "length",
        "tail",
    )

    _gates_differ = field_validator("gates")(_different)


class PythonScheduleConfig(Section):
    """The user's own schedule: `source`, FILE.py:NAME or module:NAME, is a class that is built from
    `options` and has `observe(statistics) -> Decision`."""

    kind: Literal["python"] = "python"
    source: SourceText
    options: dict[str, Any] = Field(default_factory=dict)


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
