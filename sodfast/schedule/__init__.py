"""WHEN the teacher moves: state machines over numbers, no torch.

A schedule sees a step's statistics after the step's update and answers with a `Decision` that
explains itself. It can be replayed on the lines of a recorded metrics.jsonl. `teacher.py`
carries the decision out.

The schedules are those of arXiv 2606.03532 §3.1 and §4 (fixed, hard refresh, EMA, CGTR), of
arXiv 2601.20802 (trust region), one of our own (evidence), and whatever the user writes
(`PythonSchedule`). What a configuration says about its schedule is read here and nowhere else.
"""

from collections.abc import Mapping
from typing import Any

from sodfast.config import (
    CGTRConfig,
    EMAConfig,
    EvidenceConfig,
    FixedConfig,
    HardConfig,
    PythonScheduleConfig,
    ScheduleConfig,
    TrustRegionConfig,
    load_config,
)
from sodfast.schedule.base import (
    KNOWN,
    Action,
    Decision,
    Schedule,
    StepStatistics,
    replay,
    trained,
)
from sodfast.schedule.evidence import PROBE_KEYS, Evidence, ProbedStep
from sodfast.schedule.published import CGTR, EMA, Fixed, Hard, TrustRegion
from sodfast.schedule.python import PythonSchedule

__all__ = [
    "CGTR",
    "EMA",
    "KNOWN",
    "PROBE_KEYS",
    "Action",
    "Decision",
    "Evidence",
    "Fixed",
    "Hard",
    "ProbedStep",
    "PythonSchedule",
    "Schedule",
    "StepStatistics",
    "TrustRegion",
    "average_rate",
    "build_schedule",
    "replay",
    "student_share",
    "trained",
]


def build_schedule(config: ScheduleConfig | Mapping[str, Any]) -> Schedule:
    """The schedule of a configuration, or of a mapping with the keys of its group `schedule`, such
    as {"kind": "hard", "every": 20}; what it does not name has the lab's value.

    Raises `UsageError` for a wrong key or value, or where a user's schedule cannot be loaded.
    """
    match config:
        case Mapping():
            return build_schedule(load_config(schedule=config).schedule)
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
