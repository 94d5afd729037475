"""The definition, against formulas written down independently and against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from sodfast_kernels import reference
from sodfast_kernels.distillation.reference import TAIL_FLOOR, top_ids

ROWS, VOCABULARY = 4, 11
ALPHAS = [0, 0.3, 0.5, 1]


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)


def divergence(s: torch.Tensor, q: torch.Tensor, alpha: float) -> torch.Tensor:
    """From probabilities, the textbook way."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    if alpha in (0, 1):
        return kl(q, s) if alpha == 0 else kl(s, q)
    m = (1 - alpha) * s + alpha * q
    return (1 - alpha) * kl(s, m) + alpha * kl(q, m)


def buckets(p: torch.Tensor, ids: torch.Tensor, add_tail: bool) -> torch.Tensor:
    kept = p.gather(-1, ids)
    if add_tail:
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
    return kept / kept.sum(-1, keepdim=True)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("support", ["full", "tail", "renormalised"])
def test_value_and_published_gradient(alpha, support):
    student, teacher = logits(0).requires_grad_(), logits(1)
    temperature, weight = 0.7, torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    top_k = None if support == "full" else 3
    output = reference.distillation_loss(
        student,
        teacher,
        alpha=alpha,
        temperature=temperature,
        top_k=top_k,
        add_tail=support == "tail",
        distill_weight=weight,
    )
    output.loss.backward()

    s, q = (student.detach() / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    ids = student.detach().argsort(descending=True)[:, : top_k or VOCABULARY]
    s_b, q_b = (buckets(p, ids, support == "tail") if top_k else p for p in (s, q))
    expected = divergence(s_b, q_b, alpha)
    torch.testing.assert_close(output.divergence, expected * (weight != 0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(output.loss.detach(), (weight * expected).sum())

    # ∂D/∂z_j = s_j (g_b(j) − E)/T, arXiv 2601.20802
    m_b = (1 - alpha) * s_b + alpha * q_b
    g = {0: 1 - q_b / s_b, 1: (s_b / q_b).log()}.get(alpha, (1 - alpha) * (s_b / m_b).log())
    centred = g - (s_b * g).sum(-1, keepdim=True)
    if support == "full":
        gradient = s * centred
    elif support == "tail":
        gradient = (s * centred[:, -1:]).scatter(-1, ids, s.gather(-1, ids) * centred[:, :-1])
    else:
        gradient = torch.zeros_like(s).scatter(-1, ids, s_b * centred)
    gradient = gradient * weight[:, None] / temperature
    torch.testing.assert_close(student.grad, gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.3, *slow(0, 0.5, 1)])
@pytest.mark.parametrize("top_k, add_tail", [(None, True), (4, True), (4, False)])
def test_gradcheck_with_every_term(alpha, top_k, add_tail):
    generator = torch.Generator().manual_seed(3)

    def loss(hidden, head):
        return reference.linear_distillation_loss(
            hidden,
            head,
            logits(5)[:, :6],
            logits(6).T[:, :4].repeat(1, 2)[:, :6],
            alpha=alpha,
            top_k=top_k,
            add_tail=add_tail,
            softcap=5.0,
            temperature=1.3,
            target_ids=torch.tensor([0, 3, 10, 7]),
            advantage=torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64),
            old_logprob=torch.tensor([-2.0, -2.5, -30.0, -3.0], dtype=torch.float64),
            reduction="none",
        ).loss

    hidden = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCABULARY, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (hidden, head))


def test_the_ratio_cap_multiplies_the_divergence_and_is_not_differentiated():
    student, teacher = logits(0), logits(1)
    ids = torch.tensor([1, 2, 3, 4])
    logprob = student.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    old = logprob - torch.tensor([0.1, 5.0, -0.3, -50.0], dtype=torch.float64)
    ratio = torch.tensor([0.1, math.log(2.0), -0.3, -20.0], dtype=torch.float64).exp()
    plain, capped = student.clone().requires_grad_(), student.clone().requires_grad_()
    weight = ratio / ROWS
    first = reference.distillation_loss(plain, teacher, distill_weight=weight)
    second = reference.distillation_loss(
        capped, teacher, target_ids=ids, old_logprob=old, ratio_cap=2.0
    )
    first.loss.backward()
    second.loss.backward()
    torch.testing.assert_close(second.loss, first.loss)
    torch.testing.assert_close(capped.grad, plain.grad)


def test_the_policy_loss_is_the_clipped_one_and_its_gradient_stops_at_the_clip():
    student = logits(2).requires_grad_()
    ids = torch.tensor([0, 1, 2, 3])
    logprob = student.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    log_ratio = torch.tensor([0.5, 0.5, -0.5, 0.01], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, -1.0, 2.0], dtype=torch.float64)
    output = reference.distillation_loss(
        student,
        student.detach(),
        target_ids=ids,
        advantage=advantage,
        old_logprob=(logprob - log_ratio).detach(),
        clip_range=(0.2, 0.28),
        reduction="none",
    )
    expected = torch.tensor([-1.28, math.exp(0.5), 0.8, -2 * math.exp(0.01)], dtype=torch.float64)
    torch.testing.assert_close(output.loss.detach() * ROWS, expected)
    output.loss.sum().backward()
    slope = torch.tensor([0.0, math.exp(0.5), 0.0, -2 * math.exp(0.01)], dtype=torch.float64)
    onehot = F.one_hot(ids, VOCABULARY)
    expected_gradient = slope[:, None] / ROWS * (onehot - student.detach().softmax(-1))
    torch.testing.assert_close(student.grad, expected_gradient)


def test_without_old_logprob_the_ratio_is_one():
    student = logits(2)
    output = reference.distillation_loss(
        student,
        student,
        target_ids=torch.zeros(ROWS, dtype=torch.int64),
        advantage=torch.tensor([1.0, 2.0, 3.0, -4.0], dtype=torch.float64),
    )
    torch.testing.assert_close(output.loss, torch.tensor(-0.5, dtype=torch.float64))


def test_equal_logits_keep_the_lower_index():
    row = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -0.0, 0.0]])
    assert top_ids(row, 4).tolist() == [[1, 3, 2, 4]]


def test_where_the_cap_binds_the_tail_has_no_gradient():
    student = torch.tensor([[30.0, 29.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[29.0, 30.0, 5.0, 4.0]], dtype=torch.float64)
    output = reference.distillation_loss(student, teacher, alpha=1, top_k=2)
    output.loss.backward()
    s = student.detach().softmax(-1)
    s_b = torch.cat([s[:, :2], torch.full((1, 1), TAIL_FLOOR, dtype=torch.float64)], -1)
    q = teacher.softmax(-1)
    q_tail = q[:, 2:].sum(-1, keepdim=True).clamp(min=TAIL_FLOOR)
    g = (s_b / torch.cat([q[:, :2], q_tail], -1)).log()
    mean = (s_b * g)[:, :2].sum(-1, keepdim=True)
    expected = torch.cat([s[:, :2] * (g[:, :2] - mean), -s[:, 2:] * mean], -1)
    torch.testing.assert_close(student.grad, expected, rtol=1e-9, atol=1e-16)


def test_stored_top_k_equals_the_teacher_it_was_taken_from():
    student, teacher = logits(0), logits(1)
    log_q = teacher.log_softmax(-1)
    ids = top_ids(student, 4)
    targets = torch.tensor([int(ids[0, 1]), 5, 6, 7])
    direct = reference.distillation_loss(student, teacher, top_k=4, target_ids=targets)
    stored = reference.distillation_loss(
        student, teacher_topk=(ids, log_q.gather(-1, ids)), target_ids=targets
    )
    torch.testing.assert_close(stored.loss, direct.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(stored.teacher_logprob[0], direct.teacher_logprob[0])


def test_statistics():
    student, teacher = logits(0), logits(1)
    ids = torch.tensor([1, 0, 4, 9])
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    output = reference.distillation_loss(
        student,
        teacher,
        temperature=2.0,
        target_ids=ids,
        distill_weight=weight,
        advantage=torch.ones(ROWS),
        policy_weight=torch.tensor([1.0, 1.0, 0.0, 0.0]),
    )
    for entropy, logprob, side, used in (
        (output.student_entropy, output.student_logprob, student, [1, 1, 1, 0]),
        (output.teacher_entropy, output.teacher_logprob, teacher, [1, 0, 1, 0]),
    ):
        chosen = torch.distributions.Categorical(logits=side / 2)
        mask = torch.tensor(used)
        torch.testing.assert_close(entropy, chosen.entropy() * mask)
        torch.testing.assert_close(logprob, chosen.log_prob(ids) * mask)
