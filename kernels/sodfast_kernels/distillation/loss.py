"""The public distillation functions: arguments checked, backend chosen, autograd.

Both forms, both reductions and both backends go through one custom op, so `torch.compile` sees an
opaque call with known output shapes.

Suffixes: N response tokens, V vocabulary, H hidden size, K stored teacher tokens.
"""

from typing import Any

import torch
from torch import Tensor

from . import torch_path
from .arguments import (
    Call,
    Objective,
    Settings,
    Sides,
    Tokens,
    check_linear_sides,
    check_logit_sides,
    check_settings,
    check_tokens,
    packed_schema,
)
from .reference import DistillationOutput


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
    dual_clip: float | None = None,
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
    objective = Objective(
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
        dual_clip=dual_clip,
        ratio_cap=ratio_cap,
        reduction=reduction,
        teacher_topk=teacher_topk,
        backend=backend,
        max_scratch_bytes=max_scratch_bytes,
    )
    return linear_loss(objective, student_hidden, student_head, teacher_hidden, teacher_head)


def linear_loss(
    objective: Objective,
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    may_be_padded: bool = False,
    label_weight: Tensor | None = None,
) -> DistillationOutput:
    """`linear_distillation_loss` of an `Objective`, with what only the modules have.

    Args:
        student_bias, teacher_bias: [V] of each head, added to the logits.
        may_be_padded: the heads may differ in their numbers of rows; the smaller number is the
            vocabulary, and the other head's last rows have no part in anything.
        label_weight: [N], of the dtype of the statistics. Adds Σ_t label_weight_t·(−log
            softmax(z_t)[target_ids_t]), at temperature 1. Excludes `advantage` and `softcap`.

    Raises:
        ValueError: as `linear_distillation_loss`.
    """
    if isinstance(student_hidden, Tensor):
        device = student_hidden.device.type
        student_hidden, student_head, teacher_hidden, teacher_head, student_bias, teacher_bias = (
            _autocast(tensor, device)
            for tensor in (
                student_hidden,
                student_head,
                teacher_hidden,
                teacher_head,
                student_bias,
                teacher_bias,
            )
        )
    sides = check_linear_sides(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        objective.teacher_topk,
        student_bias,
        teacher_bias,
        may_be_padded=may_be_padded,
    )
    return _loss(sides, objective, label_weight)


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
    settings = check_settings(Objective(softcap=softcap, top_k=top_k, backend="torch"), sides)
    found: int = _path(backend == "triton").scratch_bytes(sides, settings)
    return found


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
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    reduction: str = "sum",
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    max_scratch_bytes: int | None = None,
) -> DistillationOutput:
    """Distillation and policy gradient in one pass, with per-token statistics.

    loss = Σ_t distill_weight_t·ρ_t·D_t + Σ_t policy_weight_t·L_t, where D is the divergence of SDPO
    (arXiv 2601.20802), ρ its capped, detached token ratio, and L the clipped policy loss max(−A·r,
    −A·clip(r, 1 − low, 1 + high)), r the ratio to `old_logprob`. Log-ratios are clamped to ±20.

    Args:
        student_logits: [N, V], fp16, bf16, fp32 or fp64; gradients flow here.
        teacher_logits: [N, V], any of these dtypes. Never differentiated.
        alpha: 0 forward KL(Q‖S), 1 reverse KL(S‖Q), between them
            (1 − α)·KL(S‖M) + α·KL(Q‖M), M = (1 − α)·S + α·Q.
        temperature: divides both logits, after softcap: z ← c·tanh(z/c).
        top_k: the student's k greatest logits (the lower index among equals) and a bucket for the
            rest. None, or k ≥ V: the full vocabulary.
        add_tail: False leaves the rest out and renormalises both sides over the k.
        distill_weight: [N] coefficient of each divergence, default 1/N. Where it is 0 the teacher's
            row is never read.
        target_ids: [N] int64, the sampled tokens.
        advantage, policy_weight: [N], turns the policy term on; its coefficients, default 1/N.
        old_logprob: [N] log-prob of each sampled token when it was sampled. None: ratio 1.
        clip_range: (low, high) of the clip.
        dual_clip: c > 1, bounds the policy loss of a token with a negative advantage A by −c·A; a
            loss at the bound has no gradient (arXiv 1912.09729, where c is 3). None: no bound.
        ratio_cap: multiplies each divergence by min(exp(logp − old_logprob), cap).
        reduction: "sum": a scalar, its gradient made along the way; "none": [N], computed twice.
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
    objective = Objective(
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
        dual_clip=dual_clip,
        ratio_cap=ratio_cap,
        reduction=reduction,
        teacher_topk=teacher_topk,
        backend=backend,
        max_scratch_bytes=max_scratch_bytes,
    )
    return _loss(check_logit_sides(student_logits, teacher_logits, teacher_topk), objective)


def _path(triton: bool) -> Any:
    """The module that evaluates a call. Triton's is imported only where it is used."""
    if not triton:
        return torch_path
    from . import triton_path

    return triton_path


def _loss(
    sides: Sides, objective: Objective, label_weight: Tensor | None = None
) -> DistillationOutput:
    settings, tokens = check_settings(objective, sides), check_tokens(objective, sides)
    if label_weight is not None:
        assert tokens.target_ids is not None and tokens.advantage is None
        assert settings.softcap is None
        tokens = tokens._replace(policy_weight=label_weight)
    scalar = objective.reduction == "sum"
    outputs = _Loss.apply(settings, scalar, *sides, *tokens)  # type: ignore[no-untyped-call]
    if torch.compiler.is_compiling():
        # torch 2.11 forgets there that the statistics were marked as not differentiable.
        outputs = (outputs[0], *(entry.detach() for entry in outputs[1:]))
    if objective.target_ids is None:
        outputs = (*outputs[:4], None, None)
    return DistillationOutput(*outputs)


def _autocast(tensor: Any, device_type: str) -> Any:
    """What autocast does to a linear layer's arguments."""
    if not isinstance(tensor, Tensor) or not torch.is_autocast_enabled(device_type):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


# Positions of the student's tensors among the arguments of `_Loss.forward`, and of their gradients.
DIFFERENTIABLE = tuple(
    2 + Sides._fields.index(name) for name in ("student", "student_head", "student_bias")
)


class _Loss(torch.autograd.Function):
    """Loss and statistics; the gradient in the forward pass if the upstream one is a scalar."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, scalar: bool, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.settings = settings
        ctx.wants = tuple(ctx.needs_input_grad[position] for position in DIFFERENTIABLE)
        ctx.save_for_backward(*tensors)
        wants = ctx.wants if scalar else (False, False, False)
        stats, *gradients = _evaluate(*_call(tensors, settings, None, wants).pack())
        ctx.gradients = gradients if scalar else None
        loss, *statistics = stats.unbind()
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        loss = loss.sum() if scalar else loss.clone()
        return (loss, *statistics)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if upstream is None:
            return tuple(found)
        student = ctx.saved_tensors[0]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            # Handed over once, so that nobody else holds them and they may be scaled in place.
            gradients = [_scale_(gradient, upstream, ctx.settings.triton) for gradient in gradients]
        else:
            rows = upstream.expand(student.shape[0]).contiguous()
            call = _call(ctx.saved_tensors, ctx.settings, rows, ctx.wants)
            gradients = _evaluate(*call.pack())[1:]
        for position, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
            if ctx.needs_input_grad[position]:
                found[position] = gradient.to(student.dtype)
        return tuple(found)


def _call(
    tensors: tuple[Any, ...],
    settings: Settings,
    upstream: Tensor | None,
    wants: tuple[bool, bool, bool],
) -> Call:
    count = len(Sides._fields)
    return Call(Sides(*tensors[:count]), Tokens(*tensors[count:]), settings, upstream, *wants)


def _scale_(gradient: Tensor, factor: Tensor, triton: bool) -> Tensor:
    if torch.compiler.is_compiling():
        return gradient * factor
    scaled: Tensor = _path(triton).scale_(gradient, factor)
    return scaled


@torch.library.custom_op(
    "sodfast_kernels::evaluate", mutates_args=(), schema=f"({packed_schema()}) -> Tensor[]"
)
def _evaluate(*arguments: Any) -> list[Tensor]:
    """Statistics [6, N], d_student, d_head and d_bias (empty if not wanted) of a packed `Call`."""
    call = Call.unpack(arguments)
    with torch.no_grad(), torch.autocast(call.sides.student.device.type, enabled=False):
        return list(_path(call.settings.triton).evaluate(call))


@_evaluate.register_fake
def _(*arguments: Any) -> list[Tensor]:
    call = Call.unpack(arguments)
    sides, student = call.sides, call.sides.student
    head_shape = (
        sides.student_head.shape if sides.student_head is not None and call.want_head else (0,)
    )
    bias_shape = sides.student_bias.shape if sides.student_bias is not None else (0,)
    return [
        student.new_empty(6, student.shape[0], dtype=sides.compute_dtype),
        student.new_empty(student.shape if call.want_student else (0,), dtype=sides.gradient_dtype),
        student.new_empty(head_shape, dtype=sides.gradient_dtype),
        student.new_empty(bias_shape if call.want_bias else (0,), dtype=sides.compute_dtype),
    ]
