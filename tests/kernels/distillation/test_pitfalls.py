"""What went wrong in other implementations, in every backend."""

import math

import pytest
import torch
from kernel_inputs import BACKENDS, DEVICE
from marks import slow
from sodfast_kernels import distillation_loss, linear_distillation_loss, reference

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def run(student, teacher, function=distillation_loss, **given):
    student = student.clone().requires_grad_()
    output = function(student, teacher, **given)
    output.loss.sum().backward()
    return output, student.grad


def compare(student, teacher, backend, **given):
    actual, gradient = run(student, teacher, backend=backend, **given)
    expected, exact = run(student, teacher, reference.distillation_loss, **given)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(
            getattr(actual, name), value, rtol=1e-4, atol=1e-6, equal_nan=True, msg=name
        )
    torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-6, equal_nan=True)
    return actual, gradient


@pytest.mark.parametrize("alpha", [1, *slow(0, 0.3, 0.5)])
@pytest.mark.parametrize("top_k, softcap", [(4, None), *slow((None, None), (None, 3.0))])
def test_masked_broken_and_overflowed_logits(backend, alpha, top_k, softcap):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 11, generator=generator).to(DEVICE)
    student[0, 3] = teacher[0, 3] = -INF  # masked on both sides
    student[1, 3] = -INF  # S = 0 < Q
    teacher[2, 3] = -INF  # Q = 0 < S
    student[3, 1] = NAN
    teacher[4, 1] = NAN
    student[5, 1] = INF
    teacher[6, 2] = INF
    student[7] = -INF
    output, gradient = compare(
        student,
        teacher,
        backend,
        alpha=alpha,
        top_k=top_k,
        softcap=softcap,
        target_ids=torch.full((8,), 3, device=DEVICE),
    )
    assert output.divergence[3:7].isnan().all() and gradient[3:7].isnan().all()
    assert output.divergence[0].isfinite() and gradient[0].isfinite().all()
    if top_k is None and softcap is None:
        assert output.divergence[7].isnan() and output.student_entropy[7].isnan()
        assert output.divergence[1].isinf() == (alpha == 0)
        assert output.divergence[2].isinf() == (alpha == 1)


@pytest.mark.parametrize("alpha", [0.5, *slow(0, 0.3, 1)])
@pytest.mark.parametrize("top_k, add_tail", [(None, True), (5, True), *slow((5, False))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32)], ids=str)
def test_equal_bits_give_exactly_nothing(backend, alpha, top_k, add_tail, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(3, 37, generator=generator)).to(DEVICE, dtype)
    logits[1] *= 8  # nearly all mass on one token: the cap of the tail binds
    output, gradient = run(
        logits, logits.clone(), alpha=alpha, top_k=top_k, add_tail=add_tail, backend=backend
    )
    assert not output.divergence.any() and not gradient.any()


@pytest.mark.slow
def test_equal_logits_keep_the_lower_index(backend):
    rows = [[1.0, 2.0, 2.0, 0.0, 2.0, -0.0], [0.0, -0.0, 0.0, 0.0, 0.0, 0.0]]
    student = torch.tensor(rows, device=DEVICE)
    rows = [[3.0, 1.0, 0.5, 1.0, 4.0, 0.0], [1.0, 5.0, 2.0, 0.0, 7.0, 3.0]]
    teacher = torch.tensor(rows, device=DEVICE)
    for k in (1, 2, 3, 5):
        compare(student, teacher, backend, top_k=k)
        compare(student, teacher, backend, top_k=k, add_tail=False, alpha=0)


def test_the_teacher_is_not_read_and_nothing_leaks_where_weights_are_zero(backend):
    generator = torch.Generator().manual_seed(2)
    student, teacher, head = torch.randn(3, 6, 6, generator=generator).to(DEVICE)
    teacher[1] = NAN  # no distillation
    teacher[2] = student[2] = NAN  # no weight at all
    hidden, matrix = student.requires_grad_(), head.clone().requires_grad_()
    output = linear_distillation_loss(
        hidden,
        matrix,
        teacher,
        head,
        backend=backend,
        distill_weight=torch.tensor([1.0, 0, 0, 1, 1, 1], device=DEVICE),
        target_ids=torch.tensor([0, 1, -100, 2, 3, 4], device=DEVICE),
        advantage=torch.tensor([1.0, 1, NAN, 1, 1, 1], device=DEVICE),
        policy_weight=torch.tensor([1.0, 1, 0, 0, 1, 1], device=DEVICE),
    )
    output.loss.backward()
    assert output.loss.isfinite() and hidden.grad.isfinite().all() and matrix.grad.isfinite().all()
    assert not hidden.grad[2].any() and hidden.grad[1].any()
    for name, zeros in (
        ("divergence", [1, 2]),
        ("teacher_entropy", [1, 2]),
        ("teacher_logprob", [1, 2]),
        ("student_entropy", [2]),
        ("student_logprob", [2]),
    ):
        entries = getattr(output, name)
        assert (entries == 0).nonzero().flatten().tolist() == zeros, name


def test_no_weight_at_all(backend):
    student, teacher = torch.randn(2, 3, 9, device=DEVICE)
    weight = torch.zeros(3, device=DEVICE)
    output, gradient = run(student, teacher, backend=backend, distill_weight=weight)
    assert output.loss == 0 and not gradient.any()
    assert all(not entries.any() for entries in (output.divergence, output.student_entropy))


@pytest.mark.parametrize("k", [1, 16, 17, 30])
@pytest.mark.parametrize("rows", [3, *slow(1)])
def test_the_ends_of_k(backend, k, rows):
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, rows, 17, generator=generator).to(DEVICE)
    compare(student, teacher, backend, top_k=k, temperature=0.6)


def test_views_that_are_not_contiguous(backend):
    generator = torch.Generator().manual_seed(4)
    wide = torch.randn(2, 6, 24, generator=generator).to(DEVICE)
    student, teacher = wide[0, ::2, :11], wide[1].T[:11, :3].T
    expected, gradient = run(student.contiguous(), teacher.contiguous(), backend=backend)
    base = wide[0].clone().requires_grad_()
    output = distillation_loss(base[::2, :11], teacher, backend=backend)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(base.grad[::2, :11], gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_gradients_survive_16_bit_inputs(backend, dtype):
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(4, 300, generator=generator).to(DEVICE, dtype)
    drift = 0.02 * torch.randn(4, 300, generator=generator).to(DEVICE)
    teacher = (student.float() + drift).to(dtype)
    scale = 65536.0  # a loss scale, as fp16 training uses
    logits = student.clone().requires_grad_()
    (scale * distillation_loss(logits, teacher, backend=backend).loss).backward()
    wide = student.double().requires_grad_()
    (scale * reference.distillation_loss(wide, teacher.double()).loss).backward()
    error = (logits.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert logits.grad.dtype == dtype and error < 3e-3
