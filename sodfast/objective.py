"""Samples + rewards + teacher → per-token weights → the fused loss of `sodfast_kernels`.

For one update over B rollouts y_i with distillation mask m_i (arXiv 2606.03532 §3.1 and A.5,
arXiv 2601.20802):

    sequence_mean  L = 1/B Σ_i 1/|y_i| Σ_t (c_D · m_i · ρ_t · D_t + c_P · P_t)
    token_mean     L = c_D Σ m_i ρ_t D_t / Σ_i m_i |y_i|  +  c_P Σ P_t / Σ_i |y_i|

Both D_t and P_t are also multiplied by the truncated importance weight min(π_old/π_sampler, 2),
which is 1 when the engine that sampled has the numerics of training. The denominators come from the
whole update, so no loss depends on how it is cut into micro-batches.

Shapes: N response tokens of a micro-batch, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from sodfast_kernels import DistillationOutput, linear_distillation_loss
from torch import Tensor

from sodfast.config import ObjectiveConfig
from sodfast.rollout.engine import Sample

# Bounds of likelihood ratios and of the importance weight, arXiv 2601.20802.
MAX_LOG_RATIO, MAX_IMPORTANCE_WEIGHT = 20.0, 2.0


@dataclass(frozen=True)
class SequenceWeights:
    """What every token of rollout i is multiplied by: `distill[i]`, `policy[i]`, `advantage[i]`."""

    distill: list[float]
    policy: list[float]
    advantage: list[float]

    def of(self, index: int) -> tuple[float, float, float]:
        return self.distill[index], self.policy[index], self.advantage[index]

    def matters(self, index: int) -> bool:
        """Whether rollout `index` has any gradient at all."""
        return bool(self.distill[index] or (self.policy[index] and self.advantage[index]))


def group_advantages(rewards: Sequence[float], group_size: int, normalize: bool) -> list[float]:
    """Reward minus the mean of its group; `normalize` divides by the group's std (GRPO)."""
    advantages = []
    for first in range(0, len(rewards), group_size):
        group = rewards[first : first + group_size]
        mean = sum(group) / group_size
        centred = [reward - mean for reward in group]
        if normalize:
            # The 1e-6 keeps a group of equal rewards at 0.
            std = sqrt(sum(value * value for value in centred) / group_size) + 1e-6
            centred = [value / std for value in centred]
        advantages += centred
    return advantages


def sequence_weights(
    config: ObjectiveConfig,
    lengths: Sequence[int],
    distilled: Sequence[bool],
    advantages: Sequence[float],
) -> SequenceWeights:
    """Weights of one update from its rollouts' lengths, masks m_i and advantages."""
    if config.reduction == "sequence_mean":
        shares = [1 / (len(lengths) * length) for length in lengths]
        distill, policy = shares, shares
    else:
        tokens = sum(length for length, m in zip(lengths, distilled, strict=True) if m)
        distill = [1 / max(1, tokens)] * len(lengths)
        policy = [1 / sum(lengths)] * len(lengths)
    return SequenceWeights(
        distill=[
            config.distill_coef * w if m else 0.0 for w, m in zip(distill, distilled, strict=True)
        ],
        policy=[config.policy_coef * w for w in policy],
        advantage=list(advantages),
    )


def likelihood_ratio(logprob_N: Tensor, old_logprob_N: Tensor) -> Tensor:
    """exp(logprob − old_logprob), its logarithm clamped to ±20 as everywhere in the kernels."""
    return (logprob_N - old_logprob_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def truncated_importance_weight(samples: Sequence[Sample]) -> Tensor:
    """min(π_old,trainer / π_sampler, 2) of every response token, [N] fp32 on the CPU."""
    trainer_N = torch.cat([sample.logprob for sample in samples])
    sampler_N = torch.cat([sample.behavior_logprob for sample in samples])
    return likelihood_ratio(trainer_N, sampler_N).clamp(max=MAX_IMPORTANCE_WEIGHT)


def to_device(
    device: torch.device, ids_N: Tensor, *floats_N: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Per-token arrays on the CPU, int64 and fp32, moved to `device` in one copy.

    On a GPU the copy starts from pinned memory, so the host does not wait for it, and the results
    are views of one buffer. On the CPU they are the arguments themselves.
    """
    if device.type == "cpu":
        return ids_N, floats_N
    # An id takes the room of two fp32 numbers. Every array starts on 16 bytes, as kernels like it.
    count, padded = len(ids_N), -(-len(ids_N) // 4) * 4
    host = torch.empty(2 + len(floats_N), padded, pin_memory=device.type == "cuda")
    ids, floats = _unpacked(host, count)
    ids.copy_(ids_N)
    for target_N, source_N in zip(floats, floats_N, strict=True):
        target_N.copy_(source_N)
    return _unpacked(host.to(device, non_blocking=True), count)


def _unpacked(buffer: Tensor, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Views of an fp32 buffer: int64 in its first two rows, fp32 in each of the others."""
    return buffer[:2].view(-1).view(torch.int64)[:count], buffer[2:, :count].unbind()


def micro_batch_loss(
    config: ObjectiveConfig,
    temperature: float,
    softcap: float | None,
    student_hidden_NH: Tensor,
    student_head: Tensor,
    teacher_hidden: Sequence[Tensor | None],
    teacher_head: Tensor,
    samples: Sequence[Sample],
    weights: Sequence[tuple[float, float, float]],
) -> DistillationOutput:
    """The loss of some of an update's rollouts, with per-token statistics [N].

    `student_hidden_NH` holds the samples' response rows one after the other; `teacher_hidden` has
    one [L_i, H'] tensor per sample, or None where m_i = 0 (those rows are never read);
    `weights` one (distill, policy, advantage) per sample.
    """
    lengths = torch.tensor([len(sample.response) for sample in samples])
    per_token = torch.tensor(weights, dtype=torch.float32).repeat_interleave(
        lengths, dim=0, output_size=len(student_hidden_NH)
    )
    importance_N = truncated_importance_weight(samples)
    target_ids, (distill_weight, policy_weight, advantage, old_logprob) = to_device(
        student_hidden_NH.device,
        torch.cat([sample.response for sample in samples]),
        per_token[:, 0] * importance_N,
        per_token[:, 1] * importance_N,
        per_token[:, 2],
        torch.cat([sample.logprob for sample in samples]),
    )
    unread = student_hidden_NH.new_zeros(1, teacher_head.shape[1])
    teacher_rows = [
        unread.expand(len(sample.response), -1) if rows is None else rows
        for rows, sample in zip(teacher_hidden, samples, strict=True)
    ]
    return linear_distillation_loss(
        student_hidden_NH,
        student_head,
        torch.cat(teacher_rows),
        teacher_head,
        alpha=config.alpha,
        temperature=temperature,
        softcap=softcap,
        top_k=config.top_k,
        add_tail=config.add_tail,
        distill_weight=distill_weight,
        target_ids=target_ids,
        policy_weight=policy_weight,
        advantage=advantage,
        old_logprob=old_logprob,
        clip_range=config.clip_range,
        dual_clip=config.dual_clip,
        ratio_cap=config.ratio_cap,
    )
