"""The arguments of the objective: what a call consists of, and every check on it.

Suffixes: N response tokens, V vocabulary, H hidden size, K stored teacher tokens.
"""

import math
from itertools import islice
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..backend import uses_triton

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Objective(NamedTuple):
    """The keyword arguments of both public functions as they were given, explained there."""

    alpha: float = 0.5
    temperature: float = 1.0
    softcap: float | None = None
    top_k: int | None = None
    add_tail: bool = True
    distill_weight: Tensor | None = None
    target_ids: Tensor | None = None
    advantage: Tensor | None = None
    policy_weight: Tensor | None = None
    old_logprob: Tensor | None = None
    clip_range: tuple[float, float] = (0.2, 0.28)
    dual_clip: float | None = None
    ratio_cap: float | None = None
    reduction: str = "sum"
    teacher_topk: tuple[Tensor, Tensor] | None = None
    backend: str = "auto"
    max_scratch_bytes: int | None = None


class Sides(NamedTuple):
    """Student and teacher: logits [N, V] without heads, or hidden [N, H] with heads [V, H] and
    perhaps biases [V]; the teacher may be `stored_ids`, `stored_logprobs` [N, K] instead.

    Heads of different padding have different numbers of rows; the smaller one is the vocabulary.
    The teacher's are detached. They must be views: torch.compile takes no tensor twice, and teacher
    and student may share a head.
    """

    student: Tensor
    student_head: Tensor | None
    teacher: Tensor | None
    teacher_head: Tensor | None
    stored_ids: Tensor | None
    stored_logprobs: Tensor | None
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        if self.student_head is None:
            return self.student.shape[1]
        heads = (self.student_head, self.teacher_head)
        return min(head.shape[0] for head in heads if head is not None)

    @property
    def student_layer(self) -> tuple[Tensor | None, Tensor | None]:
        """Head and bias of the vocabulary, without padding."""
        return _first_rows(self.vocabulary, self.student_head, self.student_bias)

    @property
    def teacher_layer(self) -> tuple[Tensor | None, Tensor | None]:
        return _first_rows(self.vocabulary, self.teacher_head, self.teacher_bias)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of logits and statistics."""
        return torch.promote_types(self.student.dtype, torch.float32)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """In which gradients wait for the backward pass: no loss scale has reached fp16 yet."""
        return torch.float32 if self.student.dtype == torch.float16 else self.student.dtype


class Tokens(NamedTuple):
    """What belongs to each token, [N]. `policy_weight` without `advantage` is the coefficient of
    the cross-entropy −log softmax(z)[target_ids] at temperature 1, in place of a policy loss."""

    distill_weight: Tensor
    target_ids: Tensor | None
    advantage: Tensor | None
    policy_weight: Tensor | None
    old_logprob: Tensor | None

    @property
    def active(self) -> Tensor:
        """[N] bool: the rows with any weight, the only ones that are read."""
        active = self.distill_weight != 0
        return active if self.policy_weight is None else active | (self.policy_weight != 0)

    @property
    def has_labels(self) -> bool:
        """Whether there is a cross-entropy."""
        return self.policy_weight is not None and self.advantage is None

    def rows(self, part: slice) -> "Tokens":
        rest = [None if entry is None else entry[part] for entry in self[1:]]
        return Tokens(self.distill_weight[part], *rest)


class Settings(NamedTuple):
    """The scalars of one call; `top_k` is None for the full vocabulary."""

    alpha: float
    temperature: float
    softcap: float | None
    top_k: int | None
    add_tail: bool
    clip_low: float
    clip_high: float
    dual_clip: float | None
    ratio_cap: float | None
    triton: bool
    max_scratch_bytes: int | None


class Call(NamedTuple):
    """What one evaluation of the objective gets, checked.

    upstream: [N], multiplies each row's gradient; None for 1.
    want_student, want_head, want_bias: which gradients to compute.
    """

    sides: Sides
    tokens: Tokens
    settings: Settings
    upstream: Tensor | None
    want_student: bool
    want_head: bool
    want_bias: bool = False

    @property
    def wants(self) -> bool:
        return self.want_student or self.want_head or self.want_bias

    @property
    def labels_apart(self) -> bool:
        """Whether the cross-entropy, which is at temperature 1, takes a softmax of its own."""
        return self.tokens.has_labels and self.settings.temperature != 1

    def pack(self) -> tuple[Any, ...]:
        """The same as a flat list, which is all that a custom op takes."""
        return (*self.sides, *self.tokens, *self.settings, *self[3:])

    @staticmethod
    def unpack(arguments: tuple[Any, ...]) -> "Call":
        rest = iter(arguments)
        sides = Sides(*islice(rest, len(Sides._fields)))
        tokens = Tokens(*islice(rest, len(Tokens._fields)))
        return Call(sides, tokens, Settings(*islice(rest, len(Settings._fields))), *rest)


def packed_schema() -> str:
    """The types and names of `Call.pack`, as a custom op wants to be told."""
    kinds: dict[Any, str] = {float: "float", int: "int", bool: "bool", Tensor: "Tensor"}
    kinds |= {kind | None: f"{name}?" for kind, name in kinds.items()}
    hints = [
        hint for kind in (Sides, Tokens, Settings, Call) for hint in get_type_hints(kind).items()
    ]
    return ", ".join(f"{kinds[kind]} {name}" for name, kind in hints if kind in kinds)


def check_scalars(objective: Objective) -> None:
    """Raises ValueError naming the scalar that is out of its range, whatever the tensors are."""
    alpha, temperature, softcap, top_k, add_tail = objective[:5]
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if not isinstance(add_tail, bool):
        raise ValueError(f"add_tail must be True or False, got {add_tail!r}")
    dual_clip = objective.dual_clip
    if dual_clip is not None and not 1 < dual_clip < math.inf:
        raise ValueError(f"dual_clip must lie above 1, or be None, got {dual_clip}")
    ratio_cap, scratch = objective.ratio_cap, objective.max_scratch_bytes
    if ratio_cap is not None and not ratio_cap > 0:
        raise ValueError(f"ratio_cap must be positive or None, got {ratio_cap}")
    if objective.reduction not in ("sum", "none"):
        raise ValueError(f'reduction must be "sum" or "none", got {objective.reduction!r}')
    if scratch is not None and scratch < 1:
        raise ValueError(f"max_scratch_bytes must be positive or None, got {scratch}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer or None, got {top_k!r}")


def check_settings(objective: Objective, sides: Sides) -> Settings:
    """The scalars, checked, and the backend chosen.

    Raises:
        ValueError: naming the argument that is out of its range.
    """
    check_scalars(objective)
    alpha, temperature, softcap, top_k, add_tail = objective[:5]
    low, high = _clip_range(objective.clip_range)
    ratio_cap = objective.ratio_cap
    top_k = _top_k(top_k, sides, objective.teacher_topk)
    networks = [side for side in (sides.student, sides.teacher) if side is not None]
    return Settings(
        alpha=float(alpha),
        temperature=float(temperature),
        softcap=None if softcap is None else float(softcap),
        top_k=top_k,
        add_tail=add_tail,
        clip_low=low,
        clip_high=high,
        dual_clip=None if objective.dual_clip is None else float(objective.dual_clip),
        ratio_cap=None if ratio_cap is None else float(ratio_cap),
        triton=uses_triton(objective.backend, networks, top_k),
        max_scratch_bytes=objective.max_scratch_bytes,
    )


def _clip_range(clip_range: tuple[float, float]) -> tuple[float, float]:
    if len(clip_range) != 2 or not (0 <= clip_range[0] <= 1 and 0 <= clip_range[1] < math.inf):
        raise ValueError(
            f"clip_range must be (low, high) with 0 ≤ low ≤ 1 and high ≥ 0, got {clip_range!r}"
        )
    return float(clip_range[0]), float(clip_range[1])


def _top_k(
    top_k: int | None, sides: Sides, teacher_topk: tuple[Tensor, Tensor] | None
) -> int | None:
    """None where the student's top k do not choose the support."""
    if teacher_topk is not None and top_k is not None and top_k != teacher_topk[0].shape[-1]:
        raise ValueError(
            f"top_k={top_k} contradicts teacher_topk, whose {teacher_topk[0].shape[-1]} ids a row "
            "are the support; leave top_k out"
        )
    if top_k is None or top_k >= sides.vocabulary or teacher_topk is not None:
        return None
    return top_k


def check_linear_sides(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    may_be_padded: bool = False,
) -> Sides:
    """Hidden states, heads and biases, checked; raises ValueError naming the argument.

    may_be_padded: whether the heads may differ in their numbers of rows.
    """
    _matrix("student_hidden", student_hidden, student_hidden)
    _matrix("student_head", student_head, student_hidden)
    _same("student_head", "dtype", student_head.dtype, student_hidden.dtype)
    _same("student_head", "width", student_head.shape[1], student_hidden.shape[1])
    rows, vocabulary = student_hidden.shape[0], student_head.shape[0]
    if vocabulary < 1:
        raise ValueError("student_head must have at least one row, one for each token")
    _bias("student_bias", student_bias, "student_head", student_head)
    if teacher_topk is not None:
        for name, tensor in (("teacher_hidden", teacher_hidden), ("teacher_head", teacher_head)):
            if tensor is not None:
                raise ValueError(f"{name} and teacher_topk exclude each other: give one teacher")
        ids, logprobs = _stored(teacher_topk, student_hidden, rows, vocabulary)
        return Sides(student_hidden, student_head, None, None, ids, logprobs)
    if teacher_hidden is None:
        raise ValueError("teacher_hidden is missing (or give teacher_topk)")
    if teacher_head is None:
        raise ValueError("teacher_head is missing (or give teacher_topk)")
    _matrix("teacher_hidden", teacher_hidden, student_hidden)
    _matrix("teacher_head", teacher_head, student_hidden)
    _same("teacher_hidden", "number of rows", teacher_hidden.shape[0], rows)
    _same("teacher_head", "dtype", teacher_head.dtype, teacher_hidden.dtype)
    _same("teacher_head", "width", teacher_head.shape[1], teacher_hidden.shape[1])
    if not may_be_padded:
        _same("teacher_head", "vocabulary (number of rows)", teacher_head.shape[0], vocabulary)
    _bias("teacher_bias", teacher_bias, "teacher_head", teacher_head)
    return Sides(
        student_hidden,
        student_head,
        teacher_hidden.detach(),
        teacher_head.detach(),
        None,
        None,
        student_bias,
        None if teacher_bias is None else teacher_bias.detach(),
    )


def check_logit_sides(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
) -> Sides:
    """Logits, checked; raises ValueError naming the argument."""
    _matrix("student_logits", student_logits, student_logits)
    rows, vocabulary = student_logits.shape
    if vocabulary < 1:
        raise ValueError("student_logits must have at least one column, one for each token")
    if teacher_topk is not None:
        if teacher_logits is not None:
            raise ValueError("teacher_logits and teacher_topk exclude each other: give one teacher")
        ids, logprobs = _stored(teacher_topk, student_logits, rows, vocabulary)
        return Sides(student_logits, None, None, None, ids, logprobs)
    if teacher_logits is None:
        raise ValueError("teacher_logits is missing (or give teacher_topk)")
    _matrix("teacher_logits", teacher_logits, student_logits)
    _same("teacher_logits", "number of rows", teacher_logits.shape[0], rows)
    _same("teacher_logits", "vocabulary (width)", teacher_logits.shape[1], vocabulary)
    return Sides(student_logits, None, teacher_logits.detach(), None, None, None)


def check_tokens(objective: Objective, sides: Sides) -> Tokens:
    """The per-token tensors, checked and with their defaults filled in.

    Raises:
        ValueError: naming the argument that is missing, of a wrong shape, dtype or device.
    """
    rows, device = sides.student.shape[0], sides.student.device
    dtype = sides.compute_dtype
    target_ids, advantage = objective.target_ids, objective.advantage
    for name, needed in (
        ("advantage", "target_ids"),
        ("policy_weight", "advantage"),
        ("old_logprob", "target_ids"),
        ("ratio_cap", "target_ids"),
        ("ratio_cap", "old_logprob"),
    ):
        if getattr(objective, name) is not None and getattr(objective, needed) is None:
            raise ValueError(f"{needed} is missing: {name} needs it")

    def floats(name: str) -> Tensor | None:
        tensor: Tensor | None = getattr(objective, name)
        if tensor is None:
            return None
        _vector(name, tensor, rows, device)
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        return tensor.detach().to(dtype)

    def uniform() -> Tensor:
        return torch.full((rows,), 1.0 / max(rows, 1), dtype=dtype, device=device)

    if target_ids is not None:
        _vector("target_ids", target_ids, rows, device)
        if target_ids.dtype != torch.int64:
            raise ValueError(f"target_ids must be int64, got {target_ids.dtype}")
    old = floats("old_logprob")
    if old is not None:
        # A log-prob of +inf is nonsense; the clamp of the log-ratio would hide it.
        old = old.masked_fill(old == math.inf, math.nan)
    weight = floats("distill_weight")
    policy = floats("policy_weight")
    tokens = Tokens(
        distill_weight=uniform() if weight is None else weight,
        target_ids=None if target_ids is None else target_ids.detach(),
        advantage=floats("advantage"),
        policy_weight=uniform() if policy is None and advantage is not None else policy,
        old_logprob=old,
    )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids_on_cpu(sides, tokens)
    return tokens


def _check_ids_on_cpu(sides: Sides, tokens: Tokens) -> None:
    """Ids are values: reading them on a GPU would stall it, so there they come out as NaN."""
    distilled = tokens.distill_weight != 0
    if tokens.target_ids is not None:
        _in_vocabulary("target_ids", tokens.target_ids, tokens.active, sides.vocabulary)
    if sides.stored_ids is not None:
        _in_vocabulary("teacher_topk ids", sides.stored_ids, distilled[:, None], sides.vocabulary)


def _in_vocabulary(name: str, ids: Tensor, used: Tensor, vocabulary: int) -> None:
    if bool((((ids < 0) | (ids >= vocabulary)) & used).any()):
        raise ValueError(f"{name} must lie in [0, {vocabulary}) wherever the token has a weight")


def _matrix(name: str, tensor: Tensor, like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
    _same(name, "device", tensor.device, like.device)


def _bias(name: str, bias: Tensor | None, head_name: str, head: Tensor) -> None:
    """One entry for each row of its head, of the head's dtype."""
    if bias is None:
        return
    if not isinstance(bias, Tensor) or tuple(bias.shape) != (head.shape[0],):
        got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(
            f"{name} must be a tensor of shape ({head.shape[0]},), one entry for each row of "
            f"{head_name}, got {got}"
        )
    _same(name, f"the dtype of {head_name},", bias.dtype, head.dtype)
    _same(name, "device", bias.device, head.device)


def _first_rows(
    count: int, head: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    return None if head is None else head[:count], None if bias is None else bias[:count]


def _vector(name: str, tensor: Tensor, rows: int, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(tensor.shape)}")
    _same(name, "device", tensor.device, device)


def _stored(
    teacher_topk: tuple[Tensor, Tensor], like: Tensor, rows: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    if len(teacher_topk) != 2:
        raise ValueError("teacher_topk must be a pair (ids, logprobs)")
    ids, logprobs = teacher_topk
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != rows:
        raise ValueError(f"teacher_topk ids must be a tensor of shape ({rows}, K)")
    if not 1 <= ids.shape[1] <= vocabulary:
        raise ValueError(f"teacher_topk must hold 1 to {vocabulary} ids a row, got {ids.shape[1]}")
    if ids.dtype != torch.int64:
        raise ValueError(f"teacher_topk ids must be int64, got {ids.dtype}")
    _matrix("teacher_topk logprobs", logprobs, like)
    _same("teacher_topk logprobs", "shape", tuple(logprobs.shape), tuple(ids.shape))
    _same("teacher_topk ids", "device", ids.device, like.device)
    return ids.detach(), logprobs.detach()


def _same(name: str, what: str, got: object, expected: object) -> None:
    if got != expected:
        raise ValueError(f"{name} must have {what} {expected}, got {got}")
