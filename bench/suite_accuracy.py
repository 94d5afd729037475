"""Part `correctness`, the figure: how the error of gradients grows as teacher and student meet.

On bf16 inputs at true divergences of 1e-5 … 1 (forward KL, in fp64): the relative error of the
gradients of hidden states and head, ours beside the peers' and eager PyTorch's. Self-distillation
works at 1e-3 and below, where the logits of the two sides differ in their last digits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sodfast_kernels import linear_distillation_loss
from suite_gradients import (
    FLOORS,
    UPSTREAM,
    Inputs,
    Size,
    defined,
    divergence_of,
    relative_error,
)
from suite_peers import Sides, objective_peers
from suite_record import Case, Plan, Result, check
from torch import Tensor

DIVERGENCES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
Loss = Callable[[Sides], Tensor]


def cases(plan: Plan) -> list[Case]:
    size = Size(256, 4096, 151_936) if plan.full else Size(6, 32, 203)
    return [
        Case(f"accuracy, {name}", 0.6, partial(accuracy, size, plan, alpha))
        for name, alpha in (("KL", 0.0), ("JSD", 0.5))
    ]


def at_divergence(size: Size, device: torch.device, wanted: float) -> tuple[Inputs, float]:
    """bf16 inputs whose mean forward KL is near `wanted`, and that KL in fp64. It grows as the
    square of the gap between the hidden states, as long as it is small."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    state = normal(size.rows, size.hidden).bfloat16()
    head = (normal(size.vocabulary, size.hidden) / size.hidden**0.5).bfloat16()
    direction = normal(size.rows, size.hidden)
    weights = torch.full((size.rows,), 1 / size.rows, device=device)
    gap = (2 * wanted) ** 0.5
    for _ in range(8):
        teacher = (state.float() + gap * direction).bfloat16()
        inputs = Inputs(state, head, teacher, head, {"distill_weight": weights})
        found = divergence_of(inputs, 0.0)
        if abs(found / wanted - 1) < 0.1:
            break
        gap *= (wanted / found) ** 0.5
    return inputs, found


def eager(sides: Sides, alpha: float) -> Tensor:
    """bf16 logits and fp32 from there on, as most trainers do it."""
    log_s = (sides.state @ sides.head.T).float().log_softmax(-1)
    log_q = (sides.teacher @ sides.teacher_head.T).float().log_softmax(-1)
    if alpha == 0:
        return (log_q.exp() * (log_q - log_s)).sum(-1).mean()
    log_m = torch.logaddexp(log_s, log_q) - 0.6931471805599453
    both = (log_s.exp() * (log_s - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
    return 0.5 * both.mean()


def ways(plan: Plan, alpha: float) -> dict[str, Loss]:
    def ours(sides: Sides) -> Tensor:
        return linear_distillation_loss(*sides, alpha=alpha, backend="triton").loss

    found: dict[str, Loss] = {"ours": ours, "eager": partial(eager, alpha=alpha)}
    if plan.device.type == "cuda":
        for peer in objective_peers(alpha):
            found[peer.name] = lambda sides, peer=peer: peer.loss(peer.call(sides, alpha)())
    return found


def accuracy(size: Size, plan: Plan, alpha: float) -> Result:
    rows: list[dict[str, Any]] = []
    checks = []
    for wanted in DIVERGENCES:
        inputs, divergence = at_divergence(size, plan.device, wanted)
        exact, plain = (
            defined(inputs, dtype, alpha=alpha) for dtype in (torch.float64, torch.float32)
        )
        for name, loss in ways(plan, alpha).items():
            row: dict[str, Any] = {"name": name, "divergence": divergence}
            try:
                row |= errors(loss, inputs, exact.d_state, exact.d_head)
            except Exception as reason:  # a peer's fault is its result
                row["failed"] = f"{type(reason).__name__}: {reason}"[:300]
            rows.append(row)
            if name == "ours":
                for gradient in ("d_state", "d_head"):
                    usual = getattr(plain, gradient).bfloat16()
                    limit = 2 * relative_error(usual, getattr(exact, gradient))
                    limit += FLOORS[torch.bfloat16]
                    label = f"KL {wanted:g}: {gradient}: error"
                    checks.append(check(label, row.get(gradient, float("nan")), limit))
    return {"size": size, "checks": checks, "rows": rows}


def errors(loss: Loss, inputs: Inputs, d_state: Tensor, d_head: Tensor) -> dict[str, float]:
    state, head = (tensor.detach().requires_grad_() for tensor in inputs[:2])
    value = loss(Sides(state, head, *inputs[2:4]))
    value.backward(torch.full_like(value, UPSTREAM))
    assert state.grad is not None and head.grad is not None
    return {
        "d_state": relative_error(state.grad, d_state),
        "d_head": relative_error(head.grad, d_head),
    }
