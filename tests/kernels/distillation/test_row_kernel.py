"""The Triton kernels against the fp64 definition on unrounded logits."""

import pytest
import torch
from kernel_inputs import DEVICE
from sodfast_kernels import distillation_loss, reference

pytestmark = pytest.mark.triton

# fp16 gradients wait in fp32 and are rounded as the definition's are.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-5}
DTYPES = [
    torch.float32,
    *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)),
]


def run(student, teacher, function, **given):
    student = student.clone().requires_grad_()
    output = function(student, teacher, **given)
    output.loss.backward()
    return output, student.grad


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("top_k", [None, 20, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_error_is_that_of_the_definition(alpha, top_k, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary = 2, 1003
    # Divergences from about 1e-5 to 1, on a random and on a peaked row.
    for temperature, drift, policy in ((0.6, 0.005, True), (1.0, 0.05, False), (2.0, 1.0, True)):
        student = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
        student[1] *= 5
        teacher = student + drift * torch.randn(rows, vocabulary, generator=generator)
        student, teacher = student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)
        given = {"alpha": alpha, "top_k": top_k, "temperature": temperature}
        if policy:
            given |= {
                "target_ids": torch.tensor([5, 1002], device=DEVICE),
                "advantage": torch.tensor([0.01, -0.02], device=DEVICE),
                "old_logprob": torch.tensor([-7.0, -9.0], device=DEVICE),
                "ratio_cap": 2.0,
            }
        check(student, teacher, given)


def check(student, teacher, given):
    """Gradients and statistics of the kernel against fp64, beside the definition's own error."""
    wide = {k: v.double() if k in ("advantage", "old_logprob") else v for k, v in given.items()}
    exact = run(student.double(), teacher.double(), reference.distillation_loss, **wide)
    plain = run(student, teacher, reference.distillation_loss, **given)
    ours = run(student, teacher, distillation_loss, backend="triton", **given)
    assert error(ours[1], exact[1]) <= 2 * error(plain[1], exact[1]) + FLOOR[student.dtype]
    for name in ("divergence", "student_entropy", "teacher_entropy", "student_logprob"):
        if getattr(exact[0], name) is not None:
            torch.testing.assert_close(
                getattr(ours[0], name).double(), getattr(exact[0], name), rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_small_divergences_are_positive_and_accurate(alpha):
    generator = torch.Generator().manual_seed(1)
    student = 3 * torch.randn(2, 500, generator=generator).to(DEVICE)
    teacher = student + 5e-4 * torch.randn(2, 500, generator=generator).to(DEVICE)
    ours = distillation_loss(student, teacher, alpha=alpha, backend="triton")
    exact = reference.distillation_loss(student.double(), teacher.double(), alpha=alpha)
    assert exact.divergence.max() < 2e-7
    assert (ours.divergence > 0).all()
    torch.testing.assert_close(ours.divergence.double(), exact.divergence, rtol=0.02, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 100])
def test_a_real_vocabulary_and_the_same_bits_twice(top_k):
    generator = torch.Generator().manual_seed(2)
    student = 2 * torch.randn(1, 151_936, generator=generator).to(DEVICE)
    teacher = student + 0.05 * torch.randn(1, 151_936, generator=generator).to(DEVICE)
    given = {"top_k": top_k, "backend": "triton"}
    first = run(student, teacher, distillation_loss, **given)
    second = run(student, teacher, distillation_loss, **given)
    exact = run(student.double(), teacher.double(), reference.distillation_loss, top_k=top_k)
    assert torch.equal(first[1], second[1]) and torch.equal(first[0].loss, second[0].loss)
    assert error(first[1], exact[1]) < 1e-4
