"""Triton: the cross-entropy of a tile of logits at temperature 1, added to what a row kernel wrote.

At temperature 1 the row kernels have the log-sum-exp that a cross-entropy needs, and compute it
with the divergence. At another temperature each of them would need a second log-sum-exp in its
first sweep and a second exponential in its last one, and registers for both. So this kernel reads
the tile, which is still in memory, twice more: 4 bytes an element of an fp32 tile, then 8 with the
bf16 d-logits, which are rounded a second time.
"""

import triton
import triton.language as tl

from ..softmax import LN2, LOG2E, load_tile, log_sum, tile_ids
from .row_terms import LOSS, load_gradient, store_tile, student_sums, target_logprob2


@triton.jit
def _add_tile(
    student_ptr, d_logits_ptr, ids, target, vocabulary, width, log_s2, weight,
    BF16: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """d-logits += weight · (s_j − [j = target]) in one tile."""
    z = load_tile(student_ptr, ids, vocabulary, None, LAST)
    value = tl.exp2(z * LOG2E - log_s2) * weight
    value = tl.where(ids == target, value - weight, value)
    value += load_gradient(d_logits_ptr, ids, width, BF16, LAST)
    store_tile(d_logits_ptr, ids, value, width, BF16, LAST)


@triton.jit
def cross_entropy_kernel(
    student_ptr, d_logits_ptr, stats_ptr, target_ptr, label_weight_ptr, upstream_ptr,
    student_row_stride, d_logits_row_stride, stats_row_stride, vocabulary, width,
    BF16: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a row; a row whose label weight is 0 is left as it is. Without d_logits_ptr only
    the loss. `width` ≥ `vocabulary` is the padded row."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(label_weight_ptr + row)
    if weight != 0:
        student_ptr += row * student_row_stride
        sums = student_sums(student_ptr, vocabulary, None, LOG2E, BLOCK_SIZE, COLUMNS)
        log_s2, _, _, _ = log_sum(sums, LOG2E)
        target = tl.load(target_ptr + row)
        logprob2 = target_logprob2(student_ptr, target, log_s2, LOG2E, None, vocabulary)
        loss_ptr = stats_ptr + LOSS * stats_row_stride + row
        tl.store(loss_ptr, tl.load(loss_ptr) - weight * (logprob2 * LN2))
        if d_logits_ptr is not None:
            d_logits_ptr += row * d_logits_row_stride
            if upstream_ptr is not None:
                weight *= tl.load(upstream_ptr + row)
            weight = tl.where(logprob2 == logprob2, weight, logprob2)
            tile = tile_ids(BLOCK_SIZE, COLUMNS)
            whole = vocabulary // BLOCK_SIZE * BLOCK_SIZE
            for start in tl.range(0, whole, BLOCK_SIZE, num_stages=1):
                _add_tile(
                    student_ptr, d_logits_ptr, start + tile, target, vocabulary, width, log_s2,
                    weight, BF16, False,
                )  # fmt: skip
            if whole < vocabulary:
                _add_tile(
                    student_ptr, d_logits_ptr, whole + tile, target, vocabulary, width, log_s2,
                    weight, BF16, True,
                )  # fmt: skip
