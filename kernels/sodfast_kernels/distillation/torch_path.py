"""The objective without a GPU, in bounded memory: rows in tiles, the gradient in the forward pass.

Suffixes: n rows of one tile, N all rows, V vocabulary, H hidden size, K kept tokens, B buckets (K,
or K + 1 with the tail, or V).

A tile's logits are fp32 (fp64 for fp64 inputs) whatever the inputs are: teacher and student nearly
agree, and 16-bit logits would be all noise. A tile goes logits → log-softmaxes → divergence and its
gradient → d-logits → products with hidden states and head, and is then overwritten by the next.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Call, Settings, Sides, Tokens
from .reference import LOG_RATIO_BOUND, TAIL_FLOOR, top_ids

DEFAULT_SCRATCH_BYTES = 64 * 2**20
# Tiles of [n, V] alive at once at the worst moment; a test measures that the bound holds.
FULL_TILES, TOP_K_TILES = 9, 10
# −inf logits become this, so that no difference or product of theirs is NaN.
MASKED, MASKED_BELOW = -1e30, -1e28


class Statistics(NamedTuple):
    """Views of the rows of the statistics, [N] each."""

    loss: Tensor
    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor


class Tiling(NamedTuple):
    """rows: of a tile. columns: of a head that are converted at a time. row_bytes, fixed_bytes:
    scratch for each row of a tile, and for a call whatever its tiles are."""

    rows: int
    columns: int
    row_bytes: int
    fixed_bytes: int


class Target(NamedTuple):
    """What depends on the sampled token alone, [n].

    ids: [n, 1], None without sampled tokens. weight: the distillation weight times the capped
    ratio. loss: the policy term. d_target: its derivative by the target's logit.
    """

    ids: Tensor | None
    weight: Tensor
    loss: Tensor
    d_target: Tensor


class Teacher(NamedTuple):
    """Log mass and mass of each bucket [n, B]; statistics [n]."""

    log_q_nB: Tensor
    q_nB: Tensor
    entropy: Tensor
    logprob: Tensor | None


def evaluate(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [6, N], d_student and d_head (empty if not wanted).

    Raises:
        ValueError: if `max_scratch_bytes` does not hold a single row.
    """
    sides = call.sides
    student, head = sides.student, sides.student_head
    dtype, saved = sides.compute_dtype, sides.gradient_dtype
    stats = student.new_zeros(6, student.shape[0], dtype=dtype)
    d_student = student.new_zeros(student.shape if call.want_student else 0, dtype=saved)
    # A 16-bit head's gradient is summed over the tiles in fp32.
    d_head = student.new_zeros(
        head.shape if head is not None and call.want_head else 0, dtype=dtype
    )
    results = Statistics(*stats)
    tiling = _tiling(sides, call.settings, call.want_head)
    for start in range(0, student.shape[0], tiling.rows):
        part = slice(start, min(start + tiling.rows, student.shape[0]))
        tokens = call.tokens.rows(part)
        d_logits_nV = _tile(call, tokens, part, tiling.columns, results)
        if d_logits_nV is None:
            continue
        if head is None:
            d_student[part] = d_logits_nV
            continue
        hidden_nH = student[part].to(dtype)
        active = tokens.active
        if not bool(active.all()):
            hidden_nH = hidden_nH.masked_fill(~active[:, None], 0)
        d_hidden_nH = torch.zeros_like(hidden_nH) if call.want_student else None
        for first in range(0, head.shape[0], tiling.columns):
            columns = slice(first, first + tiling.columns)
            if d_hidden_nH is not None:
                d_hidden_nH.addmm_(d_logits_nV[:, columns], head[columns].to(dtype))
            if call.want_head:
                d_head[columns].addmm_(d_logits_nV[:, columns].T, hidden_nH)
        if d_hidden_nH is not None:
            d_student[part] = d_hidden_nH
    return stats, d_student, d_head.to(saved)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient ← factor · gradient, in place."""
    return gradient.mul_(factor)


def scratch_bytes(sides: Sides, settings: Settings) -> int:
    """What a call without `max_scratch_bytes` that wants both gradients takes beside them."""
    tiling = _tiling(sides, settings, want_head=True)
    return tiling.fixed_bytes + min(tiling.rows, sides.student.shape[0]) * tiling.row_bytes


def _tiling(sides: Sides, settings: Settings, want_head: bool) -> Tiling:
    dtype, limit = sides.compute_dtype, settings.max_scratch_bytes
    size, vocabulary = dtype.itemsize, sides.vocabulary
    tiles = FULL_TILES if settings.top_k is None and sides.stored_ids is None else TOP_K_TILES
    tiles += settings.softcap is not None
    widest = max(side.shape[1] for side in (sides.student, sides.teacher) if side is not None)
    row_bytes = size * (tiles * vocabulary + 4 * widest)
    fixed_bytes, columns = 0, vocabulary
    budget = DEFAULT_SCRATCH_BYTES if limit is None else limit
    heads = [head for head in (sides.student_head, sides.teacher_head) if head is not None]
    if any(head.dtype != dtype for head in heads):
        columns = max(1, min(vocabulary, budget // 8 // (size * widest)))
        fixed_bytes += columns * size * widest
    if want_head and sides.gradient_dtype != dtype and sides.student_head is not None:
        fixed_bytes += size * sides.student_head.numel()
    if limit is None:
        rows = max(1, budget // row_bytes)
    elif limit < fixed_bytes + row_bytes:
        raise ValueError(
            f"max_scratch_bytes={limit} is too small: one row needs {fixed_bytes + row_bytes}"
        )
    else:
        rows = (limit - fixed_bytes) // row_bytes
    return Tiling(rows, columns, row_bytes, fixed_bytes)


def _tile(
    call: Call, tokens: Tokens, part: slice, columns: int, results: Statistics
) -> Tensor | None:
    """Writes one tile's results; returns its d-logits [n, V] if a gradient is wanted."""
    sides, settings = call.sides, call.settings
    distilled, active = tokens.distill_weight != 0, tokens.active
    anyone = bool(distilled.any())
    logits_nV = _logits(sides.student, sides.student_head, part, columns, results.loss.dtype)
    if not bool(active.all()):
        logits_nV.masked_fill_(~active[:, None], 0)
    ids_nK = _support(call, part, logits_nV, distilled) if anyone else None
    slope_nV = _softcap_(logits_nV, settings.softcap)
    log_s_nV, s_nV = _log_softmax_(logits_nV, settings.temperature)
    results.student_entropy[part] = _entropy(log_s_nV, s_nV).masked_fill_(~active, 0)

    target = _target(log_s_nV, tokens, settings, active, results.student_logprob[part])
    scale = torch.full_like(target.weight, 1 / settings.temperature)
    if call.upstream is not None:
        scale = scale * call.upstream[part]
    d_target = (target.d_target * scale)[:, None]
    if not anyone:
        results.loss[part] = target.loss
        d_logits_nV = s_nV.mul_(-d_target) if call.wants else None
        return _finish_(d_logits_nV, d_target, target.ids, slope_nV)

    read = _network_teacher if sides.stored_ids is None else _stored_teacher
    teacher = read(call, part, columns, ids_nK, target.ids, distilled)
    row = (target.weight * scale).masked_fill_(~distilled, 0)[:, None] if call.wants else None
    if ids_nK is None:
        divergence, d_logits_nV = _distill_full(
            log_s_nV, s_nV, teacher, settings.alpha, row, d_target
        )
    else:
        divergence, d_logits_nV = _distill_buckets(
            log_s_nV, s_nV, ids_nK, teacher, settings, row, d_target
        )
    results.divergence[part] = divergence.masked_fill(~distilled, 0)
    results.teacher_entropy[part] = teacher.entropy.masked_fill(~distilled, 0)
    if teacher.logprob is not None:
        logprob = teacher.logprob.masked_fill(teacher.logprob < MASKED_BELOW, -math.inf)
        results.teacher_logprob[part] = logprob.masked_fill_(~distilled, 0)
    results.loss[part] = target.loss + (target.weight * divergence).masked_fill_(~distilled, 0)
    broken = distilled & ~divergence.isfinite()
    if d_logits_nV is not None and bool(broken.any()):
        d_logits_nV.masked_fill_(broken[:, None], math.nan)
    return _finish_(d_logits_nV, d_target, target.ids, slope_nV)


def _logits(
    side: Tensor, head: Tensor | None, part: slice, columns: int, dtype: torch.dtype
) -> Tensor:
    if head is None:
        return side[part].to(dtype, copy=True)
    hidden_nH = side[part].to(dtype)
    if head.dtype == dtype:
        return hidden_nH @ head.T
    logits_nV = hidden_nH.new_empty(hidden_nH.shape[0], head.shape[0])
    for first in range(0, head.shape[0], columns):
        block = slice(first, first + columns)
        logits_nV[:, block] = hidden_nH @ head[block].to(dtype).T
    return logits_nV


def _support(call: Call, part: slice, logits_nV: Tensor, distilled: Tensor) -> Tensor | None:
    """Ids [n, K] of the tokens that the divergence keeps; None for all."""
    if call.sides.stored_ids is not None:
        return call.sides.stored_ids[part].masked_fill(~distilled[:, None], 0)
    return None if call.settings.top_k is None else _top_ids(logits_nV, call.settings.top_k)


def _target(
    log_s_nV: Tensor, tokens: Tokens, settings: Settings, active: Tensor, logprob_n: Tensor
) -> Target:
    """The policy term and the capped ratio; writes the student's log-prob to `logprob_n`."""
    weight = tokens.distill_weight
    loss, d_target = torch.zeros_like(weight), torch.zeros_like(weight)
    if tokens.target_ids is None:
        return Target(None, weight, loss, d_target)
    ids = tokens.target_ids.masked_fill(~active, 0)[:, None]
    logprob = log_s_nV.gather(-1, ids)[:, 0]
    logprob.masked_fill_(logprob < MASKED_BELOW, -math.inf)
    logprob_n.copy_(logprob.masked_fill(~active, 0))
    log_ratio = logprob - (logprob if tokens.old_logprob is None else tokens.old_logprob)
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if settings.ratio_cap is not None:
        weight = weight * ratio.clamp(max=settings.ratio_cap)
    if tokens.advantage is not None and tokens.policy_weight is not None:
        rewarded = tokens.policy_weight != 0
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        policy = torch.maximum(-tokens.advantage * ratio, -tokens.advantage * clipped)
        bounded = torch.zeros_like(rewarded)
        if settings.dual_clip is not None:
            bounded = (tokens.advantage < 0) & (ratio > settings.dual_clip)
            policy = torch.where(bounded, -tokens.advantage * settings.dual_clip, policy)
        loss = (tokens.policy_weight * policy).masked_fill_(~rewarded, 0)
        # The clip holds the token where moving on would only raise the objective.
        held = (tokens.advantage > 0) & (ratio > 1 + settings.clip_high)
        held |= (tokens.advantage < 0) & (ratio < 1 - settings.clip_low)
        held |= bounded | (log_ratio.abs() > LOG_RATIO_BOUND) | ~rewarded
        d_target = (-tokens.policy_weight * tokens.advantage * ratio).masked_fill_(held, 0)
    return Target(ids, weight, loss, d_target)


def _network_teacher(
    call: Call,
    part: slice,
    columns: int,
    ids_nK: Tensor | None,
    target: Tensor | None,
    distilled: Tensor,
) -> Teacher:
    sides, settings = call.sides, call.settings
    assert sides.teacher is not None
    logits_nV = _logits(sides.teacher, sides.teacher_head, part, columns, sides.compute_dtype)
    if not bool(distilled.all()):
        logits_nV.masked_fill_(~distilled[:, None], 0)
    _softcap_(logits_nV, settings.softcap)
    log_q_nV, q_nV = _log_softmax_(logits_nV, settings.temperature)
    entropy = _entropy(log_q_nV, q_nV)
    logprob = None if target is None else log_q_nV.gather(-1, target)[:, 0]
    if ids_nK is None:
        return Teacher(log_q_nV, q_nV, entropy, logprob)
    log_q_nB, q_nB, _ = _buckets_(log_q_nV, q_nV, ids_nK, settings.add_tail)
    return Teacher(log_q_nB, q_nB, entropy, logprob)


def _stored_teacher(
    call: Call,
    part: slice,
    columns: int,
    ids_nK: Tensor | None,
    target: Tensor | None,
    distilled: Tensor,
) -> Teacher:
    """Its entropy is that of its buckets; a target that is not stored has the tail's mass."""
    assert call.sides.stored_logprobs is not None and ids_nK is not None
    stored_nK = call.sides.stored_logprobs[part].to(call.sides.compute_dtype)
    stored_nK = stored_nK.masked_fill(~distilled[:, None], 0).clamp_(min=MASKED)
    log_kept = stored_nK.logsumexp(-1, keepdim=True)
    log_tail = torch.log(-torch.expm1(log_kept.clamp(max=-1e-7)))
    log_q_nB = torch.cat([stored_nK, log_tail], -1)
    entropy = _entropy(log_q_nB, log_q_nB.exp())
    logprob = None
    if target is not None:
        hit_nK = ids_nK == target
        found = stored_nK.masked_fill(~hit_nK, 0).sum(-1)
        logprob = torch.where(hit_nK.any(-1), found, log_tail[:, 0])
    if not call.settings.add_tail:
        log_q_nB = stored_nK - log_kept
    return Teacher(log_q_nB, log_q_nB.exp(), entropy, logprob)


def _distill_full(
    log_s_nV: Tensor,
    s_nV: Tensor,
    teacher: Teacher,
    alpha: float,
    row: Tensor | None,
    d_target: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """D [n], and d-logits unless `row` is None, which multiplies D's gradient, [n, 1]."""
    divergence, slope_s_nV = _divergence(log_s_nV, s_nV, teacher.log_q_nB, teacher.q_nB, alpha)
    if row is None:
        return divergence, None
    mean = slope_s_nV.sum(-1)[:, None]
    d_logits_nV = slope_s_nV.mul_(row)
    return divergence, d_logits_nV.addcmul_(s_nV, mean * row + d_target, value=-1)


def _distill_buckets(
    log_s_nV: Tensor,
    s_nV: Tensor,
    ids_nK: Tensor,
    teacher: Teacher,
    settings: Settings,
    row: Tensor | None,
    d_target: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The same over the tokens `ids_nK` and a bucket for the rest; overwrites `s_nV`."""
    log_s_nB, s_nB, s_nK = _buckets_(log_s_nV, s_nV, ids_nK, settings.add_tail)
    divergence, slope_s_nB = _divergence(
        log_s_nB, s_nB, teacher.log_q_nB, teacher.q_nB, settings.alpha
    )
    if settings.add_tail:
        # Where the cap binds the tail is a constant.
        slope_s_nB[:, -1].masked_fill_(s_nB[:, -1] <= TAIL_FLOOR, 0)
    if row is None:
        return divergence, None
    mean, kept = slope_s_nB.sum(-1)[:, None], ids_nK.shape[1]
    inside_nK = slope_s_nB[:, :kept] - s_nB[:, :kept] * mean
    inside_nK = inside_nK * row - s_nK * d_target
    outside = -d_target
    if settings.add_tail:
        outside = (slope_s_nB[:, -1:] / s_nB[:, -1:] - mean) * row - d_target
    return divergence, s_nV.mul_(outside).scatter_(-1, ids_nK, inside_nK)


def _finish_(
    d_logits_nV: Tensor | None, d_target: Tensor, target: Tensor | None, slope_nV: Tensor | None
) -> Tensor | None:
    """Adds the derivative by the target's logit and passes through the softcap, in place."""
    if d_logits_nV is None:
        return None
    if target is not None:
        d_logits_nV.scatter_add_(-1, target, d_target)
    return d_logits_nV if slope_nV is None else d_logits_nV.mul_(slope_nV)


def _softcap_(logits_nV: Tensor, softcap: float | None) -> Tensor | None:
    """Caps in place; returns the derivative 1 − tanh²."""
    if softcap is None:
        return None
    overflowed = logits_nV == math.inf
    logits_nV.div_(softcap).tanh_()
    slope_nV = 1 - logits_nV.square()
    # tanh would turn an overflowed logit into an ordinary number.
    logits_nV.mul_(softcap).masked_fill_(overflowed, math.nan)
    return slope_nV


def _log_softmax_(logits_nV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs, in place, and probs."""
    if temperature != 1:
        logits_nV.div_(temperature)
    logits_nV.clamp_(min=MASKED)
    top = logits_nV.amax(-1, keepdim=True)
    logits_nV.sub_(top.masked_fill_(top < MASKED_BELOW, math.nan))
    p_nV = logits_nV.exp()
    total = p_nV.sum(-1, keepdim=True)
    return logits_nV.sub_(total.log()), p_nV.div_(total)


def _entropy(log_p_nB: Tensor, p_nB: Tensor) -> Tensor:
    return torch.einsum("nb,nb->n", log_p_nB, p_nB).neg_()


def _top_ids(logits_nV: Tensor, k: int) -> Tensor:
    """Ids [n, k] of the greatest logits, the lower index among equal ones."""
    if logits_nV.dtype != torch.float32:
        return top_ids(logits_nV, k)
    # One integer orders both: the value's bits, made monotone, above the complement of the index.
    # Adding zero first turns −0 into +0.
    bits = (logits_nV + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    key = bits.to(torch.int64) << 32
    key -= torch.arange(key.shape[1], device=key.device)
    return key.topk(k, dim=-1).indices


def _buckets_(
    log_p_nV: Tensor, p_nV: Tensor, ids_nK: Tensor, add_tail: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log mass and mass of each bucket, and the kept probs, which are zeroed in `p_nV`."""
    log_kept_nK, kept_nK = log_p_nV.gather(-1, ids_nK), p_nV.gather(-1, ids_nK)
    p_nV.scatter_(-1, ids_nK, 0)
    if not add_tail:
        log_kept_nK -= log_kept_nK.logsumexp(-1, keepdim=True)
        return log_kept_nK, log_kept_nK.exp(), kept_nK
    tail = p_nV.sum(-1, keepdim=True).clamp_(min=TAIL_FLOOR)
    return torch.cat([log_kept_nK, tail.log()], -1), torch.cat([kept_nK, tail], -1), kept_nK


def _divergence(
    log_s_nB: Tensor, s_nB: Tensor, log_q_nB: Tensor, q_nB: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """D [n] and s·g [n, B], g = ∂D/∂s; overwrites `log_q_nB`.

    Everything is built from δ = log q − log s and expm1(−|δ|), so nothing overflows, an error in a
    log-sum-exp enters only to second order, and s = q gives exactly 0.
    """
    infinite = None
    if alpha in (0, 1):
        absent, present = (log_s_nB, log_q_nB) if alpha == 0 else (log_q_nB, log_s_nB)
        masked = absent < MASKED_BELOW
        if bool(masked.any()):
            infinite = (masked & (present > MASKED_BELOW)).any(-1)
    delta_nB = log_q_nB.sub_(log_s_nB)
    shrink_nB = delta_nB.abs().neg_().expm1_()
    if 0 < alpha < 1:
        # log m − max(log s, log q)
        if alpha == 0.5:
            shrink_nB *= alpha
        else:
            shrink_nB.mul_((delta_nB > 0).to(shrink_nB.dtype).mul_(1 - 2 * alpha).add_(alpha))
        log_mix_nB = shrink_nB.log1p_()
        from_q_nB = delta_nB.clamp(max=0).sub_(log_mix_nB).mul_(q_nB).mul_(alpha)
        slope_s_nB = delta_nB.clamp_(min=0).add_(log_mix_nB).mul_(s_nB).mul_(alpha - 1)
        divergence = from_q_nB.add_(slope_s_nB).sum(-1)
    else:
        # q − s, exact also where they nearly agree
        excess_nB = shrink_nB.mul_(torch.maximum(s_nB, q_nB)).copysign_(delta_nB)
        if alpha == 0:
            divergence = delta_nB.mul_(q_nB).sub_(excess_nB).sum(-1)
            slope_s_nB = excess_nB.neg_()
        else:
            slope_s_nB = delta_nB.mul_(s_nB).neg_()
            divergence = excess_nB.add_(slope_s_nB).sum(-1)
    divergence.clamp_(min=0)
    if infinite is not None:
        divergence.masked_fill_(infinite & ~divergence.isnan(), math.inf)
    return divergence, slope_s_nB
