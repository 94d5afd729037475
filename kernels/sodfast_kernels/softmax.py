"""Triton: tiles of a row of logits, and its log-sum-exp and entropy in one sweep.

For the loss and the sampler. A tile is [R, C]: C neighbouring logits belong to one thread, which
reduces them without its neighbours, so the sums of a sweep are kept for R lanes. Logits of −inf
become −1e30, so no difference of theirs is NaN. Everything is in base 2 until it is stored (names
ending in 2).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from .rounding import NATIVE

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)
MASKED_BELOW = tl.constexpr(-1e28)


@triton.jit
def fast_log2(x):
    """log2 of a normal x > 0: one instruction where tl.log2 takes twenty. Its error is 2^-22,
    absolute between 1/2 and 2, else relative."""
    return libdevice.fast_log2f(x) if NATIVE else tl.log2(x)  # the interpreter has no libdevice


@triton.jit
def expm1_negative(x):
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
def soft_cap(z, softcap):
    """c·tanh(z/c) and its derivative. An overflowed logit stays NaN instead of becoming c."""
    shrink = expm1_negative(-2.0 * tl.abs(z) / softcap)
    plus = shrink + 2.0
    size = -shrink / plus * softcap
    capped = tl.where(z < 0, -size, size)
    return tl.where(z == float("inf"), float("nan"), capped), 4.0 * (1.0 + shrink) / (plus * plus)


@triton.jit
def masked_logit(z, softcap):
    """A logit ready for differences; `softcap` may be None."""
    if softcap is not None:
        z, _ = soft_cap(z, softcap)
    return tl.maximum(z, MASKED, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_ids(BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a tile [BLOCK_SIZE / COLUMNS, COLUMNS] within its row."""
    return tl.arange(0, BLOCK_SIZE // COLUMNS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_raw(row_ptr, ids, vocabulary, LAST: tl.constexpr):
    """Logits in fp32. Only the LAST tile of a row is compared with the end of the vocabulary."""
    if LAST:
        return tl.load(row_ptr + ids, mask=ids < vocabulary, other=-float("inf")).to(tl.float32)
    else:
        return tl.load(row_ptr + ids).to(tl.float32)


@triton.jit
def load_tile(row_ptr, ids, vocabulary, softcap, LAST: tl.constexpr):
    """Logits ready for differences, −1e30 behind the vocabulary."""
    z = masked_logit(load_raw(row_ptr, ids, vocabulary, LAST), softcap)
    if LAST and softcap is not None:
        z = tl.where(ids < vocabulary, z, MASKED)
    return z


@triton.jit
def no_sums(LANES: tl.constexpr):
    """The sums of `add_tile` before the first tile."""
    zero = tl.zeros([LANES], tl.float32)
    return zero + MASKED, zero, zero


@triton.jit
def add_tile(z, sums, scale2):
    """Adds a tile's columns to each lane's peak, Σ 2^y and Σ 2^y·y of y = (z − peak)·scale2; also
    the factor its sums were multiplied by, and the summands 2^y.

    Peaks are logits, and only differences are scaled: near the peak, where the mass is, they are
    small, and so is their rounding.
    """
    peak, total, moment = sums
    top = tl.maximum(peak, tl.max(z, 1))
    gap = (peak - top) * scale2
    factor = tl.exp2(gap)
    y = (z - top[:, None]) * scale2
    mass = tl.exp2(y)
    moment = factor * (moment + gap * total) + tl.sum(mass * y, 1)
    total = total * factor + tl.sum(mass, 1)
    return (top, total, moment), factor, mass


@triton.jit
def log_sum(sums, scale2):
    """Log-sum-exp in base 2 and entropy in nats from the lanes, NaN for a row without mass; and
    the first as its two terms, the top logit and the log of the mass relative to it."""
    peak, total, moment = sums
    top = tl.max(peak, 0)
    gap = (peak - top) * scale2
    factor = tl.exp2(gap)
    mass = tl.sum(total * factor, 0)
    mean = tl.sum(factor * (moment + gap * total), 0) / mass
    log_mass = tl.log2(tl.where(top < MASKED_BELOW, float("nan"), mass))
    return top * scale2 + log_mass, (log_mass - mean) * LN2, top, log_mass
