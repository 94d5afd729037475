"""Softmaxes, buckets and divergences of rows, against their definitions."""

import pytest
import torch
from sodfast_kernels import reference
from sodfast_kernels.distillation.torch_terms import (
    buckets_,
    divergence_and_slope_,
    entropy_of,
    greatest_ids,
    log_softmax_,
    softcap_,
)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_among_equal_logits_the_lower_index_is_the_greater(dtype):
    logits = torch.tensor([[1.0, -0.0, 0.0, 2.0, 2.0, -torch.inf]], dtype=dtype)
    assert greatest_ids(logits, 5).tolist() == [[3, 4, 0, 1, 2]]
    many = torch.randint(-3, 3, (5, 40), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(greatest_ids(many, 11), reference.top_ids(many, 11))


def test_a_softmax_with_masked_logits():
    logits = rows(3, 7)
    logits[0, 2] = logits[1] = -torch.inf
    log_p, p = log_softmax_(logits.clone(), 0.7)
    torch.testing.assert_close(p[[0, 2]], (logits / 0.7).softmax(-1)[[0, 2]])
    torch.testing.assert_close(log_p[2], (logits[2] / 0.7).log_softmax(-1))
    assert p[0, 2] == 0 and p[1].isnan().all()
    torch.testing.assert_close(entropy_of(log_p, p)[2], torch.special.entr(p[2]).sum())


def test_a_capped_logit_and_its_derivative():
    logits = (4 * rows(2, 5)).requires_grad_()
    expected = 3 * torch.tanh(logits / 3)
    expected.sum().backward()
    capped = logits.detach().clone()
    slope = softcap_(capped, 3.0)
    torch.testing.assert_close((capped, slope), (expected.detach(), logits.grad))
    overflowed = torch.tensor([[torch.inf, 1.0]])
    softcap_(overflowed, 3.0)
    assert overflowed[0, 0].isnan()
    assert softcap_(overflowed, None) is None


@pytest.mark.parametrize("add_tail", [True, False])
def test_buckets_hold_all_of_the_mass(add_tail):
    log_p, p = log_softmax_(rows(4, 9), 1.0)
    ids = greatest_ids(log_p, 3)
    expected = p.gather(-1, ids)
    log_buckets, buckets, kept = buckets_(log_p, p, ids, add_tail)
    assert buckets.shape == (4, 4 if add_tail else 3)
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(buckets.sum(-1), torch.ones(4).double())
    torch.testing.assert_close(log_buckets.exp(), buckets)
    assert not p.gather(-1, ids).any()


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_the_divergence_and_its_slope(alpha):
    """s·g, where g is the derivative by s but for a constant of each row."""
    student, teacher = (rows(4, 9, seed=seed).log_softmax(-1) for seed in (0, 1))
    expected = reference.distillation_loss(
        student, teacher, alpha=alpha, distill_weight=torch.ones(4), reduction="none"
    )
    found, slope = divergence_and_slope_(
        student, student.exp(), teacher.clone(), teacher.exp(), alpha
    )
    torch.testing.assert_close(found, expected.divergence)
    logits = student.clone().requires_grad_()
    reference.distillation_loss(
        logits, teacher, alpha=alpha, distill_weight=torch.ones(4)
    ).loss.backward()
    torch.testing.assert_close(slope - student.exp() * slope.sum(-1, keepdim=True), logits.grad)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_equal_rows_have_no_divergence_and_no_gradient(alpha):
    student = rows(4, 9).float().log_softmax(-1)
    found, slope = divergence_and_slope_(
        student, student.exp(), student.clone(), student.exp(), alpha
    )
    assert not found.any() and not slope.any()
