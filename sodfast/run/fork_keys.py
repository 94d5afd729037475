"""What a fork is asked for: the step, the teacher's refresh there, and its configuration. No torch.

fork.py makes the fork's run directory.
"""

from pathlib import Path
from typing import Literal

from sodfast.config import Config, override, parse_overrides, read_overrides, validate
from sodfast.errors import UsageError
from sodfast.run.records import require_run

Refresh = Literal["now", "never"]
_OWN = ("step=", "teacher.refresh=")


def read_fork(overrides: list[str]) -> tuple[int, Refresh | None, list[str]]:
    """The fork's step, what its teacher does there, and the other overrides.

    Raises `UsageError` for a step or a refresh that is not there or is none.
    """
    values = dict(parse_overrides([text for text in overrides if text.startswith(_OWN)]))
    step, refresh = values.get("step"), values.get("teacher.refresh")
    if type(step) is not int or step < 0:
        raise UsageError(f"say where to fork, for example step=100 (got step={step})")
    if refresh not in (None, "now", "never"):
        raise UsageError(f"teacher.refresh={refresh}: choose now or never")
    return step, refresh, [text for text in overrides if not text.startswith(_OWN)]


def fork_config(
    original: Config, step: int, overrides: list[str], refresh: Refresh | None = None
) -> Config:
    """The configuration of a fork, after `step`, of a run with the configuration `original`.

    Another `seed` gives other random numbers from the fork on, the order of the questions included.
    With `refresh` the teacher stays where it is from there on (schedule.kind=fixed), unless the
    overrides give a schedule to a fork with refresh="now". Raises `UsageError` for keys that belong
    to the student of the source, and where the run cannot go on from there.
    """
    schedules = [text for text in overrides if text.startswith(("schedule.", "schedule="))]
    if refresh == "never" and schedules:
        raise UsageError(f"refresh=never holds the teacher still: leave {schedules[0]} out")
    if refresh is not None and not schedules:
        overrides = ["schedule.kind=fixed", *overrides]
    config = override(original.model_copy(update={"out": None}), overrides)
    if config.task != original.task.model_copy(update={"label_noise": config.task.label_noise}):
        raise UsageError("a fork has the task of its source: no task.* but label_noise here")
    for name in ("model", "lab"):
        if getattr(config, name) != getattr(original, name):
            raise UsageError(f"a fork has the student of its source: no {name}.* here")
    if config.steps < step:
        raise UsageError(f"steps={config.steps} lies before the fork's step {step}")
    return config


def source_config(source: Path) -> Config:
    """The configuration of a run that is to be forked; raises `UsageError` where it is none."""
    require_run(source)
    return read_stored(source / "config.yaml")


def read_stored(file: Path) -> Config:
    """The configuration in a run's config.yaml or in a copy of it; raises `UsageError`."""
    return validate(read_overrides(file, []))
