"""A bucket's term of the divergence and its derivative, in the kernel against fp64."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_inputs import DEVICE
from sodfast_kernels.distillation import row_terms

pytestmark = pytest.mark.triton
COUNT = 256


@triton.jit
def terms_kernel(
    s_ptr, q_ptr, out_ptr, alpha, KIND: tl.constexpr, HALF: tl.constexpr, COUNT: tl.constexpr
):
    at = tl.arange(0, COUNT)
    log_s2, log_q2 = tl.load(s_ptr + at), tl.load(q_ptr + at)
    term, slope = row_terms.bucket_terms(
        log_q2 - log_s2, tl.exp2(log_s2), tl.exp2(log_q2), alpha, KIND, HALF
    )
    nats = row_terms.unit(KIND, HALF)
    tl.store(out_ptr + at, term * nats)
    tl.store(out_ptr + COUNT + at, slope * nats)


def run(log_s2, log_q2, alpha):
    out = torch.empty(2, COUNT, device=DEVICE)
    kind = {0.0: 0, 1.0: 1}.get(alpha, 2)
    terms_kernel[(1,)](
        log_s2.to(DEVICE), log_q2.to(DEVICE), out, alpha, KIND=kind, HALF=alpha == 0.5, COUNT=COUNT
    )
    return out.cpu().double()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("drift", [1e-3, 0.1, 3.0])
def test_term_and_slope(alpha, drift):
    generator = torch.Generator().manual_seed(0)
    log_s2 = -8 * torch.rand(COUNT, generator=generator)
    log_q2 = log_s2 + drift * torch.randn(COUNT, generator=generator)
    s = (log_s2.double() * 0.6931471805599453).exp().requires_grad_()
    q = (log_q2.double() * 0.6931471805599453).exp()
    # The Bregman form: each summand ≥ 0, and its derivative by s is the published gradient's g.
    if alpha == 0:
        term = q * (q / s).log() - q + s
    elif alpha == 1:
        term = s * (s / q).log() - s + q
    else:
        m = (1 - alpha) * s + alpha * q
        term = (1 - alpha) * s * (s / m).log() + alpha * q * (q / m).log()
    term.sum().backward()
    expected = torch.stack([term.detach(), s.detach() * s.grad])
    actual = run(log_s2, log_q2, alpha)
    errors = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors[1] < 1e-5
    # A term is of second order in the drift, the parts it is made of are of first order.
    assert errors[0] < (1e-5 if drift > 1e-3 else 1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_equal_masses_give_exactly_nothing(alpha):
    log_s2 = torch.linspace(-90, 0, COUNT)
    assert not run(log_s2, log_s2, alpha).any()
