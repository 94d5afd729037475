"""Triton: philox.py's random bits, and rounding to 16 bits: stochastic, or to nearest even.

Stochastic rounding is done in integers, so that its results are those of the PyTorch path bit for
bit. To nearest even it is the GPU's own conversion; the interpreter, which would truncate, takes
the integers.
"""

import triton
import triton.language as tl

from .launch import INTERPRETED

# What one instruction of a GPU does, the interpreter needs several for.
NATIVE = tl.constexpr(not INTERPRETED)


@triton.jit
def random_bits(first_group, seed_low, seed_high, step_low, step_high, GROUPS: tl.constexpr):
    """16 random bits for each of 8·GROUPS elements, as int32 (philox.random_bits)."""
    group = first_group + tl.arange(0, GROUPS)
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = tl.zeros([GROUPS], tl.uint32) + step_low.to(tl.uint32, bitcast=True)
    c3 = tl.zeros([GROUPS], tl.uint32) + step_high.to(tl.uint32, bitcast=True)
    key0 = seed_low.to(tl.uint32, bitcast=True)
    key1 = seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = product0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False).to(tl.uint32)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False).to(tl.uint32)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # the last two axes count words 0 … 3
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [GROUPS * 8]).to(tl.int32)


@triton.jit
def round_bf16(x):
    """The bits of x in bf16, to nearest even."""
    if NATIVE:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, bits).to(tl.int16)


@triton.jit
def round_nearest(value, DTYPE: tl.constexpr):
    """To nearest even."""
    if tl.bfloat16 == DTYPE:
        result = round_bf16(value).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def round_stochastic(value, bits, DTYPE: tl.constexpr):
    """philox.round_stochastic."""
    raw = value.to(tl.int32, bitcast=True)
    if tl.bfloat16 == DTYPE:
        rounded = tl.where(value != value, 0x7FC0, (raw + bits) >> 16)
        result = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        spacing = tl.maximum(raw & 0x7F800000, 113 << 23) - (10 << 23)
        scaled = tl.abs(value) * ((254 << 23) - spacing).to(tl.float32, bitcast=True)
        whole = tl.floor(scaled)
        up = ((scaled - whole) * 65536.0 > bits.to(tl.float32)).to(tl.float32)
        magnitude = (whole + up) * spacing.to(tl.float32, bitcast=True)
        signed = tl.where(raw < 0, -magnitude, magnitude)
        result = tl.where((raw & 0x7FFFFFFF) < 0x7F800000, signed, value).to(DTYPE)
    return result


@triton.jit
def widen_bf16(bits):
    """fp32 of bf16 given as 16-bit integers."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
