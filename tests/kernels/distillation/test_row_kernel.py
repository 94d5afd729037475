"""The Triton kernels against the fp64 definition on unrounded logits."""

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_inputs import DEVICE
from marks import slow
from sodfast_kernels import distillation_loss, reference, softmax
from sodfast_kernels.distillation import row_kernel, row_terms

pytestmark = pytest.mark.triton

# fp16 gradients wait in fp32 and are rounded as the definition's are.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-5}
DTYPES = [
    torch.float32,
    *slow(torch.bfloat16, torch.float16),
]


def run(student, teacher, function, **given):
    student = student.clone().requires_grad_()
    output = function(student, teacher, **given)
    output.loss.backward()
    return output, student.grad


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("alpha", [0.5, *slow(0, 0.3, 1)])
@pytest.mark.parametrize("top_k", [20, *slow(None, 100)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_error_is_that_of_the_definition(alpha, top_k, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary = 2, 2512 if top_k else 2507  # two whole tiles and a part, or rows anywhere
    # Divergences from about 1e-5 to 1, on a random and on a peaked row.
    for temperature, drift, policy in ((0.6, 0.005, True), (1.0, 0.05, False), (2.0, 1.0, True)):
        student = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
        student[1] *= 5
        teacher = student + drift * torch.randn(rows, vocabulary, generator=generator)
        student, teacher = student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)
        given = {"alpha": alpha, "top_k": top_k, "temperature": temperature}
        if policy:
            given |= {
                "target_ids": torch.tensor([5, 2502], device=DEVICE),
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


@triton.jit
def expansion_kernel(
    student_ptr, teacher_ptr, out_ptr, gap0, scale2, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr
):
    LANES: tl.constexpr = BLOCK_SIZE // COLUMNS
    tile = softmax.tile_ids(BLOCK_SIZE, COLUMNS)
    z_s, z_q = tl.load(student_ptr + tile), tl.load(teacher_ptr + tile)
    sums_s, factor, mass = softmax.add_tile(z_s, softmax.no_sums(LANES), scale2)
    sums_q, _, _ = softmax.add_tile(z_q, softmax.no_sums(LANES), scale2)
    more = row_kernel._no_more(LANES, 2, True)
    more = row_kernel._add_more(more, z_s, z_q, factor, mass, gap0, scale2, 2, True)
    log_s2, _, top, _ = softmax.log_sum(sums_s, scale2)
    log_q2, _, _, _ = softmax.log_sum(sums_q, scale2)
    factor = tl.exp2((sums_s[0] - top) * scale2)
    epsilon2 = log_q2 - log_s2 - gap0 * scale2
    mean2, enough = row_kernel._expanded_mean2(more, factor, sums_s[1], epsilon2, -6.0, 4.0)
    tl.store(out_ptr, mean2 * row_terms.unit(2, True))
    tl.store(out_ptr + 1, epsilon2)
    tl.store(out_ptr + 2, enough.to(tl.float32))


@pytest.mark.parametrize("epsilon", [-0.2, -0.03, 0.0, 0.1, 0.2, 0.5, 2.0])
@pytest.mark.parametrize("drift", [1e-3, 0.05, 0.5, 3.0])
def test_the_mean_slope_is_expanded_around_another_shift(epsilon, drift):
    generator = torch.Generator().manual_seed(7)
    student = 2 * torch.randn(256, generator=generator)
    teacher = student + drift * torch.randn(256, generator=generator)
    log_s, log_q = student.double().log_softmax(0), teacher.double().log_softmax(0)
    shift = teacher.double().logsumexp(0) - student.double().logsumexp(0)
    out = torch.empty(3, device=DEVICE)
    expansion_kernel[(1,)](
        student.to(DEVICE), teacher.to(DEVICE), out, shift.item() - epsilon, math.log2(math.e),
        BLOCK_SIZE=256, COLUMNS=8,
    )  # fmt: skip
    delta = log_q - log_s
    expected = -0.5 * (log_s.exp() * torch.nn.functional.softplus(delta)).sum() + 0.5 * math.log(2)
    assert out[1].item() == pytest.approx(epsilon * math.log2(math.e), abs=1e-5)
    spread = (log_s.exp() * (torch.sigmoid(delta) - 0.5 + 0.5 * expected) ** 2).sum().sqrt()
    if out[2]:  # the spread of g, about
        assert out[0].item() == pytest.approx(expected.item(), abs=1e-7 + 1e-5 * spread.item())
    else:
        assert abs(epsilon) > 0.1 or drift < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("drift", [2e-3, 0.05, 0.5])
@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
def test_whatever_token_was_sampled_the_gradient_is_accurate(drift, spread):
    """Probable and improbable tokens, one that teacher and student disagree about: no worse than by
    the sweep of its own that a row without a token takes."""
    generator = torch.Generator().manual_seed(8)
    rows, vocabulary = 6, 1100
    student = spread * torch.randn(1, vocabulary, generator=generator).repeat(rows, 1)
    teacher = student + drift * torch.randn(rows, vocabulary, generator=generator)
    teacher[2:] += 5.0  # Δ is large, ε is not
    order = student[0].argsort(descending=True)
    target = order[torch.tensor([0, 1, 5, 50, 500, 1099])]
    teacher[4, target[4]] += 1.0
    student, teacher, target = student.to(DEVICE), teacher.to(DEVICE), target.to(DEVICE)
    for row in range(rows):
        one = slice(row, row + 1)
        exact = run(
            student[one].double(), teacher[one].double(), reference.distillation_loss, alpha=0.5
        )
        plain = run(student[one], teacher[one], reference.distillation_loss, alpha=0.5)
        swept = run(student[one], teacher[one], distillation_loss, backend="triton", alpha=0.5)
        ours = run(
            student[one],
            teacher[one],
            distillation_loss,
            backend="triton",
            alpha=0.5,
            target_ids=target[one],
        )
        known = max(error(plain[1], exact[1]), error(swept[1], exact[1]))
        assert error(ours[1], exact[1]) <= 2 * known + FLOOR[torch.float32]
