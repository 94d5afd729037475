"""A bucket's term of the divergence and its derivative, and the policy term by its cases: in the
kernel against fp64."""

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_inputs import BACKENDS, DEVICE
from marks import slow
from sodfast_kernels import distillation_loss
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


# ---------------------------------------------------------------- the policy term by its cases

LOW, HIGH, DUAL = 0.2, 0.28, 3.0
# Ratios below, within and above the clip, just below and above the dual clip, and beyond ±20.
LOG_RATIOS = [math.log(r) for r in (0.5, 1.1, 1.6, 2.99, 3.01, 40.0)] + [-25.0, 25.0]


def policy_by_hand(ratio, advantage, dual):
    """Loss and dL/d(log r) of a token, in fp64."""
    clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
    loss = max(-advantage * ratio, -advantage * clipped)
    slope = -advantage * ratio if -advantage * ratio >= -advantage * clipped else 0.0
    if dual is not None and advantage < 0 and loss > -advantage * dual:
        return -advantage * dual, 0.0
    return loss, slope


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dual", [DUAL, *slow(None)])
@pytest.mark.parametrize("form", ["full", *slow("top_k", "stored"), "without a teacher"])
def test_the_dual_clip_bounds_negative_advantages_alone(backend, dual, form):
    generator = torch.Generator().manual_seed(3)
    cases = [(r, a) for a in (1.5, -1.5) for r in LOG_RATIOS]
    rows, vocabulary = len(cases), 70
    student = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, vocabulary, (rows,), generator=generator)
    log_s = student.log_softmax(-1)
    old = log_s.gather(-1, ids[:, None])[:, 0] - torch.tensor([r for r, _ in cases])
    losses, expected = [], torch.zeros_like(student)
    for row, (log_ratio, advantage) in enumerate(cases):
        ratio = math.exp(min(max(log_ratio, -20), 20))
        loss, slope = policy_by_hand(ratio, advantage, dual)
        losses.append(loss)
        if abs(log_ratio) < 20:
            expected[row] = -slope * log_s[row].exp()
            expected[row, ids[row]] += slope
    given = {"distill_weight": torch.zeros(rows)}
    teacher = student
    if form != "without a teacher":  # itself: a divergence of 0, but the row's whole way
        given = {"distill_weight": torch.ones(rows), "alpha": 0.5}
        given |= {"top_k": 5} if form == "top_k" else {}
    if form == "stored":
        stored = log_s.topk(5)
        given["teacher_topk"] = (stored.indices, stored.values.float())
        teacher = None
    given = {
        name: tuple(part.to(DEVICE) for part in value)
        if isinstance(value, tuple)
        else value.to(DEVICE)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in given.items()
    }
    logits = student.float().to(DEVICE).requires_grad_()
    output = distillation_loss(
        logits,
        None if teacher is None else teacher.float().to(DEVICE),
        target_ids=ids.to(DEVICE),
        advantage=torch.tensor([a for _, a in cases]).to(DEVICE),
        policy_weight=torch.ones(rows, device=DEVICE),
        old_logprob=old.float().to(DEVICE),
        clip_range=(LOW, HIGH),
        dual_clip=dual,
        reduction="none",
        backend=backend,
        **given,
    )
    output.loss.sum().backward()
    for row, loss in enumerate(losses):
        assert output.loss[row].item() == pytest.approx(loss, rel=1e-4, abs=1e-5), cases[row]
        actual = logits.grad[row].cpu().double()
        scale = max(1e-2, expected[row].abs().max().item())
        assert (actual - expected[row]).abs().max() <= 1e-4 * scale, cases[row]
