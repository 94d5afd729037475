"""A fork: a new run that goes on from a checkpoint of another one, under other keys.

Student, optimizer, lines and random numbers are those of the source, so with no key changed a fork
repeats it. Two forks that differ in one refresh alone show what that refresh causes.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sodfast.config import Config
from sodfast.errors import UsageError
from sodfast.files import copy_files
from sodfast.run import checkpoint
from sodfast.run.directory import RunDirectory, fingerprint
from sodfast.run.fork_keys import Refresh, source_config
from sodfast.run.records import read_events, read_metrics
from sodfast.schedule import build_schedule
from sodfast.tasks.files import run_files

# Makes a run directory that is then resumed, from `environment`'s facts about the machine.
Beginning = Callable[[dict[str, Any]], object]


def prepare_fork(
    source: Path, step: int, config: Config, refresh: Refresh | None = None
) -> Beginning:
    """What makes `config.out` a run directory that `Trainer.resume` continues after `step` of
    `source`. Nothing is written before it is called, and what it needs of the source is checked.

    refresh="now": the teacher becomes the student of that step. Files of the checkpoint are shared
    with the source where the file system can (hard links; nothing changes one once it is written).
    The schedule keeps its state or, where it is another one, takes over from the source's.

    Raises `UsageError` where there is no such checkpoint or it is damaged, where lines are missing,
    or, when it is called, where the directory cannot be written.
    """
    assert config.out is not None
    path = source / "checkpoints" / f"step-{step}"
    kept = sorted(checkpoint.steps(path.parent))
    if step not in kept:
        raise UsageError(
            f"{source} has no checkpoint of step {step}, only of {kept or 'none'}: choose one of "
            f"them, or run it again with checkpoint.at=[{step}]"
        )
    state, original = checkpoint.verify(path), source_config(source)
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
    names = checkpoint.file_names(path, state)
    state["fingerprint"] = fingerprint(config)
    state["task_files"] = run_files(config)  # a fork may also change the user's reward
    state["teacher_is_student"] = state.get("teacher_is_student", True) or refresh == "now"
    if refresh == "now":
        names = [name for name in names if name != "teacher.safetensors"]
        state.get("files", {}).pop("teacher.safetensors", None)

    def write(run: RunDirectory) -> None:
        for file, kept in ((run.metrics, lines), (run.events, events)):
            for line in kept:
                run.append(file, line)
        copy = run.checkpoints / path.name
        copy_files(path, copy, names, _share)
        checkpoint.write_state(copy, state)

    def begin(environment: dict[str, Any]) -> None:
        RunDirectory.create(Path(str(config.out)), config, environment, write).close()

    return begin


def _share(source: Path, target: Path) -> None:
    """A hard link or, where the file system or its rules allow none, as for another user's file, a
    copy. Of a link, what it names."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
