"""The teacher's weights: where they are, and how a schedule's decision moves them.

The teacher needs no memory of its own while it equals the student. From the first update after
that on it is a copy, on the device or in host memory (parallel/offload.py). Nothing else in this
project moves the teacher; what it is shown is decided in context.py.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from sodfast_kernels import ema_update_
from torch import Tensor, nn

from sodfast.config import ScheduleConfig
from sodfast.model.language_model import output_head, trained_parameters
from sodfast.model.packing import micro_batches, response_hidden
from sodfast.parallel.fsdp import ShardedCopy, ShardedWeights, Weights
from sodfast.parallel.offload import HostCopy
from sodfast.schedule import Decision, student_share

# Steps from one measurement of the drift to the next while a teacher in host memory stands still:
# each streams all of its weights for nothing else. A window of the report's diagnostics has one.
DRIFT_EVERY = 5


@dataclass(frozen=True)
class TeacherScores:
    """Last hidden states [L_i, H'] of each rollout's response (None where there is no context),
    and the head [V, H'] they belong to. Logits are hidden @ head.T."""

    hidden: list[Tensor | None]
    head: Tensor


class Teacher:
    """Where the teacher's weights are, under every schedule.

    `weights` is None while the teacher equals the student. `prepare_update` must be called before
    the student's first update of a step, `apply` after its last.

    With storage="host" `weights` are in host memory, in the student's dtype, and pass through the
    device when they score or follow the student; all numbers are those of storage="device". Once
    allocated, host memory is kept over refreshes and written again by `prepare_update`.

    Where the student is sharded (`student_weights`) the teacher is, too, and takes its place to
    score.
    """

    def __init__(
        self,
        student: nn.Module,
        schedule: ScheduleConfig,
        seed: int,
        storage: Literal["device", "host"] = "device",
        student_weights: Weights | None = None,
    ) -> None:
        self.student = student
        self.student_weights = student_weights or Weights(student)
        self.seed = seed
        self.storage = storage
        self.store: HostCopy | ShardedCopy | None = None
        self.mix = student_share(schedule)
        self.weights: nn.Module | ShardedCopy | None = None

    @property
    def network(self) -> nn.Module:
        return self.weights if isinstance(self.weights, nn.Module) else self.student

    def own(self) -> dict[str, Tensor]:
        """The teacher's counterparts of the parameters that the student trains, or this rank's
        chunks of them."""
        if isinstance(self.weights, ShardedCopy):
            return self.weights.chunks
        named = dict(self.network.named_parameters())
        return {name: named[name].detach() for name in trained_parameters(self.student)}

    @torch.no_grad()
    def score(
        self,
        contexts: Sequence[Tensor | None],
        responses: Sequence[Tensor],
        micro_batch_tokens: int,
    ) -> TeacherScores:
        """Score the step's rollouts; only hidden states and the head outlive this phase.

        The head is taken before the student's first update, like the hidden states. Under trust
        region both models' hidden states stand side by side against both heads side by side:
        (1−τ)·h₀·W₀ᵀ + τ·h_θ·W_θᵀ is the mixture of the logits.
        """
        with self._on_device() as network:
            hidden = self._score(network, contexts, responses, micro_batch_tokens)
            head = output_head(network).detach()
            if network is self.student and output_head(network).requires_grad:
                head = head.clone()
        if self.weights is not None and self.mix is not None:
            with self.student_weights.whole():
                live = self._score(self.student, contexts, responses, micro_batch_tokens)
                head = torch.cat([head, output_head(self.student).detach()], 1)
            hidden = [
                None if a is None or b is None else torch.cat([(1 - self.mix) * a, self.mix * b], 1)
                for a, b in zip(hidden, live, strict=True)
            ]
        return TeacherScores(hidden, head)

    @contextmanager
    def _on_device(self) -> Iterator[nn.Module]:
        with ExitStack() as stack:
            network = self.network
            if self.weights is not None and self.store is not None:
                network = stack.enter_context(self.store.on_device())
            stack.enter_context(self.student_weights.whole())
            yield network

    @contextmanager
    def in_students_place(self) -> Iterator[None]:
        """A context in which the student's parameters hold the teacher's values, so that whatever
        reads the live student, such as a rollout engine, runs the teacher. Afterwards both have
        their own values again, bit for bit.

        Values are exchanged in place, a parameter at a time, whether the teacher is on the device,
        in host memory or in chunks on several ranks: pointers stay, as captured graphs and weights
        that lie side by side need it. No gradient graph may be alive.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.weights is None:
            return
        students = zip(self.student_weights.names, self.student_weights.parameters, strict=True)
        for own, (_, student) in zip(self.own().values(), students, strict=True):
            kept = student.detach().clone()
            student.copy_(own)
            own.copy_(kept)

    def _score(
        self,
        network: nn.Module,
        contexts: Sequence[Tensor | None],
        responses: Sequence[Tensor],
        micro_batch_tokens: int,
    ) -> list[Tensor | None]:
        chosen = {index: context for index, context in enumerate(contexts) if context is not None}
        scored = list(chosen)
        lengths = [len(chosen[index]) + len(responses[index]) for index in scored]
        hidden: list[Tensor | None] = [None] * len(contexts)
        for batch in micro_batches(lengths, micro_batch_tokens):
            indices = [scored[row] for row in batch]
            rows_NH = response_hidden(
                network,
                [chosen[index] for index in indices],
                [responses[index] for index in indices],
            )
            parts = rows_NH.split([len(responses[index]) for index in indices])
            for index, part in zip(indices, parts, strict=True):
                hidden[index] = part
        return hidden

    def prepare_update(self) -> None:
        """The student is about to move: from here on the teacher needs weights of its own."""
        if self.weights is not None:
            return
        if self.store is not None:
            self.store.copy_(self.student)
        elif isinstance(self.student_weights, ShardedWeights):
            self.store = ShardedCopy(self.student_weights, self.storage)
        elif self.storage == "host":
            self.store = HostCopy(self.student)
        else:
            # What is frozen is the same tensor in both.
            frozen = {id(p): p for p in self.student.parameters() if not p.requires_grad}
            self.weights = copy.deepcopy(self.student, frozen).requires_grad_(False)
            return
        self.weights = self.store.network if isinstance(self.store, HostCopy) else self.store

    @torch.no_grad()
    def apply(self, decision: Decision, step: int) -> Tensor | None:
        """Carry the schedule's decision out. Returns ‖θ − φ‖₂ from before the move, so at a copy
        this is the refresh shock ‖θ_t − φ_{t−1}‖₂ (arXiv 2606.03532 §3.2).

        None: not measured, since the teacher stands still in host memory and `step` is no multiple
        of DRIFT_EVERY.
        """
        if self.weights is None:
            raise RuntimeError("prepare_update must run before the student moves")
        if decision.action == "keep" and self.storage == "host" and step % DRIFT_EVERY:
            return None
        rate = decision.rate if decision.action == "average" else 0.0
        if self.store is not None:
            drift = self.store.update_(self.student, rate, seed=self.seed, step=step)
        else:
            teacher, student = self.own(), trained_parameters(self.student)
            drift = ema_update_(teacher.values(), student.values(), rate, seed=self.seed, step=step)
        if decision.action == "copy":
            self.weights = None
            if self.storage == "device":
                self.store = None
        return drift

    def load_weights(self, tensors: dict[str, Tensor] | None) -> None:
        """Restore the teacher from what `own` was at a checkpoint; None: it equals the student."""
        self.weights = None
        if tensors is not None:
            self.prepare_update()
            own = self.own()
            if own.keys() != tensors.keys():
                raise ValueError("the stored teacher has other parameters than the student")
            for name, weight in own.items():
                weight.copy_(tensors[name])
