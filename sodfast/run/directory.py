"""A run directory: its lock, its lines, and what a resume may keep of them."""

import datetime
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sodfast.config import BEFORE, RENAMED, Config, read_overrides, validate
from sodfast.errors import RunFailed, UsageError
from sodfast.files import (
    refuse_links,
    remove_leftovers,
    replace_text,
    require_usable,
    to_lines,
    try_lock,
)
from sodfast.run import checkpoint, samples
from sodfast.run.records import read_events, read_metrics, require_run
from sodfast.run.samples import Answer
from sodfast.tasks.files import changed_file, run_files

_log = logging.getLogger(__name__)

# What a process that ends before config.yaml is written, or a full disk, leaves of a new run.
_BEGUN = re.compile(r"\.lock|environment\.json|(environment\.json|config\.yaml)\.[0-9a-f]{16}\.tmp")
# A fork writes this file first and deletes it when it has a config.yaml; until then it may have the
# others, which belong to no run yet.
_FORKING = ".forking"
_FORKED = {_FORKING, "metrics.jsonl", "events.jsonl", "checkpoints"}
# The files that are replaced whole, while the lock is held.
_REPLACED = ("environment.json", "config.yaml", "metrics.jsonl", "events.jsonl", "summary.json")

# Keys that release 0.1.0 did not have, with the values that mean what it did.
ADDED: dict[str, Any] = {
    "model.random": None,
    "lab.stubborn": 0.0,
    "model.chat_template_kwargs": {},
    "teacher.chat_template_kwargs": None,
    "teacher.demonstrate_self": False,
    "teacher.micro_batch_tokens": None,
    "optimizer.lr_burst": None,
    "schedule.timeout": 60.0,
    "objective.dual_clip": None,
    "objective.old_logprob": "engine",
    "eval.questions": None,
    "eval.tasks": {},
    "task.split": None,
    "task.columns": {},
    "task.system": None,
    "task.request": None,
    "task.scorer": "strict",
    "task.label_noise": None,
    "task.arrival": None,
    **BEFORE,
}
# Values of `teacher.feedback` that release 0.1.0 had under other names.
_FEEDBACK_OF_0_1_0 = {"never": False, "always": True}
# What a line says of its evaluation beside `eval/*`.
ABOUT_EVALUATION = ("time/eval", "rollout/eval_tokens_per_pass")


def fingerprint(config: Config) -> str:
    """A hash of all keys but `out`, `steps`, `log`, `checkpoint`, `model.attention`,
    `model.kept_layers` and `rollout.speculate`: no number of a step depends on these.

    The runs of earlier releases go on: a renamed key is hashed under its first name, a renamed
    value as its first one, and a key that they did not have (`ADDED`) only where it does not mean
    what they did.
    """
    values = config.model_dump(mode="json", exclude={"out", "steps", "log", "checkpoint"})
    del values["model"]["attention"], values["model"]["kept_layers"]
    del values["rollout"]["speculate"]
    for key, default in ADDED.items():
        group, _, name = key.partition(".")
        if name in values[group] and values[group][name] == default:
            del values[group][name]
    feedback = values["teacher"]["feedback"]
    values["teacher"]["feedback"] = _FEEDBACK_OF_0_1_0.get(feedback, feedback)
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        values[group][name] = values[group].pop(new.removeprefix(f"{group}."))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def default_out(config: Config) -> str:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"runs/{stamp}-{config.schedule.kind}-seed{config.seed}"


def check_out(path: Path) -> None:
    """Raise `UsageError` unless `path` can become a new run directory: one that does not exist, is
    empty, or was begun, perhaps as a fork, and has no config.yaml yet. Writes nothing."""
    require_usable(path, f"out={path}")
    names = os.listdir(path) if os.path.isdir(path) else []
    forked = _FORKED if _FORKING in names else set()
    if not all(
        (_BEGUN.fullmatch(name) or name in forked) and not _another_kind(path / name)
        for name in names
    ):
        resume = f"sodfast train --resume {path}"
        if os.path.isfile(path / "config.yaml"):
            advice = f"choose another, or continue it with {resume}"
        else:
            advice = f"choose another, or empty it (it has no config.yaml for {resume})"
        raise UsageError(f"out={path} exists and is not empty: {advice}")
    refuse_links(path, (".lock", *_FORKED))
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UsageError(f"out={path} is a file: choose a directory")
    for folder in path.absolute().parents:
        if folder.name == "checkpoints" and os.path.isfile(folder.parent / "config.yaml"):
            raise UsageError(f"out={path} lies among the checkpoints of a run: choose another")
    existing = path
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"out={path} cannot be created: {existing} is not a writable directory")


def _another_kind(path: Path) -> bool:
    """Whether a folder stands where a run has a file, or a file in the place of its checkpoints:
    neither can be replaced, and then nothing beside it may be."""
    return not path.is_symlink() and path.is_dir() != (path.name == "checkpoints")


class RunDirectory:
    """The files of one run, locked against a second writer until `close` or the process's end.

    Without a lock, as on all ranks of a run but the first, it reads and never writes.
    """

    def __init__(self, path: Path, lock: IO[str] | None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: Path,
        config: Config,
        environment: dict[str, Any],
        begin: Callable[["RunDirectory"], object] | None = None,
    ) -> "RunDirectory":
        """A new directory, locked; `begin` writes what a fork holds beside its configuration."""
        check_out(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _lock(path))
            try:
                check_out(path)  # another process may have made a run of it before it was locked
                run._forget_fork()
                run._replace(path / "environment.json", json.dumps(environment, indent=2) + "\n")
                if begin is not None:
                    (path / _FORKING).touch()
                    begin(run)
                # Written last: a directory with a config.yaml is one that can be resumed, and one
                # without is one that can be created.
                run.write_config(config)
                (path / _FORKING).unlink(missing_ok=True)
            except BaseException:
                run.close()
                raise
        except (OSError, RunFailed) as error:
            raise UsageError(f"out={path} cannot be written: {error}") from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        require_run(path)
        names = ("metrics.jsonl", "events.jsonl", "checkpoints", "samples", "tensorboard")
        refuse_links(path, (".lock", *names))
        run = cls(path, _lock(path))
        if (path / _FORKING).is_file():
            (path / _FORKING).unlink()  # it has a config.yaml, and so is a run
        return run

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    def append(self, file: Path, line: dict[str, Any]) -> None:
        """Add a line. Raises `RunFailed` when the disk refuses, as all writing of a run does."""
        text = json.dumps(line, allow_nan=False) + "\n"
        if self._lock is not None:
            with _writing(file), file.open("a") as stream:
                stream.write(text)

    def sync(self) -> None:
        """Force the lines to disk; a checkpoint must not outlive the lines before it."""
        for file in (self.metrics, self.events):
            if self._lock is not None and file.exists():
                with _writing(file), file.open("a") as stream:
                    os.fsync(stream.fileno())

    def clear(self) -> None:
        """Delete the lines and the answers of a run that starts over."""
        if self._lock is not None:
            for file in (self.metrics, self.events):
                file.unlink(missing_ok=True)
            samples.remove_later(self.path, -1, -1)

    def _forget_fork(self) -> None:
        """Delete what a fork has left that was killed before it wrote config.yaml."""
        if (self.path / _FORKING).exists():
            self.clear()
            if self.checkpoints.exists():
                shutil.rmtree(self.checkpoints)
            (self.path / _FORKING).unlink()

    def rewind(self, step: int, config: Config, without_evaluation: bool) -> list[dict[str, Any]]:
        """Write `config`, under which the run goes on, and drop lines, events and answers after
        `step`; `without_evaluation` also the evaluation of `step`, a collapse that it showed and
        the rollouts that were kept because of it. Returns the metrics lines that stay.

        The configuration comes first: with the old `steps` a run that has lost its closing
        evaluation would count as finished. Raises `UsageError`, with nothing written, where lines
        are missing.
        """
        lines = [line for line in read_metrics(self.path) if line["step"] <= step]
        if len(lines) != step + 1 and step > 0:
            raise UsageError(
                f"{self.metrics} has {len(lines)} lines up to the checkpoint's step {step}, "
                f"not {step + 1}: restore the file, or delete the checkpoint"
            )
        events = [event for event in read_events(self.path) if event["step"] <= step]
        if without_evaluation:
            lines[-1] = {
                key: value
                for key, value in lines[-1].items()
                if not key.startswith("eval/") and key not in ABOUT_EVALUATION
            }
            events = [
                event for event in events if (event["step"], event.get("reason")) != (step, "eval")
            ]
        self.write_config(config)
        self.write_metrics(lines)
        self._replace(self.events, to_lines(events))
        if self._lock is not None:
            evaluated = step - 1 if without_evaluation else step
            kept = evaluated if config.log.samples_every is None else step
            with _writing(self.path / "samples"):
                samples.remove_later(self.path, rollouts=kept, evaluations=evaluated)
        return lines

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        self._replace(self.metrics, to_lines(lines))

    def write_samples(self, step: int, answers: Sequence[Answer], evaluation: bool = False) -> None:
        """Write a step's rollouts, or the answers of the evaluation after it, whole or not at all.
        Raises `RunFailed` when the disk refuses."""
        if self._lock is not None:
            file = samples.sample_file(self.path, step, evaluation)
            with _writing(file):
                file.parent.mkdir(exist_ok=True)
                replace_text(file, samples.to_text(answers))

    def write_config(self, config: Config) -> None:
        """Replace config.yaml, with which a process begins to write, and delete what processes
        that were killed have left aside."""
        self._replace(self.path / "config.yaml", config.to_yaml())
        if self._lock is not None:
            with _writing(self.path):
                remove_leftovers(self.path, _REPLACED)

    def write_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        self._replace(self.path / "summary.json", text)

    def _replace(self, file: Path, text: str) -> None:
        if self._lock is not None:
            with _writing(file):
                replace_text(file, text)


def stored_config(path: Path, overrides: list[str]) -> Config:
    """The configuration of a run directory; only `steps` may be overridden."""
    for text in overrides:
        if not text.startswith("steps="):
            raise UsageError(f"--resume takes only steps=N; {text!r} would make it another run")
    require_run(path)
    layer = read_overrides(path / "config.yaml", overrides)
    layer["out"] = str(path)
    config = validate(layer)
    newest = checkpoint.latest(path / "checkpoints")
    if newest is not None:
        state = checkpoint.load_state(newest)
        if state["fingerprint"] != fingerprint(config):
            raise UsageError(
                f"{path}/config.yaml is not the configuration its checkpoints were made with: "
                "restore it, or start a new run"
            )
        _require_same_files(path, run_files(config), state.get("task_files"))
        if config.steps < state["step"]:
            raise UsageError(f"steps={config.steps} lies before the checkpoint's {state['step']}")
    return config


def _require_same_files(path: Path, found: dict[str, str], stored: dict[str, str] | None) -> None:
    if stored is None:  # the checkpoint is of a release that kept no hashes
        if found:
            _log.warning("%s has no hashes of the task's files: taken to be the same", path)
        return
    changed = changed_file(found, stored)
    if changed is not None:
        raise UsageError(
            f"{changed} is not as it was when the run began: restore it, or start a new run"
        )


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{file} could not be written: {error.strerror}") from error


def _lock(path: Path) -> IO[str]:
    """Hold `path`/.lock; the kernel releases it when this process ends, however it ends."""
    try:
        lock = try_lock(path / ".lock")
    except OSError as error:
        raise UsageError(f"{path / '.lock'} cannot be opened: {error.strerror}") from error
    if lock is None:
        raise UsageError(f"{path} is being written by another process: wait for it")
    return lock
