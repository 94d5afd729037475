"""The distillation objective in plain PyTorch: the definition that every backend is tested against.

Suffixes: N response tokens, V vocabulary, H hidden size, K kept tokens, B buckets (K, or K + 1 with
the tail, or V).

Sources: the divergence family, the student's top-k with a tail bucket and the ratio cap are those
of SDPO (arXiv 2601.20802); the policy term is the clipped token ratio of PPO with GRPO advantages,
as in CGTR (arXiv 2606.03532, §3.1), and its dual clip that of arXiv 1912.09729.

Every summand of a divergence is written in its Bregman form, for example s·log(s/q) − s + q. The
sum is the same because both sides add up to one, each summand is ≥ 0, and the derivative by s is
the g of the published gradient s_j (g_j − E) with its constant already dropped.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The log of the kept mass is capped at −1e-7, so the tail never falls below this.
TAIL_FLOOR = -math.expm1(-1e-7)
LOG_RATIO_BOUND = 20.0


class DistillationOutput(NamedTuple):
    """What one call returns. All but `loss` are detached, [N], fp32 (fp64 for fp64 inputs).

    Attributes:
        loss: scalar (reduction "sum") or [N] ("none"), differentiable.
        divergence: D_t, before weight and ratio.
        student_entropy, teacher_entropy: nats, of the full-vocabulary softmax at the temperature
            (with `teacher_topk`: of the teacher's buckets).
        student_logprob, teacher_logprob: of `target_ids`; None without them. With `teacher_topk`,
            a target outside the stored ids gets the log of the tail's mass.
    """

    loss: Tensor
    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None


def linear_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    **objective: object,
) -> DistillationOutput:
    """`distillation_loss` of hidden [N, H] @ head [V, H]ᵀ, in fp32, or fp64 for fp64."""
    student_logits_NV = _compute(student_hidden) @ _compute(student_head).T
    teacher_logits_NV = None
    if teacher_hidden is not None and teacher_head is not None:
        with torch.no_grad():
            teacher_logits_NV = _compute(teacher_hidden) @ _compute(teacher_head).T
    return distillation_loss(student_logits_NV, teacher_logits_NV, **objective)  # type: ignore[arg-type]


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    top_k: int | None = None,
    add_tail: bool = True,
    distill_weight: Tensor | None = None,
    target_ids: Tensor | None = None,
    advantage: Tensor | None = None,
    policy_weight: Tensor | None = None,
    old_logprob: Tensor | None = None,
    clip_range: tuple[float, float] = (0.2, 0.28),
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    reduction: str = "sum",
    teacher_topk: tuple[Tensor, Tensor] | None = None,
) -> DistillationOutput:
    """Σ_t distill_weight_t·ρ_t·D_t + Σ_t policy_weight_t·L_t, by autograd, whole logits in memory.

    Arguments: `sodfast_kernels.distillation_loss`; unchecked. 16-bit inputs: computed in fp32.
    """
    rows, vocabulary = student_logits.shape
    logits_NV = _compute(student_logits)
    equal_N = logits_NV.new_full((rows,), 1.0 / max(rows, 1))
    distill_weight = equal_N if distill_weight is None else distill_weight
    policy_weight = equal_N if policy_weight is None else policy_weight
    if advantage is None:
        policy_weight = torch.zeros_like(distill_weight)
    distilled, rewarded = distill_weight != 0, policy_weight != 0
    active = distilled | rewarded

    logits_NV = torch.where(active[:, None], logits_NV, 0)
    log_s_NV = _log_softmax(logits_NV, temperature, softcap)
    student_entropy = _entropy(log_s_NV.detach())
    if target_ids is not None:
        target_ids = target_ids.masked_fill(~active, 0)
    student_logprob = _of_targets(log_s_NV, target_ids)

    if teacher_topk is None:
        assert teacher_logits is not None
        # A row without a distillation weight meets itself: the teacher's row is never read.
        teacher_NV = torch.where(distilled[:, None], _compute(teacher_logits.detach()), logits_NV)
        log_q_NV = _log_softmax(teacher_NV.detach(), temperature, softcap)
        teacher_entropy, teacher_logprob = _entropy(log_q_NV), _of_targets(log_q_NV, target_ids)
        if top_k is None or top_k >= vocabulary:
            log_s_NB, log_q_NB = log_s_NV, log_q_NV
        else:
            ids_NK = top_ids(logits_NV.detach(), top_k)
            log_s_NB = _buckets(log_s_NV, ids_NK, add_tail)
            log_q_NB = _buckets(log_q_NV, ids_NK, add_tail)
    else:
        log_s_NB, log_q_NB, teacher_entropy, teacher_logprob = _stored_teacher(
            teacher_topk, log_s_NV, distilled, target_ids, add_tail
        )

    divergence = _divergence(log_s_NB, log_q_NB, alpha)
    weight, log_ratio = distill_weight, None
    if student_logprob is not None and old_logprob is not None:
        log_ratio = (student_logprob - old_logprob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if ratio_cap is not None:
        assert log_ratio is not None
        weight = weight * log_ratio.detach().exp().clamp(max=ratio_cap)
    loss = torch.where(distilled, weight * divergence, 0)
    if advantage is not None:
        assert student_logprob is not None
        if log_ratio is None:
            log_ratio = torch.where(rewarded, student_logprob - student_logprob.detach(), 0)
        policy = _clipped_policy_loss(log_ratio, advantage, clip_range, dual_clip)
        loss = loss + torch.where(rewarded, policy_weight * policy, 0)
    return DistillationOutput(
        loss=loss.sum() if reduction == "sum" else loss,
        divergence=torch.where(distilled, divergence.detach(), 0),
        student_entropy=torch.where(active, student_entropy, 0),
        teacher_entropy=torch.where(distilled, teacher_entropy, 0),
        student_logprob=_where(active, student_logprob),
        teacher_logprob=_where(distilled, teacher_logprob),
    )


def _of_targets(log_NV: Tensor, target_ids: Tensor | None) -> Tensor | None:
    """Each row's entry of its target, [N]; None without targets."""
    return None if target_ids is None else log_NV.gather(-1, target_ids[:, None])[:, 0]


def _where(mask: Tensor, entries: Tensor | None) -> Tensor | None:
    """The entries, detached, where the mask holds, 0 elsewhere; None without entries."""
    return None if entries is None else torch.where(mask, entries.detach(), 0)


def _stored_teacher(
    teacher_topk: tuple[Tensor, Tensor],
    log_s_NV: Tensor,
    distilled: Tensor,
    target_ids: Tensor | None,
    add_tail: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Both sides' buckets, the teacher's entropy and its log-probs of the targets, where the
    teacher is known by its K stored log-probs and the mass beside them."""
    ids_NK, stored_NK = teacher_topk
    own_ids = torch.arange(ids_NK.shape[1], device=ids_NK.device)
    ids_NK = torch.where(distilled[:, None], ids_NK, own_ids)
    kept_NK = torch.where(
        distilled[:, None],
        stored_NK.detach().to(log_s_NV.dtype),
        log_s_NV.detach().gather(-1, ids_NK),
    )
    log_kept = kept_NK.logsumexp(-1, keepdim=True)
    log_tail = (-torch.expm1(log_kept.clamp(max=-1e-7))).log()
    log_s_NB = _buckets(log_s_NV, ids_NK, add_tail)
    log_q_NB = torch.cat([kept_NK, log_tail], -1) if add_tail else kept_NK - log_kept
    teacher_entropy = _entropy(torch.cat([kept_NK, log_tail], -1))
    teacher_logprob = None
    if target_ids is not None:
        hit_NK = ids_NK == target_ids[:, None]
        found = (kept_NK.masked_fill(~hit_NK, 0)).sum(-1)
        teacher_logprob = torch.where(hit_NK.any(-1), found, log_tail[:, 0])
    return log_s_NB, log_q_NB, teacher_entropy, teacher_logprob


def _clipped_policy_loss(
    log_ratio: Tensor,
    advantage: Tensor,
    clip_range: tuple[float, float],
    dual_clip: float | None,
) -> Tensor:
    """max(−A·r, −A·clip(r, 1 − low, 1 + high)), [N]; with `dual_clip` c, at most −c·A for A < 0."""
    low, high = clip_range
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)


def top_ids(logits_NV: Tensor, k: int) -> Tensor:
    """Ids [N, k] of the k greatest logits, greatest first; among equal ones the lower index."""
    return logits_NV.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _compute(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _log_softmax(logits_NV: Tensor, temperature: float, softcap: float | None) -> Tensor:
    if softcap is not None:
        # tanh would turn an overflowed logit into an ordinary number.
        overflow_NV = torch.zeros_like(logits_NV).masked_fill_(logits_NV == math.inf, math.nan)
        logits_NV = softcap * torch.tanh(logits_NV / softcap) + overflow_NV
    return (logits_NV / temperature).log_softmax(-1)


def _entropy(log_p_NV: Tensor) -> Tensor:
    return -(log_p_NV.exp() * log_p_NV.masked_fill(log_p_NV == -math.inf, 0)).sum(-1)


def _buckets(log_p_NV: Tensor, ids_NK: Tensor, add_tail: bool) -> Tensor:
    """Log mass of the kept tokens and of everything else, or the kept ones renormalised."""
    kept_NK = log_p_NV.gather(-1, ids_NK)
    if not add_tail:
        return kept_NK - kept_NK.logsumexp(-1, keepdim=True)
    # Summed, not one minus the kept mass: that difference has no digits left near the cap. clamp
    # also stops the gradient where the cap binds.
    tail = log_p_NV.exp().scatter(-1, ids_NK, 0).sum(-1, keepdim=True).clamp(min=TAIL_FLOOR)
    return torch.cat([kept_NK, tail.log()], -1)


def _divergence(log_s_NB: Tensor, log_q_NB: Tensor, alpha: float) -> Tensor:
    """D [N] of two bucketed distributions in nats; +inf with a NaN gradient where it diverges."""
    s_NB, q_NB = log_s_NB.exp(), log_q_NB.exp()
    no_s, no_q = log_s_NB == -math.inf, log_q_NB == -math.inf
    if 0 < alpha < 1:
        both = no_s & no_q
        log_s_safe, log_q_safe = log_s_NB.masked_fill(both, 0), log_q_NB.masked_fill(both, 0)
        # log m from the greater of the two, so nothing overflows, and s = q gives exactly log s.
        above = log_q_safe > log_s_safe
        from_s = log_s_safe.masked_fill(above, 0)
        from_q = log_q_safe.masked_fill(~above, 0)
        gap_s = torch.expm1(log_q_safe.masked_fill(above, 0) - from_s)
        gap_q = torch.expm1(log_s_safe.masked_fill(~above, 0) - from_q)
        log_m_NB = torch.where(
            above, from_q + torch.log1p((1 - alpha) * gap_q), from_s + torch.log1p(alpha * gap_s)
        )
        from_student = s_NB * (log_s_NB.masked_fill(no_s, 0) - log_m_NB)
        from_teacher = q_NB * (log_q_NB.masked_fill(no_q, 0) - log_m_NB)
        return ((1 - alpha) * from_student + alpha * from_teacher).sum(-1)

    skip = no_s | no_q
    delta_NB = log_q_NB.masked_fill(skip, 0) - log_s_NB.masked_fill(skip, 0)
    if alpha == 0:
        divergence = (q_NB * delta_NB - q_NB + s_NB).sum(-1)
        infinite = (no_s & ~no_q).any(-1) & ~divergence.isnan()
    else:
        divergence = (q_NB - s_NB - s_NB * delta_NB).sum(-1)
        infinite = (no_q & ~no_s).any(-1) & ~divergence.isnan()
    # exp(log(x)) at +inf is +inf with the derivative inf · 0 = NaN: a diverged row has no gradient.
    diverged = torch.where(infinite, divergence + math.inf, 1).log().exp()
    return torch.where(infinite, diverged, divergence)
