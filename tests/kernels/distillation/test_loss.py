"""The public functions: what they refuse, and that they behave like any differentiable function."""

import pytest
import torch
from kernel_inputs import BACKENDS, DEVICE
from sodfast_kernels import distillation_loss, linear_distillation_loss, reference

N, H, V = 5, 4, 13


def hidden_and_head(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, head, teacher = (
        torch.randn(rows, H, generator=generator).to(DEVICE) for rows in (N, V, N)
    )
    return hidden.requires_grad_(), head.requires_grad_(), teacher, head.detach().clone()


IDS = torch.arange(N, device=DEVICE)
ONES = torch.ones(N, device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulating_twice_in_one_graph_and_backward_twice(backend):
    hidden, head, *teacher = hidden_and_head()

    def gradient(times, factor):
        for tensor in (hidden, head):
            tensor.grad = None
        loss = sum(
            linear_distillation_loss(hidden, head, *teacher, backend=backend).loss
            for _ in range(times)
        )
        (factor * loss).backward()
        return hidden.grad.clone(), head.grad.clone()

    once = gradient(1, 1.0)
    for grads, factor in ((gradient(2, 1.0), 2), (gradient(1, -3.0), -3)):
        for actual, expected in zip(grads, once, strict=True):
            torch.testing.assert_close(actual, factor * expected)
    hidden.grad = head.grad = None
    loss = linear_distillation_loss(hidden, head, *teacher, backend=backend).loss
    loss.backward(torch.tensor(2.0, device=DEVICE), retain_graph=True)
    loss.backward(torch.tensor(0.5, device=DEVICE))
    torch.testing.assert_close(hidden.grad, 2.5 * once[0])
    torch.testing.assert_close(head.grad, 2.5 * once[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_arguments_that_require_it_get_a_gradient(backend):
    hidden, head, *teacher = hidden_and_head()
    linear_distillation_loss(hidden, head, *teacher, backend=backend).loss.backward()
    for frozen in (0, 1):
        pair = [hidden.detach().clone(), head.detach().clone()]
        pair[1 - frozen].requires_grad_()
        linear_distillation_loss(*pair, *teacher, backend=backend).loss.backward()
        assert pair[frozen].grad is None
        torch.testing.assert_close(pair[1 - frozen].grad, (hidden, head)[1 - frozen].grad)
    output = linear_distillation_loss(*pair, *teacher, backend=backend)
    assert not output.divergence.requires_grad and not output.student_entropy.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled(backend, reduction):
    hidden, head, *teacher = hidden_and_head()

    def step(hidden, head):
        output = linear_distillation_loss(
            2 * hidden, head, *teacher, backend=backend, reduction=reduction, target_ids=IDS
        )
        return output.loss.sum() * 3, output.student_logprob

    step(hidden, head)[0].backward()
    expected = hidden.grad, head.grad
    hidden.grad = head.grad = None
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss, logprob = compiled(hidden, head)
    loss.backward()
    torch.testing.assert_close((hidden.grad, head.grad), expected)
    torch.testing.assert_close(logprob, step(hidden, head)[1])


@pytest.mark.slow
def test_compiled_with_arguments_that_are_one_tensor():
    """Default weights of both terms, one head for both models, one weight given twice."""
    hidden, head, teacher, _ = hidden_and_head()
    weight = torch.full((len(IDS),), 0.1, device=DEVICE)
    terms = {"target_ids": IDS, "advantage": torch.linspace(-1, 1, len(IDS), device=DEVICE)}

    def step(hidden, head):
        first = linear_distillation_loss(2 * hidden, head, teacher, head, **terms)
        again = {"distill_weight": weight, "policy_weight": weight}
        second = linear_distillation_loss(hidden, head, hidden, head, **terms, **again)
        return first.loss + second.loss

    step(hidden, head).backward()
    expected = hidden.grad, head.grad
    hidden.grad = head.grad = None
    torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, head).backward()
    torch.testing.assert_close((hidden.grad, head.grad), expected)


def test_autocast_casts_like_a_linear_layer():
    hidden, head, *teacher = hidden_and_head()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        mixed = linear_distillation_loss(hidden, head, *teacher)
        mixed.loss.backward()
    assert hidden.grad.dtype == head.grad.dtype == mixed.loss.dtype == torch.float32
    rounded = [tensor.detach().bfloat16() for tensor in (hidden, head, *teacher)]
    plain = linear_distillation_loss(*rounded)
    torch.testing.assert_close(mixed.loss, plain.loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    hidden = torch.zeros(0, H, device=DEVICE, requires_grad=True)
    head = torch.randn(V, H, device=DEVICE, requires_grad=True)
    output = linear_distillation_loss(hidden, head, hidden.detach(), head.detach(), backend=backend)
    output.loss.backward()
    assert output.loss == 0 and output.divergence.shape == (0,)
    assert not head.grad.any() and hidden.grad.shape == (0, H)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_stored_teacher(backend):
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(N, V, generator=generator).to(DEVICE) for _ in range(2))
    logprobs, ids = teacher.log_softmax(-1).topk(5)
    for alpha in (0, 0.3, 0.5, 1):
        for add_tail in (True, False):
            results = []
            for function, extra in (
                (reference.distillation_loss, {}),
                (distillation_loss, {"backend": backend}),
            ):
                logits = student.clone().requires_grad_()
                output = function(
                    logits,
                    teacher_topk=(ids, logprobs),
                    alpha=alpha,
                    add_tail=add_tail,
                    target_ids=IDS,
                    advantage=ONES,
                    **extra,
                )
                output.loss.backward()
                results.append([*output, logits.grad])
            for actual, expected in zip(*reversed(results), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
