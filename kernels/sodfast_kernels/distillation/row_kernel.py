"""Triton: from two rows of logits to loss, statistics and d-logits. One program a row.

What it moves, fp32 tiles and bf16 d-logits, bytes an element (full vocabulary):

    sweep 1  read both   8   log-sum-exp, entropies, the sampled token's log-probs; for α = 1 also E
    sweep 2  read both   8   JSD only: E and D
    sweep 3  read both   8   D for the two KLs; write d-logits 2

18 for a KL, 26 for the JSD. With top-k + tail the candidates for the top k are collected in sweep 2
and sweep 3 reads the student alone: 22. bf16 logits (the logits form): 10, 14 and 12.

Precision. Teacher and student nearly agree, so everything is built from δ = log q − log s, taken as
(z_q − z_s)/T − (L_q − L_s): the first difference is nearly exact, and an error in the log-sum-exps
L shifts a whole row, which the gradient s_j (g_j − E) takes out again. From δ come expm1(−|δ|) and
log1p, by series where they would cancel. Sums are per lane, then a tree: no atomics, so a call
gives the same bits twice.

Logits of −inf become −1e30, so no difference of theirs is NaN. Everything is in base 2 until it is
stored (names ending in 2).
"""

from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)
MASKED_BELOW = tl.constexpr(-1e28)
TAIL_FLOOR = tl.constexpr(9.9999995e-08)
LOG_RATIO_BOUND = tl.constexpr(20.0)
FORWARD, REVERSE, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Rows of the statistics, [6, N].
LOSS, DIVERGENCE, STUDENT_ENTROPY, TEACHER_ENTROPY, STUDENT_LOGPROB, TEACHER_LOGPROB = (
    tl.constexpr(row) for row in range(6)
)
SCALE_BLOCK = 4096


@triton.jit
def _expm1_negative(x):
    """exp(x) − 1 for x ≤ 0."""
    series = 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    series = (series * x + 1.0) * x
    return tl.where(x > -0.35, series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def _log1p_negative(u, HALF: tl.constexpr):
    """log(1 + u) for −1 < u ≤ 0; HALF promises u ≥ −1/2, where the series holds everywhere."""
    r = u / (u + 2.0)
    square = r * r
    series = 2.0 / 15
    series = series * square + 2.0 / 13
    series = series * square + 2.0 / 11
    series = series * square + 2.0 / 9
    series = series * square + 2.0 / 7
    series = series * square + 2.0 / 5
    series = series * square + 2.0 / 3
    series = (series * square + 2.0) * r
    if HALF:
        return series
    return tl.where(u > -0.5, series, tl.log(1.0 + u))


@triton.jit
def _softcap(z, softcap):
    """c·tanh(z/c) and its derivative. An overflowed logit stays NaN instead of becoming c."""
    shrink = _expm1_negative(-2.0 * tl.abs(z) / softcap)
    plus = shrink + 2.0
    size = -shrink / plus * softcap
    capped = tl.where(z < 0, -size, size)
    return tl.where(z == float("inf"), float("nan"), capped), 4.0 * (1.0 + shrink) / (plus * plus)


@triton.jit
def _logit(z, valid, softcap):
    """A logit ready for differences; `softcap` may be None."""
    if softcap is not None:
        z, _ = _softcap(z, softcap)
    return tl.where(valid, tl.where(z < MASKED, MASKED, z), MASKED)


@triton.jit
def _ordered(z):
    """Integers in the order of the floats; −0 counts as +0."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _online(z, peak, total, moment, scale2):
    """Adds y = z·scale2 to Σ 2^(y − top) and Σ 2^(y − top)(y − top), top = peak·scale2; also the
    factor and the new peaks.

    Peaks are logits, and only differences are scaled: near the peak, where the mass is, they are
    small, and so is their rounding.
    """
    gap = (z - peak) * scale2
    factor = tl.exp2(-tl.abs(gap))
    above = gap > 0
    moment = tl.where(above, factor * (moment - gap * total), moment + factor * gap)
    total = tl.where(above, total * factor + 1.0, total + factor)
    return tl.where(above, z, peak), total, moment, factor, above


@triton.jit
def _log_sum(peak, total, moment, scale2):
    """Log-sum-exp in base 2 and entropy in nats from the lanes, NaN for a row without mass; and
    the first as its two terms, the top logit and the log of the mass relative to it."""
    top = tl.max(peak, 0)
    gap = (peak - top) * scale2
    factor = tl.exp2(gap)
    mass = tl.sum(total * factor, 0)
    mean = tl.sum(factor * (moment + gap * total), 0) / mass
    log_mass = tl.log2(tl.where(top < MASKED_BELOW, float("nan"), mass))
    return top * scale2 + log_mass, (log_mass - mean) * LN2, top, log_mass


@triton.jit
def _terms(delta2, s, q, alpha, KIND: tl.constexpr, HALF: tl.constexpr):
    """A bucket's summand of D and s·g, g = ∂D/∂s, from δ and both masses. Never overflows."""
    delta = delta2 * LN2
    shrink = _expm1_negative(-tl.abs(delta))
    if KIND == JSD:
        if HALF:
            # log m − max(log s, log q)
            log_mix = _log1p_negative(0.5 * shrink, HALF)
            slope = -0.5 * s * (tl.maximum(delta, 0.0) + log_mix)
            return slope + 0.5 * q * (tl.minimum(delta, 0.0) - log_mix), slope
        side = tl.where(delta > 0, 1.0 - alpha, alpha)
        log_mix = _log1p_negative(side * shrink, HALF)
        slope = (alpha - 1.0) * s * (tl.maximum(delta, 0.0) + log_mix)
        return slope + alpha * q * (tl.minimum(delta, 0.0) - log_mix), slope
    # q − s, exact also where they nearly agree
    excess = tl.maximum(s, q) * tl.where(delta > 0, -shrink, shrink)
    if KIND == FORWARD:
        return q * delta - excess, -excess
    slope = -s * delta
    return excess + slope, slope


@triton.jit
def _diverges(z_s, z_q, valid, KIND: tl.constexpr):
    """1 where this token alone makes the KL infinite."""
    if KIND == FORWARD:
        return tl.where(valid & (z_s < MASKED_BELOW) & (z_q > MASKED_BELOW), 1, 0)
    return tl.where(valid & (z_q < MASKED_BELOW) & (z_s > MASKED_BELOW), 1, 0)


@triton.jit
def _round_bf16(x):
    """The bits of x in bf16, to nearest even; integers, because the interpreter truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, bits).to(tl.int16)


@triton.jit
def _store(pointer, value, mask, BF16: tl.constexpr):
    """Stores fp32, or bf16 through a pointer to 16-bit integers."""
    if BF16:
        tl.store(pointer, _round_bf16(value), mask=mask)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def _weights(row, distill_ptr, policy_ptr):
    """The distillation weight, whether the teacher counts, and whether the row counts at all."""
    weight = tl.load(distill_ptr + row)
    distilled = weight != 0
    active = distilled
    if policy_ptr is not None:
        active = active | (tl.load(policy_ptr + row) != 0)
    return weight, distilled, active


@triton.jit
def _target_logprob2(base_ptr, target, wanted, log_sum2, scale2, softcap, vocabulary):
    """Log-prob of one token in base 2; NaN for an id outside the vocabulary."""
    inside = (target >= 0) & (target < vocabulary)
    z = tl.load(base_ptr + target, mask=wanted & inside, other=0.0).to(tl.float32)
    z = _logit(z, True, softcap)
    logprob2 = tl.where(z < MASKED_BELOW, log_sum2 * 0.0 - float("inf"), z * scale2 - log_sum2)
    return tl.where(inside, logprob2, float("nan"))


@triton.jit
def _policy(
    row, logprob, weight, scale, advantage_ptr, policy_ptr, old_ptr, clip_low, clip_high, ratio_cap
):
    """The policy loss, its pull on the sampled token's logit, the capped distillation weight."""
    old = logprob
    if old_ptr is not None:
        old = tl.load(old_ptr + row)
    log_ratio = logprob - old
    bounded = tl.where(log_ratio > LOG_RATIO_BOUND, LOG_RATIO_BOUND, log_ratio)
    bounded = tl.where(bounded < -LOG_RATIO_BOUND, -LOG_RATIO_BOUND, bounded)
    ratio = tl.exp(bounded)
    if ratio_cap is not None:
        weight = weight * tl.where(ratio > ratio_cap, ratio_cap, ratio)
    loss = 0.0
    pull = 0.0
    if advantage_ptr is not None:
        advantage = tl.load(advantage_ptr + row)
        policy_weight = tl.load(policy_ptr + row)
        clipped = tl.where(ratio > 1.0 + clip_high, 1.0 + clip_high, ratio)
        clipped = tl.where(clipped < 1.0 - clip_low, 1.0 - clip_low, clipped)
        free, held = -advantage * ratio, -advantage * clipped
        rewarded = policy_weight != 0
        # Where the clip wins the token stays; NaN comes through `free`.
        loss = tl.where(rewarded, policy_weight * tl.where(held > free, held, free), 0.0)
        stays = (held > free) | (tl.abs(log_ratio) > LOG_RATIO_BOUND) | ~rewarded
        pull = tl.where(stays, 0.0, policy_weight * free * scale)
    return weight, loss, pull


@triton.jit
def _save(stats_ptr, stats_stride, row, entry: tl.constexpr, value, counts):
    tl.store(stats_ptr + entry * stats_stride + row, tl.where(counts, value, 0.0))


@triton.jit
def full_kernel(
    student_ptr, teacher_ptr, d_logits_ptr, stats_ptr,
    distill_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    student_stride, teacher_stride, d_logits_stride, stats_stride, vocabulary, width,
    alpha, inverse_temperature, softcap, clip_low, clip_high, ratio_cap,
    KIND: tl.constexpr, HALF: tl.constexpr, BF16: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Full vocabulary. `width` ≥ `vocabulary` is the padded row; None pointers switch terms off."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    scale2 = inverse_temperature * LOG2E
    weight, distilled, active = _weights(row, distill_ptr, policy_ptr)
    # A row without any weight sweeps nothing; the teacher's side of an undistilled one is not read.
    # (Masks compare with these widths: the interpreter cannot combine a vector and a scalar bool.)
    width_s, width_q = tl.where(active, width, 0), tl.where(distilled, width, 0)

    peak_s = tl.zeros([BLOCK], tl.float32) + MASKED
    peak_q = peak_s
    total_s = tl.zeros([BLOCK], tl.float32)
    total_q, moment_s, moment_q, gap_sum = total_s, total_s, total_s, total_s
    infinite = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, width_s, BLOCK, num_stages=STAGES):
        ids = start + lanes
        z_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
        z_q = tl.load(teacher_ptr + ids, mask=ids < width_q, other=0.0).to(tl.float32)
        valid = ids < vocabulary
        z_s, z_q = _logit(z_s, valid, softcap), _logit(z_q, valid, softcap)
        peak_s, total_s, moment_s, factor, above = _online(z_s, peak_s, total_s, moment_s, scale2)
        peak_q, total_q, moment_q, _, _ = _online(z_q, peak_q, total_q, moment_q, scale2)
        if KIND == REVERSE:
            gap = (z_q - z_s) * scale2
            gap_sum = tl.where(above, gap_sum * factor + gap, gap_sum + factor * gap)
        if KIND != JSD:
            infinite |= _diverges(z_s, z_q, valid, KIND)
    log_s2, entropy_s, top_s, mass_s = _log_sum(peak_s, total_s, moment_s, scale2)
    log_q2, entropy_q, top_q, mass_q = _log_sum(peak_q, total_q, moment_q, scale2)
    # Term by term: the log-sum-exps of a peaked row are large, their rounding would shift δ.
    shift2 = (top_q - top_s) * scale2 + (mass_q - mass_s)
    _save(stats_ptr, stats_stride, row, STUDENT_ENTROPY, entropy_s, active)
    _save(stats_ptr, stats_stride, row, TEACHER_ENTROPY, entropy_q, distilled)

    mean = 0.0
    if KIND == REVERSE:
        factor = tl.exp2((peak_s - top_s) * scale2)
        mean = (shift2 - tl.sum(gap_sum * factor, 0) / tl.sum(total_s * factor, 0)) * LN2
    diverged = False
    if KIND != JSD:
        diverged = tl.max(infinite, 0) > 0

    scale = inverse_temperature
    if upstream_ptr is not None:
        scale = scale * tl.load(upstream_ptr + row)
    policy_loss = 0.0
    pull = 0.0
    target = -1
    if target_ptr is not None:
        target = tl.load(target_ptr + row, mask=active, other=0)
        student2 = _target_logprob2(
            student_ptr, target, active, log_s2, scale2, softcap, vocabulary
        )
        teacher2 = _target_logprob2(
            teacher_ptr, target, distilled, log_q2, scale2, softcap, vocabulary
        )
        _save(stats_ptr, stats_stride, row, STUDENT_LOGPROB, student2 * LN2, active)
        _save(stats_ptr, stats_stride, row, TEACHER_LOGPROB, teacher2 * LN2, distilled)
        weight, policy_loss, pull = _policy(
            row, student2 * LN2, weight, scale, advantage_ptr, policy_ptr, old_ptr, clip_low,
            clip_high, ratio_cap,
        )  # fmt: skip

    divergence = tl.zeros([BLOCK], tl.float32)
    if KIND == JSD:
        slopes = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, width_q, BLOCK, num_stages=STAGES):
            ids = start + lanes
            z_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
            z_q = tl.load(teacher_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
            valid = ids < vocabulary
            z_s, z_q = _logit(z_s, valid, softcap), _logit(z_q, valid, softcap)
            s, q = tl.exp2(z_s * scale2 - log_s2), tl.exp2(z_q * scale2 - log_q2)
            term, slope = _terms((z_q - z_s) * scale2 - shift2, s, q, alpha, KIND, HALF)
            divergence += term
            slopes += slope
        mean = tl.sum(slopes, 0)

    # With a gradient every row is written, those without weight as zeros.
    limit = width_s
    if d_logits_ptr is not None:
        d_logits_ptr += row * d_logits_stride
        limit = width
    row_scale = tl.where(diverged, float("nan"), weight * scale)
    if (KIND != JSD) or (d_logits_ptr is not None):
        for start in tl.range(0, limit, BLOCK, num_stages=STAGES):
            ids = start + lanes
            z_s = tl.load(student_ptr + ids, mask=ids < width_s, other=0.0).to(tl.float32)
            z_q = tl.load(teacher_ptr + ids, mask=ids < width_q, other=0.0)
            z_q = z_q.to(tl.float32)
            valid = ids < vocabulary
            if softcap is not None:
                _, bend = _softcap(z_s, softcap)
            z_s, z_q = _logit(z_s, valid, softcap), _logit(z_q, valid, softcap)
            s, q = tl.exp2(z_s * scale2 - log_s2), tl.exp2(z_q * scale2 - log_q2)
            term, slope = _terms((z_q - z_s) * scale2 - shift2, s, q, alpha, KIND, HALF)
            if KIND != JSD:
                divergence += term
            if d_logits_ptr is not None:
                value = tl.where(distilled, (slope - s * mean) * row_scale, 0.0)
                if advantage_ptr is not None:
                    value += tl.where(ids == target, pull, 0.0) - s * pull
                if softcap is not None:
                    value *= bend
                _store(d_logits_ptr + ids, tl.where(active, value, 0.0), ids < width, BF16)
    total = tl.sum(divergence, 0)
    total = tl.where(total < 0, 0.0, total)
    total = tl.where(diverged & (total == total), float("inf"), total)
    _save(stats_ptr, stats_stride, row, DIVERGENCE, total, distilled)
    loss = policy_loss + tl.where(distilled, weight * total, 0.0)
    _save(stats_ptr, stats_stride, row, LOSS, loss, active)


@triton.jit
def _kth(keys, counted, k):
    """The k-th greatest of the counted integers, one bit at a time from the top."""
    found = tl.full([], -(2**31), tl.int32)
    for bit in range(32):
        # 2^31 wraps around to the sign: −2^31 + 2^31 = 0.
        step = tl.full([], 1, tl.int32) << (31 - bit)
        reach = tl.sum(tl.where(counted & (keys >= found + step), 1, 0), 0)
        found = tl.where(reach >= k, found + step, found)
    return found


@triton.jit
def _count(student_ptr, width, vocabulary, key, last, BLOCK: tl.constexpr):
    """How many logits of a row are above `key`, or equal to it with an id up to `last`."""
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        ids = start + lanes
        keys = _ordered(tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32))
        inside = (keys > key) | ((keys == key) & (ids <= last))
        count += tl.where((ids < vocabulary) & inside, 1, 0)
    return tl.sum(count, 0)


@triton.jit
def _kth_of_row(student_ptr, width, vocabulary, k, BLOCK: tl.constexpr):
    """The k-th greatest logit of a row and the last id kept among its equals; ~50 reads, exact."""
    key = tl.full([], -(2**31), tl.int32)
    for bit in range(32):
        step = tl.full([], 1, tl.int32) << (31 - bit)
        reach = _count(student_ptr, width, vocabulary, key + step, width, BLOCK)
        key = tl.where(reach >= k, key + step, key)
    # The smallest id with which the count reaches k.
    low, high = tl.full([], 0, tl.int32), vocabulary - 1
    while low < high:
        middle = (low + high) // 2
        enough = _count(student_ptr, width, vocabulary, key, middle, BLOCK) >= k
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return key, low


@triton.jit
def _collect(
    student_ptr, teacher_ptr, values_ptr, ids_ptr, width, vocabulary, key, last, log_s2,
    log_q2, scale2, softcap, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Candidates (above `key`, or equal with an id up to `last`) into the buffer, in the order of
    their ids; returns how many there are and both sides' mass outside them."""
    lanes = tl.arange(0, BLOCK)
    outside_s = tl.zeros([BLOCK], tl.float32)
    outside_q = tl.zeros([BLOCK], tl.float32)
    count = tl.full([], 0, tl.int32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        ids = start + lanes
        raw_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
        raw_q = tl.load(teacher_ptr + ids, mask=ids < width, other=0.0)
        raw_q = raw_q.to(tl.float32)
        keys = _ordered(raw_s)
        valid = ids < vocabulary
        chosen = valid & ((keys > key) | ((keys == key) & (ids <= last)))
        z_s, z_q = _logit(raw_s, valid, softcap), _logit(raw_q, valid, softcap)
        outside_s += tl.where(chosen, 0.0, tl.exp2(z_s * scale2 - log_s2))
        outside_q += tl.where(chosen, 0.0, tl.exp2(z_q * scale2 - log_q2))
        picked = tl.where(chosen, 1, 0)
        places = count + tl.cumsum(picked, 0) - 1
        stored = chosen & (places < CAPACITY)
        tl.store(values_ptr + places, raw_s, mask=stored)
        tl.store(values_ptr + CAPACITY + places, raw_q, mask=stored)
        tl.store(ids_ptr + places, ids, mask=stored)
        count += tl.sum(picked, 0)
    return count, tl.sum(outside_s, 0), tl.sum(outside_q, 0)


@triton.jit
def _bucket_gradient(
    delta2, s, q, kept, tail_s, tail_q, probability, alpha, row_scale, pull,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr,
):  # fmt: skip
    """D, the d-logits of the kept tokens, and the factor of s_j for all the others."""
    term, slope = _terms(delta2, s, q, alpha, KIND, HALF)
    divergence = tl.sum(tl.where(kept, term, 0.0), 0)
    mean = tl.sum(tl.where(kept, slope, 0.0), 0)
    outside = 0.0
    if ADD_TAIL:
        capped = tail_s <= TAIL_FLOOR
        tail_s = tl.where(capped, TAIL_FLOOR, tail_s)
        tail_q = tl.where(tail_q <= TAIL_FLOOR, TAIL_FLOOR, tail_q)
        gap2 = tl.log2(tail_q) - tl.log2(tail_s)
        tail_term, tail_slope = _terms(gap2, tail_s, tail_q, alpha, KIND, HALF)
        # Where the cap binds the tail is a constant.
        tail_slope = tl.where(capped, 0.0, tail_slope)
        divergence += tail_term
        mean += tail_slope
        outside = (tail_slope / tail_s - mean) * row_scale
    inside = (slope - s * mean) * row_scale - probability * pull
    divergence = tl.where(divergence < 0, 0.0, divergence)
    return divergence, inside, outside - pull


@triton.jit
def top_k_kernel(
    student_ptr, teacher_ptr, d_logits_ptr, stats_ptr,
    distill_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    values_ptr, ids_ptr,
    student_stride, teacher_stride, d_logits_stride, stats_stride, vocabulary, width, k,
    alpha, inverse_temperature, softcap, clip_low, clip_high, ratio_cap,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr, CAPACITY: tl.constexpr,
    BF16: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The student's top k < vocabulary, k ≤ BLOCK, k ≤ CAPACITY.

    The k-th greatest of the lanes' maxima is a lower bound of the row's k-th greatest logit. Above
    it lie few more than k candidates; they are collected and the threshold is found among them. If
    they overflow the buffer (many equal logits), the row itself is searched.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    values_ptr += row * (2 * CAPACITY)
    ids_ptr += row * CAPACITY
    lanes = tl.arange(0, BLOCK)
    scale2 = inverse_temperature * LOG2E
    weight, distilled, active = _weights(row, distill_ptr, policy_ptr)
    width_s, width_q = tl.where(active, width, 0), tl.where(distilled, width, 0)

    peak_s = tl.zeros([BLOCK], tl.float32) + MASKED
    peak_q = peak_s
    total_s = tl.zeros([BLOCK], tl.float32)
    total_q, moment_s, moment_q = total_s, total_s, total_s
    greatest = tl.full([BLOCK], -(2**31), tl.int32)
    for start in tl.range(0, width_s, BLOCK, num_stages=STAGES):
        ids = start + lanes
        z_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
        z_q = tl.load(teacher_ptr + ids, mask=ids < width_q, other=0.0).to(tl.float32)
        valid = ids < vocabulary
        greatest = tl.maximum(greatest, tl.where(valid, _ordered(z_s), -(2**31)))
        z_s, z_q = _logit(z_s, valid, softcap), _logit(z_q, valid, softcap)
        peak_s, total_s, moment_s, _, _ = _online(z_s, peak_s, total_s, moment_s, scale2)
        peak_q, total_q, moment_q, _, _ = _online(z_q, peak_q, total_q, moment_q, scale2)
    log_s2, entropy_s, _, _ = _log_sum(peak_s, total_s, moment_s, scale2)
    log_q2, entropy_q, _, _ = _log_sum(peak_q, total_q, moment_q, scale2)
    _save(stats_ptr, stats_stride, row, STUDENT_ENTROPY, entropy_s, active)
    _save(stats_ptr, stats_stride, row, TEACHER_ENTROPY, entropy_q, distilled)

    scale = inverse_temperature
    if upstream_ptr is not None:
        scale = scale * tl.load(upstream_ptr + row)
    policy_loss = 0.0
    pull = 0.0
    target = -1
    if target_ptr is not None:
        target = tl.load(target_ptr + row, mask=active, other=0)
        student2 = _target_logprob2(
            student_ptr, target, active, log_s2, scale2, softcap, vocabulary
        )
        teacher2 = _target_logprob2(
            teacher_ptr, target, distilled, log_q2, scale2, softcap, vocabulary
        )
        _save(stats_ptr, stats_stride, row, STUDENT_LOGPROB, student2 * LN2, active)
        _save(stats_ptr, stats_stride, row, TEACHER_LOGPROB, teacher2 * LN2, distilled)
        weight, policy_loss, pull = _policy(
            row, student2 * LN2, weight, scale, advantage_ptr, policy_ptr, old_ptr, clip_low,
            clip_high, ratio_cap,
        )  # fmt: skip

    bound = _kth(greatest, lanes < BLOCK, k)
    count, tail_s, tail_q = _collect(
        student_ptr, teacher_ptr, values_ptr, ids_ptr, width_q, vocabulary, bound, vocabulary,
        log_s2, log_q2, scale2, softcap, CAPACITY, BLOCK, STAGES,
    )  # fmt: skip
    if count > CAPACITY:
        bound, last = _kth_of_row(student_ptr, width, vocabulary, k, BLOCK)
        # Everyone has written its candidates before they are overwritten.
        tl.debug_barrier()
        count, tail_s, tail_q = _collect(
            student_ptr, teacher_ptr, values_ptr, ids_ptr, width_q, vocabulary, bound, last,
            log_s2, log_q2, scale2, softcap, CAPACITY, BLOCK, STAGES,
        )  # fmt: skip
    tl.debug_barrier()

    slots = tl.arange(0, CAPACITY)
    filled = slots < count
    raw_s = tl.load(values_ptr + slots, mask=filled, other=0.0)
    raw_q = tl.load(values_ptr + CAPACITY + slots, mask=filled, other=0.0)
    ids = tl.load(ids_ptr + slots, mask=filled, other=0)
    keys = _ordered(raw_s)
    threshold = _kth(keys, filled, k)
    above = filled & (keys > threshold)
    equal = filled & (keys == threshold)
    room = k - tl.sum(tl.where(above, 1, 0), 0)
    # The buffer is in the order of the ids, so the first of the equals are the lowest.
    kept = above | (equal & (tl.cumsum(tl.where(equal, 1, 0), 0) <= room))
    z_s, z_q = _logit(raw_s, filled, softcap), _logit(raw_q, filled, softcap)
    log_kept_s2, log_kept_q2 = z_s * scale2 - log_s2, z_q * scale2 - log_q2
    s, q = tl.exp2(log_kept_s2), tl.exp2(log_kept_q2)
    probability = s
    delta2 = (z_q - z_s) * scale2 - (log_q2 - log_s2)
    tail_s += tl.sum(tl.where(filled & ~kept, s, 0.0), 0)
    tail_q += tl.sum(tl.where(filled & ~kept, q, 0.0), 0)
    if not ADD_TAIL:
        top_s = tl.max(tl.where(kept, log_kept_s2, scale2 * MASKED), 0)
        top_q = tl.max(tl.where(kept, log_kept_q2, scale2 * MASKED), 0)
        norm_s2 = top_s + tl.log2(tl.sum(tl.where(kept, tl.exp2(log_kept_s2 - top_s), 0.0), 0))
        norm_q2 = top_q + tl.log2(tl.sum(tl.where(kept, tl.exp2(log_kept_q2 - top_q), 0.0), 0))
        s, q = tl.exp2(log_kept_s2 - norm_s2), tl.exp2(log_kept_q2 - norm_q2)
        delta2 = delta2 - (norm_q2 - norm_s2)
    divergence, inside, outside = _bucket_gradient(
        delta2, s, q, kept, tail_s, tail_q, probability, alpha, weight * scale, pull, KIND, HALF,
        ADD_TAIL,
    )  # fmt: skip
    if KIND != JSD:
        diverged = tl.max(_diverges(z_s, z_q, kept, KIND), 0) > 0
        divergence = tl.where(diverged & (divergence == divergence), float("inf"), divergence)
    _save(stats_ptr, stats_stride, row, DIVERGENCE, divergence, distilled)
    loss = policy_loss + tl.where(distilled, weight * divergence, 0.0)
    _save(stats_ptr, stats_stride, row, LOSS, loss, active)

    if d_logits_ptr is not None:
        _write_buckets(
            student_ptr, d_logits_ptr + row * d_logits_stride, ids, kept, inside,
            outside, divergence, distilled, active, target, pull, log_s2, scale2, softcap, width,
            vocabulary, BF16, BLOCK, STAGES,
        )  # fmt: skip


@triton.jit
def _write_buckets(
    student_ptr, d_logits_ptr, ids, kept, inside, outside, divergence, distilled, active,
    target, pull, log_s2, scale2, softcap, width, vocabulary,
    BF16: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d-logits: s_j · outside everywhere, then the kept tokens over it."""
    finite = (divergence == divergence) & (divergence < float("inf"))
    outside = tl.where(distilled, tl.where(finite, outside, float("nan")), -pull)
    inside = tl.where(finite, inside, float("nan")) + tl.where(ids == target, pull, 0.0)
    lanes = tl.arange(0, BLOCK)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        every = start + lanes
        z = tl.load(student_ptr + every, mask=every < tl.where(active, width, 0), other=0.0).to(
            tl.float32
        )
        if softcap is not None:
            _, bend = _softcap(z, softcap)
        z = _logit(z, every < vocabulary, softcap)
        value = tl.exp2(z * scale2 - log_s2) * outside + tl.where(every == target, pull, 0.0)
        if softcap is not None:
            value *= bend
        _store(d_logits_ptr + every, tl.where(active, value, 0.0), every < width, BF16)
    tl.debug_barrier()
    if softcap is not None:
        # 1 − (z/c)² from the capped logit would cancel: read the logit again.
        raw = tl.load(student_ptr + ids, mask=kept, other=0.0).to(tl.float32)
        _, bend = _softcap(raw, softcap)
        inside *= bend
    _store(d_logits_ptr + ids, inside, kept, BF16)


@triton.jit
def stored_kernel(
    student_ptr, stored_ids_ptr, stored_logprobs_ptr, d_logits_ptr, stats_ptr,
    distill_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    student_stride, stored_stride, d_logits_stride, stats_stride, vocabulary, width, k,
    alpha, inverse_temperature, softcap, clip_low, clip_high, ratio_cap,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr, CAPACITY: tl.constexpr,
    BF16: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A teacher of k stored ids and log-probs a row; the remaining masses are the tails."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    lanes = tl.arange(0, BLOCK)
    scale2 = inverse_temperature * LOG2E
    weight, distilled, active = _weights(row, distill_ptr, policy_ptr)
    width_s, width_q = tl.where(active, width, 0), tl.where(distilled, width, 0)

    peak_s = tl.zeros([BLOCK], tl.float32) + MASKED
    total_s = tl.zeros([BLOCK], tl.float32)
    moment_s = total_s
    for start in tl.range(0, width_s, BLOCK, num_stages=STAGES):
        ids = start + lanes
        z_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
        z_s = _logit(z_s, ids < vocabulary, softcap)
        peak_s, total_s, moment_s, _, _ = _online(z_s, peak_s, total_s, moment_s, scale2)
    log_s2, entropy_s, _, _ = _log_sum(peak_s, total_s, moment_s, scale2)
    _save(stats_ptr, stats_stride, row, STUDENT_ENTROPY, entropy_s, active)

    slots = tl.arange(0, CAPACITY)
    kept = slots < tl.where(distilled, k, 0)
    ids = tl.load(stored_ids_ptr + row * stored_stride + slots, mask=kept, other=0)
    inside_vocabulary = (ids >= 0) & (ids < vocabulary)
    z_s = tl.load(student_ptr + ids, mask=kept & inside_vocabulary, other=0.0).to(tl.float32)
    z_s = _logit(tl.where(inside_vocabulary, z_s, float("nan")), True, softcap)
    log_q = tl.load(stored_logprobs_ptr + row * stored_stride + slots, mask=kept, other=0.0)
    log_q = log_q.to(tl.float32)
    log_q2 = tl.where(log_q < MASKED, MASKED, log_q) * LOG2E
    log_kept_s2 = z_s * scale2 - log_s2
    s, q = tl.exp2(log_kept_s2), tl.exp2(log_q2)
    probability = s
    delta2 = log_q2 - log_kept_s2

    # What is left of one has few digits: count it in fp64, from the same fp32 masses.
    mass = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, width_q, BLOCK):
        every = start + lanes
        z = tl.load(student_ptr + every, mask=every < width, other=0.0).to(tl.float32)
        z = _logit(z, every < vocabulary, softcap)
        mass += tl.exp2(z * scale2 - log_s2).to(tl.float64)
    kept_mass = tl.sum(tl.where(kept, s.to(tl.float64), 0.0), 0)
    tail_s = (tl.sum(mass, 0) - kept_mass).to(tl.float32)
    stored = tl.exp(tl.where(kept, log_q, MASKED).to(tl.float64))
    stored_mass = tl.sum(stored, 0)
    tail_q = (1.0 - stored_mass).to(tl.float32)
    log_tail = tl.log(tl.where(tail_q <= TAIL_FLOOR, TAIL_FLOOR, tail_q))
    entropy_q = -tl.sum(tl.where(kept, q * log_q2 * LN2, 0.0), 0) - tl.exp(log_tail) * log_tail
    _save(stats_ptr, stats_stride, row, TEACHER_ENTROPY, entropy_q, distilled)

    scale = inverse_temperature
    if upstream_ptr is not None:
        scale = scale * tl.load(upstream_ptr + row)
    policy_loss = 0.0
    pull = 0.0
    target = -1
    if target_ptr is not None:
        target = tl.load(target_ptr + row, mask=active, other=0)
        student2 = _target_logprob2(
            student_ptr, target, active, log_s2, scale2, softcap, vocabulary
        )
        hit = kept & (ids == target)
        among = tl.sum(tl.where(hit, log_q, 0.0), 0)
        teacher_logprob = tl.where(tl.max(tl.where(hit, 1, 0), 0) > 0, among, log_tail)
        _save(stats_ptr, stats_stride, row, STUDENT_LOGPROB, student2 * LN2, active)
        _save(stats_ptr, stats_stride, row, TEACHER_LOGPROB, teacher_logprob, distilled)
        weight, policy_loss, pull = _policy(
            row, student2 * LN2, weight, scale, advantage_ptr, policy_ptr, old_ptr, clip_low,
            clip_high, ratio_cap,
        )  # fmt: skip

    if not ADD_TAIL:
        top_s = tl.max(tl.where(kept, log_kept_s2, scale2 * MASKED), 0)
        norm_s2 = top_s + tl.log2(tl.sum(tl.where(kept, tl.exp2(log_kept_s2 - top_s), 0.0), 0))
        top_q = tl.max(tl.where(kept, log_q2, MASKED * LOG2E), 0)
        norm_q2 = top_q + tl.log2(tl.sum(tl.where(kept, tl.exp2(log_q2 - top_q), 0.0), 0))
        s, q = tl.exp2(log_kept_s2 - norm_s2), tl.exp2(log_q2 - norm_q2)
        delta2 = delta2 - (norm_q2 - norm_s2)
    divergence, inside, outside = _bucket_gradient(
        delta2, s, q, kept, tail_s, tail_q, probability, alpha, weight * scale, pull, KIND, HALF,
        ADD_TAIL,
    )  # fmt: skip
    if KIND != JSD:
        diverged = tl.max(_diverges(z_s, log_q2, kept, KIND), 0) > 0
        divergence = tl.where(diverged & (divergence == divergence), float("inf"), divergence)
    _save(stats_ptr, stats_stride, row, DIVERGENCE, divergence, distilled)
    loss = policy_loss + tl.where(distilled, weight * divergence, 0.0)
    _save(stats_ptr, stats_stride, row, LOSS, loss, active)

    if d_logits_ptr is not None:
        _write_buckets(
            student_ptr, d_logits_ptr + row * d_logits_stride, ids, kept & inside_vocabulary,
            inside, outside, divergence, distilled, active, target, pull, log_s2, scale2, softcap,
            width, vocabulary, BF16, BLOCK, STAGES,
        )  # fmt: skip


@triton.jit
def scale_kernel(values_ptr, factor_ptr, count, BF16: tl.constexpr, BLOCK: tl.constexpr):
    """values ← factor · values, in place; a factor of 1 reads nothing."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        ids = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + ids, mask=ids < count)
        if BF16:
            wide = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            tl.store(values_ptr + ids, _round_bf16(wide * factor), mask=ids < count)
        else:
            tl.store(values_ptr + ids, values * factor, mask=ids < count)


INTERPRETED = isinstance(full_kernel, InterpretedFunction)


def launch_options(vocabulary: int, buckets: bool = False) -> dict[str, int]:
    """Block, pipeline stages and warps: eight elements a thread, so bf16 is stored 16 bytes wide.
    Buckets are more to remember: they get the registers of half as many threads."""
    if vocabulary <= 1024:
        return {"BLOCK": 1024, "STAGES": 1, "num_warps": 4}
    if buckets:
        return {"BLOCK": 2048, "STAGES": 3, "num_warps": 8}
    return {"BLOCK": 4096, "STAGES": 3, "num_warps": 16}


def production_configurations() -> list[
    tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], list[str]]
]:
    """What bench/compile_report.py checks: (name, kernel, signature, constexprs, options, streamed
    arguments), for rows padded to multiples of 16, all per-token terms on."""
    options, top_options = launch_options(151_936), launch_options(151_936, buckets=True)
    strides = ["student_stride", "teacher_stride", "d_logits_stride", "vocabulary", "width"]
    vectors = ["distill_ptr", "advantage_ptr", "policy_ptr", "old_ptr"]
    scalars = ["alpha", "inverse_temperature", "clip_low", "clip_high", "ratio_cap"]
    common = {
        "stats_ptr": "*fp32",
        **dict.fromkeys(vectors, "*fp32"),
        "target_ptr": "*i64",
        **dict.fromkeys(scalars, "fp32"),
        "stats_stride": "i32",
    }
    # logits, what the d-logits are, and how the kernel sees them
    forms = {
        "fp32": ("*fp32", "*i16", True),
        "fp32_to_fp32": ("*fp32", "*fp32", False),
        "bf16": ("*bf16", "*i16", True),
        "fp16": ("*fp16", "*fp32", False),
    }
    kinds = {"forward": (0, False), "reverse": (1, False), "jsd": (2, True), "any": (2, False)}
    found = []
    for form, (logits, d_logits, bf16) in forms.items():
        for name, (kind, half) in kinds.items():
            constexprs: dict[str, Any] = {"KIND": kind, "HALF": half, "BF16": bf16}
            constexprs |= {"ADD_TAIL": True, "upstream_ptr": None, "softcap": None}
            both = {
                **common,
                **dict.fromkeys(strides, "i32:16"),
                "student_ptr": logits,
                "teacher_ptr": logits,
                "d_logits_ptr": d_logits,
            }
            stored = {key: kind for key, kind in both.items() if "teacher" not in key} | {
                "stored_ids_ptr": "*i64",
                "stored_logprobs_ptr": "*fp32",
                "stored_stride": "i32",
                "k": "i32",
            }
            top = {**both, "values_ptr": "*fp32", "ids_ptr": "*i32", "k": "i32"}
            streamed = ["student_ptr", "teacher_ptr", "d_logits_ptr"]
            variants: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
                ("full", full_kernel, both, options),
                ("top_100", top_k_kernel, top, {**top_options, "CAPACITY": 256}),
                ("top_1024", top_k_kernel, top, {**top_options, "CAPACITY": 2048}),
                ("stored_100", stored_kernel, stored, {**top_options, "CAPACITY": 128}),
            ]
            # All of them on our own tiles; elsewhere the ones that differ most.
            for variant, kernel, signature, sizes in variants:
                if form == "fp32" or name == "jsd" or (form == "bf16" and variant == "full"):
                    given = {**constexprs, **sizes}
                    found.append(
                        (
                            f"{variant}_{name}_{form}",
                            kernel,
                            signature,
                            {key: given[key] for key in given if key in kernel.arg_names},
                            {"num_warps": given["num_warps"]},
                            [argument for argument in streamed if argument in signature],
                        )
                    )
    for bf16 in (True, False):
        found.append(
            (
                f"scale_{'bf16' if bf16 else 'fp32'}",
                scale_kernel,
                {
                    "values_ptr": "*i16" if bf16 else "*fp32",
                    "factor_ptr": "*fp32",
                    "count": "i32:16",
                },
                {"BF16": bf16, "BLOCK": SCALE_BLOCK},
                {"num_warps": 8},
                ["values_ptr"],
            )
        )
    return found
