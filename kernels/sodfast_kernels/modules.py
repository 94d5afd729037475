"""The distillation loss as a module of the shape that trainers expect.

Hidden states [B, T, H] or [N, H], labels, heads with biases and padded vocabularies, and the usual
reductions; computed by what `linear_distillation_loss` computes with, in the same memory.

Suffixes: N all rows (B·T of them for hidden states [B, T, H]), H hidden size, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from .distillation import DistillationOutput, Objective, check_scalars, linear_loss

REDUCTIONS = ("mean", "sum", "none", "batchmean")
Parts = tuple[Tensor, Tensor, Tensor, DistillationOutput]


class FusedLinearDistillationLoss(nn.Module):
    """hard_weight · cross-entropy of the labels + soft_weight · divergence from the teacher.

    The cross-entropy is that of softmax(z), at temperature 1; the divergence is that of
    `linear_distillation_loss`, at `temperature` and without a factor of temperature². One pass over
    tiles of logits gives both, and the logits of all rows never exist at once. No call waits for
    the GPU.

    Args:
        alpha: 0 forward KL(Q‖S), 1 reverse KL(S‖Q), between them
            (1 − α)·KL(S‖M) + α·KL(Q‖M), M = (1 − α)·S + α·Q; S the student, Q the teacher.
        temperature: divides both logits, for the divergence and the statistics.
        top_k: the divergence over the student's k greatest logits and one bucket for the rest.
            None: the full vocabulary.
        ignore_index: the label of tokens that have no loss. Whatever their hidden states hold, they
            change no result; but their rows cost as much in the matrix products as others, so pack
            the hidden states beforehand where most labels are ignored.
        hard_weight, soft_weight: finite and not negative. With soft_weight=0 the teacher's logits
            are not read, and the student's statistics are those at temperature 1.
        reduction: "mean" over the tokens that are not ignored, 0 if there are none; "sum"; "none",
            each token's loss, with a backward pass that computes everything a second time;
            "batchmean", the sum over B, or over N for hidden states [N, H].
        shift: True: the hidden state at t predicts the label at t+1, along the last axis of the
            labels, so the last state has no label; all rows of [N, H] count as one sequence. False:
            it predicts the label at t, that is, the labels are shifted already.
        return_parts: see `forward`.
        backend: "auto", "triton" or "torch", as in `linear_distillation_loss`.
        max_scratch_bytes: bound on temporary memory, as there.

    Raises:
        ValueError: naming the argument that is out of its range.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        ignore_index: int = -100,
        hard_weight: float = 0.0,
        soft_weight: float = 1.0,
        reduction: str = "mean",
        shift: bool = False,
        return_parts: bool = False,
        *,
        backend: str = "auto",
        max_scratch_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        for name, weight in (("hard_weight", hard_weight), ("soft_weight", soft_weight)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {weight}")
        if shift not in (False, True):
            raise ValueError(f"shift must be False or True: labels move by one or not, got {shift}")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")
        self.objective = Objective(
            alpha=alpha,
            temperature=temperature,
            top_k=top_k,
            reduction="none" if reduction == "none" else "sum",
            backend=backend,
            max_scratch_bytes=max_scratch_bytes,
        )
        check_scalars(self.objective)
        if soft_weight == 0:
            # Nothing is left at the temperature, so one softmax does.
            self.objective = self.objective._replace(temperature=1.0)
        self.ignore_index = ignore_index
        self.hard_weight, self.soft_weight = hard_weight, soft_weight
        self.reduction, self.shift, self.return_parts = reduction, bool(shift), return_parts

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | Parts:
        """The loss, differentiable by the student's three tensors.

        Args:
            student_hidden: [B, T, H] or [N, H], fp16, bf16, fp32 or fp64.
            student_head: [V, H], the dtype of `student_hidden`.
            teacher_hidden: [B, T, H'] or [N, H'], its own width and dtype. Never differentiated.
            teacher_head: [V', H'], the dtype of `teacher_hidden`. Where V and V' differ, the
                smaller one is the vocabulary: the other head's last rows are padding, without mass
                or gradient.
            labels: [B, T] or [N] int64. Read for `ignore_index` even if hard_weight is 0.
            student_bias, teacher_bias: [V] and [V'], of their head's dtype, added to the logits.

        Returns:
            The loss, fp32 (fp64 for fp64 inputs): a scalar, or for "none" of the shape of `labels`,
            [B, T−1] or [N−1] with `shift`, and 0 where ignored.

            With `return_parts` a tuple (loss, hard, soft, output). hard and soft are the two
            summands of the loss, weights included, reduced like the loss and detached. At another
            temperature than 1 the hard part is what the soft one leaves of the loss, so it has the
            loss's rounding error. output is a `DistillationOutput` of this loss and each token's
            statistics, detached, of the shape of the loss under "none" and 0 where ignored; its
            log-probs are those of the labels, at `temperature`.

        Raises:
            ValueError: naming the argument of a wrong shape, dtype or device. A label outside the
                vocabulary raises on the CPU; on a GPU its cross-entropy is NaN.
        """
        shape = _check_shapes(student_hidden, teacher_hidden, labels)
        vocabulary = _check_heads(student_head, teacher_head)
        dtype = torch.promote_types(student_hidden.dtype, torch.float32)
        if self.shift:
            labels = labels.roll(-1, -1)
            labels[..., -1:] = self.ignore_index
        labels_N = labels.flatten()
        kept_N = labels_N != self.ignore_index
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_labels(labels_N, kept_N, vocabulary)
        weight_N = kept_N.to(dtype) * self._token_weight(kept_N, shape).to(dtype)
        soft_weight_N = self.soft_weight * weight_N
        hard_weight_N = self.hard_weight * weight_N if self.hard_weight else None
        output = linear_loss(
            self.objective._replace(distill_weight=soft_weight_N, target_ids=labels_N),
            student_hidden.flatten(0, -2),
            student_head,
            teacher_hidden.flatten(0, -2),
            teacher_head,
            student_bias,
            teacher_bias,
            may_be_padded=True,
            label_weight=hard_weight_N,
        )

        def shaped(entries_N: Tensor) -> Tensor:
            return entries_N.view(shape)[..., : -1 if self.shift else None]

        def reduced(entries_N: Tensor) -> Tensor:
            return shaped(entries_N) if self.reduction == "none" else entries_N.sum()

        loss = shaped(output.loss) if self.reduction == "none" else output.loss
        if not self.return_parts:
            return loss
        assert output.student_logprob is not None
        soft = reduced(soft_weight_N * output.divergence)
        hard = loss.detach() - soft  # the labels' log-probs at temperature 1 may not be kept
        if hard_weight_N is None:
            hard = torch.zeros_like(soft)
        elif self.objective.temperature == 1:
            hard = reduced(-hard_weight_N * output.student_logprob)
        statistics = [shaped(entries) for entries in output[1:] if entries is not None]
        return loss, hard, soft, DistillationOutput(loss, *statistics)

    def extra_repr(self) -> str:
        alpha, temperature, top_k = (
            getattr(self.objective, name) for name in ("alpha", "temperature", "top_k")
        )
        return (
            f"alpha={alpha}, temperature={temperature}, top_k={top_k}, "
            f"hard_weight={self.hard_weight}, soft_weight={self.soft_weight}, "
            f"reduction={self.reduction!r}, shift={self.shift}"
        )

    def _token_weight(self, kept_N: Tensor, shape: torch.Size) -> Tensor:
        """What the reduction multiplies each token by, a scalar on the device."""
        if self.reduction == "mean":
            return 1 / kept_N.sum().clamp(min=1).double()
        count = 1
        if self.reduction == "batchmean":
            count = shape[0] - (self.shift and len(shape) == 1)
        return torch.full((), 1 / max(count, 1), dtype=torch.float64, device=kept_N.device)


def _check_shapes(student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> torch.Size:
    """The shape of the labels; ValueError naming the argument that does not fit."""
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if not isinstance(hidden, Tensor) or hidden.dim() not in (2, 3):
            raise ValueError(
                f"{name} must be a tensor of shape [B, T, H] or [N, H], got {_described(hidden)}"
            )
    shape = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            "teacher_hidden must have the shape of student_hidden but for the last axis, "
            f"{(*shape, 'H')}, got {tuple(teacher_hidden.shape)}"
        )
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be an int64 tensor, got {_described(labels)}; convert them with .long()"
        )
    if labels.shape != shape:
        raise ValueError(
            f"labels must have the shape of student_hidden without the last axis, {tuple(shape)}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.device != student_hidden.device:
        raise ValueError(f"labels must be on {student_hidden.device}, got {labels.device}")
    return shape


def _check_heads(student_head: Tensor, teacher_head: Tensor) -> int:
    """The vocabulary, which is the smaller head's."""
    for name, head in (("student_head", student_head), ("teacher_head", teacher_head)):
        if not isinstance(head, Tensor) or head.dim() != 2 or head.shape[0] < 1:
            raise ValueError(
                f"{name} must be a tensor of shape [V, H], with a row for each token, "
                f"got {_described(head)}"
            )
    return min(student_head.shape[0], teacher_head.shape[0])


def _described(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)} and dtype {given.dtype}"
    return type(given).__name__


def _check_labels(labels_N: Tensor, kept_N: Tensor, vocabulary: int) -> None:
    """Labels are values: reading them on a GPU would stall it."""
    outside_N = kept_N & ((labels_N < 0) | (labels_N >= vocabulary))
    if bool(outside_N.any()):
        raise ValueError(
            f"labels must lie in [0, {vocabulary}), the smaller head's rows, or be ignore_index; "
            f"got {labels_N[outside_N][0].item()}"
        )
