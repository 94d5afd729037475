"""Gradients against fp64: the inputs, the definition in slices of rows, and the comparison.

Suffixes: N rows, H hidden size, V vocabulary.

The measure of kernels.md §3: our error is at most twice that of the definition computed in fp32
from the same inputs and rounded to their type, plus a floor. Errors are relative: of the whole
gradient, and of each of its rows, so that one wrong row among 16,384 is seen. NaN is never small.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sodfast_kernels import DistillationOutput, reference
from suite_record import check
from torch import Tensor

# What kernels.md allows beside twice the reference's error; fp16 has fp32 d-logits.
FLOORS = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 3e-3}
# A row by itself: errors do not average out as over all rows.
ROW_FLOOR = 5.0
# The upstream gradient: a power of two, which changes no digit and keeps fp16 gradients normal.
UPSTREAM = 1024.0
STATISTICS = ("divergence", "student_entropy", "teacher_entropy", "student_logprob")


class Size(NamedTuple):
    rows: int
    hidden: int
    vocabulary: int


class Inputs(NamedTuple):
    """Hidden states [N, H], heads [V, H], and per-token terms [N]."""

    state: Tensor
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    terms: dict[str, Tensor]


class Found(NamedTuple):
    """d_state [N, H] and d_head [V, H] of UPSTREAM times the loss, and statistics [N]."""

    d_state: Tensor
    d_head: Tensor
    statistics: dict[str, Tensor]


def make_inputs(
    size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0, gap: float = 0.05
) -> Inputs:
    """Logits of deviation 1 in every other row and 6 (peaked) in the rest; the teacher's hidden
    states differ by `gap`. A tenth of the rows has no weight."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows, hidden, vocabulary = size
    state = normal(rows, hidden)
    state[1::2] *= 6
    teacher = state + gap * normal(rows, hidden)
    head = normal(vocabulary, hidden) / hidden**0.5
    weight = torch.rand(rows, generator=generator, device=device) + 0.5
    terms = {
        "distill_weight": weight.masked_fill(weight < 0.6, 0.0),
        "target_ids": torch.randint(vocabulary, (rows,), generator=generator, device=device),
        "advantage": 0.1 * normal(rows),
        "policy_weight": weight.masked_fill(weight < 0.7, 0.0),
    }
    return Inputs(
        *(tensor.to(dtype) for tensor in (state, head, teacher)), head.to(dtype).clone(), terms
    )


def gradients(loss: Callable[..., Any], inputs: Inputs, **settings: Any) -> Found:
    """Of one call of `loss`, a function with the parameters of `linear_distillation_loss`."""
    state, head = (tensor.detach().requires_grad_() for tensor in inputs[:2])
    output = loss(state, head, *inputs[2:4], **inputs.terms, **settings)
    upstream = torch.full_like(output.loss, UPSTREAM)
    d_state, d_head = torch.autograd.grad(output.loss, (state, head), upstream)
    return Found(d_state, d_head, statistics_of(output))


def statistics_of(output: DistillationOutput) -> dict[str, Tensor]:
    """Without those that are None, because the call has no targets."""
    found = {name: getattr(output, name) for name in STATISTICS}
    return {name: value for name, value in found.items() if value is not None}


def defined(inputs: Inputs, dtype: torch.dtype, slice_rows: int = 256, **settings: Any) -> Found:
    """The definition in `dtype`, a slice of rows at a time, since all logits would not fit."""
    head = inputs.head.to(dtype).requires_grad_()
    teacher_head = inputs.teacher_head.to(dtype)
    d_states: list[Tensor] = []
    statistics: list[dict[str, Tensor]] = []
    for first in range(0, len(inputs.state), slice_rows):
        part = slice(first, first + slice_rows)
        state = inputs.state[part].to(dtype).requires_grad_()
        terms = {
            name: term[part].to(dtype) if term.is_floating_point() else term[part]
            for name, term in inputs.terms.items()
        }
        output = reference.linear_distillation_loss(
            state, head, inputs.teacher[part].to(dtype), teacher_head, **terms, **settings
        )
        output.loss.backward(torch.full_like(output.loss, UPSTREAM))
        assert state.grad is not None
        d_states.append(state.grad)
        statistics.append(statistics_of(output))
    assert head.grad is not None
    joined = {name: torch.cat([part[name] for part in statistics]) for name in statistics[0]}
    return Found(torch.cat(d_states), head.grad, joined)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in fp64; NaN where there is any."""
    difference = found.double() - exact.double()
    return float(difference.norm() / exact.double().norm().clamp(min=1e-300))


def row_errors(found: Tensor, exact: Tensor) -> Tensor:
    """The same for each row, [rows]. A row that is almost 0 is measured against the mean row."""
    exact = exact.double()
    norms = exact.norm(dim=1)
    least = 1e-2 * norms.square().mean().sqrt()
    return (found.double() - exact).norm(dim=1) / norms.clamp(min=float(least) + 1e-300)


def compare(ours: Found, exact: Found, plain: Found, dtype: torch.dtype, ties: bool) -> list[Any]:
    """Checks of every gradient and statistic.

    plain: the definition in fp32. ties: whether two tokens may change places at a boundary (top-k),
    which fp32 and fp64 decide differently in a row out of a thousand.
    """
    floor, checks = FLOORS[dtype], []
    for name in ("d_state", "d_head"):
        got, right, usual = (getattr(found, name) for found in (ours, exact, plain))
        usual = usual.to(dtype)  # what any gradient of such inputs is rounded to
        limit = 2 * relative_error(usual, right) + floor
        checks.append(check(f"{name}: error", relative_error(got, right), limit))
        allowed = 2 * row_errors(usual, right).max() + ROW_FLOOR * floor
        # `not ≤` and not `>`: a row of NaN is beyond any limit.
        beyond = ~(row_errors(got, right) <= allowed)
        share = float(beyond.double().mean())
        checks.append(check(f"{name}: share of wrong rows", share, 3e-3 if ties else 0.0))
    for name in exact.statistics:
        got, right, usual = (found.statistics[name] for found in (ours, exact, plain))
        limit = 2 * relative_error(usual, right) + 1e-4
        checks.append(check(f"{name}: error", relative_error(got, right), limit))
    least = ours.statistics["divergence"].min()
    checks.append(check("least divergence", float(least), 0.0, at_most=False))
    return checks


def judged(inputs: Inputs, found: Found, dtype: torch.dtype, **settings: Any) -> list[Any]:
    """Checks of `found` against the definition with these settings, in fp64 and in fp32."""
    exact, plain = (
        defined(inputs, compute, **settings) for compute in (torch.float64, torch.float32)
    )
    return compare(found, exact, plain, dtype, ties=settings.get("top_k") is not None)


def differing(left: Found, right: Found) -> float:
    """The share of tensors whose bits differ: 0 for equal results. NaN equals nothing."""
    pairs = [(left.d_state, right.d_state), (left.d_head, right.d_head)]
    pairs += [(left.statistics[name], right.statistics[name]) for name in left.statistics]
    return sum(not torch.equal(one, other) for one, other in pairs) / len(pairs)


def divergence_of(inputs: Inputs, alpha: float) -> float:
    """The mean divergence in fp64, nats."""
    with torch.no_grad():
        found = reference.linear_distillation_loss(
            *(tensor.double() for tensor in inputs[:4]), alpha=alpha
        )
    return float(found.divergence.mean())
