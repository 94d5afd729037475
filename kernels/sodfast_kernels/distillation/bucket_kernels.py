"""Triton: the row kernels whose divergence is over K tokens and one bucket for the rest.

`top_k_kernel` keeps the student's top k, `stored_kernel` the ids of a stored teacher. Bytes an
element of fp32 tiles, with bf16 d-logits:

    top-k    read both 8      log-sum-exps, entropies, a lower bound of the k-th logit
             read both 8      the candidates above that bound, and the mass outside of them
             read student 4   write d-logits 2                                             22
    stored   read student 4   log-sum-exp, entropy
             read student 4   the mass outside of the stored ids
             read student 4   write d-logits 2                                             14

and 12 and 8 over bf16 logits. Precision: see row_terms.py.
"""

import triton
import triton.language as tl

from ..softmax import LN2, LOG2E, MASKED, add_online, log_sum, masked_logit, soft_cap
from .row_terms import (
    JSD,
    STUDENT_ENTROPY,
    TAIL_FLOOR,
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
def _ordered(z):
    """Integers in the order of the floats; −0 counts as +0."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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
def _count(student_ptr, width, vocabulary, key, last, BLOCK_SIZE: tl.constexpr):
    """How many logits of a row are above `key`, or equal to it with an id up to `last`."""
    lanes = tl.arange(0, BLOCK_SIZE)
    count = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, width, BLOCK_SIZE):
        ids = start + lanes
        keys = _ordered(tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32))
        inside = (keys > key) | ((keys == key) & (ids <= last))
        count += tl.where((ids < vocabulary) & inside, 1, 0)
    return tl.sum(count, 0)


@triton.jit
def _kth_of_row(student_ptr, width, vocabulary, k, BLOCK_SIZE: tl.constexpr):
    """The k-th greatest logit of a row and the last id kept among its equals; ~50 reads, exact."""
    key = tl.full([], -(2**31), tl.int32)
    for bit in range(32):
        step = tl.full([], 1, tl.int32) << (31 - bit)
        reach = _count(student_ptr, width, vocabulary, key + step, width, BLOCK_SIZE)
        key = tl.where(reach >= k, key + step, key)
    # The smallest id with which the count reaches k.
    low, high = tl.full([], 0, tl.int32), vocabulary - 1
    while low < high:
        middle = (low + high) // 2
        enough = _count(student_ptr, width, vocabulary, key, middle, BLOCK_SIZE) >= k
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return key, low


@triton.jit
def _collect(
    student_ptr, teacher_ptr, values_ptr, ids_ptr, width, vocabulary, key, last, log_s2,
    log_q2, scale2, softcap, CAPACITY: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Candidates (above `key`, or equal with an id up to `last`) into the buffer, in the order of
    their ids; returns how many there are and both sides' mass outside them."""
    lanes = tl.arange(0, BLOCK_SIZE)
    outside_s = tl.zeros([BLOCK_SIZE], tl.float32)
    outside_q = tl.zeros([BLOCK_SIZE], tl.float32)
    count = tl.full([], 0, tl.int32)
    for start in tl.range(0, width, BLOCK_SIZE, num_stages=STAGES):
        ids = start + lanes
        raw_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
        raw_q = tl.load(teacher_ptr + ids, mask=ids < width, other=0.0)
        raw_q = raw_q.to(tl.float32)
        keys = _ordered(raw_s)
        valid = ids < vocabulary
        chosen = valid & ((keys > key) | ((keys == key) & (ids <= last)))
        z_s, z_q = masked_logit(raw_s, valid, softcap), masked_logit(raw_q, valid, softcap)
        outside_s += tl.where(chosen, 0.0, tl.exp2(z_s * scale2 - log_s2))
        outside_q += tl.where(chosen, 0.0, tl.exp2(z_q * scale2 - log_q2))
        picked = tl.where(chosen, 1, 0)
        slots = count + tl.cumsum(picked, 0) - 1
        stored = chosen & (slots < CAPACITY)
        tl.store(values_ptr + slots, raw_s, mask=stored)
        tl.store(values_ptr + CAPACITY + slots, raw_q, mask=stored)
        tl.store(ids_ptr + slots, ids, mask=stored)
        count += tl.sum(picked, 0)
    return count, tl.sum(outside_s, 0), tl.sum(outside_q, 0)


@triton.jit
def _bucket_gradient(
    delta2, s, q, kept, tail_s, tail_q, probability, alpha, row_scale, d_target,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr,
):  # fmt: skip
    """D, the d-logits of the kept tokens, and the factor of s_j for all the others."""
    term, slope = bucket_terms(delta2, s, q, alpha, KIND, HALF)
    divergence = tl.sum(tl.where(kept, term, 0.0), 0)
    mean = tl.sum(tl.where(kept, slope, 0.0), 0)
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
        outside = (tail_slope / tail_s - mean) * row_scale
    inside = (slope - s * mean) * row_scale - probability * d_target
    divergence = tl.where(divergence < 0, 0.0, divergence)
    return divergence, inside, outside - d_target


@triton.jit
def _write_buckets(
    student_ptr, d_logits_ptr, ids, kept, inside, outside, divergence, distilled, active,
    target, d_target, log_s2, scale2, softcap, width, vocabulary,
    BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d-logits: s_j · outside everywhere, then the kept tokens over it."""
    finite = (divergence == divergence) & (divergence < float("inf"))
    outside = tl.where(distilled, tl.where(finite, outside, float("nan")), -d_target)
    inside = tl.where(finite, inside, float("nan")) + tl.where(ids == target, d_target, 0.0)
    lanes = tl.arange(0, BLOCK_SIZE)
    for start in tl.range(0, width, BLOCK_SIZE, num_stages=STAGES):
        every = start + lanes
        z = tl.load(student_ptr + every, mask=every < tl.where(active, width, 0), other=0.0).to(
            tl.float32
        )
        if softcap is not None:
            _, softcap_slope = soft_cap(z, softcap)
        z = masked_logit(z, every < vocabulary, softcap)
        value = tl.exp2(z * scale2 - log_s2) * outside + tl.where(every == target, d_target, 0.0)
        if softcap is not None:
            value *= softcap_slope
        store_gradient(d_logits_ptr + every, tl.where(active, value, 0.0), every < width, BF16)
    tl.debug_barrier()
    if softcap is not None:
        # 1 − (z/c)² from the capped logit would cancel: read the logit again.
        raw = tl.load(student_ptr + ids, mask=kept, other=0.0).to(tl.float32)
        _, softcap_slope = soft_cap(raw, softcap)
        inside *= softcap_slope
    store_gradient(d_logits_ptr + ids, inside, kept, BF16)


@triton.jit
def _log_sum_kept(log_kept2, kept):
    top = tl.max(tl.where(kept, log_kept2, -float("inf")), 0)
    return top + tl.log2(tl.sum(tl.where(kept, tl.exp2(log_kept2 - top), 0.0), 0))


@triton.jit
def _finish_buckets(
    row, student_ptr, d_logits_ptr, stats_ptr, ids, kept, written, z_s, z_q, log_kept_s2,
    log_kept_q2, delta2, s, q, tail_s, tail_q, target, weight, scale, policy_loss, d_target,
    distilled, active, log_s2, scale2, alpha, softcap, d_logits_row_stride, stats_row_stride,
    width, vocabulary,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr, BF16: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the kept tokens (`written`: those of them whose d-logits have a place) and both tails to
    divergence, loss and d-logits."""
    probability = s
    if not ADD_TAIL:
        norm_s2, norm_q2 = _log_sum_kept(log_kept_s2, kept), _log_sum_kept(log_kept_q2, kept)
        s, q = tl.exp2(log_kept_s2 - norm_s2), tl.exp2(log_kept_q2 - norm_q2)
        delta2 = delta2 - (norm_q2 - norm_s2)
    divergence, inside, outside = _bucket_gradient(
        delta2, s, q, kept, tail_s, tail_q, probability, alpha, weight * scale, d_target, KIND,
        HALF, ADD_TAIL,
    )  # fmt: skip
    if KIND != JSD:
        diverged = tl.max(diverges(z_s, z_q, kept, KIND), 0) > 0
        divergence = tl.where(diverged & (divergence == divergence), float("inf"), divergence)
    save_loss(stats_ptr, stats_row_stride, row, divergence, weight, policy_loss, distilled, active)
    if d_logits_ptr is not None:
        _write_buckets(
            student_ptr, d_logits_ptr + row * d_logits_row_stride, ids, written, inside, outside,
            divergence, distilled, active, target, d_target, log_s2, scale2, softcap, width,
            vocabulary, BF16, BLOCK_SIZE, STAGES,
        )  # fmt: skip


@triton.jit
def top_k_kernel(
    student_ptr, teacher_ptr, d_logits_ptr, stats_ptr,
    distill_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    values_ptr, ids_ptr,
    student_row_stride, teacher_row_stride, d_logits_row_stride, stats_row_stride,
    vocabulary, width, k,
    alpha, inverse_temperature, softcap, clip_low, clip_high, ratio_cap,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr, CAPACITY: tl.constexpr,
    BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The student's top k < vocabulary, k ≤ BLOCK_SIZE, k ≤ CAPACITY.

    The k-th greatest of the lanes' maxima is a lower bound of the row's k-th greatest logit. Above
    it lie few more than k candidates; they are collected and the threshold is found among them. If
    they overflow the buffer (many equal logits), the row itself is searched.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    values_ptr += row * (2 * CAPACITY)
    ids_ptr += row * CAPACITY
    lanes = tl.arange(0, BLOCK_SIZE)
    scale2 = inverse_temperature * LOG2E
    weight, distilled, active = row_weights(row, distill_ptr, policy_ptr)
    width_s, width_q = tl.where(active, width, 0), tl.where(distilled, width, 0)

    peak_s = tl.zeros([BLOCK_SIZE], tl.float32) + MASKED
    peak_q = peak_s
    total_s = tl.zeros([BLOCK_SIZE], tl.float32)
    total_q, moment_s, moment_q = total_s, total_s, total_s
    greatest = tl.full([BLOCK_SIZE], -(2**31), tl.int32)
    for start in tl.range(0, width_s, BLOCK_SIZE, num_stages=STAGES):
        ids = start + lanes
        z_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
        z_q = tl.load(teacher_ptr + ids, mask=ids < width_q, other=0.0).to(tl.float32)
        valid = ids < vocabulary
        greatest = tl.maximum(greatest, tl.where(valid, _ordered(z_s), -(2**31)))
        z_s, z_q = masked_logit(z_s, valid, softcap), masked_logit(z_q, valid, softcap)
        peak_s, total_s, moment_s, _, _ = add_online(z_s, peak_s, total_s, moment_s, scale2)
        peak_q, total_q, moment_q, _, _ = add_online(z_q, peak_q, total_q, moment_q, scale2)
    log_s2, entropy_s, _, _ = log_sum(peak_s, total_s, moment_s, scale2)
    log_q2, entropy_q, _, _ = log_sum(peak_q, total_q, moment_q, scale2)
    save(stats_ptr, stats_row_stride, row, STUDENT_ENTROPY, entropy_s, active)
    save(stats_ptr, stats_row_stride, row, TEACHER_ENTROPY, entropy_q, distilled)

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

    bound = _kth(greatest, lanes < BLOCK_SIZE, k)
    count, tail_s, tail_q = _collect(
        student_ptr, teacher_ptr, values_ptr, ids_ptr, width_q, vocabulary, bound, vocabulary,
        log_s2, log_q2, scale2, softcap, CAPACITY, BLOCK_SIZE, STAGES,
    )  # fmt: skip
    if count > CAPACITY:
        bound, last = _kth_of_row(student_ptr, width, vocabulary, k, BLOCK_SIZE)
        # Everyone has written its candidates before they are overwritten.
        tl.debug_barrier()
        count, tail_s, tail_q = _collect(
            student_ptr, teacher_ptr, values_ptr, ids_ptr, width_q, vocabulary, bound, last,
            log_s2, log_q2, scale2, softcap, CAPACITY, BLOCK_SIZE, STAGES,
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
    z_s, z_q = masked_logit(raw_s, filled, softcap), masked_logit(raw_q, filled, softcap)
    log_kept_s2, log_kept_q2 = z_s * scale2 - log_s2, z_q * scale2 - log_q2
    s, q = tl.exp2(log_kept_s2), tl.exp2(log_kept_q2)
    delta2 = (z_q - z_s) * scale2 - (log_q2 - log_s2)
    tail_s += tl.sum(tl.where(filled & ~kept, s, 0.0), 0)
    tail_q += tl.sum(tl.where(filled & ~kept, q, 0.0), 0)
    _finish_buckets(
        row, student_ptr, d_logits_ptr, stats_ptr, ids, kept, kept, z_s, z_q, log_kept_s2,
        log_kept_q2, delta2, s, q, tail_s, tail_q, target, weight, scale, policy_loss, d_target,
        distilled, active, log_s2, scale2, alpha, softcap, d_logits_row_stride, stats_row_stride,
        width, vocabulary, KIND, HALF, ADD_TAIL, BF16, BLOCK_SIZE, STAGES,
    )  # fmt: skip


@triton.jit
def stored_kernel(
    student_ptr, stored_ids_ptr, stored_logprobs_ptr, d_logits_ptr, stats_ptr,
    distill_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    student_row_stride, stored_row_stride, d_logits_row_stride, stats_row_stride,
    vocabulary, width, k,
    alpha, inverse_temperature, softcap, clip_low, clip_high, ratio_cap,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr, CAPACITY: tl.constexpr,
    BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A teacher of k stored ids and log-probs a row; the remaining masses are the tails."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    lanes = tl.arange(0, BLOCK_SIZE)
    scale2 = inverse_temperature * LOG2E
    weight, distilled, active = row_weights(row, distill_ptr, policy_ptr)
    width_s, width_q = tl.where(active, width, 0), tl.where(distilled, width, 0)

    peak_s = tl.zeros([BLOCK_SIZE], tl.float32) + MASKED
    total_s = tl.zeros([BLOCK_SIZE], tl.float32)
    moment_s = total_s
    for start in tl.range(0, width_s, BLOCK_SIZE, num_stages=STAGES):
        ids = start + lanes
        z_s = tl.load(student_ptr + ids, mask=ids < width, other=0.0).to(tl.float32)
        z_s = masked_logit(z_s, ids < vocabulary, softcap)
        peak_s, total_s, moment_s, _, _ = add_online(z_s, peak_s, total_s, moment_s, scale2)
    log_s2, entropy_s, _, _ = log_sum(peak_s, total_s, moment_s, scale2)
    save(stats_ptr, stats_row_stride, row, STUDENT_ENTROPY, entropy_s, active)

    slots = tl.arange(0, CAPACITY)
    kept = slots < tl.where(distilled, k, 0)
    ids = tl.load(stored_ids_ptr + row * stored_row_stride + slots, mask=kept, other=0)
    inside_vocabulary = (ids >= 0) & (ids < vocabulary)
    z_s = tl.load(student_ptr + ids, mask=kept & inside_vocabulary, other=0.0).to(tl.float32)
    z_s = masked_logit(tl.where(inside_vocabulary, z_s, float("nan")), True, softcap)
    log_q = tl.load(stored_logprobs_ptr + row * stored_row_stride + slots, mask=kept, other=0.0)
    log_q = log_q.to(tl.float32)
    log_q2 = tl.where(log_q < MASKED, MASKED, log_q) * LOG2E
    log_kept_s2 = z_s * scale2 - log_s2
    s, q = tl.exp2(log_kept_s2), tl.exp2(log_q2)
    delta2 = log_q2 - log_kept_s2

    # What is left of one has few digits: count it in fp64, from the same fp32 masses.
    mass = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in tl.range(0, width_q, BLOCK_SIZE):
        every = start + lanes
        z = tl.load(student_ptr + every, mask=every < width, other=0.0).to(tl.float32)
        z = masked_logit(z, every < vocabulary, softcap)
        mass += tl.exp2(z * scale2 - log_s2).to(tl.float64)
    kept_mass = tl.sum(tl.where(kept, s.to(tl.float64), 0.0), 0)
    tail_s = (tl.sum(mass, 0) - kept_mass).to(tl.float32)
    stored = tl.exp(tl.where(kept, log_q, MASKED).to(tl.float64))
    stored_mass = tl.sum(stored, 0)
    tail_q = (1.0 - stored_mass).to(tl.float32)
    log_tail = tl.log(tl.where(tail_q <= TAIL_FLOOR, TAIL_FLOOR, tail_q))
    entropy_q = -tl.sum(tl.where(kept, q * log_q2 * LN2, 0.0), 0) - tl.exp(log_tail) * log_tail
    save(stats_ptr, stats_row_stride, row, TEACHER_ENTROPY, entropy_q, distilled)

    target, weight, scale, policy_loss, d_target = sampled_token(
        row, student_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
        stats_row_stride, vocabulary, log_s2, scale2, weight, active, inverse_temperature, softcap,
        clip_low, clip_high, ratio_cap,
    )  # fmt: skip
    if target_ptr is not None:
        hit = kept & (ids == target)
        among = tl.sum(tl.where(hit, log_q, 0.0), 0)
        logprob = tl.where(tl.max(tl.where(hit, 1, 0), 0) > 0, among, log_tail)
        save(stats_ptr, stats_row_stride, row, TEACHER_LOGPROB, logprob, distilled)
    _finish_buckets(
        row, student_ptr, d_logits_ptr, stats_ptr, ids, kept, kept & inside_vocabulary, z_s, log_q2,
        log_kept_s2, log_q2, delta2, s, q, tail_s, tail_q, target, weight, scale, policy_loss,
        d_target, distilled, active, log_s2, scale2, alpha, softcap, d_logits_row_stride,
        stats_row_stride, width, vocabulary, KIND, HALF, ADD_TAIL, BF16, BLOCK_SIZE, STAGES,
    )  # fmt: skip
