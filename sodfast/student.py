"""The student's updates: what a step's rollouts weigh, their gradients, and the optimizer's call.

A step's questions are cut into updates, each with denominators of its own (`plan`). An update adds
up the gradients of its micro-batches and moves the weights once (`update`). Nothing else in this
project moves the student; where the teacher's weights are is decided in teacher.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sodfast import optimizer
from sodfast.config import Config
from sodfast.context import Hint
from sodfast.errors import RunFailed
from sodfast.metrics import TokenTotals
from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import micro_batches, response_hidden
from sodfast.objective import micro_batch_loss, sequence_weights
from sodfast.parallel.fsdp import ShardedWeights, Weights
from sodfast.parallel.ranks import Ranks
from sodfast.rng import Stream, generator
from sodfast.rollout.engine import Sample
from sodfast.rollout.scores import recompute
from sodfast.tasks.base import Grade, Question
from sodfast.teacher import TeacherScores


@dataclass(frozen=True)
class Rollouts:
    """One step's rollouts, groups of `samples_per_prompt` one after the other."""

    questions: list[Question]  # one per group
    samples: list[Sample]
    texts: list[str]
    grades: list[Grade]
    contexts: list[Hint | None]  # what the teacher is shown; None: nothing to distil (m_i = 0)
    advantages: list[float]
    # Index of a rollout → D_t [L] fp32 as the updates' loss gives it; filled where it is kept.
    divergences: dict[int, Tensor] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        return len(self.samples) // len(self.questions)

    @property
    def asked(self) -> list[Question]:
        """The question of every rollout."""
        return [question for question in self.questions for _ in range(self.group_size)]

    @property
    def rewards(self) -> list[float]:
        return [grade.reward for grade in self.grades]

    @property
    def group_means(self) -> list[float]:
        rewards, size = self.rewards, self.group_size
        return [sum(rewards[i : i + size]) / size for i in range(0, len(rewards), size)]


@dataclass(frozen=True)
class Update:
    """One optimizer update: the rollouts (indices) that have a gradient and that this rank runs,
    their weights (distill, policy, advantage), and how many passes each rank makes for its part."""

    rows: list[int]
    weights: list[tuple[float, float, float]]
    passes: int


class Student:
    """The weights that a run trains, of which several ranks have chunks, and their optimizer.

    `moved`: whether an update has been made since it was last set to False. With
    `keep_divergences` an update leaves the divergence of every token in its rollouts.
    """

    def __init__(
        self, config: Config, model: LanguageModel, ranks: Ranks, keep_divergences: bool
    ) -> None:
        self.config = config
        self.model = model
        self.ranks = ranks
        self.keep_divergences = keep_divergences
        self.weights = Weights(model.network)
        if ranks.size > 1:
            alignment = optimizer.alignment(config.optimizer, model.head.dtype)
            self.weights = ShardedWeights(model.network, ranks, alignment)
        self.optimizer = optimizer.build_optimizer(config.optimizer, self.weights, config.seed)
        self.moved = False

    @property
    def _budget(self) -> int:
        return self.config.optimizer.micro_batch_tokens

    def recompute(self, samples: list[Sample]) -> list[Sample]:
        """The samples with the log-probs of training's forward pass, each by one of the ranks."""
        with self.weights.whole():
            own = recompute(
                self.model,
                self.ranks.share(samples),
                self.config.rollout.temperature,
                self._budget,
            )
        return [sample for part in self.ranks.gather(own) for sample in part]

    def plan(self, step: int, rollouts: Rollouts) -> list[Update]:
        """The step's prompts are cut into `updates_per_step` equal parts in an order keyed by
        (seed, step); each part is one update with denominators of its own."""
        config = self.config
        count = rollouts.group_size
        groups = len(rollouts.questions)
        order = generator(config.seed, Stream.UPDATES, step).permutation(groups).tolist()
        size = groups // config.optimizer.updates_per_step
        updates = []
        for start in range(0, groups, size):
            rows = [
                group * count + sample
                for group in sorted(order[start : start + size])
                for sample in range(count)
            ]
            weights = sequence_weights(
                config.objective,
                [len(rollouts.samples[row].response) for row in rows],
                [rollouts.contexts[row] is not None for row in rows],
                [rollouts.advantages[row] for row in rows],
            )
            trained = [index for index in range(len(rows)) if weights.matters(index)]
            lengths = [rollouts.samples[rows[index]].length for index in trained]
            shares = self.ranks.deal(lengths)
            passes = [
                len(list(micro_batches([lengths[i] for i in share], self._budget)))
                for share in shares
            ]
            own = [trained[i] for i in shares[self.ranks.rank]]
            updates.append(
                Update([rows[i] for i in own], [weights.of(i) for i in own], max(passes))
            )
        return updates

    def update(
        self,
        step: int,
        rollouts: Rollouts,
        updates: Sequence[Update],
        scores: TeacherScores,
        before_first: Callable[[], object],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, float]:
        """Make all updates of a step; returns the statistics of their tokens as `distill/*`,
        `policy/*` and `optim/*`. `before_first` is called when the student is about to move.

        Raises `RunFailed` for a loss or gradient that is not finite."""
        config = self.config
        lr = optimizer.learning_rate(config.optimizer, step)
        totals = TokenTotals(self.model.device, config.objective.clip_range)
        norms = []
        for number, update in enumerate(updates):
            progress(number, len(updates))
            loss = self._accumulate_gradients(update, rollouts, scores, totals)
            norm = self.weights.gradient_norm()
            totals.sampled_by_these_weights = False
            if number == 0:
                before_first()
            self.moved = True
            try:
                clip_norm = config.optimizer.clip_norm
                norms.append(optimizer.update(self.optimizer, lr, clip_norm, loss, norm))
            except RunFailed:
                self.moved = number > 0  # only the updates before this one were made
                raise
        return {
            **totals.over(self.ranks).metrics(),
            "optim/loss": float(totals.loss) / len(norms),
            "optim/grad_norm": sum(norms) / len(norms),
            "optim/lr": lr,
        }

    def _accumulate_gradients(
        self,
        update: Update,
        rollouts: Rollouts,
        scores: TeacherScores,
        totals: TokenTotals,
    ) -> Tensor:
        """Gradients of one update, micro-batch by micro-batch; returns its loss over all ranks."""
        config = self.config
        samples = [rollouts.samples[row] for row in update.rows]
        teacher = [scores.hidden[row] for row in update.rows]
        loss = torch.zeros((), device=self.model.device)
        batches = list(micro_batches([sample.length for sample in samples], self._budget))
        for batch in batches:
            part = [samples[index] for index in batch]
            hidden_NH = response_hidden(
                self.model.network,
                [sample.prompt for sample in part],
                [sample.response for sample in part],
            )
            output = micro_batch_loss(
                config.objective,
                config.rollout.temperature,
                self.model.softcap,
                hidden_NH,
                self.model.head,
                [teacher[index] for index in batch],
                scores.head,
                part,
                [update.weights[index] for index in batch],
            )
            output.loss.backward()
            loss += output.loss.detach()
            distilled = [teacher[index] is not None for index in batch]
            totals.add(output, part, distilled)
            if self.keep_divergences:
                lengths = [len(sample.response) for sample in part]
                parts = output.divergence.clone().split(lengths)  # without the other statistics
                found = zip(batch, distilled, parts, strict=True)
                rollouts.divergences.update((update.rows[i], d) for i, m, d in found if m)
        for _ in range(update.passes - len(batches)):
            self.weights.idle_pass()
        loss = self.ranks.sum(loss)
        totals.loss += loss
        return loss
