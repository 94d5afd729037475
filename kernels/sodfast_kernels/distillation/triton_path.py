"""The objective on a GPU: tensor-core products around the row kernel, in two levels of chunks.

Suffixes: N all rows, S rows of a slab, n rows of a tile, V vocabulary (padded to whole 16-byte
accesses where the buffer is ours), H hidden size.

Inner level: fp32 logits of one tile (about 512 rows) of student and teacher, then the row kernel,
which writes bf16 d-logits into the slab. Outer level: the gradients of hidden states and head, one
product each for a whole slab. Forward and backward together are four products (2·N·H·V flops
each), three with a frozen head. Nothing waits for the GPU.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .arguments import Settings, Sides, Tokens
from .row_kernel import (
    SCALE_BLOCK,
    full_kernel,
    launch_options,
    scale_kernel,
    stored_kernel,
    top_k_kernel,
)
from .torch_path import gradient_dtype

TILE_ROWS = 512
# Columns are padded to this, so that rows of fp32 and bf16 start on 16 bytes.
PAD = 16
# A 16-bit head whose d-logits are fp32 (fp16 inputs) is widened this many rows at a time.
WIDENED_ROWS = 8192


def evaluate(
    sides: Sides,
    tokens: Tokens,
    settings: Settings,
    upstream: Tensor | None,
    want_student: bool,
    want_head: bool,
    max_scratch_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [6, N], d_student and d_head (empty if not wanted).

    Raises:
        ValueError: if `max_scratch_bytes` does not hold a single row.
    """
    with _device(sides.student.device):
        if sides.student_head is None:
            return _logit_form(sides, tokens, settings, upstream, want_student)
        return _linear_form(
            sides, tokens, settings, upstream, want_student, want_head, max_scratch_bytes
        )


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient ← factor · gradient in place, without a sync; a factor of 1 reads nothing."""
    count = gradient.numel()
    if count:
        bf16 = gradient.dtype == torch.bfloat16
        with _device(gradient.device):
            scale_kernel[(_ceil(count, SCALE_BLOCK),)](
                gradient.view(torch.int16) if bf16 else gradient,
                factor,
                count,
                BF16=bf16,
                BLOCK=SCALE_BLOCK,
                num_warps=8,
            )
    return gradient


def _logit_form(
    sides: Sides,
    tokens: Tokens,
    settings: Settings,
    upstream: Tensor | None,
    want_student: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = sides.student.shape
    student = _rows(sides.student)
    stats = student.new_zeros(6, rows, dtype=torch.float32)
    d_student = student.new_empty(0, dtype=gradient_dtype(student.dtype))
    if want_student:
        d_student = student.new_empty(rows, vocabulary, dtype=d_student.dtype)
    _launch(
        student,
        None if sides.teacher is None else _rows(sides.teacher),
        sides,
        tokens,
        settings,
        upstream,
        d_student if want_student else None,
        stats,
        slice(0, rows),
        vocabulary,
    )
    return stats, d_student, student.new_empty(0, dtype=d_student.dtype)


def _linear_form(
    sides: Sides,
    tokens: Tokens,
    settings: Settings,
    upstream: Tensor | None,
    want_student: bool,
    want_head: bool,
    max_scratch_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_NH, head_VH = sides.student, sides.student_head
    assert head_VH is not None
    rows, vocabulary = hidden_NH.shape[0], head_VH.shape[0]
    width = _ceil(vocabulary, PAD) * PAD
    wants = want_student or want_head
    d_dtype = torch.bfloat16 if hidden_NH.dtype == torch.bfloat16 else torch.float32
    saved = gradient_dtype(hidden_NH.dtype)
    tile, slab = _sizes(rows, width, sides, settings, d_dtype, wants, want_head, max_scratch_bytes)

    stats = hidden_NH.new_zeros(6, rows, dtype=torch.float32)
    d_hidden_NH = hidden_NH.new_zeros(hidden_NH.shape if want_student else 0, dtype=saved)
    d_head_VH = hidden_NH.new_zeros(head_VH.shape if want_head else 0, dtype=saved)
    if rows == 0:
        return stats, d_hidden_NH, d_head_VH
    # Several slabs are summed in fp32; a single one is written as it is.
    sum_VH = d_head_VH
    if want_head and slab < rows and saved != torch.float32:
        sum_VH = d_head_VH.new_zeros(head_VH.shape, dtype=torch.float32)
    student_nV = hidden_NH.new_empty(tile, width, dtype=torch.float32)
    teacher_nV = torch.empty_like(student_nV) if sides.teacher is not None else None
    d_logits_SV = hidden_NH.new_empty(slab, width, dtype=d_dtype) if wants else None
    active = tokens.distill_weight != 0
    if tokens.policy_weight is not None:
        active = active | (tokens.policy_weight != 0)

    for first in range(0, rows, slab):
        last = min(first + slab, rows)
        for start in range(first, last, tile):
            part = slice(start, min(start + tile, last))
            count = part.stop - start
            _project(hidden_NH[part], head_VH, student_nV[:count, :vocabulary])
            if teacher_nV is not None and sides.teacher is not None:
                assert sides.teacher_head is not None
                _project(sides.teacher[part], sides.teacher_head, teacher_nV[:count, :vocabulary])
            _launch(
                student_nV[:count],
                None if teacher_nV is None else teacher_nV[:count],
                sides,
                tokens,
                settings,
                upstream,
                None if d_logits_SV is None else d_logits_SV[start - first :][:count],
                stats,
                part,
                vocabulary,
            )
        if d_logits_SV is None:
            continue
        d_logits = d_logits_SV[: last - first, :vocabulary]
        if want_student:
            _times_head(d_logits, head_VH, d_hidden_NH[first:last])
        if want_head:
            # A row without weight has no gradient, whatever stands in its hidden state.
            hidden = hidden_NH[first:last].masked_fill(~active[first:last, None], 0)
            _add_outer(d_logits, hidden.to(d_dtype), sum_VH, first == 0)
    if sum_VH is not d_head_VH:
        d_head_VH.copy_(sum_VH)
    return stats, d_hidden_NH, d_head_VH


def scratch_bytes(sides: Sides, settings: Settings) -> int:
    """What a call without `max_scratch_bytes` that wants both gradients takes beside them."""
    assert sides.student_head is not None
    rows, width = sides.student.shape[0], _ceil(sides.vocabulary, PAD) * PAD
    d_dtype = torch.bfloat16 if sides.student.dtype == torch.bfloat16 else torch.float32
    tile, slab = _sizes(rows, width, sides, settings, d_dtype, True, True, None)
    return _scratch(tile, slab, rows, width, sides, settings, d_dtype, True, True)


def _sizes(
    rows: int,
    width: int,
    sides: Sides,
    settings: Settings,
    d_dtype: torch.dtype,
    wants: bool,
    want_head: bool,
    max_scratch_bytes: int | None,
) -> tuple[int, int]:
    """Rows of a tile and of a slab."""
    tile = max(1, min(TILE_ROWS, rows))
    # Only the head's gradient gains from more rows in one product.
    slab = max(1, min(rows, 2 * sides.student.shape[1] if want_head else tile))
    if max_scratch_bytes is None:
        return tile, slab

    def fits(slab: int) -> bool:
        return max_scratch_bytes >= _scratch(
            min(tile, slab), slab, rows, width, sides, settings, d_dtype, wants, want_head
        )

    while slab > 1 and not fits(slab):
        slab = _ceil(slab, 2)
    if not fits(slab):
        raise ValueError(
            f"max_scratch_bytes={max_scratch_bytes} is too small for one row of this call; raise it"
        )
    return min(tile, slab), slab


def _scratch(
    tile: int,
    slab: int,
    rows: int,
    width: int,
    sides: Sides,
    settings: Settings,
    d_dtype: torch.dtype,
    wants: bool,
    want_head: bool,
) -> int:
    """Bytes of the buffers for tiles and slabs of so many rows."""
    hidden, dtype = sides.student.shape[1], sides.student.dtype
    tile_row = width * 4 * (1 if sides.teacher is None else 2)
    if settings.top_k is not None:
        tile_row += 12 * _capacity(settings.top_k)
    slab_row = width * d_dtype.itemsize if wants else 0
    slab_row += hidden * d_dtype.itemsize if want_head else 0
    fixed = 4 * WIDENED_ROWS * hidden if dtype == torch.float16 and wants else 0
    if want_head and slab < rows and gradient_dtype(dtype) != torch.float32:
        fixed += 4 * hidden * width
    return fixed + tile * tile_row + slab * slab_row


def _project(hidden_nH: Tensor, head_VH: Tensor, out_nV: Tensor) -> None:
    """fp32 logits; 16-bit operands are multiplied as they are and summed in fp32."""
    if hidden_nH.dtype == torch.float32:
        torch.mm(hidden_nH, head_VH.T, out=out_nV)
    elif hidden_nH.is_cuda:
        torch.mm(hidden_nH, head_VH.T, out_dtype=torch.float32, out=out_nV)
    else:
        torch.mm(hidden_nH.float(), head_VH.float().T, out=out_nV)


def _times_head(d_logits_SV: Tensor, head_VH: Tensor, out_SH: Tensor) -> None:
    if head_VH.dtype == d_logits_SV.dtype == out_SH.dtype:
        torch.mm(d_logits_SV, head_VH, out=out_SH)
        return
    for first in range(0, head_VH.shape[0], WIDENED_ROWS):
        block = slice(first, first + WIDENED_ROWS)
        out_SH.addmm_(d_logits_SV[:, block], head_VH[block].to(d_logits_SV.dtype))


def _add_outer(d_logits_SV: Tensor, hidden_SH: Tensor, sum_VH: Tensor, is_first: bool) -> None:
    """sum ← sum + d_logitsᵀ · hidden; the first is written without reading the sum."""
    if sum_VH.dtype == d_logits_SV.dtype:
        if is_first:
            torch.mm(d_logits_SV.T, hidden_SH, out=sum_VH)
        else:
            sum_VH.addmm_(d_logits_SV.T, hidden_SH)
    elif sum_VH.is_cuda:
        torch.addmm(
            sum_VH,
            d_logits_SV.T,
            hidden_SH,
            out_dtype=torch.float32,
            beta=0 if is_first else 1,
            out=sum_VH,
        )
    else:
        sum_VH.addmm_(d_logits_SV.float().T, hidden_SH.float())


def _launch(
    student: Tensor,
    teacher: Tensor | None,
    sides: Sides,
    tokens: Tokens,
    settings: Settings,
    upstream: Tensor | None,
    d_logits: Tensor | None,
    stats: Tensor,
    part: slice,
    vocabulary: int,
) -> None:
    """The row kernel over one tile; `part` is where its rows stand among all of them."""
    count = part.stop - part.start
    if count == 0:
        return
    width = student.shape[1]
    own = [None if entry is None else entry[part].contiguous() for entry in (*tokens, upstream)]
    distill, target, advantage, policy, old, up = own
    bf16 = d_logits is not None and d_logits.dtype == torch.bfloat16
    if d_logits is not None and bf16:
        d_logits = d_logits.view(torch.int16)
    kind = 0 if settings.alpha == 0 else 1 if settings.alpha == 1 else 2
    vectors = (distill, target, advantage, policy, old, up)
    strides = (
        0 if d_logits is None else d_logits.stride(0),
        stats.stride(0),
        vocabulary,
        width,
    )
    scalars = (
        settings.alpha,
        1 / settings.temperature,
        settings.softcap,
        settings.clip_low,
        settings.clip_high,
        settings.ratio_cap,
    )
    flags: dict[str, Any] = {
        "KIND": kind,
        "HALF": settings.alpha == 0.5,
        "BF16": bf16,
        **launch_options(vocabulary, settings.top_k is not None or sides.stored_ids is not None),
    }
    stats = stats[:, part]
    grid = (count,)
    if sides.stored_ids is not None and sides.stored_logprobs is not None:
        ids, logprobs = sides.stored_ids[part], sides.stored_logprobs[part]
        ids, logprobs = ids.contiguous(), logprobs.contiguous()
        k = ids.shape[1]
        stored_kernel[grid](
            student,
            ids,
            logprobs,
            d_logits,
            stats,
            *vectors,
            student.stride(0),
            k,
            *strides,
            k,
            *scalars,
            ADD_TAIL=settings.add_tail,
            CAPACITY=_power_of_two(k),
            **flags,
        )
        return
    assert teacher is not None
    both = (student.stride(0), teacher.stride(0))
    if settings.top_k is None:
        full_kernel[grid](
            student, teacher, d_logits, stats, *vectors, *both, *strides, *scalars, **flags
        )
        return
    capacity = _capacity(settings.top_k)
    values = student.new_empty(count, 2, capacity, dtype=torch.float32)
    places = student.new_empty(count, capacity, dtype=torch.int32)
    top_k_kernel[grid](
        student,
        teacher,
        d_logits,
        stats,
        *vectors,
        values,
        places,
        *both,
        *strides,
        settings.top_k,
        *scalars,
        ADD_TAIL=settings.add_tail,
        CAPACITY=capacity,
        **flags,
    )


def _capacity(top_k: int) -> int:
    """Slots for top-k candidates: about 1.15·k of them are expected, or a few more."""
    return max(256, _power_of_two(top_k + top_k // 2))


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _rows(logits: Tensor) -> Tensor:
    """Rows may be strided, elements within a row may not."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _device(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
