"""From answers to rewards: graded once, by one rank, for all."""

from collections.abc import Sequence
from dataclasses import replace

from sodfast.config import CGTRConfig, CollapseConfig, Config
from sodfast.errors import RunFailed
from sodfast.parallel.ranks import ALONE, Ranks
from sodfast.rng import Stream, generator
from sodfast.tasks.base import Grade, Question, Task, grade


def grade_answers(
    config: Config,
    task: Task,
    questions: Sequence[Question],
    texts: Sequence[str],
    ranks: Ranks = ALONE,
) -> list[Grade]:
    """The grade of each of `texts`, the answer to the question of the same index.

    One rank grades for all: a program that runs out of time, or a user's reward that draws random
    numbers, would be graded differently by each.

    Raises:
        RunFailed: the user's code failed, or gave a reward outside [0, 1] while a key that is
            compared with rewards still has its default.
    """
    grades: list[Grade] = []
    with ranks.together():
        if ranks.main:
            grades = grade(task, questions, texts)
            _require_scale(config, questions, grades)
    return ranks.gather(grades)[0]


def with_noise(
    config: Config, step: int, grades: Sequence[Grade], probe: bool = False
) -> list[Grade]:
    """The grades as training sees them: under `task.label_noise` a reward r is 1 − r with its
    probability, drawn by a stream keyed by (seed, step, `probe`) for one sample after the other.

    Whether noise is on or off, nothing else draws on that stream. Raises `RunFailed` for a reward
    outside [0, 1], which has no opposite.
    """
    noise = config.task.label_noise
    if noise is None or not noise.first <= step <= noise.last:
        return list(grades)
    outside = next((grade.reward for grade in grades if not 0 <= grade.reward <= 1), None)
    if outside is not None:
        raise RunFailed(f"task.label_noise: the reward {outside:g} lies outside [0, 1]")
    rng = generator(config.seed, Stream.NOISE, step, probe)
    wrong = rng.random(len(grades)) < noise.share
    return [
        replace(grade, reward=1 - grade.reward) if flipped else grade
        for grade, flipped in zip(grades, wrong.tolist(), strict=True)
    ]


def _require_scale(config: Config, questions: Sequence[Question], grades: Sequence[Grade]) -> None:
    """A default counts as not set, also where somebody has written it: a stored configuration has
    every key, and a resumed run is asked for the same."""
    outside = [i for i, given in enumerate(grades) if not 0 <= given.reward <= 1]
    missing, schedule = [], config.schedule
    if config.collapse.eval_floor == CollapseConfig().eval_floor:
        missing.append("collapse.eval_floor")
    if isinstance(schedule, CGTRConfig) and schedule.reward_margin == CGTRConfig().reward_margin:
        missing.append("schedule.reward_margin")
    if outside and missing:
        first = outside[0]
        raise RunFailed(
            f"the reward {grades[first].reward:g} (row {questions[first].id!r}) lies outside "
            f"[0, 1], for which the defaults are made: set {' and '.join(missing)} on the scale of "
            "your rewards, to another value than the default"
        )
