"""The bytes of one configuration, item by item.

Weights, gradients, optimizer state, teacher, its hidden states and the cache have known sizes. What
the phases allocate beside them is measured on tensors without memory (rehearsal.py).

All of it is what one process takes that has the GPU and the model to itself. Every phase is taken
at its largest: the teacher has weights of its own, and gradients are there from an earlier
micro-batch. Left out: what CUDA itself holds (about half a GiB outside the allocator), workspaces
of matrix products, captured graphs, and fragments between the allocator's blocks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sodfast_kernels
import torch
from huggingface_hub import try_to_load_from_cache
from sodfast_kernels.parameters import empty_state

from sodfast.config import PRESETS, Config, LoRAConfig
from sodfast.decoder import Cache, unsupported
from sodfast.errors import UsageError
from sodfast.model import output_head, trained_parameters
from sodfast.native import CPU_ROWS, MEMORY_SHARE, PREFILL_TOKENS, slot_bytes, state_bytes
from sodfast.optimizer import build_optimizer
from sodfast.packing import micro_batches
from sodfast.rehearsal import Rehearsal
from sodfast.sharding import Weights
from sodfast.streaming import SLOTS, block_bytes, blocks
from sodfast.tasks import ArithmeticConfig

GIB = 2**30
BUDGET_GIB = 78.0  # of allocator memory on an 80 GB card

Items = dict[str, int]  # item → bytes
Sequences = tuple[tuple[int, int], ...]  # (prompt, response) tokens of a micro-batch


@dataclass(frozen=True)
class Lengths:
    """Tokens of one rollout; `context`: of the teacher's prompt, None where it scores nothing."""

    prompt: int
    context: int | None
    response: int


class Footprint:
    """The sizes of one configuration whose steps have these `rollouts`, groups one after the other,
    each update taking an equal part of them; None: all of them at their caps.

    Raises `UsageError` for a model whose config.json is not at hand or that cannot be trained here,
    and for an engine whose memory is not known.
    """

    def __init__(self, config: Config, rollouts: Sequence[Lengths] | None) -> None:
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
        self.rehearsal = _rehearsal(
            json.dumps(architecture(config)),
            config.model.dtype,
            config.model.gradient_checkpointing,
            self.on_gpu and config.model.liger is not False,
            config.model.lora,
        )
        self.network = self.rehearsal.network
        self.head = output_head(self.network)
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self.weights = sum(p.nbytes for p in self.network.parameters())
        # As much again are gradients, and the teacher on the device.
        self.trained = sum(p.nbytes for p in trained_parameters(self.network).values())
        self.given = rollouts is not None
        self.rollouts = self._at_the_caps() if rollouts is None else list(rollouts)
        # Under trust region the hidden states and heads of two models stand side by side.
        self.teachers = 2 if config.schedule.kind == "trust_region" else 1
        self.native = config.rollout.engine != "hf" and unsupported(self.network) is None

    def phases(self) -> dict[str, Items]:
        """Bytes on the device by phase and item; a phase's peak is the sum of its items."""
        resident = self._resident()
        scores = self._scores()
        phases = {
            "rollout": {**resident, **self._sampling(evaluating=False)},
            "teacher": {
                **resident,
                **self._streamed(scoring=True),
                "teacher_hidden": scores["teacher_hidden"],
                # Two models' hidden states are there apart while they are put side by side.
                "activations": max(
                    self._scoring(), scores["teacher_hidden"] if self.teachers == 2 else 0
                ),
            },
            "train": {
                **resident,
                **scores,
                "gradients": self.trained,
                "activations": self._training(),
            },
            "refresh": {
                **resident,
                **self._streamed(scoring=False),
                "activations": self._following(),
            },
            "evaluate": {**resident, **self._sampling(evaluating=True)},
        }
        if not self.on_gpu and self.native:
            # There the engine keeps its cache's memory for the next call.
            kept = max(phases[phase]["kv_cache"] for phase in ("rollout", "evaluate"))
            phases = {phase: {**items, "kv_cache": kept} for phase, items in phases.items()}
        return {
            phase: {item: count for item, count in items.items() if count}
            for phase, items in phases.items()
        }

    def _at_the_caps(self) -> list[Lengths]:
        config = self.config
        prompt, context = config.rollout.max_prompt_tokens, config.teacher.max_prompt_tokens
        scored = config.objective.distill_coef > 0
        unshown = config.teacher.context == "none"
        count = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        longest = Lengths(
            prompt, (prompt if unshown else context) if scored else None,
            config.rollout.max_new_tokens,
        )  # fmt: skip
        return [longest] * count

    # ---------------------------------------------------------------- what is there throughout

    def _resident(self) -> Items:
        teacher = self.trained
        if self.config.teacher.storage == "host":
            # Without a GPU the host's memory is the device's.
            sizes = [block_bytes(parameters) for _, parameters in blocks(self.network)]
            teacher = 0 if self.on_gpu else sum(sizes)
        return {"weights": self.weights, "optimizer_state": self._state(), "teacher": teacher}

    def _state(self) -> int:
        optimizer = build_optimizer(self.config.optimizer, Weights(self.network))
        group = optimizer.param_groups[0]
        if not isinstance(optimizer, sodfast_kernels.AdamW):  # two moments and a count of steps
            return 2 * self.trained + 4 * len(group["params"])
        with self.rehearsal.mode:
            states = [empty_state(p, group["state"]) for p in group["params"]]
        return sum(tensor.nbytes for state in states for tensor in state.values())

    def host(self) -> Items:
        """Bytes in host memory beside a GPU's: the weights on their way from disk, and the teacher,
        each of whose pinned buffers torch rounds up to a power of two."""
        if not self.on_gpu:
            return {}
        items = {"loading": self.weights}
        if self.config.teacher.storage == "host":
            sizes = [block_bytes(parameters) for _, parameters in blocks(self.network)]
            items["teacher"] = sum(1 << (size - 1).bit_length() for size in sizes)
        return items

    def _streamed(self, scoring: bool) -> Items:
        """Device buffers of a teacher in host memory: while it scores everything outside of the
        layers is there, while it follows the student one such block at a time."""
        if self.config.teacher.storage != "host":
            return {}
        layers = [block_bytes(ps) for layer, ps in blocks(self.network) if layer is not None]
        others = [block_bytes(ps) for layer, ps in blocks(self.network) if layer is None]
        slots = SLOTS * max(layers)
        return {"teacher_stream": slots + (sum(others) if scoring else max(others))}

    # ---------------------------------------------------------------- teacher and training

    def _scores(self) -> Items:
        """What scoring leaves: hidden states of the scored responses, and the head, which is held
        as part of the block that brought it where the teacher is streamed."""
        tokens = sum(r.response for r in self.rollouts if r.context is not None)
        # One that stays as it is is not copied.
        head = self.teachers * self.head.nbytes
        if not self.head.requires_grad and self.teachers == 1:
            head = 0
        if self.config.teacher.storage == "host" and self.teachers == 1:
            (head,) = (
                block_bytes(parameters)
                for _, parameters in blocks(self.network)
                if any(parameter is self.head for parameter in parameters)
            )
        hidden = tokens * self.teachers * self.head[0].nbytes
        return {"teacher_hidden": hidden, "teacher_head": head}

    def _scoring(self) -> int:
        scored = [r for r in self.rollouts if r.context is not None]
        if not scored:
            return 0
        batch = self._micro_batches([(r.context or 0, r.response) for r in scored])[0]
        rows = sum(response for _, response in batch)
        return self.rehearsal.scoring(batch) - rows * self.head[0].nbytes

    def _training(self) -> int:
        """Beside full gradients: of the heaviest micro-batch, or of the optimizer's step."""
        config = self.config
        size = len(self.rollouts) // config.optimizer.updates_per_step
        updates = [self.rollouts[i : i + size] for i in range(0, len(self.rollouts), size)]
        most = self._updating()
        for update in updates if self.given else updates[:1]:
            first, *rest = self._micro_batches([(r.prompt, r.response) for r in update])
            if self.given or not rest:
                most = max(most, self._backward(first, False) - self.trained)
            if rest:
                heaviest = max(rest, key=lambda batch: sum(map(sum, batch)))
                most = max(most, self._backward(heaviest if self.given else first, True))
        return most

    def _backward(self, batch: Sequences, accumulating: bool) -> int:
        softcap = getattr(self.network.config, "final_logit_softcapping", None)
        width = self.teachers * self.head.shape[1]
        return self.rehearsal.training(
            self.config.objective, softcap, batch, width, accumulating, self.on_gpu
        )

    def _micro_batches(self, lengths: list[tuple[int, int]]) -> list[Sequences]:
        """As training cuts them, the longest sequence in the first. At the caps that one is filled
        up with responses to the least of prompts, as no other micro-batch is larger."""
        budget = self.config.optimizer.micro_batch_tokens
        totals = [sum(pair) for pair in lengths]
        batches = [tuple(lengths[i] for i in group) for group in micro_batches(totals, budget)]
        if not self.given and len(batches) > 1:
            first, room = list(batches[0]), budget - sum(map(sum, batches[0]))
            if room > 1:
                first.append((1, room - 1))
            batches[0] = tuple(first)
        return batches

    def _updating(self) -> int:
        """Of the optimizer's step: only the PyTorch path takes any."""
        group = build_optimizer(self.config.optimizer, Weights(self.network)).param_groups[0]
        return 0 if self.on_gpu or "state" not in group else self.rehearsal.updating(group["state"])

    def _following(self) -> int:
        """Of the teacher's move, likewise."""
        schedule = self.config.schedule
        rate = schedule.rate if schedule.kind == "ema" else 0.0
        return 0 if self.on_gpu else self.rehearsal.following(rate)

    # ---------------------------------------------------------------- sampling

    @property
    def refused(self) -> str | None:
        """Why the engine would not start: its cache does not hold the least at a time."""
        if not self.native or self._slots():
            return None
        step, least = self._least()
        return (
            f"rollout: the keys and values of {step} sequence{'s' * (step > 1)} of {self.longest} "
            f"tokens, the least at a time, take {least / GIB:.2f} GiB and the cache may have "
            f"{max(0.0, self._cache_budget()) / GIB:.2f} GiB"
        )

    def _sampling(self, evaluating: bool) -> Items:
        """Cache and activations of the engine."""
        config = self.config.rollout
        copies = config.samples_per_prompt
        prompts = sorted((r.prompt for r in self.rollouts[::copies]), reverse=True)
        wanted = len(self.rollouts)
        if evaluating:
            task, copies, wanted = self.config.task, self.config.eval.samples, config.batch_size
            if isinstance(task, ArithmeticConfig):
                wanted = task.test * copies
            prompts = prompts[:1] * -(-wanted // copies)
        if not self.native:
            # All prompts of a batch at once, padded; the cache grows with the answers.
            rows = min(config.batch_size, wanted)
            activations = self.rehearsal.scoring(((prompts[0], 1),) * rows)
            kv_cache = rows * self.longest * self.token_bytes
            return {"kv_cache": kv_cache, "activations": activations}
        step, _ = self._least()
        rows = min(self._slots() or step, wanted)
        rows += -rows % step
        packed: list[int] = []
        for prompt in prompts[: -(-rows // copies)]:
            if not packed or sum(packed) + prompt <= PREFILL_TOKENS:
                packed.append(prompt)
        activations = self.rehearsal.prefill(tuple(packed), copies, self.longest, self.on_gpu)
        return {
            "kv_cache": rows * slot_bytes(self.network, self.longest),
            "activations": activations + state_bytes(rows, config.max_new_tokens),
        }

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the engine may have to hold."""
        return max(r.prompt for r in self.rollouts) + self.config.rollout.max_new_tokens

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        if self.native:
            return Cache.bytes_per_token(self.network)
        config = self.network.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return config.num_hidden_layers * 2 * kv_heads * size * self.head.element_size()

    def _least(self) -> tuple[int, int]:
        """Sequences that the native engine decodes at once at least, and the bytes of their cache.
        They are also what it takes more by."""
        step = 1 if self.on_gpu else CPU_ROWS
        return step, step * slot_bytes(self.network, self.longest)

    def _cache_budget(self) -> float:
        if self.config.rollout.cache_gib is not None:
            return self.config.rollout.cache_gib * GIB
        free = self.budget - sum(self._resident().values())
        return free * MEMORY_SHARE["cuda" if self.on_gpu else "cpu"]

    def _slots(self) -> int:
        step, least = self._least()
        slots = max(0, int(self._cache_budget() // least)) * step
        return min(self.config.rollout.batch_size, slots)


def architecture(config: Config) -> dict[str, Any]:
    """The contents of the model's config.json: the lab's, a directory's, the hub cache's, or those
    of a known model.

    Raises `UsageError` where there is none.
    """
    path = config.model.path
    if path is None:
        from sodfast import lab

        return lab.architecture(config.lab).to_dict()
    known = json.loads((PRESETS / "models.json").read_text())
    if path in known:
        return known[path]
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        try:
            found = try_to_load_from_cache(path, "config.json")
        except ValueError:  # no id at all
            found = None
        if not isinstance(found, str):
            raise UsageError(
                f"model.path={path}: a plan needs the model's config.json: give a directory that "
                f"holds it, or one of {', '.join(known)}"
            )
        file = Path(found)
    try:
        contents = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"model.path={path}: its config.json cannot be read: {error}") from error
    if not isinstance(contents, dict) or "model_type" not in contents:
        raise UsageError(f"model.path={path}: its config.json names no model_type")
    return contents


@cache
def _rehearsal(
    contents: str, dtype: str, recompute: bool, liger: bool, adapters: LoRAConfig | None
) -> Rehearsal:
    return Rehearsal(json.loads(contents), getattr(torch, dtype), recompute, liger, adapters)
