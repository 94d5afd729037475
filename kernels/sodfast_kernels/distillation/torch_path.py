"""The objective without a GPU, in bounded memory: rows in tiles, the gradient in the forward pass.

Suffixes: n rows of one tile, N all rows, V vocabulary, H hidden size, K kept tokens, B buckets.

A tile's logits are fp32 (fp64 for fp64 inputs) whatever the inputs are: teacher and student nearly
agree, and 16-bit logits would be all noise. A tile goes logits → log-softmaxes → divergence and its
gradient → d-logits → products with hidden states and head, and is then overwritten by the next.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Settings, Sides, Tokens
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


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients wait for the backward pass in this dtype: no loss scale has reached fp16 yet."""
    return torch.float32 if dtype == torch.float16 else dtype


def evaluate(
    sides: Sides,
    tokens: Tokens,
    settings: Settings,
    upstream: Tensor | None,
    want_student: bool,
    want_head: bool,
    max_scratch_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [6, N], d_student and d_head (empty if not wanted).

    `upstream` [N] multiplies each row's gradient.

    Raises:
        ValueError: if `max_scratch_bytes` does not hold a single row.
    """
    student, head = sides.student, sides.student_head
    rows = student.shape[0]
    dtype = torch.promote_types(student.dtype, torch.float32)
    saved = gradient_dtype(student.dtype)
    stats = student.new_zeros(6, rows, dtype=dtype)
    results = Statistics(*stats)
    d_student = student.new_zeros(student.shape if want_student else 0, dtype=saved)
    # A 16-bit head's gradient is summed over the tiles in fp32.
    d_head = student.new_zeros(head.shape if head is not None and want_head else 0, dtype=dtype)
    sums_head = want_head and saved != dtype
    step, block, *_ = _sizes(sides, settings, sums_head, max_scratch_bytes)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        own = tokens.rows(part)
        d_logits_nV = _tile(
            sides, own, settings, upstream, part, want_student or want_head, results, block
        )
        if d_logits_nV is None:
            continue
        if head is None:
            d_student[part] = d_logits_nV
            continue
        hidden_nH = student[part].to(dtype)
        active = _active(own)
        if not bool(active.all()):
            hidden_nH = hidden_nH.masked_fill(~active[:, None], 0)
        d_hidden_nH = torch.zeros_like(hidden_nH) if want_student else None
        for first in range(0, head.shape[0], block):
            columns = slice(first, first + block)
            if d_hidden_nH is not None:
                d_hidden_nH.addmm_(d_logits_nV[:, columns], head[columns].to(dtype))
            if want_head:
                d_head[columns].addmm_(d_logits_nV[:, columns].T, hidden_nH)
        if d_hidden_nH is not None:
            d_student[part] = d_hidden_nH
    return stats, d_student, d_head.to(saved)


def scratch_bytes(sides: Sides, settings: Settings) -> int:
    """What a call without `max_scratch_bytes` that wants both gradients takes beside them."""
    step, _, a_row, fixed = _sizes(sides, settings, sides.student.dtype == torch.bfloat16, None)
    return fixed + min(step, sides.student.shape[0]) * a_row


def _sizes(
    sides: Sides, settings: Settings, sums_head: bool, max_scratch_bytes: int | None
) -> tuple[int, int, int, int]:
    """Rows of a tile, columns converted at a time, bytes of a tile's row and of the rest."""
    dtype = torch.promote_types(sides.student.dtype, torch.float32)
    size, vocabulary = dtype.itemsize, sides.vocabulary
    tiles = FULL_TILES if settings.top_k is None and sides.stored_ids is None else TOP_K_TILES
    tiles += settings.softcap is not None
    widths = [side.shape[1] for side in (sides.student, sides.teacher) if side is not None]
    a_row = size * (tiles * vocabulary + 4 * max(widths))
    fixed, block = 0, vocabulary
    budget = DEFAULT_SCRATCH_BYTES if max_scratch_bytes is None else max_scratch_bytes
    heads = [head for head in (sides.student_head, sides.teacher_head) if head is not None]
    if any(head.dtype != dtype for head in heads):
        block_row = size * max(widths)
        block = max(1, min(vocabulary, budget // 8 // block_row))
        fixed += block * block_row
    if sums_head and sides.student_head is not None:
        fixed += size * sides.student_head.numel()
    if max_scratch_bytes is None:
        return max(1, budget // a_row), block, a_row, fixed
    if budget < fixed + a_row:
        raise ValueError(
            f"max_scratch_bytes={max_scratch_bytes} is too small: one row needs {fixed + a_row}"
        )
    return (budget - fixed) // a_row, block, a_row, fixed


def _active(tokens: Tokens) -> Tensor:
    active = tokens.distill_weight != 0
    return active if tokens.policy_weight is None else active | (tokens.policy_weight != 0)


def _logits(
    side: Tensor, head: Tensor | None, part: slice, block: int, dtype: torch.dtype
) -> Tensor:
    if head is None:
        return side[part].to(dtype, copy=True)
    hidden_nH = side[part].to(dtype)
    if head.dtype == dtype:
        return hidden_nH @ head.T
    logits_nV = hidden_nH.new_empty(hidden_nH.shape[0], head.shape[0])
    for first in range(0, head.shape[0], block):
        columns = slice(first, first + block)
        logits_nV[:, columns] = hidden_nH @ head[columns].to(dtype).T
    return logits_nV


def _tile(
    sides: Sides,
    tokens: Tokens,
    settings: Settings,
    upstream: Tensor | None,
    part: slice,
    want_gradient: bool,
    results: Statistics,
    block: int,
) -> Tensor | None:
    """Writes one tile's results; returns its d-logits [n, V] if a gradient is wanted."""
    dtype = results.loss.dtype
    distilled = tokens.distill_weight != 0
    active = _active(tokens)
    everyone, anyone = bool(active.all()), bool(distilled.any())
    logits_nV = _logits(sides.student, sides.student_head, part, block, dtype)
    if not everyone:
        logits_nV.masked_fill_(~active[:, None], 0)
    ids_nK = None
    if anyone and sides.stored_ids is not None:
        ids_nK = sides.stored_ids[part].masked_fill(~distilled[:, None], 0)
    elif anyone and settings.top_k is not None:
        ids_nK = _top_ids(logits_nV, settings.top_k)
    slope_nV = _softcap_(logits_nV, settings.softcap)
    log_s_nV, s_nV = _log_softmax_(logits_nV, settings.temperature)
    results.student_entropy[part] = _entropy(log_s_nV, s_nV).masked_fill_(~active, 0)

    # The policy term and the weights need only the sampled token's log-prob.
    target = None
    weight = tokens.distill_weight
    loss = torch.zeros_like(weight)
    pull = torch.zeros_like(weight)
    if tokens.target_ids is not None:
        target = tokens.target_ids.masked_fill(~active, 0)[:, None]
        logprob = log_s_nV.gather(-1, target)[:, 0]
        logprob.masked_fill_(logprob < MASKED_BELOW, -math.inf)
        results.student_logprob[part] = logprob.masked_fill(~active, 0)
        old = logprob if tokens.old_logprob is None else tokens.old_logprob
        log_ratio = logprob - old
        ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        if settings.ratio_cap is not None:
            weight = weight * ratio.clamp(max=settings.ratio_cap)
        if tokens.advantage is not None and tokens.policy_weight is not None:
            rewarded = tokens.policy_weight != 0
            clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
            policy = torch.maximum(-tokens.advantage * ratio, -tokens.advantage * clipped)
            loss = (tokens.policy_weight * policy).masked_fill_(~rewarded, 0)
            # The clip holds the token where moving on would only raise the objective.
            held = (tokens.advantage > 0) & (ratio > 1 + settings.clip_high)
            held |= (tokens.advantage < 0) & (ratio < 1 - settings.clip_low)
            held |= (log_ratio.abs() > LOG_RATIO_BOUND) | ~rewarded
            pull = (-tokens.policy_weight * tokens.advantage * ratio).masked_fill_(held, 0)

    scale = torch.full_like(weight, 1 / settings.temperature)
    if upstream is not None:
        scale = scale * upstream[part]
    pull = (pull * scale)[:, None]
    if not anyone:
        results.loss[part] = loss
        if not want_gradient:
            return None
        return _finish_(s_nV.mul_(-pull), pull, target, slope_nV)

    d_logits_nV = None
    stored_nK = None
    if sides.stored_logprobs is not None and ids_nK is not None:
        stored_nK = sides.stored_logprobs[part].to(dtype).masked_fill_(~distilled[:, None], 0)
        stored_nK.clamp_(min=MASKED)
        log_q_nV = q_nV = None
    else:
        assert sides.teacher is not None
        log_q_nV = _logits(sides.teacher, sides.teacher_head, part, block, dtype)
        if not bool(distilled.all()):
            log_q_nV.masked_fill_(~distilled[:, None], 0)
        _softcap_(log_q_nV, settings.softcap)
        log_q_nV, q_nV = _log_softmax_(log_q_nV, settings.temperature)

    if ids_nK is None:
        assert log_q_nV is not None and q_nV is not None
        teacher_entropy = _entropy(log_q_nV, q_nV)
        teacher_logprob = None if target is None else log_q_nV.gather(-1, target)[:, 0]
        divergence, slope_s_nV = _divergence(log_s_nV, s_nV, log_q_nV, q_nV, settings.alpha)
        mean = slope_s_nV.sum(-1)
        if want_gradient:
            row = (weight * scale).masked_fill_(~distilled, 0)
            d_logits_nV = slope_s_nV.mul_(row[:, None])
            d_logits_nV.addcmul_(s_nV, (mean * row)[:, None] + pull, value=-1)
    else:
        log_s_nB, s_nB, s_nK = _buckets_(log_s_nV, s_nV, ids_nK, settings.add_tail)
        if stored_nK is None:
            assert log_q_nV is not None and q_nV is not None
            teacher_entropy = _entropy(log_q_nV, q_nV)
            teacher_logprob = None if target is None else log_q_nV.gather(-1, target)[:, 0]
            log_q_nB, q_nB, _ = _buckets_(log_q_nV, q_nV, ids_nK, settings.add_tail)
        else:
            log_kept = stored_nK.logsumexp(-1, keepdim=True)
            log_tail = torch.log(-torch.expm1(log_kept.clamp(max=-1e-7)))
            log_q_nB = torch.cat([stored_nK, log_tail], -1)
            teacher_entropy = _entropy(log_q_nB, log_q_nB.exp())
            teacher_logprob = None
            if target is not None:
                hit_nK = ids_nK == target
                found = stored_nK.masked_fill(~hit_nK, 0).sum(-1)
                teacher_logprob = torch.where(hit_nK.any(-1), found, log_tail[:, 0])
            if not settings.add_tail:
                log_q_nB = stored_nK - log_kept
            q_nB = log_q_nB.exp()
        divergence, slope_s_nB = _divergence(log_s_nB, s_nB, log_q_nB, q_nB, settings.alpha)
        if settings.add_tail:
            # Where the cap binds the tail is a constant.
            slope_s_nB[:, -1].masked_fill_(s_nB[:, -1] <= TAIL_FLOOR, 0)
        mean = slope_s_nB.sum(-1)
        if want_gradient:
            kept = ids_nK.shape[1]
            row = (weight * scale).masked_fill_(~distilled, 0)[:, None]
            inside_nK = slope_s_nB[:, :kept] - s_nB[:, :kept] * mean[:, None]
            inside_nK = inside_nK * row - s_nK * pull
            outside = -pull
            if settings.add_tail:
                outside = (slope_s_nB[:, -1:] / s_nB[:, -1:] - mean[:, None]) * row - pull
            d_logits_nV = s_nV.mul_(outside).scatter_(-1, ids_nK, inside_nK)

    results.divergence[part] = divergence.masked_fill(~distilled, 0)
    results.teacher_entropy[part] = teacher_entropy.masked_fill(~distilled, 0)
    if teacher_logprob is not None:
        teacher_logprob = teacher_logprob.masked_fill(teacher_logprob < MASKED_BELOW, -math.inf)
        results.teacher_logprob[part] = teacher_logprob.masked_fill_(~distilled, 0)
    results.loss[part] = loss + (weight * divergence).masked_fill_(~distilled, 0)
    if d_logits_nV is None:
        return None
    broken = distilled & ~divergence.isfinite()
    if bool(broken.any()):
        d_logits_nV.masked_fill_(broken[:, None], math.nan)
    return _finish_(d_logits_nV, pull, target, slope_nV)


def _finish_(
    d_logits_nV: Tensor, pull: Tensor, target: Tensor | None, slope: Tensor | None
) -> Tensor:
    if target is not None:
        d_logits_nV.scatter_add_(-1, target, pull)
    return d_logits_nV if slope is None else d_logits_nV.mul_(slope)


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
