"""Triton: from two rows of logits to loss, statistics and d-logits. One program a row.

What a gradient needs decides how often a row is read. Δ = L_q − L_s, the log-sum-exps' difference,
stands in every δ_j, so nothing can be written before both rows have been read once: two sweeps are
the least. Forward KL needs no more. Reverse KL needs E = Σ s·g = Δ − Σ s·(z_q − z_s)/T, a sum that
the first sweep can take. JSD needs E = Σ s·h(δ0 − ε), h(x) = log((1 + e^x)/2), which is not linear
in Δ: a sweep of its own, or an expansion. With a sampled token the first sweep takes δ0, that is δ
with the token's own z_q − z_s in Δ's place, and sums h(δ0) and the powers of τ = tanh(δ0/2), of
which all derivatives of h are polynomials. What is left is ε = Δ − Δ0, small where teacher and
student agree about the sampled token: five derivatives leave ε⁶/2880, 2e-8 at 0.2 nats. Rows where
that, or the rounding of ε, would be seen in the gradient take the extra sweep.

What it moves, fp32 tiles and bf16 d-logits, bytes an element:

    sweep 1  read both   8   log-sum-exps, entropies; E of reverse KL, the expansion of JSD's E
    sweep E  read both   8   E of JSD, for rows without an expansion
    sweep 2  read both   8   D; write d-logits 2

18, or 26 with the extra sweep; over bf16 logits (the logits form) 10 and 14.

Precision: see row_terms.py. Sums are per lane, then a tree: no atomics, so a call gives the same
bits twice.
"""

import triton
import triton.language as tl

from ..rounding import round_bf16, widen_bf16
from ..softmax import (
    LN2,
    LOG2E,
    MASKED,
    MASKED_BELOW,
    add_tile,
    fast_log2,
    load_raw,
    load_tile,
    log_sum,
    masked_logit,
    no_sums,
    soft_cap,
    tile_ids,
)
from .row_terms import (
    FORWARD,
    JSD,
    REVERSE,
    STUDENT_ENTROPY,
    TEACHER_ENTROPY,
    TEACHER_LOGPROB,
    bucket_terms,
    diverges,
    load_target,
    log_cosh2,
    row_weights,
    sampled_token,
    save,
    save_loss,
    store_target,
    store_tile,
    target_logprob2,
    undistilled_row,
    unit,
)


@triton.jit
def _no_more(LANES: tl.constexpr, KIND: tl.constexpr, EXPAND: tl.constexpr):
    """`_add_more`'s sums before the first tile."""
    zero = tl.zeros([LANES], tl.float32)
    if EXPAND:
        return zero, zero, zero, zero, zero, zero
    elif KIND == REVERSE:
        return zero + float("inf"), zero
    else:
        return (zero + float("inf"),)


@triton.jit
def _add_more(more, z_s, z_q, factor, mass, gap0, scale2, KIND: tl.constexpr, EXPAND: tl.constexpr):
    """What sweep 1 sums beside the softmaxes: JSD's h(δ0) and powers of τ; a KL's least logit of
    the side that must not be masked alone, and reverse KL's Σ 2^y (z_q − z_s)."""
    if EXPAND:
        mix, tau1, tau2, tau3, tau4, tau5 = more
        delta2 = ((z_q - z_s) - gap0) * scale2
        size = tl.abs(delta2)
        shrunk = tl.exp2(-size)
        log_plus2 = fast_log2(shrunk + 1.0)
        mix2 = tl.where(size < 0.7, log_cosh2(delta2) - 0.5 * size, log_plus2 - 1.0)
        mix = mix * factor + tl.sum(mass * (tl.maximum(delta2, 0.0) + mix2), 1)
        tau = (1.0 - shrunk) * tl.exp2(-log_plus2)
        tau = tl.where(delta2 < 0, -tau, tau)
        power = mass * tau
        tau1 = tau1 * factor + tl.sum(power, 1)
        power *= tau
        tau2 = tau2 * factor + tl.sum(power, 1)
        power *= tau
        tau3 = tau3 * factor + tl.sum(power, 1)
        power *= tau
        tau4 = tau4 * factor + tl.sum(power, 1)
        power *= tau
        tau5 = tau5 * factor + tl.sum(power, 1)
        return mix, tau1, tau2, tau3, tau4, tau5
    elif KIND == REVERSE:
        least, gap_sum = more
        gap_sum = gap_sum * factor + tl.sum(mass * (z_q - z_s), 1)
        return tl.minimum(least, tl.min(z_q, 1)), gap_sum
    elif KIND == FORWARD:
        return (tl.minimum(more[0], tl.min(z_s, 1)),)
    else:
        return more


@triton.jit
def _sweep1_tile(
    student_ptr, teacher_ptr, ids, vocabulary, softcap, scale2, gap0, sums_s, sums_q, more,
    KIND: tl.constexpr, EXPAND: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    z_s = load_tile(student_ptr, ids, vocabulary, softcap, LAST)
    z_q = load_tile(teacher_ptr, ids, vocabulary, softcap, LAST)
    sums_s, factor, mass = add_tile(z_s, sums_s, scale2)
    sums_q, _, _ = add_tile(z_q, sums_q, scale2)
    more = _add_more(more, z_s, z_q, factor, mass, gap0, scale2, KIND, EXPAND)
    return sums_s, sums_q, more


@triton.jit
def _expanded_mean2(more, factor, mass, epsilon2, logprob2, log_mass2):
    """E of JSD in units, −Σ s·h(δ0 − ε) by five derivatives of h at δ0, and whether that is exact
    enough: to 1e-5 of the gradient's norm over the student's, ‖s·(g − E)‖ / ‖s‖.

    The sampled token alone gives that quotient ε/4 · s_t / √max s at least. Where no token has more
    than a quarter of the mass it is near the spread of g, a quarter of δ's. What is left of E is
    ε⁶/2880, and the rounding of ε. logprob2: log2 s_t; log_mass2: −log2 max s.
    """
    total = tl.sum(mass * factor, 0)
    mix2, tau1, tau2, tau3, tau4, tau5 = more
    mix2 = tl.sum(mix2 * factor, 0) / total
    tau1 = tl.sum(tau1 * factor, 0) / total
    tau2 = tl.sum(tau2 * factor, 0) / total
    tau3 = tl.sum(tau3 * factor, 0) / total
    tau4 = tl.sum(tau4 * factor, 0) / total
    tau5 = tl.sum(tau5 * factor, 0) / total
    step = -epsilon2 * LN2
    series = (2.0 * tau1 - 5.0 * tau3 + 3.0 * tau5) * (step / 480)
    series = (series + (-1.0 + 4.0 * tau2 - 3.0 * tau4) / 192) * step
    series = (series + (tau3 - tau1) / 24) * step
    series = (series + (1.0 - tau2) / 8) * step
    series = (series + (1.0 + tau1) / 2) * step

    size = tl.abs(step)
    cube = size * size * size
    error = cube * cube / 2880 + size * 3e-8
    by_token = size * tl.exp2(logprob2 + 0.5 * log_mass2)
    variance = tl.maximum(tau2 - tau1 * tau1, 0.0)
    by_spread = tl.where(log_mass2 >= 2.0, 2.0 * tl.sqrt(variance), 0.0)
    # False where anything is not a number.
    enough = error <= 2.5e-6 * tl.maximum(by_token, by_spread)
    return -(mix2 + series * LOG2E), enough


@triton.jit
def _target_logits(student_ptr, teacher_ptr, target, vocabulary, softcap):
    """z_s of the sampled token and its z_q − z_s; 0 where one side masks it, or if it is no id of
    the vocabulary."""
    inside = (target >= 0) & (target < vocabulary)
    z_s = masked_logit(load_target(student_ptr, target, vocabulary), softcap)
    z_q = masked_logit(load_target(teacher_ptr, target, vocabulary), softcap)
    gap = tl.where(inside, z_q - z_s, 0.0)
    return tl.where(inside, z_s, MASKED), tl.where(tl.abs(gap) < -MASKED_BELOW, gap, 0.0)


@triton.jit
def _delta2(z_s, z_q, scale2, gap, rest2):
    """δ2, where Δ = gap·scale2 + rest2: the gap is a difference of logits and is taken off exactly,
    so a teacher whose logits lie elsewhere costs no digits."""
    return ((z_q - z_s) - gap) * scale2 - rest2


@triton.jit
def _any_diverges(
    student_ptr, teacher_ptr, vocabulary, softcap, KIND: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Whether a token makes the KL infinite: read again only where one side masks a token."""
    lanes = tl.arange(0, BLOCK_SIZE)
    found = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, vocabulary, BLOCK_SIZE):
        ids = start + lanes
        z_s = load_tile(student_ptr, ids, vocabulary, softcap, True)
        z_q = load_tile(teacher_ptr, ids, vocabulary, softcap, True)
        found |= diverges(z_s, z_q, KIND)
    return tl.max(found, 0)


@triton.jit
def _mean_slope2(
    student_ptr, teacher_ptr, vocabulary, softcap, scale2, log_s2, log_q2, gap, rest2, alpha,
    KIND: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sweep E: Σ s·g in units."""
    tile = tile_ids(BLOCK_SIZE, COLUMNS)
    slopes = tl.zeros([BLOCK_SIZE // COLUMNS], tl.float32)
    whole = vocabulary // BLOCK_SIZE * BLOCK_SIZE
    for start in tl.range(0, whole, BLOCK_SIZE, num_stages=1):
        z_s = load_tile(student_ptr, start + tile, vocabulary, softcap, False)
        z_q = load_tile(teacher_ptr, start + tile, vocabulary, softcap, False)
        s, q = tl.exp2(z_s * scale2 - log_s2), tl.exp2(z_q * scale2 - log_q2)
        _, slope = bucket_terms(_delta2(z_s, z_q, scale2, gap, rest2), s, q, alpha, KIND, HALF)
        slopes += tl.sum(slope, 1)
    if whole < vocabulary:
        z_s = load_tile(student_ptr, whole + tile, vocabulary, softcap, True)
        z_q = load_tile(teacher_ptr, whole + tile, vocabulary, softcap, True)
        s, q = tl.exp2(z_s * scale2 - log_s2), tl.exp2(z_q * scale2 - log_q2)
        _, slope = bucket_terms(_delta2(z_s, z_q, scale2, gap, rest2), s, q, alpha, KIND, HALF)
        slopes += tl.sum(slope, 1)
    return tl.sum(slopes, 0)


@triton.jit
def _gradient(
    z_s, z_q, scale2, log_s2, log_q2, gap, rest2, offset, factor, alpha,
    KIND: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A token's summand of D in units and its d-logit but for the sampled token's own term."""
    s, q = tl.exp2(z_s * scale2 - log_s2), tl.exp2(z_q * scale2 - log_q2)
    term, slope = bucket_terms(_delta2(z_s, z_q, scale2, gap, rest2), s, q, alpha, KIND, HALF)
    return term, slope * factor + s * offset


@triton.jit
def _sweep2_tile(
    student_ptr, teacher_ptr, d_logits_ptr, ids, vocabulary, width, softcap, scale2, log_s2,
    log_q2, gap, rest2, offset, factor, alpha, divergence,
    KIND: tl.constexpr, HALF: tl.constexpr, BF16: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    z_s = load_tile(student_ptr, ids, vocabulary, softcap, LAST)
    z_q = load_tile(teacher_ptr, ids, vocabulary, softcap, LAST)
    term, value = _gradient(
        z_s, z_q, scale2, log_s2, log_q2, gap, rest2, offset, factor, alpha, KIND, HALF
    )
    if d_logits_ptr is not None:
        if softcap is not None:
            _, slope = soft_cap(load_raw(student_ptr, ids, vocabulary, LAST), softcap)
            value *= slope
        store_tile(d_logits_ptr, ids, value, width, BF16, LAST)
    return divergence + tl.sum(term, 1)


@triton.jit
def full_kernel(
    student_ptr, teacher_ptr, d_logits_ptr, stats_ptr,
    distill_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    student_row_stride, teacher_row_stride, d_logits_row_stride, stats_row_stride,
    vocabulary, width,
    alpha, inverse_temperature, softcap, clip_low, clip_high, ratio_cap, dual_clip,
    KIND: tl.constexpr, HALF: tl.constexpr, BF16: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Full vocabulary. `width` ≥ `vocabulary` is the padded row; None pointers switch terms off."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    if d_logits_ptr is not None:
        d_logits_ptr += row * d_logits_row_stride
    scale2 = inverse_temperature * LOG2E
    weight, distilled, active = row_weights(row, distill_ptr, policy_ptr)
    if distilled:
        teacher_ptr += row * teacher_row_stride
        LANES: tl.constexpr = BLOCK_SIZE // COLUMNS
        WANTS_MEAN: tl.constexpr = (KIND == JSD) and (d_logits_ptr is not None)
        EXPAND: tl.constexpr = WANTS_MEAN and HALF and (target_ptr is not None)
        tile = tile_ids(BLOCK_SIZE, COLUMNS)
        whole = vocabulary // BLOCK_SIZE * BLOCK_SIZE
        z_target, gap0 = 0.0, 0.0
        if EXPAND:
            z_target, gap0 = _target_logits(
                student_ptr, teacher_ptr, tl.load(target_ptr + row), vocabulary, softcap
            )
        sums_s, sums_q, more = no_sums(LANES), no_sums(LANES), _no_more(LANES, KIND, EXPAND)
        for start in tl.range(0, whole, BLOCK_SIZE, num_stages=1):
            sums_s, sums_q, more = _sweep1_tile(
                student_ptr, teacher_ptr, start + tile, vocabulary, softcap, scale2, gap0, sums_s,
                sums_q, more, KIND, EXPAND, False,
            )  # fmt: skip
        if whole < vocabulary:
            sums_s, sums_q, more = _sweep1_tile(
                student_ptr, teacher_ptr, whole + tile, vocabulary, softcap, scale2, gap0, sums_s,
                sums_q, more, KIND, EXPAND, True,
            )  # fmt: skip
        log_s2, entropy_s, top_s, mass_s = log_sum(sums_s, scale2)
        log_q2, entropy_q, top_q, mass_q = log_sum(sums_q, scale2)
        # Term by term: the log-sum-exps of a peaked row are large, their rounding would shift δ.
        gap, rest2 = top_q - top_s, mass_q - mass_s
        save(stats_ptr, stats_row_stride, row, STUDENT_ENTROPY, entropy_s)
        save(stats_ptr, stats_row_stride, row, TEACHER_ENTROPY, entropy_q)
        target, weight, scale, policy_loss, d_target = sampled_token(
            row, student_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr,
            upstream_ptr, stats_row_stride, vocabulary, log_s2, scale2, weight,
            inverse_temperature, softcap, clip_low, clip_high, ratio_cap, dual_clip,
        )  # fmt: skip
        if target_ptr is not None:
            logprob2 = target_logprob2(teacher_ptr, target, log_q2, scale2, softcap, vocabulary)
            save(stats_ptr, stats_row_stride, row, TEACHER_LOGPROB, logprob2 * LN2)

        mean2 = 0.0
        factor_s = tl.exp2((sums_s[0] - top_s) * scale2)
        if KIND == REVERSE:
            mean_gap = tl.sum(more[1] * factor_s, 0) / tl.sum(sums_s[1] * factor_s, 0)
            mean2 = (gap - mean_gap) * scale2 + rest2
        if EXPAND:
            epsilon2 = (gap - gap0) * scale2 + rest2
            mean2, enough = _expanded_mean2(
                more, factor_s, sums_s[1], epsilon2, z_target * scale2 - log_s2, mass_s
            )
            if enough:
                gap, rest2 = gap0, epsilon2
            else:
                mean2 = _mean_slope2(
                    student_ptr, teacher_ptr, vocabulary, softcap, scale2, log_s2, log_q2, gap,
                    rest2, alpha, KIND, HALF, BLOCK_SIZE, COLUMNS,
                )  # fmt: skip
        elif WANTS_MEAN:
            mean2 = _mean_slope2(
                student_ptr, teacher_ptr, vocabulary, softcap, scale2, log_s2, log_q2, gap, rest2,
                alpha, KIND, HALF, BLOCK_SIZE, COLUMNS,
            )  # fmt: skip
        factor = weight * scale * unit(KIND, HALF)
        diverged = tl.full([], 0, tl.int32)
        if KIND != JSD and tl.min(more[0], 0) < MASKED_BELOW:
            diverged = _any_diverges(
                student_ptr, teacher_ptr, vocabulary, softcap, KIND, BLOCK_SIZE
            )
            factor = tl.where(diverged > 0, float("nan"), factor)

        offset = -mean2 * factor - d_target
        divergence = tl.zeros([LANES], tl.float32)
        for start in tl.range(0, whole, BLOCK_SIZE, num_stages=1):
            divergence = _sweep2_tile(
                student_ptr, teacher_ptr, d_logits_ptr, start + tile, vocabulary, width, softcap,
                scale2, log_s2, log_q2, gap, rest2, offset, factor, alpha, divergence, KIND, HALF,
                BF16, False,
            )  # fmt: skip
        if whole < width:
            divergence = _sweep2_tile(
                student_ptr, teacher_ptr, d_logits_ptr, whole + tile, vocabulary, width, softcap,
                scale2, log_s2, log_q2, gap, rest2, offset, factor, alpha, divergence, KIND, HALF,
                BF16, True,
            )  # fmt: skip
        total = tl.sum(divergence, 0) * unit(KIND, HALF)
        total = tl.where(total < 0, 0.0, total)
        total = tl.where((diverged > 0) & (total == total), float("inf"), total)
        save_loss(stats_ptr, stats_row_stride, row, total, weight, policy_loss)
        if (d_logits_ptr is not None) and (policy_ptr is not None):
            z_s = load_target(student_ptr, target, vocabulary)
            z_q = load_target(teacher_ptr, target, vocabulary)
            _, value = _gradient(
                masked_logit(z_s, softcap), masked_logit(z_q, softcap), scale2, log_s2, log_q2,
                gap, rest2, offset, factor, alpha, KIND, HALF,
            )  # fmt: skip
            store_target(d_logits_ptr, target, value + d_target, z_s, softcap, vocabulary, BF16)
    else:
        undistilled_row(
            row, student_ptr, d_logits_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr,
            old_ptr, upstream_ptr, stats_row_stride, vocabulary, width, weight, active,
            inverse_temperature, softcap, clip_low, clip_high,
            ratio_cap, dual_clip, BF16, BLOCK_SIZE,
            COLUMNS,
        )  # fmt: skip


@triton.jit
def scale_kernel(values_ptr, factor_ptr, count, BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """values ← factor · values, in place; a factor of 1 reads nothing. Any number of programs."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
        step = tl.num_programs(0).to(tl.int64) * BLOCK_SIZE
        for start in range(first, count, step):
            ids = start + tl.arange(0, BLOCK_SIZE)
            values = tl.load(values_ptr + ids, mask=ids < count)
            if BF16:
                tl.store(
                    values_ptr + ids, round_bf16(widen_bf16(values) * factor), mask=ids < count
                )
            else:
                tl.store(values_ptr + ids, values * factor, mask=ids < count)
