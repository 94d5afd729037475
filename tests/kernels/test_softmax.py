"""The online log-sum-exp and entropy of a row, and the softcap, against torch in fp64."""

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_inputs import DEVICE
from sodfast_kernels import softmax

pytestmark = pytest.mark.triton


@triton.jit
def row_kernel(z_ptr, out_ptr, count, scale2, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    tile = softmax.tile_ids(BLOCK_SIZE, COLUMNS)
    sums = softmax.no_sums(BLOCK_SIZE // COLUMNS)
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for start in range(0, whole, BLOCK_SIZE):
        z = softmax.load_tile(z_ptr, start + tile, count, None, False)
        sums, _, _ = softmax.add_tile(z, sums, scale2)
    if whole < count:
        z = softmax.load_tile(z_ptr, whole + tile, count, None, True)
        sums, _, _ = softmax.add_tile(z, sums, scale2)
    log_sum2, entropy, top, log_mass2 = softmax.log_sum(sums, scale2)
    tl.store(out_ptr, log_sum2)
    tl.store(out_ptr + 1, entropy)
    tl.store(out_ptr + 2, top * scale2 + log_mass2)


@triton.jit
def load_kernel(z_ptr, out_ptr, count, softcap, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    tile = softmax.tile_ids(BLOCK_SIZE, COLUMNS)
    tl.store(out_ptr + tile, softmax.load_tile(z_ptr, tile, count, softcap, True))


@triton.jit
def cap_kernel(z_ptr, out_ptr, softcap, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    capped, slope = softmax.soft_cap(tl.load(z_ptr + at), softcap)
    tl.store(out_ptr + at, capped)
    tl.store(out_ptr + COUNT + at, slope)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("count", [1, 16, 100, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_log_sum_exp_and_entropy(temperature, count, masked):
    z = 5 * torch.randn(count, generator=torch.Generator().manual_seed(count))
    if masked and count > 1:
        z[::3] = -math.inf
    out = torch.empty(3, device=DEVICE)
    scale2 = math.log2(math.e) / temperature
    row_kernel[(1,)](z.to(DEVICE), out, count, scale2, BLOCK_SIZE=16, COLUMNS=4)
    log_p = (z.double() / temperature).log_softmax(0)
    entropy = torch.special.entr(log_p.exp()).sum()
    log_sum2 = (z.double() / temperature).logsumexp(0) * math.log2(math.e)
    expected = torch.stack([log_sum2, entropy, log_sum2])
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_row_without_mass_is_nan():
    out = torch.empty(3, device=DEVICE)
    z = torch.full((20,), -math.inf, device=DEVICE)
    row_kernel[(1,)](z, out, 20, 1.0, BLOCK_SIZE=16, COLUMNS=4)
    assert out.isnan().all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_lies_behind_the_vocabulary_has_no_mass(softcap):
    z = torch.tensor([1.0, -math.inf, math.nan, 2.0] + 12 * [7.0], device=DEVICE)
    out = torch.empty(16, device=DEVICE)
    load_kernel[(1,)](z, out, 4, softcap, BLOCK_SIZE=16, COLUMNS=4)
    inside = z[:4].cpu() if softcap is None else 5.0 * torch.tanh(z[:4].cpu() / 5.0)
    expected = torch.cat([inside.clamp(min=-1e30), torch.full((12,), -1e30)])
    torch.testing.assert_close(out.cpu(), expected, equal_nan=True)


def test_the_softcap_and_its_derivative():
    z = torch.linspace(-40, 40, 64, dtype=torch.float64, requires_grad=True)
    expected = 5.0 * torch.tanh(z / 5.0)
    expected.sum().backward()
    out = torch.empty(2, 64, device=DEVICE)
    cap_kernel[(1,)](z.detach().float().to(DEVICE), out, 5.0, COUNT=64)
    torch.testing.assert_close(out[0].cpu().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[1].cpu().double(), z.grad, rtol=1e-5, atol=1e-6)
    cap_kernel[(1,)](torch.full((64,), math.inf, device=DEVICE), out, 5.0, COUNT=64)
    assert out[0].isnan().all()  # an overflow must not become an ordinary number
