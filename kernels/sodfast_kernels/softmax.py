"""Triton: log-sum-exp and entropy of a row of logits in one sweep, for the loss and the sampler.

Logits of −inf become −1e30, so no difference of theirs is NaN. Everything is in base 2 until it is
stored (names ending in 2).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)
MASKED_BELOW = tl.constexpr(-1e28)


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
def masked_logit(z, valid, softcap):
    """A logit ready for differences; `softcap` may be None."""
    if softcap is not None:
        z, _ = soft_cap(z, softcap)
    return tl.where(valid, tl.where(z < MASKED, MASKED, z), MASKED)


@triton.jit
def add_online(z, peak, total, moment, scale2):
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
def log_sum(peak, total, moment, scale2):
    """Log-sum-exp in base 2 and entropy in nats from the lanes, NaN for a row without mass; and
    the first as its two terms, the top logit and the log of the mass relative to it."""
    top = tl.max(peak, 0)
    gap = (peak - top) * scale2
    factor = tl.exp2(gap)
    mass = tl.sum(total * factor, 0)
    mean = tl.sum(factor * (moment + gap * total), 0) / mass
    log_mass = tl.log2(tl.where(top < MASKED_BELOW, float("nan"), mass))
    return top * scale2 + log_mass, (log_mass - mean) * LN2, top, log_mass
