"""Triton: a divergence over K tokens and one bucket for the rest; teachers of K stored log-probs.

`finish_buckets` is the second half of a row: what is kept and both tails are known. The first half
is in top_k_kernel.py, or here in `stored_kernel`, which moves, in bytes an element of fp32 tiles
with bf16 d-logits:

    read student 4   log-sum-exp, entropy
    read student 4   the mass outside of the stored ids
    read student 4   write d-logits 2                                                         14

and 8 over bf16 logits. Precision: see row_terms.py.
"""

import triton
import triton.language as tl

from ..softmax import (
    LN2,
    LOG2E,
    MASKED,
    MASKED_BELOW,
    load_tile,
    log_sum,
    masked_logit,
    soft_cap,
    tile_ids,
)
from .row_terms import (
    JSD,
    STUDENT_ENTROPY,
    TAIL_FLOOR,
    TEACHER_ENTROPY,
    TEACHER_LOGPROB,
    bucket_terms,
    diverges,
    load_target,
    row_weights,
    sampled_token,
    save,
    save_loss,
    store_gradient,
    store_target,
    student_sums,
    undistilled_row,
    unit,
    write_outside,
)


@triton.jit
def _log_sum_kept(z, log_kept2, kept):
    """NaN where nothing is kept, or nothing that is not masked."""
    top = tl.max(tl.where(kept, log_kept2, -float("inf")), 0)
    top = tl.where(tl.max(tl.where(kept, z, MASKED), 0) < MASKED_BELOW, float("nan"), top)
    return top + tl.log2(tl.sum(tl.where(kept, tl.exp2(log_kept2 - top), 0.0), 0))


@triton.jit
def _bucket_gradient(
    delta2, s, q, kept, tail_s, tail_q, probability, alpha, factor, d_target,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr,
):  # fmt: skip
    """D, the d-logits of the kept tokens, and the factor of s_j for all the others."""
    term, slope = bucket_terms(delta2, s, q, alpha, KIND, HALF)
    divergence = tl.sum(tl.where(kept, term, 0.0), 0)
    mean = tl.sum(tl.where(kept, slope, 0.0), 0)
    factor *= unit(KIND, HALF)
    outside = 0.0
    if ADD_TAIL:
        capped = tail_s <= TAIL_FLOOR
        tail_s = tl.where(capped, TAIL_FLOOR, tail_s)
        tail_q = tl.where(tail_q <= TAIL_FLOOR, TAIL_FLOOR, tail_q)
        gap2 = tl.log2(tail_q) - tl.log2(tail_s)
        tail_term, tail_slope = bucket_terms(gap2, tail_s, tail_q, alpha, KIND, HALF)
        # Where the cap binds the tail is a constant.
        tail_slope = tl.where(capped, 0.0, tail_slope)
        divergence += tail_term
        mean += tail_slope
        outside = (tail_slope / tail_s - mean) * factor
    inside = (slope - s * mean) * factor - probability * d_target
    divergence = tl.where(divergence < 0, 0.0, divergence) * unit(KIND, HALF)
    return divergence, inside, outside - d_target


@triton.jit
def finish_buckets(
    row, student_ptr, d_logits_ptr, stats_ptr, policy_ptr, ids, kept, written, z_s, z_q,
    log_kept_s2, log_kept_q2, delta2, s, q, tail_s, tail_q, target, weight, scale, policy_loss,
    d_target, log_s2, scale2, alpha, softcap, stats_row_stride, width, vocabulary,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr, BF16: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the kept tokens (`written`: those of them whose d-logits have a place) and both tails to
    divergence, loss and d-logits."""
    probability = s
    if not ADD_TAIL:
        norm_s2 = _log_sum_kept(z_s, log_kept_s2, kept)
        norm_q2 = _log_sum_kept(z_q, log_kept_q2, kept)
        s, q = tl.exp2(log_kept_s2 - norm_s2), tl.exp2(log_kept_q2 - norm_q2)
        delta2 = delta2 - (norm_q2 - norm_s2)
    divergence, inside, outside = _bucket_gradient(
        delta2, s, q, kept, tail_s, tail_q, probability, alpha, weight * scale, d_target, KIND,
        HALF, ADD_TAIL,
    )  # fmt: skip
    if not ADD_TAIL:
        divergence += (norm_s2 + norm_q2) * 0.0  # NaN even if no term is there to be it
    if KIND != JSD:
        diverged = tl.max(tl.where(kept, diverges(z_s, z_q, KIND), 0), 0) > 0
        divergence = tl.where(diverged & (divergence == divergence), float("inf"), divergence)
    save_loss(stats_ptr, stats_row_stride, row, divergence, weight, policy_loss)
    if d_logits_ptr is not None:
        finite = (divergence == divergence) & (divergence < float("inf"))
        outside = tl.where(finite, outside, float("nan"))
        inside = tl.where(finite, inside, float("nan"))
        write_outside(
            student_ptr, d_logits_ptr, vocabulary, width, softcap, scale2, log_s2, outside, BF16,
            BLOCK_SIZE, COLUMNS,
        )  # fmt: skip
        if policy_ptr is not None:
            z = load_target(student_ptr, target, vocabulary)
            value = tl.exp2(masked_logit(z, softcap) * scale2 - log_s2) * outside + d_target
            store_target(d_logits_ptr, target, value, z, softcap, vocabulary, BF16)
            inside += tl.where(ids == target, d_target, 0.0)
        if softcap is not None:
            # 1 − (z/c)² from the capped logit would cancel: read the logit again.
            raw = tl.load(student_ptr + ids, mask=written, other=0.0).to(tl.float32)
            _, softcap_slope = soft_cap(raw, softcap)
            inside *= softcap_slope
        # The kept tokens go over what every program's thread has written before.
        tl.debug_barrier()
        store_gradient(d_logits_ptr + ids, inside, written, BF16)


@triton.jit
def stored_kernel(
    student_ptr, stored_ids_ptr, stored_logprobs_ptr, d_logits_ptr, stats_ptr,
    distill_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    student_row_stride, stored_row_stride, d_logits_row_stride, stats_row_stride,
    vocabulary, width, k,
    alpha, inverse_temperature, softcap, clip_low, clip_high, ratio_cap, dual_clip,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr, CAPACITY: tl.constexpr,
    BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A teacher of k stored ids and log-probs a row; the remaining masses are the tails."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    if d_logits_ptr is not None:
        d_logits_ptr += row * d_logits_row_stride
    scale2 = inverse_temperature * LOG2E
    weight, distilled, active = row_weights(row, distill_ptr, policy_ptr)
    if distilled:
        sums_s = student_sums(student_ptr, vocabulary, softcap, scale2, BLOCK_SIZE, COLUMNS)
        log_s2, entropy_s, _, _ = log_sum(sums_s, scale2)
        save(stats_ptr, stats_row_stride, row, STUDENT_ENTROPY, entropy_s)

        slots = tl.arange(0, CAPACITY)
        kept = slots < k
        place = row * stored_row_stride + slots
        ids = tl.load(stored_ids_ptr + place, mask=kept, other=0)
        inside_vocabulary = (ids >= 0) & (ids < vocabulary)
        z_s = tl.load(student_ptr + ids, mask=kept & inside_vocabulary, other=0.0).to(tl.float32)
        z_s = masked_logit(tl.where(inside_vocabulary, z_s, float("nan")), softcap)
        log_q = tl.load(stored_logprobs_ptr + place, mask=kept, other=0.0).to(tl.float32)
        log_q2 = tl.where(log_q < MASKED, MASKED, log_q) * LOG2E
        log_kept_s2 = z_s * scale2 - log_s2
        s, q = tl.exp2(log_kept_s2), tl.exp2(log_q2)

        kept_mass = tl.sum(tl.where(kept, s.to(tl.float64), 0.0), 0)
        whole_mass = _whole_mass(
            student_ptr, vocabulary, softcap, scale2, log_s2, BLOCK_SIZE, COLUMNS
        )
        tail_s = (whole_mass - kept_mass).to(tl.float32)
        stored = tl.exp(tl.where(kept, log_q, MASKED).to(tl.float64))
        tail_q = (1.0 - tl.sum(stored, 0)).to(tl.float32)
        log_tail = tl.log(tl.where(tail_q <= TAIL_FLOOR, TAIL_FLOOR, tail_q))
        entropy_q = -tl.sum(tl.where(kept, q * log_q2 * LN2, 0.0), 0) - tl.exp(log_tail) * log_tail
        save(stats_ptr, stats_row_stride, row, TEACHER_ENTROPY, entropy_q)

        target, weight, scale, policy_loss, d_target = sampled_token(
            row, student_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr,
            upstream_ptr, stats_row_stride, vocabulary, log_s2, scale2, weight,
            inverse_temperature, softcap, clip_low, clip_high, ratio_cap, dual_clip,
        )  # fmt: skip
        if target_ptr is not None:
            hit = kept & (ids == target)
            among = tl.sum(tl.where(hit, log_q, 0.0), 0)
            logprob = tl.where(tl.max(tl.where(hit, 1, 0), 0) > 0, among, log_tail)
            save(stats_ptr, stats_row_stride, row, TEACHER_LOGPROB, logprob)
        finish_buckets(
            row, student_ptr, d_logits_ptr, stats_ptr, policy_ptr, ids, kept,
            kept & inside_vocabulary, z_s, log_q2, log_kept_s2, log_q2, log_q2 - log_kept_s2, s, q,
            tail_s, tail_q, target, weight, scale, policy_loss, d_target, log_s2, scale2, alpha,
            softcap, stats_row_stride, width, vocabulary, KIND, HALF, ADD_TAIL, BF16, BLOCK_SIZE,
            COLUMNS,
        )  # fmt: skip
    else:
        undistilled_row(
            row, student_ptr, d_logits_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr,
            old_ptr, upstream_ptr, stats_row_stride, vocabulary, width, weight, active,
            inverse_temperature, softcap, clip_low, clip_high,
            ratio_cap, dual_clip, BF16, BLOCK_SIZE,
            COLUMNS,
        )  # fmt: skip


@triton.jit
def _whole_mass(
    student_ptr, vocabulary, softcap, scale2, log_s2,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Σ s_j of a row, near one. What the kept tokens leave of it has few digits, so it is counted
    in fp64, from the same fp32 masses."""
    tile = tile_ids(BLOCK_SIZE, COLUMNS)
    mass = tl.zeros([BLOCK_SIZE // COLUMNS, COLUMNS], tl.float64)
    whole = vocabulary // BLOCK_SIZE * BLOCK_SIZE
    for start in tl.range(0, whole, BLOCK_SIZE, num_stages=1):
        z = load_tile(student_ptr, start + tile, vocabulary, softcap, False)
        mass += tl.exp2(z * scale2 - log_s2).to(tl.float64)
    if whole < vocabulary:
        z = load_tile(student_ptr, whole + tile, vocabulary, softcap, True)
        mass += tl.exp2(z * scale2 - log_s2).to(tl.float64)
    return tl.sum(tl.sum(mass, 1), 0)
