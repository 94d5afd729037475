"""The PyTorch path against the fp64 definition on unrounded logits, and its bound on memory."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from sodfast_kernels import distillation_loss, linear_distillation_loss, reference

FLOOR = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}


def sides(rows, vocabulary, hidden, drift, peaked, seed=0):
    """Hidden states and heads, the teacher's close to the student's."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    head = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    head *= (4.0 if peaked else 1.0) / hidden**0.5
    teacher = student + drift * torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    return student, head, teacher


def terms(rows, vocabulary, policy):
    generator = torch.Generator().manual_seed(9)
    given = {"distill_weight": torch.rand(rows, generator=generator, dtype=torch.float64)}
    if policy:
        given |= {
            "target_ids": torch.randint(0, vocabulary, (rows,), generator=generator),
            "advantage": torch.randn(rows, generator=generator, dtype=torch.float64),
            "old_logprob": -5 * torch.rand(rows, generator=generator, dtype=torch.float64),
            "ratio_cap": 2.0,
        }
    return given


def gradients(function, tensors, dtype, **given):
    hidden, head, teacher = (tensor.to(dtype).detach().clone() for tensor in tensors)
    hidden.requires_grad_()
    head.requires_grad_()
    output = function(hidden, head, teacher, head.detach(), **given)
    output.loss.backward()
    return output, hidden.grad.double(), head.grad.double()


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("alpha", [0.3, *slow(0, 0.5, 1)])
@pytest.mark.parametrize("top_k", [None, 20, *slow(100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *slow(torch.float16)], ids=str)
def test_gradient_error_is_that_of_the_definition(alpha, top_k, dtype):
    for case, (drift, temperature, policy) in enumerate(
        [(3e-3, 1.0, False), (1.0, 0.6, True), (0.05, 2.0, False)]
    ):
        tensors = [
            tensor.to(dtype).double() for tensor in sides(37, 203, 19, drift, peaked=case == 1)
        ]
        given = terms(37, 203, policy) | {
            "alpha": alpha,
            "top_k": top_k,
            "temperature": temperature,
        }
        exact = gradients(reference.linear_distillation_loss, tensors, torch.float64, **given)
        plain = gradients(reference.linear_distillation_loss, tensors, dtype, **given)
        ours = gradients(linear_distillation_loss, tensors, dtype, backend="torch", **given)
        for part in (1, 2):
            allowed = 2 * error(plain[part], exact[part]) + FLOOR[dtype]
            assert error(ours[part], exact[part]) <= allowed
        torch.testing.assert_close(
            ours[0].divergence.double(), exact[0].divergence, rtol=2e-3, atol=1e-8
        )


@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(2, 40),
    hidden=st.integers(1, 9),
    alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    k=st.one_of(st.none(), st.integers(1, 41)),
    add_tail=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    reduction=st.sampled_from(["sum", "none"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, derandomize=True)
def test_any_shape_agrees_with_the_definition_in_fp64(
    rows, vocabulary, hidden, alpha, k, add_tail, softcap, reduction, seed
):
    tensors = sides(rows, vocabulary, hidden, 0.5, False, seed)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(rows if reduction == "none" else 1, generator=generator)
    given = terms(rows, vocabulary, True) | {
        "alpha": alpha,
        "top_k": k,
        "add_tail": add_tail,
        "softcap": softcap,
        "reduction": reduction,
    }
    given["distill_weight"] = given["distill_weight"] * (torch.arange(rows) % 3 != 0)
    results = []
    for function, extra in (
        (reference.linear_distillation_loss, {}),
        (linear_distillation_loss, {"backend": "torch", "max_scratch_bytes": 20_000}),
    ):
        hidden_states, head = (tensor.clone().requires_grad_() for tensor in tensors[:2])
        output = function(hidden_states, head, tensors[2], tensors[1], **given, **extra)
        (output.loss * upstream.double()).sum().backward()
        results.append([*output, hidden_states.grad, head.grad])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_small_divergences_are_positive_and_accurate(alpha):
    generator = torch.Generator().manual_seed(1)
    student = 3 * torch.randn(8, 500, generator=generator)
    teacher = student + 5e-4 * torch.randn(8, 500, generator=generator)
    ours = distillation_loss(student, teacher, alpha=alpha, backend="torch")
    exact = reference.distillation_loss(student.double(), teacher.double(), alpha=alpha)
    assert exact.divergence.max() < 2e-7
    assert (ours.divergence > 0).all()
    torch.testing.assert_close(ours.divergence.double(), exact.divergence, rtol=0.02, atol=0)


def test_a_stored_teacher_is_read_and_not_written():
    ids, logprobs = torch.arange(3).repeat(2, 1), torch.full((2, 3), -2.0)
    logprobs[0, 0] = -torch.inf
    before = logprobs.clone()
    weight = torch.tensor([1.0, 0.0])
    distillation_loss(
        torch.zeros(2, 9), teacher_topk=(ids, logprobs), distill_weight=weight, backend="torch"
    )
    assert torch.equal(logprobs, before)


MEASURE = r"""
import re, sys, torch
from sodfast_kernels import linear_distillation_loss
from sodfast_kernels.modules import FusedLinearDistillationLoss
torch.set_num_threads(1)
bound, as_module, options = int(sys.argv[1]), eval(sys.argv[2]), eval(sys.argv[3])
rows, vocabulary, hidden = 256, 20_000, 32
student, teacher = torch.randn(2, rows, hidden)
head = torch.randn(vocabulary, hidden, requires_grad=True)
bias = torch.randn(vocabulary, requires_grad=True)
labels = torch.randint(0, vocabulary, (rows,))
def call(rows, max_scratch_bytes):
    given = student[:rows].clone().requires_grad_(), head, teacher[:rows], head.detach()
    settings = {"backend": "torch", "max_scratch_bytes": max_scratch_bytes, **options}
    if as_module:
        module = FusedLinearDistillationLoss(**settings, hard_weight=0.5)
        loss = module(*given, labels[:rows], bias, bias.detach())
    else:
        loss = linear_distillation_loss(*given, **settings).loss
    loss.sum().backward()
call(1, 2**21)
head.grad = bias.grad = None
def peak():
    # Not getrusage's, in which that of the process before exec, such as pytest's, goes on.
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
call(rows, bound)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("as_module", "options"),
    [
        (False, {"alpha": 0.3}),
        (False, {"alpha": 0.3, "top_k": 20}),
        (True, {"alpha": 0.3}),
        (True, {"alpha": 0.3, "top_k": 20, "temperature": 1.7}),
        (True, {"temperature": 1.7, "reduction": "none"}),
    ],
)
def test_measured_memory_stays_within_the_bound(as_module, options):
    """Of the function, and of the module with labels, whose softmax is another one than the
    divergence's where there is a temperature."""
    bound = 32 * 2**20
    command = [sys.executable, "-c", MEASURE, str(bound), str(as_module), str(options)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    # The returned gradients (2.6 MB) and the allocator's slack are not scratch.
    assert 2**22 < int(result.stdout) <= bound + 2**22
