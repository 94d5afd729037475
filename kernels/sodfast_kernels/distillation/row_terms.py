"""Triton: what one row adds to the loss and its statistics, shared by the row kernels.

Teacher and student nearly agree, so everything is built from δ = log q − log s, taken as
(z_q − z_s)/T − (L_q − L_s): the first difference is nearly exact, and an error in the log-sum-exps
L shifts a whole row, which the gradient s_j (g_j − E) takes out again. From δ come expm1(−|δ|) and
log1p, by series where they would cancel. Names ending in 2 are in base 2.
"""

import triton
import triton.language as tl

from ..rounding import round_bf16
from ..softmax import LN2, MASKED_BELOW, expm1_negative, masked_logit

TAIL_FLOOR = tl.constexpr(9.9999995e-08)
LOG_RATIO_BOUND = tl.constexpr(20.0)
FORWARD, REVERSE, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Rows of the statistics, [6, N].
LOSS, DIVERGENCE, STUDENT_ENTROPY, TEACHER_ENTROPY, STUDENT_LOGPROB, TEACHER_LOGPROB = (
    tl.constexpr(row) for row in range(6)
)


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
def bucket_terms(delta2, s, q, alpha, KIND: tl.constexpr, HALF: tl.constexpr):
    """A bucket's summand of D and s·g, g = ∂D/∂s, from δ and both masses. Never overflows."""
    delta = delta2 * LN2
    shrink = expm1_negative(-tl.abs(delta))
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
def diverges(z_s, z_q, valid, KIND: tl.constexpr):
    """1 where this token alone makes the KL infinite."""
    if KIND == FORWARD:
        return tl.where(valid & (z_s < MASKED_BELOW) & (z_q > MASKED_BELOW), 1, 0)
    return tl.where(valid & (z_q < MASKED_BELOW) & (z_s > MASKED_BELOW), 1, 0)


@triton.jit
def store_gradient(pointer, value, mask, BF16: tl.constexpr):
    """Stores fp32, or bf16 through a pointer to 16-bit integers."""
    if BF16:
        tl.store(pointer, round_bf16(value), mask=mask)
    else:
        tl.store(pointer, value, mask=mask)


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
def target_logprob2(base_ptr, target, wanted, log_sum2, scale2, softcap, vocabulary):
    """Log-prob of one token in base 2; NaN for an id outside the vocabulary."""
    inside = (target >= 0) & (target < vocabulary)
    z = tl.load(base_ptr + target, mask=wanted & inside, other=0.0).to(tl.float32)
    z = masked_logit(z, True, softcap)
    logprob2 = tl.where(z < MASKED_BELOW, log_sum2 * 0.0 - float("inf"), z * scale2 - log_sum2)
    return tl.where(inside, logprob2, float("nan"))


@triton.jit
def save(stats_ptr, stats_row_stride, row, entry: tl.constexpr, value, counts):
    tl.store(stats_ptr + entry * stats_row_stride + row, tl.where(counts, value, 0.0))


@triton.jit
def _policy(
    row, logprob, weight, scale, advantage_ptr, policy_ptr, old_ptr, clip_low, clip_high, ratio_cap
):
    """The capped distillation weight, the policy loss and its derivative by the target's logit."""
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
        loss = tl.where(rewarded, policy_weight * tl.where(held > free, held, free), 0.0)
        stays = (held > free) | (tl.abs(log_ratio) > LOG_RATIO_BOUND) | ~rewarded
        d_target = tl.where(stays, 0.0, policy_weight * free * scale)
    return weight, loss, d_target


@triton.jit
def sampled_token(
    row, student_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    stats_row_stride, vocabulary, log_s2, scale2, weight, active, inverse_temperature, softcap,
    clip_low, clip_high, ratio_cap,
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
        target = tl.load(target_ptr + row, mask=active, other=0)
        logprob = LN2 * target_logprob2(
            student_ptr, target, active, log_s2, scale2, softcap, vocabulary
        )
        save(stats_ptr, stats_row_stride, row, STUDENT_LOGPROB, logprob, active)
        weight, policy_loss, d_target = _policy(
            row, logprob, weight, scale, advantage_ptr, policy_ptr, old_ptr, clip_low, clip_high,
            ratio_cap,
        )  # fmt: skip
    return target, weight, scale, policy_loss, d_target


@triton.jit
def save_loss(stats_ptr, stats_row_stride, row, divergence, weight, policy_loss, distilled, active):
    """The row's divergence and its share of the loss."""
    save(stats_ptr, stats_row_stride, row, DIVERGENCE, divergence, distilled)
    loss = policy_loss + tl.where(distilled, weight * divergence, 0.0)
    save(stats_ptr, stats_row_stride, row, LOSS, loss, active)
