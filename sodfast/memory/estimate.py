"""The bytes of one configuration, item by item.

Weights, gradients, optimizer state, teacher, its hidden states and the cache have known sizes. What
the phases allocate beside them is measured on tensors without memory (trace.py).

All of it is what one process takes that has the GPU and the model to itself. Every phase is taken
at its largest: the teacher has weights of its own, and gradients are there from an earlier
micro-batch. What the objective takes for its slabs of logits and its statistics is part of the
activations. Left out: what CUDA itself holds (about half a GiB outside the allocator) and fragments
between the allocator's blocks.
"""

import json
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from sodfast_kernels import AdamW, ParameterUpdate
from sodfast_kernels.parameters import empty_state
from sodfast_kernels.philox import CHUNK

from sodfast.config import ArithmeticConfig, Config
from sodfast.errors import UsageError
from sodfast.memory.network import FAKE, architecture, block_sizes, empty_network, parameter_sizes
from sodfast.memory.trace import LiveBytes, Sequences, peak, prefill, scoring, training
from sodfast.model.language_model import output_head, trained_parameters
from sodfast.model.packing import micro_batches
from sodfast.optimizer import build_optimizer
from sodfast.parallel.fsdp import Weights
from sodfast.parallel.offload import SLOTS, block_bytes, blocks, pinned_bytes
from sodfast.rollout.batch import packs
from sodfast.rollout.cache import Cache
from sodfast.rollout.decoder import unsupported
from sodfast.rollout.native import CacheSize, cache_size
from sodfast.rollout.passes import CPU_ROWS, idle_rows, state_bytes
from sodfast.rollout.speculation import (
    ANSWER_OVERHEAD,
    MOST_QUERIES,
    MOST_TEXT_BYTES,
    MOST_TOKENS,
    REMEMBERED,
    draft_bytes,
    resolved,
)
from sodfast.schedule import average_rate, student_share

GIB = 2**30
BUDGET_GIB = 78.0  # of allocator memory on an 80 GB card
# What model.kept_layers=auto fills up at most: a run's memory may be 5 % from the plan's.
AUTO_SHARE = 0.95
# Of each stream that multiplies, for good, on a Hopper GPU; others have less.
CUBLAS_WORKSPACE = 32 * 2**20

Items = dict[str, int]  # item → bytes


@dataclass(frozen=True)
class Lengths:
    """Tokens of one rollout; `context`: of the teacher's prompt, None where it scores nothing."""

    prompt: int
    context: int | None
    response: int


class Estimate:
    """The sizes of one configuration whose steps have these `rollouts`, groups one after the other,
    each update taking an equal part of them; None: all of them at their caps.

    `budget` [bytes]: of the device. `parameters`: how many numbers the model has. `token_bytes`:
    keys and values of one token.

    Raises `UsageError` for a model whose config.json is not at hand or that cannot be trained here,
    and for an engine whose memory is not known.
    """

    def __init__(self, config: Config, rollouts: Sequence[Lengths] | None = None) -> None:
        if config.rollout.engine == "vllm":
            raise UsageError(
                "rollout.engine=vllm keeps memory of its own, which is not planned: plan with "
                "rollout.engine=native"
            )
        self.config = config
        self.on_gpu = config.device.startswith("cuda") or (
            config.device == "auto" and torch.cuda.is_available()
        )
        self.budget = int((config.memory_gib or BUDGET_GIB) * GIB)
        self._network = partial(
            empty_network,
            json.dumps(architecture(config)),
            getattr(torch, config.model.dtype),
            config.model.gradient_checkpointing,
            self.on_gpu and config.model.liger is not False,
            config.model.lora,
        )
        self.network = self._network(0)
        self.head = output_head(self.network)
        # Gradients take as much as what is trained, and so does a teacher on the device.
        self.parameters, self.weights, self.trained = parameter_sizes(self.network)
        self.token_bytes = Cache.bytes_per_token(self.network)
        self.given = rollouts is not None
        self.rollouts = _at_the_caps(config) if rollouts is None else list(rollouts)
        self.longest = max(r.prompt for r in self.rollouts) + config.rollout.max_new_tokens
        self.native = config.rollout.engine != "hf" and unsupported(self.network) is None
        self.on_host = config.teacher.storage == "host"
        # The decoder's layers, and the runs of other parameters, as a teacher in host memory holds
        # and streams them.
        self.layers, self.others = block_sizes(self.network)
        # Trust region puts the hidden states and the heads of two models side by side.
        self.teachers = 1 if student_share(config.schedule) is None else 2

    @cached_property
    def phases(self) -> dict[str, Items]:
        """Bytes on the device by phase and item; a phase's peak is the sum of its items."""
        resident, scores = self._resident, self._scores()
        hidden = scores["teacher_hidden"]
        phases = {
            "rollout": {**resident, **self._sampling(evaluating=False)},
            "teacher": {
                **resident,
                "teacher_stream": self._stream(sum(self.others)),
                "teacher_hidden": hidden,
                # Those of two models exist once more while they are put side by side.
                "activations": max(self._scoring(), hidden if self.teachers == 2 else 0),
            },
            "train": {
                **resident,
                **scores,
                "gradients": self.trained,
                "activations": self._training(self.kept_layers),
            },
            "refresh": {
                **resident,
                "teacher_stream": self._stream(max(self.others)),
                "activations": self._moving_the_teacher(),
            },
        }
        if self.config.eval.every:
            phases["evaluate"] = {**resident, **self._sampling(evaluating=True)}
        if not self.on_gpu and self.native:
            # There the engine keeps its cache's memory for the next call.
            kept = max(items.get("kv_cache", 0) for items in phases.values())
            phases = {phase: {**items, "kv_cache": kept} for phase, items in phases.items()}
        return {
            phase: {item: count for item, count in items.items() if count}
            for phase, items in phases.items()
        }

    @property
    def peaks(self) -> Items:
        """Phase → bytes."""
        return {phase: sum(items.values()) for phase, items in self.phases.items()}

    @property
    def fits(self) -> bool:
        return self.refused is None and max(self.peaks.values()) <= self.budget

    @property
    def refused(self) -> str | None:
        """Why the engine would not start, whatever the sums say."""
        return self.cache(evaluating=False)[1] if self.native else None

    @property
    def cache_bytes(self) -> int:
        """What the rollout's cache could take at most."""
        return max(0, self.budget - self.peaks["rollout"] + self.phases["rollout"]["kv_cache"])

    @property
    def host(self) -> Items:
        """Bytes in host memory beside a GPU's: the weights on their way from disk, unless they are
        drawn on the GPU, the teacher's pinned buffers, and the earlier answers that drafts are
        looked up in, as many as are remembered at most."""
        if not self.on_gpu:
            return {}
        items = {} if self.config.model.random else {"loading": self.weights}
        if self.on_host:
            sizes = [*self.layers, *self.others]
            items["teacher"] = sum(map(pinned_bytes, sizes))
        return {**items, **self._answers}

    # ---------------------------------------------------------------- weights and their state

    @cached_property
    def _resident(self) -> Items:
        """What is there in every phase."""
        teacher = self.trained
        if self.on_host:
            # Without a GPU the host's memory is the device's.
            teacher = 0 if self.on_gpu else sum(self.layers) + sum(self.others)
        return {
            "weights": self.weights,
            "optimizer_state": self._state(),
            "teacher": teacher,
            # Steps are captured on a stream of their own.
            "workspaces": self.on_gpu * CUBLAS_WORKSPACE * (2 if self.native else 1),
            **({} if self.on_gpu else self._answers),
        }

    @property
    def _answers(self) -> Items:
        """Of the earlier answers that drafts are looked up in, which lie on the host: as many as
        are remembered at most, or of fewer questions all."""
        if not self._drafts:
            return {}
        config, task, tokens = self.config, self.config.task, REMEMBERED
        if isinstance(task, ArithmeticConfig) and not config.eval.tasks:
            answers = task.train * config.rollout.samples_per_prompt
            answers += task.test * config.eval.samples
            tokens = min(REMEMBERED, answers * (self.longest + ANSWER_OVERHEAD))
        return {"answers": 4 * tokens}

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.config.optimizer, Weights(self.network))

    def _state(self) -> int:
        group = self._optimizer.param_groups[0]
        if not isinstance(self._optimizer, AdamW):  # two moments and a count of steps
            return 2 * self.trained + 4 * len(group["params"])
        # A network has few shapes, however many layers it has.
        layouts = Counter((parameter.shape, parameter.dtype) for parameter in group["params"])
        total = 0
        with FAKE:
            for (shape, dtype), count in layouts.items():
                state = empty_state(torch.empty(shape, dtype=dtype), group["state"])
                total += count * sum(tensor.nbytes for tensor in state.values())
        return total

    def _stream(self, others: int) -> int:
        """Device buffers of a teacher in host memory: some layers, and `others` beside them. While
        it scores all of its other parameters are there, while it moves one such run at a time."""
        return SLOTS * max(self.layers) + others if self.on_host else 0

    # ---------------------------------------------------------------- teacher and training

    def _scores(self) -> Items:
        """What scoring leaves: hidden states of the scored responses, and the head."""
        tokens = sum(r.response for r in self.rollouts if r.context is not None)
        head = self.teachers * self.head.nbytes
        if self.teachers == 1 and self.on_host:
            # Held as part of the run of parameters that brought it.
            runs = [parameters for _, parameters in blocks(self.network)]
            (head,) = (block_bytes(run) for run in runs if any(p is self.head for p in run))
        elif self.teachers == 1 and not self.head.requires_grad:
            head = 0  # it stays as it is and is not copied
        hidden = tokens * self.teachers * self.head[0].nbytes
        return {"teacher_hidden": hidden, "teacher_head": head}

    def _scoring(self) -> int:
        scored = [(r.context, r.response) for r in self.rollouts if r.context is not None]
        if not scored:
            return 0
        batch, _ = self._heaviest(scored, self.config.scoring_tokens)
        rows = sum(response for _, response in batch)
        return peak(self.network, scoring, batch) - rows * self.head[0].nbytes

    @cached_property
    def kept_layers(self) -> int:
        """How many of the last layers keep their activations although the others do not; 0 where
        all do."""
        kept = self.config.model.kept_layers
        if not self.config.model.gradient_checkpointing:
            return 0
        if kept != "auto":
            return kept
        taken = sum((self._resident | self._scores()).values()) + self.trained
        room = int(self.budget * AUTO_SHARE) - taken
        return bisect(range(1, len(self.layers) + 1), room, key=self._training)

    def _training(self, kept: int) -> int:
        """Beside full gradients: of the heaviest micro-batch, or of the optimizer's step. `kept`:
        layers that keep their activations although the others do not."""
        network = self._network(kept)
        size = len(self.rollouts) // self.config.optimizer.updates_per_step
        most = self._stepping()
        for i in range(0, len(self.rollouts), size):
            update = [(r.prompt, r.response) for r in self.rollouts[i : i + size]]
            batch, accumulating = self._heaviest(update, self.config.optimizer.micro_batch_tokens)
            taken = peak(
                network,
                training,
                self.config.objective,
                batch,
                self.teachers * self.head.shape[1],
                accumulating,
                self.on_gpu,
                whole=not accumulating,
                last=kept,
            )
            most = max(most, taken if accumulating else taken - self.trained)
        return most

    def _heaviest(self, lengths: list[tuple[int, int]], budget: int) -> tuple[Sequences, bool]:
        """Of the micro-batches within `budget` tokens the one of the most, and whether there are
        others. At the caps it is then filled up with the response to a prompt of one token, so that
        no other can be larger."""
        groups = list(micro_batches([sum(pair) for pair in lengths], budget))
        batches = [tuple(lengths[i] for i in group) for group in groups]
        heaviest = max(batches, key=lambda batch: sum(map(sum, batch)))
        room = budget - sum(map(sum, heaviest))
        if not self.given and len(batches) > 1 and room > 1:
            heaviest += ((1, room - 1),)
        return heaviest, len(batches) > 1

    # The PyTorch paths of `sodfast_kernels`, taken without a GPU, work on CHUNK elements at a time.
    # What they allocate is measured on as much of the largest parameter: real memory, but little.

    def _stepping(self) -> int:
        """Of the optimizer's step beside its state."""
        group = self._optimizer.param_groups[0]
        if self.on_gpu or not isinstance(self._optimizer, AdamW):
            return 0
        parameter, gradient = self._chunks()
        parameter.grad = gradient
        optimizer = AdamW([parameter], state=group["state"])
        optimizer.step()  # which makes the state
        with LiveBytes([parameter, gradient, *optimizer.state[parameter].values()]) as live:
            optimizer.step()
        return live.take_peak()

    def _moving_the_teacher(self) -> int:
        if self.on_gpu:
            return 0
        update = ParameterUpdate(average_rate(self.config.schedule))
        teacher, student = self._chunks()
        with LiveBytes([teacher, student]) as live:
            update.add([teacher], [student])
        return live.take_peak()

    def _chunks(self) -> Iterator[torch.Tensor]:
        """Two tensors of such a chunk's size."""
        largest = max(trained_parameters(self.network).values(), key=torch.Tensor.numel)
        size = min(largest.numel(), CHUNK)
        return (torch.zeros(size, dtype=largest.dtype) for _ in range(2))

    # ---------------------------------------------------------------- sampling

    def cache(self, evaluating: bool) -> tuple[CacheSize, str | None]:
        """The native engine's cache of one call. Where it would not start: the least that it would
        need, and why."""
        config, free = self.config.rollout, self.budget - sum(self._resident.values())
        _, _, sequences = self._asked(evaluating)
        rows = min(config.batch_size, sequences)
        size = partial(cache_size, self.network, self.longest, on_gpu=self.on_gpu, free=free)
        try:
            return size(rows=rows, cache_gib=config.cache_gib), None
        except UsageError as error:
            return size(rows=1, cache_gib=2.0**30), str(error)

    def at_once(self, evaluating: bool) -> int:
        """How many sequences are decoded together at the start of a call."""
        prompts, copies, sequences = self._asked(evaluating)
        if not self.native:
            return min(self.config.rollout.batch_size, sequences)
        size, _ = self.cache(evaluating)
        return size.at_once(prompts[0], copies, self.config.rollout.max_new_tokens)

    @property
    def _drafts(self) -> bool:
        """Whether passes of the rollouts check drafts."""
        setting = resolved(self.config.rollout.speculate, "cuda" if self.on_gpu else "cpu")
        return self.native and setting is not False

    def _asked(self, evaluating: bool) -> tuple[list[int], int, int]:
        """Tokens of the prompts of a call, the longest first, samples of each, and samples of all
        (of an evaluation as many as can be decoded at once, where the questions are not known)."""
        copies, sequences = self.config.rollout.samples_per_prompt, len(self.rollouts)
        prompts = sorted((r.prompt for r in self.rollouts[::copies]), reverse=True)
        if evaluating:
            task, copies = self.config.task, self.config.eval.samples
            sequences = self.config.rollout.batch_size
            if isinstance(task, ArithmeticConfig):
                sequences = min(task.test, self.config.eval.questions or task.test) * copies
            prompts = prompts[:1] * -(-sequences // copies)
        return prompts, copies, sequences

    def _text_bytes(self, evaluating: bool) -> int:
        """Of what a call's drafts are looked up in: a text for each of its samples, also of those
        that wait, and the last answers to the same prompts. As much as the engine takes at most
        where an evaluation's questions are not known."""
        config, task = self.config.eval, self.config.task
        samples = len(self.rollouts)
        if evaluating:
            tests = [task.test] if isinstance(task, ArithmeticConfig) else []
            tests += [] if config.questions is None else [config.questions]
            if not tests or config.tasks:
                return MOST_TEXT_BYTES
            samples = min(tests) * config.samples
        return min(MOST_TEXT_BYTES, draft_bytes(2 * samples + 1, self.longest))

    def _sampling(self, evaluating: bool) -> Items:
        """Cache and activations of the engine."""
        prompts, copies, _ = self._asked(evaluating)
        started, new_tokens = self.at_once(evaluating), self.config.rollout.max_new_tokens
        if not self.native:
            # All prompts of a batch at once, padded; the cache grows with the answers.
            activations = peak(self.network, scoring, ((prompts[0], 1),) * started)
            cached = started * self.longest * self.token_bytes
            return {"kv_cache": cached, "activations": activations}
        size, _ = self.cache(evaluating)
        rows = size.rows + idle_rows(size.rows, self.on_gpu)
        tokens, drafts = rows, 0  # of a captured step, and bytes
        if self._drafts:
            tokens = max(rows, MOST_TOKENS["cuda"])
            drafts = self._text_bytes(evaluating)
        started += idle_rows(started, self.on_gpu)
        groups = [
            (range(prompt), range(first, min(first + copies, started)))
            for prompt, first in zip(prompts, range(0, started, copies), strict=False)
        ]
        activations = max(
            peak(
                self.network,
                prefill,
                tuple((len(prompt), len(sharing)) for prompt, sharing in pack),
                size.page,
                size.pages,
                self.longest,
                self.on_gpu,
            )
            for pack in packs(groups)
        )
        if self._drafts and not self.on_gpu:
            # A pass with drafts, as a prefill of as many tokens with the logits of them all.
            blocks = -(-min(rows * MOST_QUERIES, MOST_TOKENS["cpu"]) // CPU_ROWS)
            prompts_of_pass = ((CPU_ROWS, CPU_ROWS),) * blocks
            longest = max(self.longest, CPU_ROWS)
            checked = peak(self.network, prefill, prompts_of_pass, None, 0, longest, False)
            activations = max(activations, checked)
        return {
            "kv_cache": size.bytes,
            # The logits of a captured step; its hidden states are small beside them.
            "graphs": tokens * len(self.head) * 4 if self.on_gpu else 0,
            "activations": activations + state_bytes(rows, new_tokens) + drafts,
        }


def _at_the_caps(config: Config) -> list[Lengths]:
    """A step's rollouts with every prompt and answer as long as it may be."""
    rollout, teacher = config.rollout, config.teacher
    context = None
    if config.objective.distill_coef > 0:
        shown = teacher.context != "none"
        context = teacher.max_prompt_tokens if shown else rollout.max_prompt_tokens
    longest = Lengths(rollout.max_prompt_tokens, context, rollout.max_new_tokens)
    return [longest] * (rollout.prompts_per_step * rollout.samples_per_prompt)
