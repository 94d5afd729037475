"""A run directory: its lock, its lines, and what a resume may keep of them."""

import datetime
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sodfast.config import RENAMED, Config, read_overrides, validate
from sodfast.errors import RunFailed, UsageError
from sodfast.files import read_lines, refuse_links, replace_text, try_lock
from sodfast.run import checkpoint


def fingerprint(config: Config) -> str:
    """A hash of all keys but `out`, `steps`, `log`, `checkpoint`, `model.attention` and
    `model.kept_layers`: no number of a step depends on these.

    The runs of earlier releases go on: a renamed key is hashed under its first name, and
    `model.random` and `teacher.micro_batch_tokens`, which they did not have, only where they are
    set.
    """
    values = config.model_dump(mode="json", exclude={"out", "steps", "log", "checkpoint"})
    del values["model"]["attention"], values["model"]["kept_layers"]
    for group, key in (("model", "random"), ("teacher", "micro_batch_tokens")):
        if values[group][key] is None:
            del values[group][key]
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        values[group][name] = values[group].pop(new.removeprefix(f"{group}."))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def default_out(config: Config) -> str:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"runs/{stamp}-{config.schedule.kind}-seed{config.seed}"


def check_out(path: Path) -> None:
    """Raise `UsageError` unless `path` can become a new run directory. Writes nothing."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a loop of links
        raise UsageError(f"out={path} cannot be used: {error.strerror}") from error
    if os.path.isdir(path) and os.listdir(path):
        raise UsageError(
            f"out={path} exists and is not empty: choose another, or continue it with "
            f"sodfast train --resume {path}"
        )
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UsageError(f"out={path} is a file: choose a directory")
    existing = path
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"out={path} cannot be created: {existing} is not a writable directory")


class RunDirectory:
    """The files of one run, locked against a second writer until `close` or the process's end.

    Without a lock, as on all ranks of a run but the first, it reads and never writes.
    """

    def __init__(self, path: Path, lock: IO[str] | None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, path: Path, config: Config, environment: dict[str, Any]) -> "RunDirectory":
        check_out(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _lock(path))
            (path / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
            # Written last: a directory with a config.yaml is one that can be resumed.
            run.write_config(config)
        except (OSError, RunFailed) as error:
            raise UsageError(f"out={path} cannot be written: {error}") from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        if not (path / "config.yaml").is_file():
            raise UsageError(f"{path} is not a run directory: it has no config.yaml")
        refuse_links(path, (".lock", "metrics.jsonl", "events.jsonl", "checkpoints", "tensorboard"))
        return cls(path, _lock(path))

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
        """Delete the lines of a run that starts over."""
        for file in (self.metrics, self.events):
            if self._lock is not None:
                file.unlink(missing_ok=True)

    def rewind(self, step: int, config: Config, without_evaluation: bool) -> list[dict[str, Any]]:
        """Write `config`, under which the run goes on, and drop lines and events after `step`;
        `without_evaluation` also the evaluation of `step` and a collapse that it showed. Returns
        the metrics lines that stay.

        The configuration comes first: with the old `steps` a run that has lost its closing
        evaluation would count as finished. Raises `UsageError`, with nothing written, where lines
        are missing.
        """
        lines = [line for line in read_lines(self.metrics) if line["step"] <= step]
        if len(lines) != step + 1 and step > 0:
            raise UsageError(
                f"{self.metrics} has {len(lines)} lines up to the checkpoint's step {step}, "
                f"not {step + 1}: restore the file, or delete the checkpoint"
            )
        events = [event for event in read_lines(self.events) if event["step"] <= step]
        if without_evaluation:
            lines[-1] = {k: v for k, v in lines[-1].items() if not k.startswith("eval/")}
            events = [
                event for event in events if (event["step"], event.get("reason")) != (step, "eval")
            ]
        self.write_config(config)
        for file, kept in ((self.metrics, lines), (self.events, events)):
            self._replace(file, "".join(json.dumps(line) + "\n" for line in kept))
        return lines

    def write_config(self, config: Config) -> None:
        self._replace(self.path / "config.yaml", config.to_yaml())

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
        if config.steps < state["step"]:
            raise UsageError(f"steps={config.steps} lies before the checkpoint's {state['step']}")
    return config


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{file} could not be written: {error.strerror}") from error


def _lock(path: Path) -> IO[str]:
    """Hold `path`/.lock; the kernel releases it when this process ends, however it ends."""
    lock = try_lock(path / ".lock")
    if lock is None:
        raise UsageError(f"{path} is being written by another process: wait for it")
    return lock
