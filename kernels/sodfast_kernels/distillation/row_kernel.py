"""Triton: from two rows of logits to loss, statistics and d-logits. One program a row.

What it moves, fp32 tiles and bf16 d-logits, bytes an element (full vocabulary):

    sweep 1  read both   8   log-sum-exp, entropies, the sampled token's log-probs; for α = 1 also E
    sweep 2  read both   8   JSD only: E and D
    sweep 3  read both   8   D for the two KLs; write d-logits 2

18 for a KL, 26 for the JSD; over bf16 logits (the logits form) 10 and 14.

Precision: see row_terms.py. Sums are per lane, then a tree: no atomics, so a call gives the same
bits twice.
"""

import triton
import triton.language as tl

from ..rounding import round_bf16
from ..softmax import LN2, LOG2E, MASKED, add_online, log_sum, masked_logit, soft_cap
from .row_terms import (
    JSD,
    REVERSE,
    STUDENT_ENTROPY,
    TEACHER_ENTROPY,
    TEACHER_LOGPROB,
    bucket_terms,
    diverges,
    row_weights,
    sampled_token,
    save,
    save_loss,
    store_gradient,
    target_logprob2,
)


@triton.jit
def full_kernel(
    student_ptr, teacher_ptr, d_logits_ptr, stats_ptr,
    distill_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    student_row_stride, teacher_row_stride, d_logits_row_stride, stats_row_stride,
    vocabulary, width,
    alpha, inverse_temperature, softcap, clip_low, clip_high, ratio_cap,
    KIND: tl.constexpr, HALF: tl.constexpr, BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Full vocabulary. `width` ≥ `vocabulary` is the padded row; None pointers switch terms off."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    lanes = tl.arange(0, BLOCK_SIZE)
    scale2 = inverse_temperature * LOG2E
    weight, distilled, active = row_weights(row, distill_ptr, policy_ptr)
    # A row without any weight sweeps nothing; the teacher's side of an undistilled one is not read.
    # (Masks compare with these widths: the interpreter cannot combine a vector and a scalar bool.)
    width_s, width_q = tl.where(active, width, 0), tl.where(distilled, width, 0)

    peak_s = tl.zeros([BLOCK_SIZE], tl.float32) + MASKED
    peak_q = peak_s
    total_s = tl.zeros([BLOCK_SIZE], tl.float32)
    total_q, moment_s, moment_q, gap_sum = total_s, total_s, total_s, total_s
    infinite = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in tl.range(0, width_s, BLOCK_SIZE, num_stages=STAGES):
        ids = start + lanes
        z_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
        z_q = tl.load(teacher_ptr + ids, mask=ids < width_q, other=0.0).to(tl.float32)
        valid = ids < vocabulary
        z_s, z_q = masked_logit(z_s, valid, softcap), masked_logit(z_q, valid, softcap)
        peak_s, total_s, moment_s, factor, above = add_online(
            z_s, peak_s, total_s, moment_s, scale2
        )
        peak_q, total_q, moment_q, _, _ = add_online(z_q, peak_q, total_q, moment_q, scale2)
        if KIND == REVERSE:
            gap = (z_q - z_s) * scale2
            gap_sum = tl.where(above, gap_sum * factor + gap, gap_sum + factor * gap)
        if KIND != JSD:
            infinite |= diverges(z_s, z_q, valid, KIND)
    log_s2, entropy_s, top_s, mass_s = log_sum(peak_s, total_s, moment_s, scale2)
    log_q2, entropy_q, top_q, mass_q = log_sum(peak_q, total_q, moment_q, scale2)
    # Term by term: the log-sum-exps of a peaked row are large, their rounding would shift δ.
    shift2 = (top_q - top_s) * scale2 + (mass_q - mass_s)
    save(stats_ptr, stats_row_stride, row, STUDENT_ENTROPY, entropy_s, active)
    save(stats_ptr, stats_row_stride, row, TEACHER_ENTROPY, entropy_q, distilled)

    mean = 0.0
    if KIND == REVERSE:
        factor = tl.exp2((peak_s - top_s) * scale2)
        mean = (shift2 - tl.sum(gap_sum * factor, 0) / tl.sum(total_s * factor, 0)) * LN2
    diverged = False
    if KIND != JSD:
        diverged = tl.max(infinite, 0) > 0

    target, weight, scale, policy_loss, d_target = sampled_token(
        row, student_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
        stats_row_stride, vocabulary, log_s2, scale2, weight, active, inverse_temperature, softcap,
        clip_low, clip_high, ratio_cap,
    )  # fmt: skip
    if target_ptr is not None:
        logprob = LN2 * target_logprob2(
            teacher_ptr, target, distilled, log_q2, scale2, softcap, vocabulary
        )
        save(stats_ptr, stats_row_stride, row, TEACHER_LOGPROB, logprob, distilled)

    divergence = tl.zeros([BLOCK_SIZE], tl.float32)
    if KIND == JSD:
        slopes = tl.zeros([BLOCK_SIZE], tl.float32)
        for start in tl.range(0, width_q, BLOCK_SIZE, num_stages=STAGES):
            ids = start + lanes
            z_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
            z_q = tl.load(teacher_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
            valid = ids < vocabulary
            z_s, z_q = masked_logit(z_s, valid, softcap), masked_logit(z_q, valid, softcap)
            s, q = tl.exp2(z_s * scale2 - log_s2), tl.exp2(z_q * scale2 - log_q2)
            term, slope = bucket_terms((z_q - z_s) * scale2 - shift2, s, q, alpha, KIND, HALF)
            divergence += term
            slopes += slope
        mean = tl.sum(slopes, 0)

    # With a gradient every row is written, those without weight as zeros.
    limit = width_s
    if d_logits_ptr is not None:
        d_logits_ptr += row * d_logits_row_stride
        limit = width
    row_scale = tl.where(diverged, float("nan"), weight * scale)
    if (KIND != JSD) or (d_logits_ptr is not None):
        for start in tl.range(0, limit, BLOCK_SIZE, num_stages=STAGES):
            ids = start + lanes
            z_s = tl.load(student_ptr + ids, mask=ids < width_s, other=0.0).to(tl.float32)
            z_q = tl.load(teacher_ptr + ids, mask=ids < width_q, other=0.0)
            z_q = z_q.to(tl.float32)
            valid = ids < vocabulary
            if softcap is not None:
                _, softcap_slope = soft_cap(z_s, softcap)
            z_s, z_q = masked_logit(z_s, valid, softcap), masked_logit(z_q, valid, softcap)
            s, q = tl.exp2(z_s * scale2 - log_s2), tl.exp2(z_q * scale2 - log_q2)
            term, slope = bucket_terms((z_q - z_s) * scale2 - shift2, s, q, alpha, KIND, HALF)
            if KIND != JSD:
                divergence += term
            if d_logits_ptr is not None:
                value = tl.where(distilled, (slope - s * mean) * row_scale, 0.0)
                if advantage_ptr is not None:
                    value += tl.where(ids == target, d_target, 0.0) - s * d_target
                if softcap is not None:
                    value *= softcap_slope
                store_gradient(d_logits_ptr + ids, tl.where(active, value, 0.0), ids < width, BF16)
    total = tl.sum(divergence, 0)
    total = tl.where(total < 0, 0.0, total)
    total = tl.where(diverged & (total == total), float("inf"), total)
    save_loss(stats_ptr, stats_row_stride, row, total, weight, policy_loss, distilled, active)


@triton.jit
def scale_kernel(values_ptr, factor_ptr, count, BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """values ← factor · values, in place; a factor of 1 reads nothing."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        ids = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        values = tl.load(values_ptr + ids, mask=ids < count)
        if BF16:
            wide = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            tl.store(values_ptr + ids, round_bf16(wide * factor), mask=ids < count)
        else:
            tl.store(values_ptr + ids, values * factor, mask=ids < count)
