"""Triton: the student's top k tokens and one bucket for the rest, against a teacher's row.

Bytes an element of fp32 tiles, with bf16 d-logits:

    read both 8      the softmaxes, kept for LANES lanes of the row and not only for the row
    gather           the elements of the hot lanes, both sides
    read student 4   write d-logits 2                                          14.2 and the gather

The k-th greatest of the lanes' maxima is a lower bound of the row's k-th greatest logit. Whatever
reaches it lies in the hot lanes, those whose maximum does: about k of 1,024 (of 2,048 for k > 512),
so the gather takes 0.16 bytes for k = 20 and 0.8 for k = 100. What the hot lanes hold above the
bound, a few more than k candidates, is collected and the threshold is found among them. A tail is
what the cold lanes hold and the candidates that are not kept: a sum, never a difference.

Where the candidates overflow their buffer (many equal logits) the row is left to a second launch,
which searches it for the exact threshold.

Precision: see row_terms.py.
"""

import triton
import triton.language as tl

from ..softmax import (
    LN2,
    LOG2E,
    MASKED,
    add_tile,
    load_raw,
    log_sum,
    masked_logit,
    no_sums,
    tile_ids,
)
from .bucket_kernels import finish_buckets
from .row_terms import (
    STUDENT_ENTROPY,
    TEACHER_ENTROPY,
    TEACHER_LOGPROB,
    row_weights,
    sampled_token,
    save,
    target_logprob2,
    undistilled_row,
)

# Elements that are gathered at a time: more would need twice the registers of everything else.
GATHERED = tl.constexpr(512)
# Of the bound: the bits that matter. The others would leave a few candidates less.
BOUND_BITS = tl.constexpr(20)


@triton.jit
def _ordered(z):
    """Integers in the order of the floats; −0 counts as +0, and −inf as −1e30."""
    z = tl.maximum(z, MASKED, propagate_nan=tl.PropagateNan.ALL)
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth(keys, counted, k, BITS: tl.constexpr):
    """The k-th greatest of the counted integers, or less of it: its BITS highest bits."""
    found = tl.full([], -(2**31), tl.int32)
    for bit in range(BITS):
        # 2^31 wraps around to the sign: −2^31 + 2^31 = 0.
        step = tl.full([], 1, tl.int32) << (31 - bit)
        reach = tl.sum(tl.where(counted & (keys >= found + step), 1, 0), 0)
        found = tl.where(reach >= k, found + step, found)
    return found


@triton.jit
def _count(student_ptr, vocabulary, key, last, BLOCK_SIZE: tl.constexpr):
    """How many logits of a row are above `key`, or equal to it with an id up to `last`."""
    lanes = tl.arange(0, BLOCK_SIZE)
    count = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, vocabulary, BLOCK_SIZE):
        ids = start + lanes
        keys = _ordered(load_raw(student_ptr, ids, vocabulary, True))
        inside = (keys > key) | ((keys == key) & (ids <= last))
        count += tl.where((ids < vocabulary) & inside, 1, 0)
    return tl.sum(count, 0)


@triton.jit
def _kth_of_row(student_ptr, vocabulary, k, BLOCK_SIZE: tl.constexpr):
    """The k-th greatest logit of a row and the last id kept among its equals; ~50 reads, exact."""
    key = tl.full([], -(2**31), tl.int32)
    for bit in range(32):
        step = tl.full([], 1, tl.int32) << (31 - bit)
        reach = _count(student_ptr, vocabulary, key + step, vocabulary, BLOCK_SIZE)
        key = tl.where(reach >= k, key + step, key)
    # The smallest id with which the count reaches k.
    low, high = tl.full([], 0, tl.int32), vocabulary - 1
    while low < high:
        middle = (low + high) // 2
        enough = _count(student_ptr, vocabulary, key, middle, BLOCK_SIZE) >= k
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return key, low


@triton.jit
def _lane_tile(
    student_ptr, teacher_ptr, ids, vocabulary, softcap, scale2, sums_s, sums_q, greatest,
    LAST: tl.constexpr,
):  # fmt: skip
    z_s = load_raw(student_ptr, ids, vocabulary, LAST)
    z_q = load_raw(teacher_ptr, ids, vocabulary, LAST)
    if softcap is not None:
        greatest = tl.max(tl.maximum(z_s, greatest[:, None]), 1)
    z_s, z_q = masked_logit(z_s, softcap), masked_logit(z_q, softcap)
    if LAST and softcap is not None:
        z_s = tl.where(ids < vocabulary, z_s, MASKED)
        z_q = tl.where(ids < vocabulary, z_q, MASKED)
    sums_s, _, _ = add_tile(z_s, sums_s, scale2)
    sums_q, _, _ = add_tile(z_q, sums_q, scale2)
    return sums_s, sums_q, greatest


@triton.jit
def _store_sums(lanes_ptr, at, sums, LANES: tl.constexpr):
    for entry in tl.static_range(3):
        tl.store(lanes_ptr + entry * LANES + at, sums[entry])


@triton.jit
def _load_sums(lanes_ptr, at, LANES: tl.constexpr):
    return (
        tl.load(lanes_ptr + at),
        tl.load(lanes_ptr + LANES + at),
        tl.load(lanes_ptr + 2 * LANES + at),
    )


@triton.jit
def _sum_lanes(
    student_ptr, teacher_ptr, lanes_ptr, vocabulary, softcap, scale2,
    SEGMENTS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sweep 1: the sums of every lane into lanes_ptr [7, LANES]: student's, teacher's, and with a
    soft cap the student's greatest raw logit. A segment is ROUNDS tiles, its lanes are a tile's."""
    STRETCH: tl.constexpr = ROUNDS * BLOCK_SIZE
    TILE_LANES: tl.constexpr = BLOCK_SIZE // COLUMNS
    LANES: tl.constexpr = SEGMENTS * TILE_LANES
    tile = tile_ids(BLOCK_SIZE, COLUMNS)
    whole = vocabulary // BLOCK_SIZE * BLOCK_SIZE
    for segment in range(SEGMENTS):
        sums_s, sums_q = no_sums(TILE_LANES), no_sums(TILE_LANES)
        greatest = sums_s[0]
        first = segment * STRETCH
        stop = tl.minimum(first + STRETCH, whole)
        for start in tl.range(first, stop, BLOCK_SIZE, num_stages=1):
            sums_s, sums_q, greatest = _lane_tile(
                student_ptr, teacher_ptr, start + tile, vocabulary, softcap, scale2, sums_s, sums_q,
                greatest, False,
            )  # fmt: skip
        if (first <= whole) & (whole < first + STRETCH) & (whole < vocabulary):
            sums_s, sums_q, greatest = _lane_tile(
                student_ptr, teacher_ptr, whole + tile, vocabulary, softcap, scale2, sums_s, sums_q,
                greatest, True,
            )  # fmt: skip
        at = segment * TILE_LANES + tl.arange(0, TILE_LANES)
        _store_sums(lanes_ptr, at, sums_s, LANES)
        _store_sums(lanes_ptr + 3 * LANES, at, sums_q, LANES)
        if softcap is not None:
            tl.store(lanes_ptr + 6 * LANES + at, greatest)


@triton.jit
def _cold_mass(lanes_ptr, at, hot, top, log_mass, scale2, LANES: tl.constexpr):
    """Σ s_j over the lanes that are not hot."""
    peak, total = tl.load(lanes_ptr + at), tl.load(lanes_ptr + LANES + at)
    return tl.sum(tl.where(hot, 0.0, total * tl.exp2((peak - top) * scale2 - log_mass)), 0)


@triton.jit
def _collect(
    student_ptr, teacher_ptr, values_ptr, ids_ptr, hot_ptr, hot_lanes, vocabulary, key, last,
    log_s2, log_q2, scale2, softcap, CAPACITY: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the elements of the hot lanes the candidates (above `key`, or equal with an id up to
    `last`) into the buffer; their number, and both sides' mass of the other elements."""
    STRETCH: tl.constexpr = ROUNDS * BLOCK_SIZE
    TILE_LANES: tl.constexpr = BLOCK_SIZE // COLUMNS
    EACH: tl.constexpr = ROUNDS * COLUMNS  # elements of a lane
    at = tl.arange(0, GATHERED)
    outside_s = tl.zeros([GATHERED], tl.float32)
    outside_q = tl.zeros([GATHERED], tl.float32)
    count = tl.full([], 0, tl.int32)
    for first in range(0, hot_lanes * EACH, GATHERED):
        place = first + at
        number = place // EACH
        lane = tl.load(hot_ptr + number, mask=number < hot_lanes, other=0)
        tile_start = lane // TILE_LANES * STRETCH + place % EACH // COLUMNS * BLOCK_SIZE
        ids = tile_start + lane % TILE_LANES * COLUMNS + place % COLUMNS
        looked = (number < hot_lanes) & (ids < vocabulary)
        raw_s = tl.load(student_ptr + ids, mask=looked, other=0.0).to(tl.float32)
        raw_q = tl.load(teacher_ptr + ids, mask=looked, other=0.0).to(tl.float32)
        keys = _ordered(raw_s)
        chosen = looked & ((keys > key) | ((keys == key) & (ids <= last)))
        left = looked & ~chosen
        z_s, z_q = masked_logit(raw_s, softcap), masked_logit(raw_q, softcap)
        outside_s += tl.where(left, tl.exp2(z_s * scale2 - log_s2), 0.0)
        outside_q += tl.where(left, tl.exp2(z_q * scale2 - log_q2), 0.0)
        picked = tl.where(chosen, 1, 0)
        slots = count + tl.cumsum(picked, 0) - 1
        stored = chosen & (slots < CAPACITY)
        tl.store(values_ptr + slots, raw_s, mask=stored)
        tl.store(values_ptr + CAPACITY + slots, raw_q, mask=stored)
        tl.store(ids_ptr + slots, ids, mask=stored)
        count += tl.sum(picked, 0)
    return count, tl.sum(outside_s, 0), tl.sum(outside_q, 0)


@triton.jit
def _kept_candidates(keys, ids, filled, k, vocabulary):
    """The k greatest, among equal ones the lowest ids."""
    threshold = _kth(keys, filled, k, 32)
    above, equal = filled & (keys > threshold), filled & (keys == threshold)
    room = k - tl.sum(tl.where(above, 1, 0), 0)
    low, high = tl.full([], 0, tl.int32), vocabulary - 1
    if tl.sum(tl.where(equal, 1, 0), 0) <= room:
        low = high
    while low < high:
        middle = (low + high) // 2
        enough = tl.sum(tl.where(equal & (ids <= middle), 1, 0), 0) >= room
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return above | (equal & (ids <= low))


@triton.jit
def top_k_kernel(
    student_ptr, teacher_ptr, d_logits_ptr, stats_ptr,
    distill_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr, upstream_ptr,
    lanes_ptr, hot_ptr, values_ptr, ids_ptr, overflow_ptr,
    student_row_stride, teacher_row_stride, d_logits_row_stride, stats_row_stride,
    vocabulary, width, k,
    alpha, inverse_temperature, softcap, clip_low, clip_high, ratio_cap, dual_clip,
    KIND: tl.constexpr, HALF: tl.constexpr, ADD_TAIL: tl.constexpr, CAPACITY: tl.constexpr,
    SEARCH: tl.constexpr, SEGMENTS: tl.constexpr, ROUNDS: tl.constexpr,
    BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The student's top k < vocabulary, k ≤ CAPACITY; what overflows waits for a SEARCH launch.

    lanes, hot, values, ids: scratch of a row, [7, LANES] fp32, [LANES] int32, [2, CAPACITY] fp32
    and [CAPACITY] int32. overflow: [rows] int32, whether a row is left to the search.
    """
    TILE_LANES: tl.constexpr = BLOCK_SIZE // COLUMNS
    LANES: tl.constexpr = SEGMENTS * TILE_LANES
    STRETCH: tl.constexpr = ROUNDS * BLOCK_SIZE
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    if d_logits_ptr is not None:
        d_logits_ptr += row * d_logits_row_stride
    scale2 = inverse_temperature * LOG2E
    weight, distilled, active = row_weights(row, distill_ptr, policy_ptr)
    if SEARCH:
        wanted = tl.load(overflow_ptr + row) > 0
    else:
        wanted = distilled
        tl.store(overflow_ptr + row, 0)
    if wanted:
        teacher_ptr += row * teacher_row_stride
        lanes_ptr += row * (7 * LANES)
        values_ptr += row * (2 * CAPACITY)
        ids_ptr += row * CAPACITY
        _sum_lanes(
            student_ptr, teacher_ptr, lanes_ptr, vocabulary, softcap, scale2, SEGMENTS, ROUNDS,
            BLOCK_SIZE, COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        at = tl.arange(0, LANES)
        log_s2, entropy_s, top_s, mass_s = log_sum(_load_sums(lanes_ptr, at, LANES), scale2)
        # A barrier keeps what is loaded behind it out of the registers before it.
        tl.debug_barrier()
        log_q2, entropy_q, top_q, mass_q = log_sum(
            _load_sums(lanes_ptr + 3 * LANES, at, LANES), scale2
        )
        tl.debug_barrier()
        save(stats_ptr, stats_row_stride, row, STUDENT_ENTROPY, entropy_s)
        save(stats_ptr, stats_row_stride, row, TEACHER_ENTROPY, entropy_q)

        peaks = lanes_ptr
        if softcap is not None:
            peaks += 6 * LANES
        keys = _ordered(tl.load(peaks + at))
        exists = at // TILE_LANES * STRETCH + at % TILE_LANES * COLUMNS < vocabulary
        if SEARCH:
            key, last = _kth_of_row(student_ptr, vocabulary, k, BLOCK_SIZE)
        else:
            key, last = _kth(keys, exists, k, BOUND_BITS), vocabulary
        hot = exists & (keys >= key)
        hot_ptr += row * LANES
        one = tl.where(hot, 1, 0)
        tl.store(hot_ptr + tl.cumsum(one, 0) - 1, at, mask=hot)
        tl.debug_barrier()
        cold_s = _cold_mass(lanes_ptr, at, hot, top_s, mass_s, scale2, LANES)
        tl.debug_barrier()
        cold_q = _cold_mass(lanes_ptr + 3 * LANES, at, hot, top_q, mass_q, scale2, LANES)
        tl.debug_barrier()
        count, tail_s, tail_q = _collect(
            student_ptr, teacher_ptr, values_ptr, ids_ptr, hot_ptr, tl.sum(one, 0), vocabulary,
            key, last, log_s2, log_q2, scale2, softcap, CAPACITY, ROUNDS, BLOCK_SIZE, COLUMNS,
        )  # fmt: skip
        tail_s += cold_s
        tail_q += cold_q
        if not SEARCH:
            tl.store(overflow_ptr + row, (count > CAPACITY).to(tl.int32))
        tl.debug_barrier()
        if count <= CAPACITY:
            target, weight, scale, policy_loss, d_target = sampled_token(
                row, student_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr, old_ptr,
                upstream_ptr, stats_row_stride, vocabulary, log_s2, scale2, weight,
                inverse_temperature, softcap, clip_low, clip_high, ratio_cap, dual_clip,
            )  # fmt: skip
            if target_ptr is not None:
                logprob2 = target_logprob2(teacher_ptr, target, log_q2, scale2, softcap, vocabulary)
                save(stats_ptr, stats_row_stride, row, TEACHER_LOGPROB, logprob2 * LN2)
            slots = tl.arange(0, CAPACITY)
            filled = slots < count
            raw_s = tl.load(values_ptr + slots, mask=filled, other=0.0)
            raw_q = tl.load(values_ptr + CAPACITY + slots, mask=filled, other=0.0)
            ids = tl.load(ids_ptr + slots, mask=filled, other=0)
            kept = _kept_candidates(_ordered(raw_s), ids, filled, k, vocabulary)
            z_s, z_q = masked_logit(raw_s, softcap), masked_logit(raw_q, softcap)
            log_kept_s2, log_kept_q2 = z_s * scale2 - log_s2, z_q * scale2 - log_q2
            s, q = tl.exp2(log_kept_s2), tl.exp2(log_kept_q2)
            delta2 = ((z_q - z_s) - (top_q - top_s)) * scale2 - (mass_q - mass_s)
            tail_s += tl.sum(tl.where(filled & ~kept, s, 0.0), 0)
            tail_q += tl.sum(tl.where(filled & ~kept, q, 0.0), 0)
            finish_buckets(
                row, student_ptr, d_logits_ptr, stats_ptr, policy_ptr, ids, kept, kept, z_s, z_q,
                log_kept_s2, log_kept_q2, delta2, s, q, tail_s, tail_q, target, weight, scale,
                policy_loss, d_target, log_s2, scale2, alpha, softcap, stats_row_stride, width,
                vocabulary, KIND, HALF, ADD_TAIL, BF16, BLOCK_SIZE, COLUMNS,
            )  # fmt: skip
    elif not SEARCH:
        undistilled_row(
            row, student_ptr, d_logits_ptr, stats_ptr, target_ptr, advantage_ptr, policy_ptr,
            old_ptr, upstream_ptr, stats_row_stride, vocabulary, width, weight, active,
            inverse_temperature, softcap, clip_low, clip_high,
            ratio_cap, dual_clip, BF16, BLOCK_SIZE,
            COLUMNS,
        )  # fmt: skip
