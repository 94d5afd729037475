"""From Python: a run in one call, a run step by step, and a run directory to look into.

    run = sodfast.train("lab", steps=20, schedule={"kind": "hard", "every": 5})
    rewards = [line["reward/mean"] for line in run.metrics[1:]]

    with sodfast.Trainer.build(sodfast.load_config("lab", steps=20)) as trainer:
        line = trainer.step()

Run directories are those of the command line: either goes on where the other has stopped.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sodfast.config import Config, load_config, read_overrides, validate
from sodfast.errors import UsageError
from sodfast.run.directory import stored_config
from sodfast.run.records import read_events, read_metrics, read_summary, require_run

if TYPE_CHECKING:
    from sodfast.trainer import Trainer as Algorithm

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """A run directory, finished or still being written. Everything is read when it is asked for.

    All members raise `UsageError` for a file that is damaged.
    """

    path: Path

    @property
    def config(self) -> Config:
        return validate(read_overrides(self.path / "config.yaml", []))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, that of step 0 and then one for each step so far."""
        return read_metrics(self.path)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl, which are gates, refreshes, checkpoints, a collapse."""
        return read_events(self.path)

    @property
    def summary(self) -> dict[str, Any] | None:
        """summary.json; None until the run has ended, by itself or by an interruption."""
        return read_summary(self.path)

    def samples(self, step: int) -> list[dict[str, Any]]:
        """The rollouts of a step, with prompt, response, reward, hint and per-token divergence.

        Raises `UsageError` where none were kept of that step (`log.samples_every`).
        """
        from sodfast.run.samples import read_samples

        return list(read_samples(self.path, step))


def train(
    source: StrPath | None = None,
    overrides: Sequence[str] = (),
    *,
    resume: StrPath | None = None,
    **values: Any,
) -> Run:
    """`sodfast train`: run a preset or file (None: the lab) to its end, or `resume` a run, which
    takes only `steps`. Overrides and values are those of `load_config`.

    Raises:
        UsageError: the configuration cannot be used; nothing is written.
        RunFailed: the run has ended early, and its last finished step is saved.
        KeyboardInterrupt: after the last finished step was saved.
    """
    if resume is not None:
        if source is not None or values.keys() - {"steps"}:
            raise UsageError("resume takes only steps: anything else would make it another run")
        steps = [f"steps={values['steps']}"] if values else []
        trainer = Trainer.resume(resume, [*overrides, *steps])
    else:
        trainer = Trainer.build(load_config(source, overrides, **values))
    with trainer:
        trainer.train()
    return trainer.run


def load_run(path: StrPath) -> Run:
    """Open the run directory `path`, finished or running. Raises `UsageError` where it is none."""
    run = Run(Path(path))
    require_run(run.path)
    return run


class Trainer:
    """A run that goes on a step at a time. It holds the lock of its directory until `close`, which
    the end of a `with` block calls, too.

    `run` is what it has written so far; `algorithm` the `sodfast.trainer.Trainer` that it moves,
    with the student in `algorithm.model`.
    """

    def __init__(self, algorithm: "Algorithm") -> None:
        self.algorithm = algorithm
        self.run = Run(algorithm.run.path)
        self._open = True

    @classmethod
    def build(cls, config: Config) -> "Trainer":
        """Start a run. Raises `UsageError` for what cannot be used, with nothing written."""
        from sodfast.commands import build_trainer
        from sodfast.run.console import PlainReporter

        return cls(build_trainer(config, None, PlainReporter(None)))

    @classmethod
    def resume(cls, path: StrPath, overrides: Sequence[str] = ()) -> "Trainer":
        """Continue the run in `path`; the only override is `steps=N`."""
        from sodfast.commands import build_trainer
        from sodfast.run.console import PlainReporter

        config = stored_config(Path(path), list(overrides))
        return cls(build_trainer(config, Path(path), PlainReporter(None)))

    @property
    def finished(self) -> bool:
        """Whether no step is left, since `steps` are made or the collapse detector stopped it."""
        return self.algorithm.ended

    def step(self) -> dict[str, Any]:
        """Train one step and return its line of metrics.jsonl. The first step of a run is preceded
        by an evaluation of the untrained student.

        Raises:
            UsageError: the run is finished or closed.
            RunFailed: the step has failed; the run is closed, its last finished step saved.
            KeyboardInterrupt: likewise closed and saved. `Trainer.resume` goes on.
        """
        if self.finished:
            raise UsageError(
                f"{self.run.path} is finished at step {self.algorithm.step}: go on with "
                "sodfast.Trainer.resume(path, ['steps=N'])"
            )
        self._advance(self.algorithm.step + 1)
        return self.algorithm.lines[-1]

    def train(self) -> None:
        """Train all steps that are left; raises as `step` does, but not where none is."""
        self._advance(None)

    def _advance(self, until: int | None) -> None:
        if not self._open:
            raise UsageError(f"{self.run.path} is closed: go on with sodfast.Trainer.resume(path)")
        status = "failed"
        try:
            status = self.algorithm.train(until)
        finally:
            if status != "paused":
                self._release()
        if status == "interrupted":
            raise KeyboardInterrupt

    def close(self) -> None:
        """Save the last finished step and let others write the directory. It can be resumed."""
        if self._open:
            try:
                self.algorithm.leave()
            finally:
                self._release()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _release(self) -> None:
        self._open = False
        self.algorithm.reporter.stop()
        self.algorithm.run.close()
