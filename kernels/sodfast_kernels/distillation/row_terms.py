"""Triton: what one row adds to the loss and its statistics, shared by the row kernels.

Teacher and student nearly agree, so everything is built from δ = log q − log s, taken as
(z_q − z_s)/T − (L_q − L_s): the first difference is nearly exact, and an error in the log-sum-exps
L shifts a whole row, which the gradient s_j (g_j − E) takes out again. From δ come tanh(δ/2) and
log cosh(δ/2), by polynomials where a difference would cancel. Names ending in 2 are in base 2: δ2
and the summands of D in bits.
"""

import triton
import triton.language as tl

from ..rounding import round_bf16, widen_bf16
from ..softmax import (
    LN2,
    LOG2E,
    MASKED_BELOW,
    add_tile,
    expm1_negative,
    fast_log2,
    load_raw,
    load_tile,
    log_sum,
    masked_logit,
    no_sums,
    soft_cap,
    tile_ids,
)

TAIL_FLOOR = tl.constexpr(9.9999995e-08)
LOG_RATIO_BOUND = tl.constexpr(20.0)
FORWARD, REVERSE, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Rows of the statistics, [6, N].
LOSS, DIVERGENCE, STUDENT_ENTROPY, TEACHER_ENTROPY, STUDENT_LOGPROB, TEACHER_LOGPROB = (
    tl.constexpr(row) for row in range(6)
)


@triton.jit
def _log1p_negative(u):
    """log(1 + u) for −1 < u ≤ 0."""
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
    return tl.where(u > -0.5, series, tl.log(1.0 + u))


@triton.jit
def log_cosh2(delta2):
    """log2 cosh(δ/2) for |δ2| < 0.7: a minimax polynomial of it over δ2², relative error 1e-7."""
    square = delta2 * delta2
    series = 5.40999825585e-05 * square - 1.73423771879e-03
    return (series * square + 8.66433903637e-02) * square


@triton.jit
def log_mix2(delta2):
    """log2 m − max(log2 s, log2 q) of m = (s + q) / 2."""
    size = tl.abs(delta2)
    far = fast_log2(0.5 * tl.exp2(-size) + 0.5)
    return tl.where(size < 0.7, log_cosh2(delta2) - 0.5 * size, far)


@triton.jit
def _excess2(delta2, s, q):
    """(q − s)·log2 e, as (q + s)·tanh(δ/2) where they nearly agree: a minimax polynomial of
    tanh(δ/2)·log2(e)/δ2 over δ2², relative error 5e-8."""
    square = delta2 * delta2
    series = -4.39687197125e-05 * square + 9.60711266855e-04
    series = series * square - 2.00187354080e-02
    series = series * square + 0.5
    return tl.where(tl.abs(delta2) < 0.8, (q + s) * (series * delta2), (q - s) * LOG2E)


@triton.jit
def unit(KIND: tl.constexpr, HALF: tl.constexpr):
    """Nats of one unit of `bucket_terms`."""
    if KIND == JSD and HALF:
        return 0.5 * LN2
    else:
        return LN2


@triton.jit
def bucket_terms(delta2, s, q, alpha, KIND: tl.constexpr, HALF: tl.constexpr):
    """A bucket's summand of D and s·g, g = ∂D/∂s, from δ2 and both masses, both in `unit`s. Never
    overflows."""
    if KIND == JSD:
        if HALF:
            mix2 = log_mix2(delta2)
            slope = -s * (tl.maximum(delta2, 0.0) + mix2)
            return slope + q * (tl.minimum(delta2, 0.0) - mix2), slope
        else:
            shrink = expm1_negative(-tl.abs(delta2) * LN2)
            side = tl.where(delta2 > 0, 1.0 - alpha, alpha)
            mix2 = _log1p_negative(side * shrink) * LOG2E
            slope = (alpha - 1.0) * s * (tl.maximum(delta2, 0.0) + mix2)
            return slope + alpha * q * (tl.minimum(delta2, 0.0) - mix2), slope
    else:
        excess2 = _excess2(delta2, s, q)
        if KIND == FORWARD:
            return q * delta2 - excess2, -excess2
        else:
            slope = -s * delta2
            return excess2 + slope, slope


@triton.jit
def diverges(z_s, z_q, KIND: tl.constexpr):
    """1 where this token alone makes the KL infinite."""
    if KIND == FORWARD:
        return tl.where((z_s < MASKED_BELOW) & (z_q > MASKED_BELOW), 1, 0)
    else:
        return tl.where((z_q < MASKED_BELOW) & (z_s > MASKED_BELOW), 1, 0)


@triton.jit
def store_gradient(pointer, value, mask, BF16: tl.constexpr):
    """Stores fp32, or bf16 through a pointer to 16-bit integers; `mask` may be None."""
    if BF16:
        value = round_bf16(value)
    tl.store(pointer, value, mask=mask)


@triton.jit
def load_gradient(row_ptr, ids, width, BF16: tl.constexpr, LAST: tl.constexpr):
    """What `store_tile` has written, in fp32."""
    value = tl.load(row_ptr + ids, mask=ids < width) if LAST else tl.load(row_ptr + ids)
    if BF16:
        value = widen_bf16(value)
    return value


@triton.jit
def store_tile(row_ptr, ids, value, width, BF16: tl.constexpr, LAST: tl.constexpr):
    """d-logits of a tile; of the LAST one what is below `width`."""
    if LAST:
        store_gradient(row_ptr + ids, value, ids < width, BF16)
    else:
        store_gradient(row_ptr + ids, value, None, BF16)


@triton.jit
def row_weights(row, distill_ptr, policy_ptr):
    """The distillation weight, whether the teacher counts, and whether the row counts at all."""
    weight = tl.load(distill_ptr + row)
    distilled = weight != 0
    active = distilled
    if policy_ptr is not None:
        active = active | (tl.load(policy_ptr + row) != 0)
    return weight, distilled, active


@triton.jit
def load_target(row_ptr, target, vocabulary):
    """The logit of one token as it is; NaN for an id outside the vocabulary."""
    inside = (target >= 0) & (target < vocabulary)
    return tl.load(row_ptr + target, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def target_logprob2(row_ptr, target, log_sum2, scale2, softcap, vocabulary):
    """Log-prob of one token in base 2; NaN for an id outside the vocabulary."""
    z = masked_logit(load_target(row_ptr, target, vocabulary), softcap)
    return tl.where(z < MASKED_BELOW, log_sum2 * 0.0 - float("inf"), z * scale2 - log_sum2)


@triton.jit
def save(stats_ptr, stats_row_stride, row, entry: tl.constexpr, value):
    tl.store(stats_ptr + entry * stats_row_stride + row, value)


@triton.jit
def _policy(
    row, logprob, weight, scale, advantage_ptr, policy_ptr, old_ptr, clip_low, clip_high, ratio_cap,
    dual_clip,
):  # fmt: skip
    """The capped distillation weight, the policy loss, or the cross-entropy where there are no
    advantages, and its derivative by the target's logit."""
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
    d_target = 0.0
    if advantage_ptr is not None:
        advantage = tl.load(advantage_ptr + row)
        policy_weight = tl.load(policy_ptr + row)
        clipped = tl.where(ratio > 1.0 + clip_high, 1.0 + clip_high, ratio)
        clipped = tl.where(clipped < 1.0 - clip_low, 1.0 - clip_low, clipped)
        free, held = -advantage * ratio, -advantage * clipped
        rewarded = policy_weight != 0
        # Where the clip wins the token stays; NaN comes through `free`.
        loss = tl.where(held > free, held, free)
        stays = (held > free) | (tl.abs(log_ratio) > LOG_RATIO_BOUND) | ~rewarded
        if dual_clip is not None:
            capped = (advantage < 0) & (ratio > dual_clip)
            loss = tl.where(capped, -advantage * dual_clip, loss)
            stays = stays | capped
        loss = tl.where(rewarded, policy_weight * loss, 0.0)
        d_target = tl.where(stays, 0.0, policy_weight * free * scale)
    elif policy_ptr is not None:
        policy_weight = tl.load(policy_ptr + row)
        loss = tl.where(policy_weight != 0, -policy_weight * logprob, 0.0)
        d_target = tl.where(logprob == logprob, -policy_weight * scale, logprob)
    return weight, loss, d_target


@triton.jit
def sampled_token(
    row, student_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    stats_row_stride, vocabulary, log_s2, scale2, weight, inverse_temperature, softcap, clip_low,
    clip_high, ratio_cap, dual_clip,
):  # fmt: skip
    """What depends on the sampled token alone: the token (−1 without one), the distillation weight
    times the capped ratio, the factor of the row's gradient, the policy loss and its `d_target`.
    Saves the student's log-prob."""
    scale = inverse_temperature
    if upstream_ptr is not None:
        scale = scale * tl.load(upstream_ptr + row)
    policy_loss = 0.0
    d_target = 0.0
    target = -1
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        logprob2 = target_logprob2(student_ptr, target, log_s2, scale2, softcap, vocabulary)
        logprob = logprob2 * LN2
        save(stats_ptr, stats_row_stride, row, STUDENT_LOGPROB, logprob)
        weight, policy_loss, d_target = _policy(
            row, logprob, weight, scale, advantage_ptr, policy_ptr, old_ptr, clip_low, clip_high,
            ratio_cap, dual_clip,
        )  # fmt: skip
    return target, weight, scale, policy_loss, d_target


@triton.jit
def save_loss(stats_ptr, stats_row_stride, row, divergence, weight, policy_loss):
    """The row's divergence and its share of the loss."""
    save(stats_ptr, stats_row_stride, row, DIVERGENCE, divergence)
    save(stats_ptr, stats_row_stride, row, LOSS, policy_loss + weight * divergence)


@triton.jit
def store_target(d_logits_ptr, target, value, z_s, softcap, vocabulary, BF16: tl.constexpr):
    """The d-logit of the sampled token, over what the sweep has written there."""
    if softcap is not None:
        _, slope = soft_cap(z_s, softcap)
        value *= slope
    tl.debug_barrier()
    store_gradient(d_logits_ptr + target, value, (target >= 0) & (target < vocabulary), BF16)


@triton.jit
def student_sums(
    student_ptr, vocabulary, softcap, scale2, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums of one row's log-sum-exp and entropy, where the teacher's row is not read."""
    tile = tile_ids(BLOCK_SIZE, COLUMNS)
    sums = no_sums(BLOCK_SIZE // COLUMNS)
    whole = vocabulary // BLOCK_SIZE * BLOCK_SIZE
    for start in tl.range(0, whole, BLOCK_SIZE, num_stages=1):
        z = load_tile(student_ptr, start + tile, vocabulary, softcap, False)
        sums, _, _ = add_tile(z, sums, scale2)
    if whole < vocabulary:
        z = load_tile(student_ptr, whole + tile, vocabulary, softcap, True)
        sums, _, _ = add_tile(z, sums, scale2)
    return sums


@triton.jit
def _outside_tile(
    student_ptr, d_logits_ptr, ids, vocabulary, width, softcap, scale2, log_s2, outside,
    BF16: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    z = load_tile(student_ptr, ids, vocabulary, softcap, LAST)
    value = tl.exp2(z * scale2 - log_s2) * outside
    if softcap is not None:
        _, slope = soft_cap(load_raw(student_ptr, ids, vocabulary, LAST), softcap)
        value *= slope
    store_tile(d_logits_ptr, ids, value, width, BF16, LAST)


@triton.jit
def write_outside(
    student_ptr, d_logits_ptr, vocabulary, width, softcap, scale2, log_s2, outside,
    BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d-logits s_j · outside of a whole row."""
    tile = tile_ids(BLOCK_SIZE, COLUMNS)
    whole = vocabulary // BLOCK_SIZE * BLOCK_SIZE
    for start in tl.range(0, whole, BLOCK_SIZE, num_stages=1):
        _outside_tile(
            student_ptr, d_logits_ptr, start + tile, vocabulary, width, softcap, scale2, log_s2,
            outside, BF16, False,
        )  # fmt: skip
    if whole < width:
        _outside_tile(
            student_ptr, d_logits_ptr, whole + tile, vocabulary, width, softcap, scale2, log_s2,
            outside, BF16, True,
        )  # fmt: skip


@triton.jit
def undistilled_row(
    row, student_ptr, d_logits_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr,
    upstream_ptr, stats_row_stride, vocabulary, width, weight, active, inverse_temperature,
    softcap, clip_low, clip_high, ratio_cap, dual_clip,
    BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row with the policy term alone, or with none: the teacher is not read."""
    if policy_ptr is not None and active:
        scale2 = inverse_temperature * LOG2E
        sums = student_sums(student_ptr, vocabulary, softcap, scale2, BLOCK_SIZE, COLUMNS)
        log_s2, entropy_s, _, _ = log_sum(sums, scale2)
        save(stats_ptr, stats_row_stride, row, STUDENT_ENTROPY, entropy_s)
        target, _, _, policy_loss, d_target = sampled_token(
            row, student_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr,
            upstream_ptr, stats_row_stride, vocabulary, log_s2, scale2, weight,
            inverse_temperature, softcap, clip_low, clip_high, ratio_cap, dual_clip,
        )  # fmt: skip
        save(stats_ptr, stats_row_stride, row, LOSS, policy_loss)
        if d_logits_ptr is not None:
            write_outside(
                student_ptr, d_logits_ptr, vocabulary, width, softcap, scale2, log_s2,
                -d_target, BF16, BLOCK_SIZE, COLUMNS,
            )  # fmt: skip
            z = load_target(student_ptr, target, vocabulary)
            s = tl.exp2(masked_logit(z, softcap) * scale2 - log_s2)
            value = d_target - s * d_target
            store_target(d_logits_ptr, target, value, z, softcap, vocabulary, BF16)
    if d_logits_ptr is not None:
        lanes = tl.arange(0, BLOCK_SIZE)
        zero = tl.zeros([BLOCK_SIZE], tl.float32)
        for start in range(0, tl.where(active, 0, width), BLOCK_SIZE):
            store_tile(d_logits_ptr, start + lanes, zero, width, BF16, True)
