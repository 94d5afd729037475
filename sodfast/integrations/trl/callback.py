"""WHEN TRL's teacher moves: a callback that lets a schedule decide and carries its decision out."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sodfast_kernels import copy_teacher_, ema_update_, parameter_distance
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sodfast.config import CGTRConfig, EvidenceConfig, ScheduleConfig, load_config
from sodfast.errors import RunFailed, UsageError
from sodfast.files import read_lines, read_object, replace_text, to_lines
from sodfast.integrations.trl.known import own_teacher, require_trainer, require_trl
from sodfast.schedule import Decision, Schedule, build_schedule, student_share

_REWARD = "self_distillation/reward_mean"
_LENGTHS = ("completions/mean_length", "completions/max_length")
_WEIGHTS, _STATE = "teacher.safetensors", "teacher_schedule.json"
_LOGGED = ("teacher/", "gate/", "schedule/")


class TeacherScheduleCallback(TrainerCallback):  # type: ignore[misc]  # untyped in transformers
    """Moves the teacher of TRL's `SDPOTrainer` or `SDFTTrainer` by a schedule of sodfast.

    It owns the teacher: TRL's own averaging is switched off. φ begins as the student is when
    training begins, and after every optimizer step the schedule sees the step's mean reward and
    answer lengths, as the trainer logs them, and says keep, copy or average. A 16-bit average is
    rounded stochastically, so that it keeps the small updates that TRL's loses. Under trust_region
    the teacher's logits are (1−τ)·initial + τ·student.

    Where one batch of answers serves several steps, each of them sees its rewards and lengths; of
    several batches in a step, the step sees the mean, and the longest answer of all. SDFT scores no
    answers: `reward/mean` is 0 in its lines.

    It writes two files into `args.output_dir`, as a run of sodfast has them: metrics.jsonl, a line
    for each step with what the schedule saw, `teacher/*` and `gate/*`, which
    `sodfast.schedule.replay` takes, and events.jsonl. `teacher/*` and `gate/*` go to the trainer's
    loggers, too. A new run in the same directory begins both files anew, and of an earlier run's
    checkpoints the teachers go as it passes their steps.

    Each checkpoint has the teacher and the schedule's state, so `resume_from_checkpoint` goes on
    exactly, provided that the checkpoint lies between two batches of answers: TRL does not save a
    batch that is half used.

    Args:
        schedule: the keys of `schedule` in a configuration of sodfast, such as {"kind": "cgtr",
            "min_isolation": 20}. Every kind but `evidence`, which needs probes.

    Raises:
        UsageError: TRL is absent or of an unknown release, or the schedule cannot be had here; at
            the start of training, where the trainer has no teacher or not what the schedule reads.
        RunFailed: the weights are no longer finite.
    """

    def __init__(self, schedule: Mapping[str, Any]) -> None:
        require_trl()
        self.config: ScheduleConfig = load_config(schedule=schedule).schedule
        if isinstance(self.config, EvidenceConfig):
            raise UsageError(
                "schedule.kind=evidence decides by probes, answers of both teachers to the same "
                "questions, and TRL's trainers take none: use cgtr, or sodfast itself"
            )
        if isinstance(self.config, CGTRConfig) and self.config.length_shards is not None:
            raise UsageError(
                "schedule.length_unit=shard needs the lengths of groups of answers, and TRL's "
                "trainers log those of single answers alone: use length_unit=sequence"
            )
        build_schedule(self.config)  # so that a schedule of the user's is refused here, if it is

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the teacher over, as the student is or as the checkpoint has it."""
        self.trainer, checkpoint = _training_loop()
        require_trainer(self.trainer)
        _require_rewards(self.trainer, self.config)
        self.schedule: Schedule = build_schedule(self.config)
        self.batches: list[dict[str, float]] = []  # what has been generated for this step
        self.latest: dict[str, float] | None = None  # what the last step that generated has seen
        self._take_over()
        if checkpoint is None:
            copy_teacher_(self.teacher.parameters(), self.student.parameters())
        else:
            self._load(Path(checkpoint))
        self.folder = Path(args.output_dir)
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "events.jsonl"):
                lines = read_lines(self.folder / name)
                kept = [line for line in lines if line["step"] <= state.global_step]
                replace_text(self.folder / name, to_lines(kept))

    def on_generation_batch_built(self, **_: Any) -> None:
        """Keep what TRL has just logged of a batch of answers; an event of TRL's own."""
        logged = self.trainer._metrics["train"]
        missing = [key for key in _LENGTHS if not logged.get(key)]
        if missing:
            raise UsageError(
                f"{type(self.trainer).__name__} logs no {missing[0]}, which the schedule reads: "
                "let its _record_completion_metrics log the lengths, as TRL's own does"
            )
        mean, most = (logged[key][-1] for key in _LENGTHS)
        reward = logged[_REWARD][-1] if _REWARD in logged else 0.0
        self.batches.append({"reward/mean": reward, "length/mean": mean, "length/max": most})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the schedule decide about the step, move the teacher, write the line."""
        step: int = state.global_step
        line: dict[str, Any] = {"step": step, **self._seen()}
        # A user's schedule may draw random numbers, and every process has a teacher.
        decision = _of_the_first_process(self.schedule.observe_line(line))
        drift = self._move(decision, step)
        if not isfinite(drift):
            raise RunFailed("the update made weights that are not finite: lower learning_rate")
        copied = decision.action == "copy"
        line |= {"teacher/drift": drift, **decision.metrics}
        if decision.age is not None:
            line |= {"teacher/age": decision.age, "teacher/refreshed": int(copied)}
        for key, value in line.items():
            if key.startswith(_LOGGED):
                self.trainer._metrics["train"][key].append(value)
        if state.is_world_process_zero:
            self._write(line, decision)
            # What an earlier run has left there belongs to another student. That this step will be
            # saved is not known yet where an epoch's end or an evaluation says so.
            (self._checkpoint(step) / _STATE).unlink(missing_ok=True)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the teacher and the schedule into the checkpoint that has just been written."""
        if not state.is_world_process_zero:
            return
        folder = self._checkpoint(state.global_step)
        weights = {name: p.detach().contiguous() for name, p in self.teacher.named_parameters()}
        save_file(weights, folder / _WEIGHTS)
        # So many are trained on one batch of answers, of which TRL saves nothing.
        micro_batches = args.steps_per_generation * args.num_iterations
        stored = {
            "config": self.config.model_dump(mode="json"),
            "state": self.schedule.state_dict(),
            "latest": self.latest,
            "between_batches": self.trainer._step % micro_batches == 0,
        }
        replace_text(folder / _STATE, json.dumps(stored))  # last: it says that both are whole

    def _checkpoint(self, step: int) -> Path:
        return self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _take_over(self) -> None:
        """Make the teacher ours, and stop what moves it in TRL."""
        trainer = self.trainer
        teacher = own_teacher(trainer)
        if isinstance(teacher, MixedTeacher):  # of an earlier call of `train`
            teacher = teacher.initial
        self.teacher: nn.Module = trainer.accelerator.unwrap_model(teacher)
        self.student: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
        shapes = [
            {name: tuple(p.shape) for name, p in model.named_parameters()}
            for model in (self.teacher, self.student)
        ]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"the parameters of {type(trainer).__name__}'s teacher are not the student's: give "
                "the trainer a model that has not been changed after it was loaded"
            )
        handler = trainer.callback_handler
        # A new list: the old one is being gone through.
        handler.callbacks = [
            other
            for other in handler.callbacks
            if getattr(other, "ref_model", None) is not trainer.teacher_model
        ]
        share = student_share(self.config)
        if share is not None:
            teacher = MixedTeacher(teacher, trainer.model, share)
        trainer.teacher_model = teacher

    def _load(self, checkpoint: Path) -> None:
        try:
            stored = read_object(checkpoint / _STATE)
            weights = load_file(checkpoint / _WEIGHTS)
        except (FileNotFoundError, SafetensorError) as error:
            raise UsageError(
                f"{checkpoint} has no whole teacher ({_WEIGHTS}, {_STATE}), because it was saved "
                "without a TeacherScheduleCallback, or the process ended while it was saved: "
                "resume an earlier checkpoint, or start again"
            ) from error
        if stored["config"] != self.config.model_dump(mode="json"):
            raise UsageError(
                f"{checkpoint} was saved under the schedule {json.dumps(stored['config'])}: resume "
                "it with that one"
            )
        if not stored["between_batches"]:
            raise UsageError(
                f"{checkpoint} was saved within a batch of answers, and TRL does not save the rest "
                "of it: resume one between two batches, that is, whose step · "
                "gradient_accumulation_steps is a multiple of steps_per_generation · num_iterations"
            )
        shapes = {name: weight.shape for name, weight in weights.items()}
        if shapes != {name: p.shape for name, p in self.teacher.named_parameters()}:
            raise UsageError(
                f"{checkpoint / _WEIGHTS} belongs to another model: resume with its own"
            )
        with torch.no_grad():
            for name, p in self.teacher.named_parameters():
                p.copy_(weights[name])
        self.schedule.load_state_dict(stored["state"])
        self.latest = stored["latest"]

    def _seen(self) -> dict[str, float]:
        """What the schedule is told of the step's answers."""
        if self.batches:
            columns = {key: [batch[key] for batch in self.batches] for key in self.batches[0]}
            self.latest = {key: fsum(values) / len(values) for key, values in columns.items()}
            self.latest["length/max"] = max(columns["length/max"])
            self.batches.clear()
        if self.latest is None:
            raise UsageError(
                f"{type(self.trainer).__name__} has generated nothing before this step: use TRL's "
                "own _prepare_inputs, which tells callbacks of each batch of answers"
            )
        return dict(self.latest)

    def _move(self, decision: Decision, step: int) -> float:
        """Carry the decision out; ‖θ − φ‖₂ from before it."""
        teacher, student = self.teacher.parameters(), self.student.parameters()
        if decision.action == "copy":
            return float(copy_teacher_(teacher, student))
        if decision.action == "average":
            seed = self.trainer.args.seed
            return float(ema_update_(teacher, student, decision.rate, seed=seed, step=step))
        return float(parameter_distance(teacher, student))

    def _write(self, line: Mapping[str, Any], decision: Decision) -> None:
        step, copied = line["step"], decision.action == "copy"
        events: list[dict[str, Any]] = []
        if decision.gates is not None:
            events.append({"event": "gate", "gates": decision.gates, "refresh": copied})
        if copied:
            shock = line["teacher/drift"]
            events.append({"event": "refresh", "shock": shock, "age": decision.age})
        _append(self.folder / "metrics.jsonl", [line])
        _append(self.folder / "events.jsonl", [{"step": step, **event} for event in events])


@dataclass(frozen=True)
class MixedTeacher:
    """A teacher whose logits are (1 − share)·initial + share·student (arXiv 2601.20802)."""

    initial: nn.Module
    student: nn.Module
    share: float

    def __call__(self, **inputs: Any) -> Any:
        first, second = self.initial(**inputs).logits, self.student(**inputs).logits
        return SimpleNamespace(logits=(1 - self.share) * first + self.share * second)


def _training_loop() -> tuple[Any, str | None]:
    """The trainer that is calling a callback, and the checkpoint that it resumes.

    transformers tells a callback neither; both are variables of the loop that calls it.
    """
    code = Trainer._inner_training_loop.__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        raise UsageError("TeacherScheduleCallback acts in trainer.train() alone: call that")
    return frame.f_locals["self"], frame.f_locals["resume_from_checkpoint"]


def _require_rewards(trainer: Any, config: ScheduleConfig) -> None:
    reads = isinstance(config, CGTRConfig) and "reward" in config.gates
    if reads and not hasattr(trainer, "reward_funcs"):
        raise UsageError(
            f"{type(trainer).__name__} scores no answers, so the reward gate would never open: set "
            "gates to ['isolation', 'length'], or use hard, ema, fixed or trust_region"
        )


def _of_the_first_process(decision: Decision) -> Decision:
    from accelerate.utils import broadcast_object_list

    given = [decision]
    broadcast_object_list(given)
    return given[0]


def _append(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with file.open("a") as stream:
        stream.write(to_lines(lines))
