"""The gated activation, on both paths."""

import math

import pytest
import torch
from kernel_inputs import BACKENDS, DEVICE, FLOATS
from sodfast_kernels import silu_and_mul

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def by_hand(gate_up):
    gate, up = gate_up.double().cpu().chunk(2, 1)
    return gate / (1 + torch.exp(-gate)) * up


def draw(tokens, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(width)
    return (3 * torch.randn(tokens, 2 * width, generator=generator)).to(DEVICE, dtype)


def agree(gate_up, backend):
    before = gate_up.clone()
    out = silu_and_mul(gate_up, backend=backend)
    assert out.dtype == gate_up.dtype and out.is_contiguous() and gate_up.equal(before)
    tolerance = TOLERANCE[gate_up.dtype]
    torch.testing.assert_close(
        out.double().cpu(), by_hand(gate_up), rtol=tolerance, atol=tolerance / 100
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width"), [(0, 8), (1, 1), (1, 1024), (3, 77), (2, 1025), (4, 0)]
)
def test_values_of_every_dtype_and_size(backend, dtype, tokens, width):
    agree(draw(tokens, width, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_lie_apart_and_columns_that_do(backend):
    gate_up = draw(4, 40)
    agree(torch.cat((gate_up, torch.full_like(gate_up, math.nan)), 1)[:, :80], backend)
    agree(gate_up.T.contiguous().T, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_zero_and_what_is_not_finite(backend):
    gate = torch.tensor([-200.0, -88.8, 200.0, 3e38, math.inf, math.nan, 0.0, 1.0])
    up = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0, 1.0, math.inf, math.nan])
    out = silu_and_mul(torch.cat((gate, up))[None].to(DEVICE), backend=backend)[0].cpu()
    assert out[:2].abs().max() < 1e-30
    assert out[2:5].tolist() == pytest.approx([400.0, 3e38, math.inf])
    assert out[5:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 78, 99])
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(backend, width):
    gate_up = draw(48, width)
    out = silu_and_mul(gate_up, backend=backend)
    assert silu_and_mul(gate_up[17:30], backend=backend).equal(out[17:30])


@pytest.mark.parametrize("threads", [3, 4])
def test_the_bits_of_a_row_do_not_depend_on_the_threads(threads):
    """Which share 16 rows of this width in the middle of one."""
    gate_up = draw(128, 4864).cpu()
    one = silu_and_mul(gate_up)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert silu_and_mul(gate_up).equal(one)
        assert silu_and_mul(gate_up[16:32]).equal(one[16:32])
    finally:
        torch.set_num_threads(before)


def test_fp64_is_exact_on_the_pytorch_path():
    gate_up = draw(3, 7, torch.float64)
    torch.testing.assert_close(
        silu_and_mul(gate_up).cpu(), by_hand(gate_up), rtol=1e-14, atol=1e-14
    )


def test_a_gradient_is_refused():
    gate_up = draw(2, 4).requires_grad_()
    with pytest.raises(ValueError, match=r"^gate_up must not require a gradient"):
        silu_and_mul(gate_up)
    with torch.no_grad():
        assert not silu_and_mul(gate_up).requires_grad


@pytest.mark.parametrize(
    "wrong", [torch.zeros(4), torch.zeros(2, 3), torch.zeros(2, 4).int(), [[0.0, 1.0]]]
)
def test_a_wrong_argument_is_named(wrong):
    with pytest.raises(ValueError, match=r"^gate_up "):
        silu_and_mul(wrong)
