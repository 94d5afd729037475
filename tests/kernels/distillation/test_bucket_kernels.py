"""Stored teachers in Triton, against the definition in fp64."""

import math

import pytest
import torch
from kernel_inputs import DEVICE
from marks import slow
from sodfast_kernels import distillation_loss, reference

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("alpha", [0.3, *slow(0, 1)])
@pytest.mark.parametrize("add_tail", [True, False])
def test_a_stored_teacher_over_several_blocks(alpha, add_tail):
    generator = torch.Generator().manual_seed(5)
    student = 2 * torch.randn(2, 3001, generator=generator).to(DEVICE)
    teacher = student + torch.randn(2, 3001, generator=generator).to(DEVICE)
    logprobs, ids = teacher.log_softmax(-1).topk(37)
    given = {
        "alpha": alpha,
        "add_tail": add_tail,
        "target_ids": torch.tensor([int(ids[0, 3]), 7], device=DEVICE),
        "advantage": torch.tensor([1.0, -1.0], device=DEVICE),
    }
    results = []
    for function, extra in (
        (reference.distillation_loss, {}),
        (distillation_loss, {"backend": "triton"}),
    ):
        logits = student.clone().requires_grad_()
        output = function(logits, teacher_topk=(ids, logprobs), **given, **extra)
        output.loss.backward()
        results.append([*output, logits.grad])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_stored_teacher_of_no_mass_at_all():
    ids = torch.arange(4, device=DEVICE)[None]
    nothing = torch.full((1, 4), -math.inf, device=DEVICE)
    for backend in ("torch", "triton"):
        output = distillation_loss(
            torch.zeros(1, 9, device=DEVICE),
            teacher_topk=(ids, nothing),
            backend=backend,
            alpha=0.5,
        )
        # Everything is in the tail: S has 5/9 there, Q all.
        s, q = torch.tensor([4 / 9, 5 / 9]), torch.tensor([1e-30, 1.0])
        m = (s + q) / 2
        expected = ((s * (s / m).log()).sum() + (q * (q / m).log()).sum()) / 2
        torch.testing.assert_close(output.divergence[0].cpu(), expected, rtol=1e-5, atol=1e-6)
