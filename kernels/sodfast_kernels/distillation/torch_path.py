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
from .reference import LOG_RATIO_BOUND, TAIL_FLOOR
from .torch_terms import (
    MASKED,
    MASKED_BELOW,
    buckets_,
    divergence_and_slope_,
    entropy_of,
    greatest_ids,
    log_softmax_,
    softcap_,
)

DEFAULT_SCRATCH_BYTES = 64 * 2**20
# Tiles of [n, V] alive at once at the worst moment; a test measures that the bound holds.
FULL_TILES, TOP_K_TILES = 9, 10


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
    ratio. loss: the policy term, or the cross-entropy. d_target: its derivative by the target's
    logit.
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


def evaluate(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics [6, N], d_student, d_head and d_bias (empty if not wanted).

    Raises:
        ValueError: if `max_scratch_bytes` does not hold a single row.
    """
    sides = call.sides
    student, head = sides.student, sides.student_layer[0]
    dtype, saved = sides.compute_dtype, sides.gradient_dtype
    stats = student.new_zeros(6, student.shape[0], dtype=dtype)
    d_student = student.new_zeros(student.shape if call.want_student else 0, dtype=saved)
    # A 16-bit head's gradient is summed over the tiles in fp32.
    d_head, d_bias = (
        student.new_zeros(tensor.shape if tensor is not None and wanted else 0, dtype=dtype)
        for tensor, wanted in (
            (sides.student_head, call.want_head),
            (sides.student_bias, call.want_bias),
        )
    )
    d_head_VH, d_bias_V = d_head[: sides.vocabulary], d_bias[: sides.vocabulary]
    results = Statistics(*stats)
    tiling = _tiling(sides, call.settings, call.want_head, call.labels_apart)
    for start in range(0, student.shape[0], tiling.rows):
        part = slice(start, min(start + tiling.rows, student.shape[0]))
        tokens = call.tokens.rows(part)
        d_logits_nV = _tile(call, tokens, part, tiling.columns, results)
        if d_logits_nV is None:
            continue
        if head is None:
            d_student[part] = d_logits_nV
            continue
        if call.want_bias:
            d_bias_V += d_logits_nV.sum(0)
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
                d_head_VH[columns].addmm_(d_logits_nV[:, columns].T, hidden_nH)
        if d_hidden_nH is not None:
            d_student[part] = d_hidden_nH
    return stats, d_student, d_head.to(saved), d_bias


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient ← factor · gradient, in place."""
    return gradient.mul_(factor)


def scratch_bytes(sides: Sides, settings: Settings) -> int:
    """What a call without `max_scratch_bytes` that wants both gradients takes beside them."""
    tiling = _tiling(sides, settings, want_head=True, labels_apart=False)
    return tiling.fixed_bytes + min(tiling.rows, sides.student.shape[0]) * tiling.row_bytes


def _tiling(sides: Sides, settings: Settings, want_head: bool, labels_apart: bool) -> Tiling:
    dtype, limit = sides.compute_dtype, settings.max_scratch_bytes
    size, vocabulary = dtype.itemsize, sides.vocabulary
    tiles = FULL_TILES if settings.top_k is None and sides.stored_ids is None else TOP_K_TILES
    tiles += (settings.softcap is not None) + labels_apart
    widest = max(side.shape[1] for side in (sides.student, sides.teacher) if side is not None)
    row_bytes = size * (tiles * vocabulary + 4 * widest)
    fixed_bytes, columns = 0 if sides.student_bias is None else size * vocabulary, vocabulary
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
    sides, active = call.sides, tokens.active
    logits_nV = _logits(sides.student, *sides.student_layer, part, columns, results.loss.dtype)
    if not bool(active.all()):
        logits_nV.masked_fill_(~active[:, None], 0)
    if not call.labels_apart:
        return _objective_(call, tokens, part, columns, logits_nV, results)
    label_loss, d_labels_nV = _cross_entropy(call, tokens, part, logits_nV)
    tokens = tokens._replace(policy_weight=None)
    d_logits_nV = _objective_(call, tokens, part, columns, logits_nV, results)
    results.loss[part] += label_loss
    return None if d_logits_nV is None else d_logits_nV.add_(d_labels_nV)


def _cross_entropy(
    call: Call, tokens: Tokens, part: slice, logits_nV: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted −log softmax(z)[target] [n] at temperature 1 and its d-logits [n, V]."""
    assert tokens.target_ids is not None and tokens.policy_weight is not None
    log_s_nV, s_nV = log_softmax_(logits_nV.clone(), 1.0)
    target = _target(
        log_s_nV, tokens, call.settings, tokens.active, torch.empty_like(log_s_nV[:, 0])
    )
    d_target = target.d_target if call.upstream is None else target.d_target * call.upstream[part]
    d_logits_nV = s_nV.mul_(-d_target[:, None])
    assert target.ids is not None
    return target.loss, d_logits_nV.scatter_add_(-1, target.ids, d_target[:, None])


def _objective_(
    call: Call,
    tokens: Tokens,
    part: slice,
    columns: int,
    logits_nV: Tensor,
    results: Statistics,
) -> Tensor | None:
    """`_tile` but for a cross-entropy that takes a softmax of its own; overwrites `logits_nV`."""
    settings = call.settings
    distilled, active = tokens.distill_weight != 0, tokens.active
    anyone = bool(distilled.any())
    ids_nK = _support(call, part, logits_nV, distilled) if anyone else None
    slope_nV = softcap_(logits_nV, settings.softcap)
    log_s_nV, s_nV = log_softmax_(logits_nV, settings.temperature)
    results.student_entropy[part] = entropy_of(log_s_nV, s_nV).masked_fill_(~active, 0)

    target = _target(log_s_nV, tokens, settings, active, results.student_logprob[part])
    scale = torch.full_like(target.weight, 1 / settings.temperature)
    if call.upstream is not None:
        scale = scale * call.upstream[part]
    d_target = (target.d_target * scale)[:, None]
    if not anyone:
        results.loss[part] = target.loss
        d_logits_nV = s_nV.mul_(-d_target) if call.wants else None
        return _finish_(d_logits_nV, d_target, target.ids, slope_nV)

    read = _network_teacher if call.sides.stored_ids is None else _stored_teacher
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
    side: Tensor,
    head: Tensor | None,
    bias: Tensor | None,
    part: slice,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    if head is None:
        return side[part].to(dtype, copy=True)
    hidden_nH = side[part].to(dtype)
    if head.dtype == dtype:
        logits_nV = hidden_nH @ head.T
    else:
        logits_nV = hidden_nH.new_empty(hidden_nH.shape[0], head.shape[0])
        for first in range(0, head.shape[0], columns):
            block = slice(first, first + columns)
            logits_nV[:, block] = hidden_nH @ head[block].to(dtype).T
    return logits_nV if bias is None else logits_nV.add_(bias)


def _support(call: Call, part: slice, logits_nV: Tensor, distilled: Tensor) -> Tensor | None:
    """Ids [n, K] of the tokens that the divergence keeps; None for all."""
    if call.sides.stored_ids is not None:
        return call.sides.stored_ids[part].masked_fill(~distilled[:, None], 0)
    return None if call.settings.top_k is None else greatest_ids(logits_nV, call.settings.top_k)


def _target(
    log_s_nV: Tensor, tokens: Tokens, settings: Settings, active: Tensor, logprob_n: Tensor
) -> Target:
    """The policy term, or the cross-entropy, and the capped ratio; writes the student's log-prob to
    `logprob_n`."""
    weight = tokens.distill_weight
    loss, d_target = torch.zeros_like(weight), torch.zeros_like(weight)
    if tokens.target_ids is None:
        return Target(None, weight, loss, d_target)
    ids = tokens.target_ids.masked_fill(~active, 0)[:, None]
    logprob = log_s_nV.gather(-1, ids)[:, 0]
    logprob.masked_fill_(logprob < MASKED_BELOW, -math.inf)
    logprob_n.copy_(logprob.masked_fill(~active, 0))
    if tokens.has_labels and tokens.policy_weight is not None:
        unlabelled = tokens.policy_weight == 0
        loss = (-tokens.policy_weight * logprob).masked_fill_(unlabelled, 0)
        return Target(ids, weight, loss, -tokens.policy_weight)
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
    logits_nV = _logits(sides.teacher, *sides.teacher_layer, part, columns, sides.compute_dtype)
    if not bool(distilled.all()):
        logits_nV.masked_fill_(~distilled[:, None], 0)
    softcap_(logits_nV, settings.softcap)
    log_q_nV, q_nV = log_softmax_(logits_nV, settings.temperature)
    entropy = entropy_of(log_q_nV, q_nV)
    logprob = None if target is None else log_q_nV.gather(-1, target)[:, 0]
    if ids_nK is None:
        return Teacher(log_q_nV, q_nV, entropy, logprob)
    log_q_nB, q_nB, _ = buckets_(log_q_nV, q_nV, ids_nK, settings.add_tail)
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
    entropy = entropy_of(log_q_nB, log_q_nB.exp())
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
    divergence, slope_s_nV = divergence_and_slope_(
        log_s_nV, s_nV, teacher.log_q_nB, teacher.q_nB, alpha
    )
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
    log_s_nB, s_nB, s_nK = buckets_(log_s_nV, s_nV, ids_nK, settings.add_tail)
    divergence, slope_s_nB = divergence_and_slope_(
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
