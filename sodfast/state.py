"""What a run carries from one step to the next: taken after each, saved, and restored.

Student, teacher and optimizer are tensors; schedule, collapse detector and reward memory are JSON
values. Every random stream is keyed by (seed, step, ...), so its counter is the step.
"""

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sodfast.collapse import CollapseDetector
from sodfast.config import Config
from sodfast.metrics import RewardGain
from sodfast.run import checkpoint
from sodfast.run.directory import RunDirectory, fingerprint
from sodfast.run.restore import (
    optimizer_tensors,
    require_fitting,
    restore_optimizer,
    restore_student,
)
from sodfast.schedule import Schedule
from sodfast.tasks.files import run_files
from sodfast.teacher import Teacher

if TYPE_CHECKING:
    from sodfast.student import Student


class RunState:
    """The parts of a run that its steps change, as of the step that `take` was last called for.

    The tensors are read when `save` writes them, so between `take` and `save` no update may be
    made; the JSON values may have changed.
    """

    def __init__(
        self,
        config: Config,
        student: "Student",
        teacher: Teacher,
        schedule: Schedule,
        collapse: CollapseDetector,
        gain: RewardGain,
        run: RunDirectory,
    ) -> None:
        self.config = config
        self.student = student
        self.teacher = teacher
        self.schedule = schedule
        self.collapse = collapse
        self.gain = gain
        self.run = run
        self.task_files = run_files(config)
        self.take(0)

    def take(self, step: int) -> None:
        """Note the JSON half of a checkpoint, as of the finished step `step`."""
        self.step = step
        self.values: dict[str, Any] = {
            "fingerprint": fingerprint(self.config),
            "task_files": self.task_files,
            "base": self.student.model.base,
            "schedule": self.schedule.state_dict(),
            "collapse": self.collapse.state_dict(),
            "reward_memory": dict(self.gain.last),
            "cursor": step * self.config.rollout.prompts_per_step,
            "streams": {"seed": self.config.seed, "step": step},
            "teacher_is_student": self.teacher.weights is None,
        }

    def save(self, lasting: Container[int]) -> bool:
        """Write the checkpoint of the step, unless it is there; returns whether it was written.

        Afterwards there are the last `checkpoint.keep` and those of the steps `lasting`. Every rank
        calls this, rank 0 writes. Raises `RunFailed` when the disk refuses.
        """
        weights, ranks = self.student.weights, self.student.ranks
        if ranks.any(self.step in checkpoint.steps(self.run.checkpoints)):
            return False
        network = self.student.model.network
        student = weights.state_dict()
        same = self.teacher.weights is None
        teacher = None if same else weights.gather_full(self.teacher.own())
        moments = weights.gather_full(optimizer_tensors(network, self.student.optimizer))
        with ranks.together():
            if ranks.main:
                self.run.sync()
                checkpoint.save(
                    self.run.checkpoints,
                    self.step,
                    self.student.model,
                    student,
                    teacher,
                    moments,
                    self.values,
                    self.config.checkpoint.keep,
                    lasting,
                )
        return True

    def restore(self, path: Path) -> checkpoint.Checkpoint:
        """Put every part back as it was at the checkpoint `path`; returns what was found there.

        Raises `UsageError` for a damaged checkpoint and for that of another run.
        """
        stored = checkpoint.load(path)
        model, weights, optimizer = self.student.model, self.student.weights, self.student.optimizer
        require_fitting(stored, model, optimizer, self.schedule)
        restore_student(model, weights.loadable(stored.student), stored.state.get("base"))
        own = None if stored.teacher is None else weights.shard(stored.teacher)
        self.teacher.load_weights(own)
        restore_optimizer(model.network, optimizer, weights.shard(stored.optimizer))
        self.schedule.load_state_dict(stored.state["schedule"])
        self.collapse.load_state_dict(stored.state["collapse"])
        self.gain.last = stored.state["reward_memory"]
        self.take(stored.step)
        return stored
