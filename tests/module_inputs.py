"""Arguments of the distillation module, and its loss as someone would write it in eager PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from kernel_inputs import DEVICE
from sodfast_kernels import reference
from torch import Tensor

B, T, H, V, PADDED = 3, 4, 5, 19, 24
IGNORED = -7
BIASES = [(False, False), (True, False), (False, True), (True, True)]
PADDINGS = [(V, V), (PADDED, V), (V, PADDED)]
NAMES = ("student_hidden", "student_head", "student_bias")


def arguments(
    shape: tuple[int, ...] = (B, T),
    vocabularies: tuple[int, int] = (V, V),
    biases: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.float64,
    hidden: int = H,
    drift: float = 0.5,
) -> dict[str, Any]:
    """By name, the student's with gradients; the teacher is near the student, and wider. Labels
    with ignored ones among them and in the first place."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    rows, (student, teacher) = max(vocabularies), vocabularies
    state, head, bias = normal(*shape, hidden), normal(rows, hidden, scale=1.5), normal(rows)
    labels = torch.randint(0, min(vocabularies), shape, generator=generator)
    labels.view(-1)[[0, 5]] = IGNORED
    wide = torch.cat([state + drift * normal(*shape, hidden), normal(*shape, 1)], -1)
    wide_head = torch.cat([head, drift * normal(rows, 1)], -1)
    made = {
        "student_hidden": state,
        "student_head": head[:student].clone(),
        "teacher_hidden": wide,
        "teacher_head": wide_head[:teacher].clone(),
        "labels": labels,
        "student_bias": bias[:student].clone() if biases[0] else None,
        "teacher_bias": (bias + drift * normal(rows))[:teacher].clone() if biases[1] else None,
    }
    return {
        name: value if value is None else value.to(DEVICE, None if name == "labels" else dtype)
        for name, value in made.items()
    }


def with_gradients(given: dict[str, Any]) -> dict[str, Any]:
    return given | {
        name: given[name].detach().clone().requires_grad_()
        for name in NAMES
        if given[name] is not None
    }


def gradients(given: dict[str, Any]) -> list[Tensor]:
    return [given[name].grad for name in NAMES if given[name] is not None]


def divergence(log_s: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """(1 − α)·KL(S‖M) + α·KL(Q‖M), or a KL at the ends, by definition."""
    if alpha == 0:
        return (log_q.exp() * (log_q - log_s)).sum(-1)
    if alpha == 1:
        return (log_s.exp() * (log_s - log_q)).sum(-1)
    log_m = ((1 - alpha) * log_s.exp() + alpha * log_q.exp()).log()
    from_student = (log_s.exp() * (log_s - log_m)).sum(-1)
    return (1 - alpha) * from_student + alpha * (log_q.exp() * (log_q - log_m)).sum(-1)


def eager(
    given: dict[str, Any],
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    reduction: str = "mean",
    shift: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hard and soft part, as someone would write them who holds all logits."""
    labels = given["labels"]
    student = F.linear(given["student_hidden"], given["student_head"], given["student_bias"])
    teacher = F.linear(given["teacher_hidden"], given["teacher_head"], given["teacher_bias"])
    vocabulary = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[..., :vocabulary], teacher[..., :vocabulary].detach()
    if shift:
        student, teacher, labels = student[..., :-1, :], teacher[..., :-1, :], labels[..., 1:]
    kept = labels != IGNORED
    hard = F.cross_entropy(
        student.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED
    ).view(labels.shape)
    if top_k is None:
        log_s, log_q = (z.div(temperature).log_softmax(-1) for z in (student, teacher))
        soft = divergence(log_s, log_q, alpha)
    else:
        rows = [z.flatten(0, -2) for z in (student, teacher)]
        ones = torch.ones(len(rows[0]), dtype=student.dtype, device=student.device)
        soft = reference.distillation_loss(
            *rows,
            alpha=alpha,
            temperature=temperature,
            top_k=top_k,
            distill_weight=ones,
            reduction="none",
        ).loss.view(labels.shape)
    soft = soft * kept
    count = {
        "mean": int(kept.sum()),
        "batchmean": len(labels),
        "sum": 1,
        "none": 1,
    }[reduction]
    parts = [hard_weight * hard / count, soft_weight * soft / count]
    if reduction != "none":
        parts = [part.sum() for part in parts]
    return parts[0] + parts[1], *(part.detach() for part in parts)


def backward(loss: Tensor) -> None:
    """With another upstream gradient for each token."""
    upstream = torch.linspace(1, 2, max(loss.numel(), 1), dtype=loss.dtype, device=loss.device)
    (loss * upstream.view(loss.shape)).sum().backward()
