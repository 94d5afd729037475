"""The objective on a GPU: tensor-core products around the row kernel, in two levels of chunks.

Suffixes: N all rows, S rows of a slab, n rows of a tile, V vocabulary (padded to whole 16-byte
accesses where the buffer is ours), H hidden size.

Inner level: fp32 logits of one tile (about 512 rows) of student and teacher, then the row kernel,
which writes bf16 d-logits into the slab. Outer level: the gradients of hidden states and head, one
product each for a whole slab. Forward and backward together are four products (2·N·H·V flops
each), three with a frozen head. Nothing waits for the GPU.
"""

import torch
from torch import Tensor

from ..launch import on_device
from .arguments import Call, Settings, Sides
from .row_launch import launch_rows, launch_scale, top_k_scratch

TILE_ROWS = 512
# Of the logits form with top-k: 75 MB of scratch for a large vocabulary.
TOP_K_ROWS = 2048
# Columns are padded to this, so that rows of fp32 and bf16 start on 16 bytes.
PAD = 16
# A 16-bit head whose d-logits are fp32 (fp16 inputs) is widened this many rows at a time.
WIDENED_ROWS = 8192


def evaluate(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [6, N], d_student and d_head (empty if not wanted).

    Raises:
        ValueError: if `max_scratch_bytes` does not hold a single row.
    """
    with on_device(call.sides.student.device):
        return _logit_form(call) if call.sides.student_head is None else _linear_form(call)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient ← factor · gradient in place, without a sync; a factor of 1 reads nothing."""
    if gradient.numel():
        with on_device(gradient.device):
            launch_scale(gradient, factor)
    return gradient


def _logit_form(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    sides = call.sides
    student_NV = _rows(sides.student)
    count, vocabulary = student_NV.shape
    stats = student_NV.new_zeros(6, count, dtype=torch.float32)
    d_shape = (count, vocabulary) if call.want_student else (0,)
    d_student_NV = student_NV.new_empty(d_shape, dtype=sides.gradient_dtype)
    teacher_NV = None if sides.teacher is None else _rows(sides.teacher)
    # Only top-k takes scratch for its rows.
    step = count if call.settings.top_k is None else TOP_K_ROWS
    for first in range(0, count, max(step, 1)):
        part = slice(first, min(first + step, count))
        d_logits_nV = d_student_NV[part] if call.want_student else None
        teacher_nV = None if teacher_NV is None else teacher_NV[part]
        launch_rows(call, part, student_NV[part], teacher_nV, d_logits_nV, stats)
    return stats, d_student_NV, student_NV.new_empty(0, dtype=sides.gradient_dtype)


def _linear_form(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    sides = call.sides
    hidden_NH, head_VH = sides.student, sides.student_head
    assert head_VH is not None
    count, saved = hidden_NH.shape[0], sides.gradient_dtype
    tile, slab = _tile_and_slab(sides, call.settings, call.wants, call.want_head)
    stats = hidden_NH.new_zeros(6, count, dtype=torch.float32)
    d_hidden_NH = hidden_NH.new_zeros(hidden_NH.shape if call.want_student else 0, dtype=saved)
    d_head_VH = hidden_NH.new_zeros(head_VH.shape if call.want_head else 0, dtype=saved)
    if count == 0:
        return stats, d_hidden_NH, d_head_VH
    # Several slabs are summed in fp32; a single one is written as it is.
    sum_VH = d_head_VH
    if call.want_head and slab < count and saved != torch.float32:
        sum_VH = d_head_VH.new_zeros(head_VH.shape, dtype=torch.float32)
    width, d_dtype = _width(sides), _d_logits_dtype(sides)
    student_nV = hidden_NH.new_empty(tile, width, dtype=torch.float32)
    teacher_nV = torch.empty_like(student_nV) if sides.teacher is not None else None
    d_logits_SV = hidden_NH.new_empty(slab, width, dtype=d_dtype) if call.wants else None
    active = call.tokens.active
    for first in range(0, count, slab):
        last = min(first + slab, count)
        for start in range(first, last, tile):
            part = slice(start, min(start + tile, last))
            d_logits_nV = None if d_logits_SV is None else d_logits_SV[start - first :]
            _tile(call, part, student_nV, teacher_nV, d_logits_nV, stats)
        if d_logits_SV is None:
            continue
        d_logits = d_logits_SV[: last - first, : sides.vocabulary]
        if call.want_student:
            _times_head(d_logits, head_VH, d_hidden_NH[first:last])
        if call.want_head:
            # A row without weight has no gradient, whatever stands in its hidden state.
            hidden = hidden_NH[first:last].masked_fill(~active[first:last, None], 0)
            _add_outer(d_logits, hidden.to(d_dtype), sum_VH, first == 0)
    if sum_VH is not d_head_VH:
        d_head_VH.copy_(sum_VH)
    return stats, d_hidden_NH, d_head_VH


def _tile(
    call: Call,
    part: slice,
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    d_logits_nV: Tensor | None,
    stats: Tensor,
) -> None:
    """Logits of the rows `part` into the first rows of the buffers, then the row kernel."""
    sides, count, vocabulary = call.sides, part.stop - part.start, call.sides.vocabulary
    assert sides.student_head is not None
    student_nV = student_nV[:count]
    _project(sides.student[part], sides.student_head, student_nV[:, :vocabulary])
    if teacher_nV is not None and sides.teacher is not None:
        assert sides.teacher_head is not None
        teacher_nV = teacher_nV[:count]
        _project(sides.teacher[part], sides.teacher_head, teacher_nV[:, :vocabulary])
    if d_logits_nV is not None:
        d_logits_nV = d_logits_nV[:count]
    launch_rows(call, part, student_nV, teacher_nV, d_logits_nV, stats)


def scratch_bytes(sides: Sides, settings: Settings) -> int:
    """What a call without `max_scratch_bytes` that wants both gradients takes beside them."""
    tile, slab = _tile_and_slab(sides, settings, wants=True, want_head=True)
    return _scratch(tile, slab, sides, settings, wants=True, want_head=True)


def _width(sides: Sides) -> int:
    """Columns of a tile: the vocabulary, padded."""
    return _ceil(sides.vocabulary, PAD) * PAD


def _d_logits_dtype(sides: Sides) -> torch.dtype:
    return torch.bfloat16 if sides.student.dtype == torch.bfloat16 else torch.float32


def _tile_and_slab(
    sides: Sides, settings: Settings, wants: bool, want_head: bool
) -> tuple[int, int]:
    """Rows of a tile and of a slab. wants: whether there is any gradient to compute."""
    rows, hidden = sides.student.shape
    tile = max(1, min(TILE_ROWS, rows))
    # Only the head's gradient gains from more rows in one product.
    slab = max(1, min(rows, 2 * hidden if want_head else tile))
    limit = settings.max_scratch_bytes
    if limit is None:
        return min(tile, slab), slab
    while _scratch(min(tile, slab), slab, sides, settings, wants, want_head) > limit:
        if slab == 1:
            raise ValueError(
                f"max_scratch_bytes={limit} is too small for one row of this call; raise it"
            )
        slab = _ceil(slab, 2)
    return min(tile, slab), slab


def _scratch(
    tile: int, slab: int, sides: Sides, settings: Settings, wants: bool, want_head: bool
) -> int:
    """Bytes of the buffers for tiles and slabs of so many rows."""
    rows, hidden = sides.student.shape
    width, d_size = _width(sides), _d_logits_dtype(sides).itemsize
    tile_row = width * 4 * (1 if sides.teacher is None else 2)
    if settings.top_k is not None:
        tile_row += top_k_scratch(settings.top_k, sides.vocabulary)
    slab_row = width * d_size if wants else 0
    slab_row += hidden * d_size if want_head else 0
    fixed = 4 * WIDENED_ROWS * hidden if sides.student.dtype == torch.float16 and wants else 0
    if want_head and slab < rows and sides.gradient_dtype != torch.float32:
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


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _rows(logits: Tensor) -> Tensor:
    """Rows may be strided, elements within a row may not."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
