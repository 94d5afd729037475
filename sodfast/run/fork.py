"""A fork: a new run that goes on from a checkpoint of another one, under other keys.

Student, optimizer, lines and random numbers are those of the source, so with no key changed a fork
repeats it. Two forks that differ in one refresh alone show what that refresh causes.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from sodfast.config import Config, parse_overrides, read_overrides, validate
from sodfast.errors import UsageError
from sodfast.run import checkpoint
from sodfast.run.directory import RunDirectory, fingerprint
from sodfast.run.records import read_events, read_metrics, require_run
from sodfast.schedule import build_schedule
from sodfast.tasks.files import run_files

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
    source: Path, step: int, overrides: list[str], refresh: Refresh | None = None
) -> Config:
    """The configuration of a fork of the run `source` after `step`.

    With `refresh` the teacher stays where it is from there on (schedule.kind=fixed), unless the
    overrides give a schedule to a fork with refresh="now". Raises `UsageError` for keys that belong
    to the student of the source, and where the run cannot go on from there.
    """
    schedules = [text for text in overrides if text.startswith("schedule.")]
    if refresh == "never" and schedules:
        raise UsageError(f"refresh=never holds the teacher still: leave {schedules[0]} out")
    if refresh is not None and not schedules:
        overrides = ["schedule.kind=fixed", *overrides]
    original = source_config(source)
    layer = read_overrides(source / "config.yaml", overrides)
    if not any(text.startswith("out=") for text in overrides):
        layer["out"] = None
    config = validate(layer)
    for name in ("model", "lab", "task"):
        if getattr(config, name) != getattr(original, name):
            raise UsageError(f"a fork has the student and the task of {source}: leave {name}.* out")
    if config.steps < step:
        raise UsageError(f"steps={config.steps} lies before the fork's step {step}")
    return config


def source_config(source: Path) -> Config:
    """The configuration of a run that is to be forked; raises `UsageError` where it is none."""
    require_run(source)
    return validate(read_overrides(source / "config.yaml", []))


def fork_run(
    source: Path,
    step: int,
    config: Config,
    environment: dict[str, Any],
    refresh: Refresh | None = None,
) -> None:
    """Make `config.out` a run directory that `Trainer.resume` continues after `step` of `source`.

    refresh="now": the teacher becomes the student of that step. Files of the checkpoint are shared
    with the source where the file system can (hard links; nothing changes one once it is written).
    The schedule keeps its state or, where it is another one, takes over from the source's.

    Raises `UsageError` where there is no such checkpoint, where lines are missing, or where the
    directory cannot be written.
    """
    assert config.out is not None
    path = source / "checkpoints" / f"step-{step}"
    kept = sorted(checkpoint.steps(path.parent))
    if step not in kept:
        raise UsageError(
            f"{source} has no checkpoint of step {step}, only of {kept or 'none'}: choose one of "
            "them, or run it again with checkpoint.every and checkpoint.keep that keep this one"
        )
    state, original = checkpoint.load_state(path), source_config(source)
    if state["fingerprint"] != fingerprint(original):
        raise UsageError(f"{source}/config.yaml is not what its checkpoints were made with")
    lines = [line for line in read_metrics(source) if line["step"] <= step]
    if len(lines) != step + 1:
        raise UsageError(f"{source}/metrics.jsonl lacks lines up to the checkpoint's step {step}")
    events = [event for event in read_events(source) if event["step"] <= step]
    events.append({"step": step, "event": "fork", "source": str(source.absolute())})
    if refresh == "now":
        last = lines[-1]
        shock, age = last.get("teacher/drift", 0.0), last.get("teacher/age")
        events.append({"step": step, "event": "refresh", "shock": shock, "age": age})
    same = config.schedule == original.schedule
    if not same or refresh == "now":
        if not same:  # its gates are not this schedule's
            events = [event for event in events if event["event"] != "gate"]
        schedule = build_schedule(config.schedule)
        copies = {event["step"] for event in events if event["event"] == "refresh"}
        try:
            schedule.follow(lines, copies)
        except KeyError as error:
            raise UsageError(
                f"{source}/metrics.jsonl has no {error.args[0]}, which this schedule looks at: "
                "leave out schedule.length_unit=shard, or fork a run that has it"
            ) from error
        state["schedule"] = schedule.state_dict()
    state["fingerprint"] = fingerprint(config)
    state["task_files"] = run_files(config)  # a fork may also change the user's reward
    state["teacher_is_student"] = state.get("teacher_is_student", True) or refresh == "now"
    if refresh == "now":
        state.get("files", {}).pop("teacher.safetensors", None)

    def begin(run: RunDirectory) -> None:
        for file, kept in ((run.metrics, lines), (run.events, events)):
            for line in kept:
                run.append(file, line)
        copy = run.checkpoints / path.name
        without = ["state.json", *(["teacher.safetensors"] if refresh == "now" else [])]
        shutil.copytree(path, copy, copy_function=_share, ignore=shutil.ignore_patterns(*without))
        checkpoint.write_state(copy, state)

    RunDirectory.create(Path(config.out), config, environment, begin).close()


def _share(source: str, target: str) -> None:
    """A hard link, or a copy where the two lie on different file systems."""
    if os.stat(source).st_dev == os.stat(os.path.dirname(target)).st_dev:
        os.link(source, target)
    else:
        shutil.copyfile(source, target)
