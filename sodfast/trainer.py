"""The algorithm: self on-policy distillation with a scheduled teacher, one screen per phase.

    task → prompts → rollout(student) → rewards → context (who gets which demonstration)
         → probe (where the schedule asks: student and teacher answer alike)
         → teacher scores (hidden states only) → objective (fused loss, gradients) → optimizer
         → statistics → schedule decides → teacher moves → metrics line → checkpoint

Sources: arXiv 2606.03532 (schedules, gates, diagnostics) and arXiv 2601.20802 (the objective and
the teacher's context). A step commits as a whole: whatever ends a run before a step's first
optimizer update leaves the state of the step before.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from torch import OutOfMemoryError

from sodfast.answers import AnswerLog
from sodfast.collapse import CollapseDetector, SignalWatch
from sodfast.config import Config
from sodfast.context import Questions, TeacherContext, teacher_prompts
from sodfast.errors import Interrupted, RunFailed
from sodfast.evaluate import Evaluator, Examination
from sodfast.metrics import RewardGain, length_metrics, mean_entropy, pass_metrics, reward_metrics
from sodfast.model.language_model import LanguageModel, to_ids
from sodfast.objective import group_advantages
from sodfast.parallel.ranks import ALONE, Ranks
from sodfast.probe import is_due, longest_mean, probe
from sodfast.rewards import grade_answers, with_noise
from sodfast.rng import PromptOrder, Stream, draw_key
from sodfast.rollout.engine import Engine, SampleKey, Sampling
from sodfast.rollout.shared import SharedEngine
from sodfast.run import checkpoint
from sodfast.run.console import Reporter
from sodfast.run.directory import RunDirectory
from sodfast.run.interrupt import Interruption
from sodfast.run.loggers import Logger
from sodfast.run.phases import PhaseClock, oom_hint
from sodfast.schedule import Schedule
from sodfast.state import RunState
from sodfast.student import Rollouts, Student, Update
from sodfast.summary import lasting_steps, summarize
from sodfast.tasks.base import Task
from sodfast.teacher import Teacher, TeacherScores

Status = Literal["done", "collapsed", "interrupted", "failed", "paused"]


class Trainer:
    """One run. `train` runs it to its end; everything it keeps is in its run directory.

    With several ranks each has a trainer; they are alike but for the rollouts that they run and
    the chunks of weights that they hold.
    """

    def __init__(
        self,
        config: Config,
        model: LanguageModel,
        engine: Engine,
        task: Task,
        data: Questions,
        schedule: Schedule,
        run: RunDirectory,
        reporter: Reporter,
        ranks: Ranks = ALONE,
        examinations: Mapping[str, Examination] | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.engine = engine
        self.ranks = ranks
        self.answers = AnswerLog(config, model, run.write_samples, ranks)
        self.student = Student(config, model, ranks, self.answers.wanted)
        weights = self.student.weights
        if ranks.size > 1:
            self.engine = SharedEngine(engine, ranks, weights.whole)
        self.task = task
        self.run = run
        self.reporter = reporter
        self.context = TeacherContext(config.teacher, model)
        self.data = data
        self.evaluator = Evaluator(
            config,
            model,
            self.engine,
            task,
            data.test,
            examinations or {},
            ranks,
            self.answers.keep_evaluation,
            partial(reporter.phase, "evaluate"),
        )

        self.teacher = Teacher(
            model.network, config.schedule, config.seed, config.teacher.storage, weights
        )
        self.schedule = schedule
        self.gain = RewardGain()
        self.collapse = CollapseDetector(
            config.collapse, config.rollout.max_new_tokens, config.eval.samples
        )
        self.signal = SignalWatch(config.steps)
        self.lines: list[dict[str, Any]] = []
        self.step = 0
        self.state = RunState(
            config, self.student, self.teacher, schedule, self.collapse, self.gain, run
        )
        self.clock = PhaseClock(model.device)
        self._logger: Logger | None = None  # open from the first step to the run's end

    # ---------------------------------------------------------------- the run

    def train(self, until: int | None = None) -> Status:
        """Run to `steps`, or to the collapse detector's stop, or to an interruption.

        `until`: stop after that step, if the run goes on beyond it, with the status "paused";
        nothing but the lines of the steps is written then, and another call goes on.

        Raises `RunFailed` when a loss or gradient is not finite, memory runs out or the disk
        refuses, and summary.json says "failed". The last finished step is checkpointed first: that
        before the step which failed or, where only its evaluation did, the step itself, and a
        resume evaluates it. The last checkpoint stands instead with checkpoint.every=0, where an
        update of a step that is not finished has already moved the weights, and where one of
        several ranks has run out of memory, since the others then wait for it at another point.
        """
        if self._logger is None:
            self._logger = Logger(self.config, self.run.path)
            self.reporter.start(self.step, self.config.steps)
        logger = self._logger
        interruption = Interruption(self.ranks.any if self.ranks.size > 1 else None)
        step = self.step
        status: Status = "failed"
        try:
            with interruption:
                if not self.lines:
                    self._evaluate_start(interruption, logger)
                while not self.ended and self.step != until:
                    step = self.step + 1
                    self._train_step(step, interruption, logger)
            if not self.ended:
                status = "paused"
                return status
            status = "done" if self.collapse.step is None else "collapsed"
        except Interrupted:
            kept = "saving the last finished step" if self.config.checkpoint.every else "not saved"
            self.reporter.message(f"interrupted: {kept}")
            if self.lines:
                self._save()
            status = "interrupted"
        except RunFailed as error:
            failed = RunFailed(f"step {step}: {error}")
            failed.alone = self._alone(error)
            with suppress(RunFailed):  # a full disk refuses these, too
                with nullcontext() if failed.alone else self.ranks.together():
                    self.run.write_summary(self.summary("failed"))
                if self.lines and not self.student.moved and not failed.alone:
                    self._save()
            raise failed from error
        finally:
            if status != "paused":
                self._close_logger()
        self._write_end(status)
        return status

    def leave(self) -> None:
        """Save the last finished step of a paused run and close it as an interrupted one."""
        if self.lines:
            self._save()
        self._close_logger()
        self._write_end("interrupted")

    def _write_end(self, status: Status) -> None:
        self.run.write_summary(self.summary(status))
        if self.ranks.main:  # a run that was killed while it deleted the old ones may be finished
            checkpoint.prune(self.run.checkpoints, self.config.checkpoint.keep, self._lasting())

    def _close_logger(self) -> None:
        if self._logger is not None:
            self._logger.close()
            self._logger = None

    def resume(self) -> None:
        """Continue from the newest checkpoint, or from the start where there is none yet, and
        write the configuration, whose `steps` may be new."""
        path = checkpoint.latest(self.run.checkpoints)
        if path is None:
            self.run.write_config(self.config)
            self.run.clear()
            self.reporter.message("no checkpoint yet: starting over at step 0")
            return
        stored = self.state.restore(path)
        self.step = stored.step
        if not stored.hashed:
            self.reporter.message(f"{path} is of an earlier release: it has no hashes to check")
        closing = self.config.eval.due_at_the_end(self.step)
        self.lines = self.run.rewind(
            self.step, self.config, without_evaluation=closing and not self.ended
        )
        if self.config.eval.due(self.step) or (closing and self.ended):
            kept = {k: v for k, v in self.lines[-1].items() if k.startswith("eval/")}
            if kept:  # the state may be from before it; seen twice, it says the same
                self.collapse.observe({"step": self.step, **kept})
            else:  # it failed, or the run went on at this step, at which `steps` now ends it
                evaluation = self.evaluator.evaluate(self.step)
                self.lines[-1] |= evaluation
                self._observe_collapse({"step": self.step, **evaluation})
                self.run.write_metrics(self.lines)
        self._event(self.step, "resume")

    def _evaluate_start(self, interruption: Interruption, logger: Logger) -> None:
        line: dict[str, Any] = {"step": 0}
        if self.config.eval.every:
            line |= self.evaluator.evaluate(0)
        with interruption.shielded():
            self.collapse.observe(line)
            self.state.take(0)
            self._commit(line, logger)
            self._save()

    # ---------------------------------------------------------------- one step

    def _train_step(self, step: int, interruption: Interruption, logger: Logger) -> None:
        self.clock.reset()
        self.student.moved = False
        interruption.boundary()
        with self.clock("rollout"):
            rollouts = self._rollout(step)
        passes = pass_metrics("rollout/tokens_per_pass", self.engine)
        updates = self.student.plan(step, rollouts)
        interruption.boundary()
        probed = self._probe(step, rollouts)
        interruption.boundary()
        with self.clock("teacher"):
            if self.config.objective.old_logprob == "recompute":
                rollouts = replace(rollouts, samples=self.student.recompute(rollouts.samples))
            scores = self._score(rollouts, updates)
        interruption.boundary()
        line: dict[str, Any] = {"step": step, **self._statistics(rollouts), **probed, **passes}

        def before_first() -> None:  # from here on a step is finished, or it never happened
            shield.enter_context(interruption.shielded())
            self.teacher.prepare_update()

        with ExitStack() as shield:
            with self.clock("train"):
                progress = partial(self.reporter.phase, "train")
                line |= self.student.update(step, rollouts, updates, scores, before_first, progress)
            del scores
            gain = self.gain.observe([q.id for q in rollouts.questions], rollouts.group_means)
            line |= self._move_teacher(step, line | gain) | gain
            line |= self.clock.metrics(sum(len(sample.response) for sample in rollouts.samples))
            self._finish(line, rollouts, logger)

    def _rollout(self, step: int) -> Rollouts:
        config = self.config.rollout
        count = config.samples_per_prompt
        cursor = (step - 1) * config.prompts_per_step
        arrived = [question for question in self.data.train if question.arrival <= step]
        order = PromptOrder(self.config.seed, len(arrived))
        questions = [arrived[index] for index in order.take(cursor, config.prompts_per_step)]
        prompts = [to_ids(self.model.encode_question(question)) for question in questions]
        samples = self.engine.generate(
            [prompt for prompt in prompts for _ in range(count)],
            range(len(prompts) * count),
            Sampling.of(self.config, config),
            SampleKey(draw_key(self.config.seed, Stream.ROLLOUT), step),
            partial(self.reporter.phase, "rollout"),
        )
        texts = [self.model.decode(sample.response) for sample in samples]
        asked = [question for question in questions for _ in range(count)]
        grades = grade_answers(self.config, self.task, asked, texts, self.ranks)
        grades = with_noise(self.config, step, grades)
        contexts = teacher_prompts(self.config, self.context, step, asked, texts, grades)
        advantages = group_advantages(
            [grade.reward for grade in grades], count, self.config.objective.normalize_advantage
        )
        return Rollouts(questions, samples, texts, grades, contexts, advantages)

    def _probe(self, step: int, rollouts: Rollouts) -> dict[str, float]:
        """What the schedule wants to know of both possible teachers; only `evidence` asks."""
        if not is_due(self.config, step):
            return {}
        with self.clock("probe"):
            measured = probe(
                self.config,
                self.model,
                self.engine,
                self.task,
                self.teacher,
                rollouts.questions,
                [None if hint is None else hint.prompt for hint in rollouts.contexts],
                step,
                self.ranks,
                partial(self.reporter.phase, "probe"),
            )
        return {**measured, "probe/longest": longest_mean(rollouts.samples)}

    def _score(self, rollouts: Rollouts, updates: Sequence[Update]) -> TeacherScores:
        self.reporter.phase("teacher")
        read = {row for update in updates for row in update.rows}
        if self.config.objective.distill_coef == 0:
            read.clear()
        return self.teacher.score(
            [
                hint.prompt if hint is not None and row in read else None
                for row, hint in enumerate(rollouts.contexts)
            ],
            [sample.response for sample in rollouts.samples],
            self.config.scoring_tokens,
        )

    def _statistics(self, rollouts: Rollouts) -> dict[str, Any]:
        config = self.config
        shown = [context is not None for context in rollouts.contexts]
        return {
            **reward_metrics(rollouts.rewards, rollouts.group_size, config.teacher.success_reward),
            **length_metrics(rollouts.samples, config.length_shards),
            "distill/reprompt_fraction": sum(shown) / len(shown),
            "policy/entropy": mean_entropy(rollouts.samples),
        }

    def _move_teacher(self, step: int, line: dict[str, Any]) -> dict[str, Any]:
        """Let the schedule decide and the teacher follow; write the events, return the metrics."""
        with self.ranks.together():
            decision = self.schedule.observe_line(line)
        decision = self.ranks.gather(decision)[0]  # a user's schedule may draw random numbers
        with oom_hint("refresh"):
            moved = self.teacher.apply(decision, step)
            drift = None if moved is None else float(moved)
        finite = self.student.weights.finite() if drift is None else isfinite(drift)
        if self.ranks.any(not finite):
            raise RunFailed("the update made weights that are not finite: lower optimizer.lr")
        copied = decision.action == "copy"
        if decision.gates is not None:
            self._event(step, "gate", gates=decision.gates, refresh=copied)
        if copied:
            self._event(step, "refresh", shock=drift, age=decision.age)
        metrics: dict[str, Any] = {} if drift is None else {"teacher/drift": drift}
        metrics |= decision.metrics
        if decision.age is not None:
            metrics |= {"teacher/age": decision.age, "teacher/refreshed": int(copied)}
        return metrics

    def _finish(self, line: dict[str, Any], rollouts: Rollouts, logger: Logger) -> None:
        """Evaluate where due, detect a collapse, write answers and line, checkpoint where due.

        Where an evaluation fails the step is kept all the same, and a resume makes up for it.
        """
        step = line["step"]
        evaluated, failed = self.config.eval.due(step), None
        if evaluated:
            failed = self._examine(line)
        self._observe_collapse(line)
        self.step = step
        self.state.take(step)  # before a closing evaluation: see `EvalConfig.due_at_the_end`
        if self.ended and self.config.eval.due_at_the_end(step):
            evaluated, closing = True, {"step": step}
            failed = self._examine(closing)
            line |= closing
            self._observe_collapse(closing)
        if self.answers.due(step, evaluated):
            self.answers.keep_rollouts(step, rollouts)
        self._commit(line, logger)
        every = self.config.checkpoint.every
        if self.ended or (every and step % every == 0) or step in self._lasting():
            self._save()
        if failed is not None:
            self.student.moved = False  # from the step that stands: `train` saves it
            raise failed

    def _examine(self, line: dict[str, Any]) -> RunFailed | None:
        """Add the evaluation of its step to a line; returns why that failed, if it did."""
        try:
            line |= self.evaluator.evaluate(line["step"])
        except RunFailed as error:
            if self._alone(error):
                raise
            return error
        return None

    def _observe_collapse(self, line: dict[str, Any]) -> None:
        reason = self.collapse.observe(line)
        if reason is not None:
            self._event(line["step"], "collapse", **reason)
            self.reporter.message(f"collapse at step {line['step']}: {reason}")

    def _commit(self, line: dict[str, Any], logger: Logger) -> None:
        self.lines.append(line)
        self._append(self.run.metrics, line)
        logger.log(line)
        self.reporter.line(line)
        if missing := self.signal.observe(line):
            self.reporter.message(missing)

    # ---------------------------------------------------------------- small parts

    def _alone(self, error: RunFailed) -> bool:
        """Whether one of several ranks has failed without the others, which wait for it."""
        return self.ranks.size > 1 and isinstance(error.__cause__, OutOfMemoryError)

    @property
    def ended(self) -> bool:
        """Whether no step is left."""
        collapsed = self.config.collapse.stop and self.collapse.step is not None
        return self.step >= self.config.steps or collapsed

    def _lasting(self) -> set[int]:
        return lasting_steps(self.config, self.lines)

    def _event(self, step: int, event: str, **fields: Any) -> None:
        self._append(self.run.events, {"step": step, "event": event, **fields})

    def _append(self, file: Path, line: dict[str, Any]) -> None:
        with self.ranks.together():
            self.run.append(file, line)

    def _save(self) -> None:
        """Write the checkpoint of `step`, unless it is there, or checkpoint.every=0 and
        checkpoint.at does not name it."""
        if not self.config.checkpoint.every and self.step not in self.config.checkpoint.at:
            return
        self.reporter.phase("checkpoint")
        if self.state.save(self._lasting()):
            self._event(self.step, "checkpoint")

    def summary(self, status: Status) -> dict[str, Any]:
        return {
            **summarize(self.lines, self.config.eval.samples),
            "status": status,
            "collapse_step": self.collapse.step,
            "seed": self.config.seed,
            "schedule": self.config.schedule.kind,
            "dropped_prompts": self.data.dropped,
        }
