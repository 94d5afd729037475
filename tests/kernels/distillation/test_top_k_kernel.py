"""Top-k in Triton against the definition in fp64: which tokens are kept, and rows that overflow.

The gradients over all kinds of rows are in test_row_kernel.py, with those of the full vocabulary.
"""

import math

import pytest
import torch
from kernel_inputs import DEVICE
from marks import slow
from sodfast_kernels import distillation_loss, reference

pytestmark = pytest.mark.triton


def compare(student, teacher, **given):
    """Divergence and gradients against fp64 of the same logits."""
    logits, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    ours = distillation_loss(logits, teacher, backend="triton", **given)
    exact = reference.distillation_loss(wide, teacher.double(), **given)
    ours.loss.backward()
    exact.loss.backward()
    torch.testing.assert_close(ours.divergence.double(), exact.divergence, rtol=1e-4, atol=1e-7)
    # Where teacher and student share no token the gradient is a difference of nearly equal terms.
    errors = (logits.grad - wide.grad).norm(dim=1) / (wide.grad.norm(dim=1) + 0.01)
    assert errors.max() < 1e-5, errors


def rows(kind, vocabulary, generator):
    """Rows of one kind, [1, vocabulary]."""
    if kind == "one lane":  # the greatest logits are neighbours: one lane holds several of them
        z = torch.randn(1, vocabulary, generator=generator)
        z[:, 40:56] += 9.0
        return z
    if kind == "three values":  # thousands of equal logits around the threshold
        return torch.randint(0, 3, (1, vocabulary), generator=generator).float()
    if kind == "constant":
        return torch.zeros(1, vocabulary)
    if kind == "five finite":
        z = torch.full((1, vocabulary), -math.inf)
        z[:, torch.tensor([3, 700, 1500, 2100, vocabulary - 1])] = torch.tensor(
            [1.0, 2.0, 1.0, 0.0, 1.0]
        )
        return z
    return 3 * torch.randn(1, vocabulary, generator=generator)


KINDS = ("random", "one lane", "three values", "constant", "five finite")


@pytest.mark.parametrize("vocabulary", [3001, *slow(3008)], ids=["anywhere", "aligned"])
@pytest.mark.parametrize("softcap", [None, *slow(4.0)])
@pytest.mark.parametrize("k", [3, *slow(20, 600)])
def test_the_kept_tokens_are_those_of_the_definition(k, softcap, vocabulary):
    """One call: rows that the first launch finishes beside rows that it leaves to the search."""
    generator = torch.Generator().manual_seed(3)
    student = torch.cat([rows(kind, vocabulary, generator) for kind in KINDS]).to(DEVICE)
    # Nearly equal teachers would hide a token kept instead of another.
    teacher = torch.randn(student.shape, generator=generator).to(DEVICE)
    compare(student, teacher, top_k=k, softcap=softcap, alpha=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0, 1])
@pytest.mark.parametrize("add_tail", [True, False])
def test_policy_terms_and_rows_without_a_teacher(alpha, add_tail):
    generator = torch.Generator().manual_seed(4)
    student = 3 * torch.randn(5, 2100, generator=generator).to(DEVICE)
    teacher = student + torch.randn(5, 2100, generator=generator).to(DEVICE)
    compare_all(
        student,
        teacher,
        top_k=7,
        alpha=alpha,
        add_tail=add_tail,
        # A kept token, one of the tail, one of a row without a teacher, and the last.
        target_ids=torch.stack([student[0].argmax(), student[1].argmin(), *student[2:].argmax(1)]),
        advantage=torch.tensor([1.0, -1.0, 2.0, 0.5, 0.0], device=DEVICE),
        distill_weight=torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0], device=DEVICE),
        policy_weight=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], device=DEVICE),
    )


def compare_all(student, teacher, **given):
    results = []
    for function, extra in (
        (reference.distillation_loss, {}),
        (distillation_loss, {"backend": "triton"}),
    ):
        logits = student.clone().requires_grad_()
        output = function(logits, teacher, **given, **extra)
        output.loss.backward()
        results.append([*output, logits.grad])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("alpha", [0.5, *slow(0, 1)])
@pytest.mark.parametrize("add_tail", [True, *slow(False)])
def test_rows_that_are_broken_or_masked_on_one_side_of_all_that_is_kept(alpha, add_tail):
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 3, 700, generator=generator)
    student[0, 3:60] = math.nan  # more than the buffer of equal ones holds, and k of them NaN
    teacher[1, student[1].topk(3).indices] = -math.inf
    student[2] = math.nan
    compare_all(
        student.to(DEVICE),
        teacher.to(DEVICE),
        top_k=3,
        alpha=alpha,
        add_tail=add_tail,
        target_ids=torch.tensor([1, 2, 3], device=DEVICE),
    )
