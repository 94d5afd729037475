"""The public distillation functions: arguments checked, backend chosen, autograd.

Both forms, both reductions and both backends go through one custom op, so `torch.compile` sees an
opaque call with known output shapes.

Suffixes: N response tokens, V vocabulary, H hidden size, K stored teacher tokens.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import torch_path
from .arguments import (
    Settings,
    Sides,
    Tokens,
    check_linear_sides,
    check_logit_sides,
    check_settings,
    check_tokens,
)
from .reference import DistillationOutput
from .torch_path import gradient_dtype

BACKENDS = ("auto", "triton", "torch")
# The row kernel's candidate buffer is sized for this.
MAX_TOP_K = 1024


def linear_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    top_k: int | None = None,
    add_tail: bool = True,
    distill_weight: Tensor | None = None,
    target_ids: Tensor | None = None,
    advantage: Tensor | None = None,
    policy_weight: Tensor | None = None,
    old_logprob: Tensor | None = None,
    clip_range: tuple[float, float] = (0.2, 0.28),
    ratio_cap: float | None = None,
    reduction: str = "sum",
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    max_scratch_bytes: int | None = None,
) -> DistillationOutput:
    """`distillation_loss` of hidden @ headᵀ, without ever holding the logits.

    Args:
        student_hidden: [N, H], fp16, bf16, fp32 or fp64.
        student_head: [V, H], the dtype of `student_hidden`. Neither needs to require gradients;
            one that does not costs no product.
        teacher_hidden: [N, H'], its own width and dtype. Never differentiated.
        teacher_head: [V, H'].
        max_scratch_bytes: bound on temporary memory beyond the inputs, the returned gradients and
            [N] vectors. None: 64 MiB on the CPU; on a GPU two slabs' worth for the best speed.
        **others: those of `distillation_loss`.

    Under autocast the four matrices are cast like the arguments of a linear layer.

    Raises:
        ValueError: naming the argument that is missing, out of range, or of a wrong shape, dtype or
            device.
    """
    if isinstance(student_hidden, Tensor):
        matrices = (student_hidden, student_head, teacher_hidden, teacher_head)
        student_hidden, student_head, teacher_hidden, teacher_head = (
            _autocast(matrix, student_hidden.device.type) for matrix in matrices
        )
    sides = check_linear_sides(
        student_hidden, student_head, teacher_hidden, teacher_head, teacher_topk
    )
    return _loss(
        sides,
        alpha=alpha,
        temperature=temperature,
        softcap=softcap,
        top_k=top_k,
        add_tail=add_tail,
        distill_weight=distill_weight,
        target_ids=target_ids,
        advantage=advantage,
        policy_weight=policy_weight,
        old_logprob=old_logprob,
        clip_range=clip_range,
        ratio_cap=ratio_cap,
        reduction=reduction,
        teacher_topk=teacher_topk,
        backend=backend,
        max_scratch_bytes=max_scratch_bytes,
    )


def linear_scratch_bytes(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    softcap: float | None = None,
    top_k: int | None = None,
    backend: str,
) -> int:
    """Temporary memory of `linear_distillation_loss` where nothing bounds it and both gradients are
    wanted, beside them and [N] vectors. Arguments as there; of the tensors only shapes are read.

    With "torch" an upper bound, with "triton" all buffers.
    """
    sides = Sides(student_hidden, student_head, teacher_hidden, teacher_head, None, None)
    settings = check_settings(
        vocabulary=sides.vocabulary,
        alpha=0.5,
        temperature=1.0,
        softcap=softcap,
        top_k=top_k,
        add_tail=True,
        clip_range=(0.0, 0.0),
        ratio_cap=None,
        teacher_topk=None,
    )
    if backend == "triton":
        from .triton_path import scratch_bytes
    else:
        scratch_bytes = torch_path.scratch_bytes
    return scratch_bytes(sides, settings)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    top_k: int | None = None,
    add_tail: bool = True,
    distill_weight: Tensor | None = None,
    target_ids: Tensor | None = None,
    advantage: Tensor | None = None,
    policy_weight: Tensor | None = None,
    old_logprob: Tensor | None = None,
    clip_range: tuple[float, float] = (0.2, 0.28),
    ratio_cap: float | None = None,
    reduction: str = "sum",
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    max_scratch_bytes: int | None = None,
) -> DistillationOutput:
    """Distillation and policy gradient in one pass, with per-token statistics.

    loss = Σ_t distill_weight_t·ρ_t·D_t + Σ_t policy_weight_t·L_t, where D is the divergence of SDPO
    (arXiv 2601.20802), ρ its capped, detached token ratio, and L the clipped policy loss
    max(−A·r, −A·clip(r, 1 − low, 1 + high)), r the ratio to `old_logprob`. Log-ratios are clamped
    to ±20.

    Args:
        student_logits: [N, V], fp16, bf16, fp32 or fp64; gradients flow here.
        teacher_logits: [N, V], any of these dtypes. Never differentiated.
        alpha: 0 forward KL(Q‖S), 1 reverse KL(S‖Q), between them
            (1 − α)·KL(S‖M) + α·KL(Q‖M), M = (1 − α)·S + α·Q.
        temperature: divides both logits, for divergence, entropies and log-probs.
        softcap: z ← c·tanh(z/c) before the temperature.
        top_k: the student's k greatest logits, the lower index among equal ones, and one bucket
            for the rest. None, or k ≥ V: the full vocabulary.
        add_tail: False leaves the rest out and renormalises both sides over the k.
        distill_weight: [N] coefficient of each divergence, default 1/N. Where it is 0 the teacher's
            row is never read.
        target_ids: [N] int64, the sampled tokens.
        advantage: [N], turns the policy term on.
        policy_weight: [N] coefficient of each policy loss, default 1/N.
        old_logprob: [N] log-prob of each sampled token when it was sampled. None: ratio 1.
        clip_range: (low, high) of the clip.
        ratio_cap: multiplies each divergence by min(exp(logp − old_logprob), cap).
        reduction: "sum" gives a scalar loss, its gradient computed along the way; "none" gives [N],
            and the backward pass computes everything a second time.
        teacher_topk: (ids [N, K] int64, log-probs [N, K] at the same temperature) in place of the
            teacher. The ids, distinct in each row, are the support; the remaining mass is the tail.
        backend: "auto", "triton" or "torch". "auto" is Triton on CUDA, and PyTorch elsewhere and
            for what Triton does not take: fp64, and top_k above 1024.
        max_scratch_bytes: bound on temporary memory, see `linear_distillation_loss`.

    Returns:
        A `DistillationOutput`. Entries of tokens whose weights are all 0 are 0.

    Raises:
        ValueError: naming the argument that is missing, out of range, or of a wrong shape, dtype or
            device. An id outside the vocabulary raises on the CPU and gives NaN on a GPU.
    """
    return _loss(
        check_logit_sides(student_logits, teacher_logits, teacher_topk),
        alpha=alpha,
        temperature=temperature,
        softcap=softcap,
        top_k=top_k,
        add_tail=add_tail,
        distill_weight=distill_weight,
        target_ids=target_ids,
        advantage=advantage,
        policy_weight=policy_weight,
        old_logprob=old_logprob,
        clip_range=clip_range,
        ratio_cap=ratio_cap,
        reduction=reduction,
        teacher_topk=teacher_topk,
        backend=backend,
        max_scratch_bytes=max_scratch_bytes,
    )


def _loss(
    sides: Sides,
    *,
    alpha: float,
    temperature: float,
    softcap: float | None,
    top_k: int | None,
    add_tail: bool,
    distill_weight: Tensor | None,
    target_ids: Tensor | None,
    advantage: Tensor | None,
    policy_weight: Tensor | None,
    old_logprob: Tensor | None,
    clip_range: tuple[float, float],
    ratio_cap: float | None,
    reduction: str,
    teacher_topk: tuple[Tensor, Tensor] | None,
    backend: str,
    max_scratch_bytes: int | None,
) -> DistillationOutput:
    settings = check_settings(
        vocabulary=sides.vocabulary,
        alpha=alpha,
        temperature=temperature,
        softcap=softcap,
        top_k=top_k,
        add_tail=add_tail,
        clip_range=clip_range,
        ratio_cap=ratio_cap,
        teacher_topk=teacher_topk,
    )
    tokens = check_tokens(
        sides,
        distill_weight=distill_weight,
        target_ids=target_ids,
        advantage=advantage,
        policy_weight=policy_weight,
        old_logprob=old_logprob,
        ratio_cap=ratio_cap,
    )
    if reduction not in ("sum", "none"):
        raise ValueError(f'reduction must be "sum" or "none", got {reduction!r}')
    if max_scratch_bytes is not None and max_scratch_bytes < 1:
        raise ValueError(f"max_scratch_bytes must be positive or None, got {max_scratch_bytes}")
    backend = _choose(backend, sides, settings.top_k)
    # torch.compile takes no tensor twice, and teacher and student may share a head: a view is
    # another tensor. The teacher is never differentiated anyway.
    teacher, teacher_head = (
        None if side is None else side.detach() for side in (sides.teacher, sides.teacher_head)
    )
    sides = sides._replace(teacher=teacher, teacher_head=teacher_head)
    outputs = _Objective.apply(
        *sides, *tokens, settings, reduction == "sum", backend, max_scratch_bytes
    )
    if target_ids is None:
        outputs = (*outputs[:4], None, None)
    return DistillationOutput(*outputs)


def _choose(backend: str, sides: Sides, top_k: int | None) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    floats = [side.dtype for side in (sides.student, sides.teacher) if side is not None]
    double, device = torch.float64 in floats, sides.student.device.type
    if backend == "auto":
        usable = device == "cuda" and not double and (top_k or 0) <= MAX_TOP_K
        return "triton" if usable and find_spec("triton") is not None else "torch"
    if backend == "triton":
        if double:
            raise ValueError('backend "triton" does not take fp64 inputs; use backend="torch"')
        if (top_k or 0) > MAX_TOP_K:
            raise ValueError(f'top_k must be ≤ {MAX_TOP_K} with backend "triton", got {top_k}')
        if find_spec("triton") is None:
            raise ValueError('backend "triton" needs the package triton; use backend="torch"')
        from .row_kernel import INTERPRETED

        if device != "cuda" and not INTERPRETED:
            raise ValueError(
                'backend "triton" needs CUDA tensors, or TRITON_INTERPRET=1 in the environment '
                'before the first import; use backend="torch"'
            )
    return backend


def _autocast(matrix: Any, device_type: str) -> Any:
    """What autocast does to a linear layer's arguments."""
    if not isinstance(matrix, Tensor) or not torch.is_autocast_enabled(device_type):
        return matrix
    if not matrix.is_floating_point() or matrix.dtype == torch.float64:
        return matrix
    return matrix.to(torch.get_autocast_dtype(device_type))


class _Objective(torch.autograd.Function):
    """Loss and statistics; the gradient in the forward pass if the upstream one is a scalar."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        sides, tokens = Sides(*arguments[:6]), Tokens(*arguments[6:11])
        settings, scalar, backend, scratch = arguments[11:]
        wants = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        early = wants if scalar else (False, False)
        stats, *gradients = _call(sides, tokens, settings, None, early, backend, scratch)
        ctx.save_for_backward(*arguments[:11])
        ctx.call = (settings, wants, backend, scratch)
        ctx.gradients = gradients if scalar else None
        loss, *statistics = stats.unbind()
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        loss = loss.sum() if scalar else loss.clone()
        return (loss, *statistics)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 13
        if upstream is None:
            return (None, None, *nothing)
        saved = ctx.saved_tensors
        sides, tokens = Sides(*saved[:6]), Tokens(*saved[6:11])
        settings, wants, backend, scratch = ctx.call
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            # Handed over once, so that nobody else holds them and they may be scaled in place.
            gradients = [_scale_(gradient, upstream, backend) for gradient in gradients]
        else:
            rows = upstream.expand(sides.student.shape[0]).contiguous()
            gradients = _call(sides, tokens, settings, rows, wants, backend, scratch)[1:]
        d_student, d_head = gradients
        return (
            d_student.to(sides.student.dtype) if wants[0] else None,
            d_head.to(sides.student.dtype) if wants[1] else None,
            *nothing,
        )


def _scale_(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    if torch.compiler.is_compiling():
        return gradient * factor
    if backend == "triton":
        from .triton_path import scale_

        return scale_(gradient, factor)
    return gradient.mul_(factor)


def _call(
    sides: Sides,
    tokens: Tokens,
    settings: Settings,
    upstream: Tensor | None,
    wants: tuple[bool, bool],
    backend: str,
    scratch: int | None,
) -> list[Tensor]:
    return _evaluate(
        *sides,
        *tokens,
        upstream,
        settings.alpha,
        settings.temperature,
        settings.softcap,
        settings.top_k,
        settings.add_tail,
        settings.clip_low,
        settings.clip_high,
        settings.ratio_cap,
        *wants,
        backend,
        scratch,
    )


@torch.library.custom_op("sodfast_kernels::evaluate", mutates_args=())
def _evaluate(
    student: Tensor,
    student_head: Tensor | None,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    stored_ids: Tensor | None,
    stored_logprobs: Tensor | None,
    distill_weight: Tensor,
    target_ids: Tensor | None,
    advantage: Tensor | None,
    policy_weight: Tensor | None,
    old_logprob: Tensor | None,
    upstream: Tensor | None,
    alpha: float,
    temperature: float,
    softcap: float | None,
    top_k: int | None,
    add_tail: bool,
    clip_low: float,
    clip_high: float,
    ratio_cap: float | None,
    want_student: bool,
    want_head: bool,
    backend: str,
    max_scratch_bytes: int | None,
) -> list[Tensor]:
    sides = Sides(student, student_head, teacher, teacher_head, stored_ids, stored_logprobs)
    tokens = Tokens(distill_weight, target_ids, advantage, policy_weight, old_logprob)
    settings = Settings(
        alpha, temperature, softcap, top_k, add_tail, clip_low, clip_high, ratio_cap
    )
    if backend == "triton":
        from .triton_path import evaluate
    else:
        evaluate = torch_path.evaluate
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        return list(
            evaluate(sides, tokens, settings, upstream, want_student, want_head, max_scratch_bytes)
        )


@_evaluate.register_fake
def _(
    student: Tensor,
    student_head: Tensor | None,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    stored_ids: Tensor | None,
    stored_logprobs: Tensor | None,
    distill_weight: Tensor,
    target_ids: Tensor | None,
    advantage: Tensor | None,
    policy_weight: Tensor | None,
    old_logprob: Tensor | None,
    upstream: Tensor | None,
    alpha: float,
    temperature: float,
    softcap: float | None,
    top_k: int | None,
    add_tail: bool,
    clip_low: float,
    clip_high: float,
    ratio_cap: float | None,
    want_student: bool,
    want_head: bool,
    backend: str,
    max_scratch_bytes: int | None,
) -> list[Tensor]:
    rows = student.shape[0]
    wide = torch.promote_types(student.dtype, torch.float32)
    dtype = gradient_dtype(student.dtype)
    head_shape = student_head.shape if student_head is not None and want_head else (0,)
    return [
        student.new_empty(6, rows, dtype=wide),
        student.new_empty(student.shape if want_student else (0,), dtype=dtype),
        student.new_empty(head_shape, dtype=dtype),
    ]
