"""The objective on a GPU: tensor-core products around the row kernel, in two levels of chunks.

Suffixes: N all rows, S rows of a slab, n rows of a tile, V vocabulary (padded to whole 16-byte
accesses where the buffer is ours), H hidden size.

Inner level: fp32 logits of one tile (about 512 rows) of student and teacher, then the row kernel,
which writes bf16 d-logits into the slab. Outer level: the gradients of hidden states and head, one
product each for a whole slab. Forward and backward together are four products (2·N·H·V flops
each), three with a frozen head; six and four with fp16 inputs, see `products`. Slabs and their
tiles are of nearly equal size, for a product of a few rows reads the whole head like any other.
Nothing waits for the GPU.
"""

import torch
from torch import Tensor

from ..launch import on_device
from .arguments import Call, Settings, Sides
from .products import multiply, multiply_gradients, split_bytes, summed_in_fp32
from .row_launch import launch_cross_entropy, launch_rows, launch_scale, top_k_scratch

TILE_ROWS = 512
# Of the logits form with top-k: 75 MB of scratch for a large vocabulary.
TOP_K_ROWS = 2048
# A slab's least rows where the head is frozen. The gradient of [S, H] hidden states is computed in
# blocks of about 128 × 256, which must be more than a GPU has multiprocessors.
FROZEN_SLAB_ROWS = 2048
# Columns are padded to this, so that rows of fp32 and bf16 start on 16 bytes; parts of rows too.
PAD = 16


def evaluate(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics [6, N], d_student, d_head and d_bias (empty if not wanted).

    Raises:
        ValueError: if `max_scratch_bytes` does not hold a single row.
    """
    with on_device(call.sides.student.device), summed_in_fp32():
        return _logit_form(call) if call.sides.student_head is None else _linear_form(call)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient ← factor · gradient in place, without a sync; a factor of 1 reads nothing."""
    if gradient.numel():
        with on_device(gradient.device):
            launch_scale(gradient, factor)
    return gradient


def _logit_form(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    nothing = student_NV.new_empty(0, dtype=sides.gradient_dtype)
    return stats, d_student_NV, nothing, nothing.new_empty(0, dtype=torch.float32)


def _linear_form(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = call.sides
    hidden_NH, head_VH = sides.student, sides.student_layer[0]
    assert sides.student_head is not None and head_VH is not None
    count, saved = hidden_NH.shape[0], sides.gradient_dtype
    tile, slab = _tile_and_slab(sides, call.settings, call.wants, call.want_head)
    stats = hidden_NH.new_zeros(6, count, dtype=torch.float32)
    # The first product that writes to a gradient does not read it.
    empty = hidden_NH.new_zeros if count == 0 else hidden_NH.new_empty
    d_hidden_NH = empty(hidden_NH.shape if call.want_student else (0,), dtype=saved)
    d_head = empty(sides.student_head.shape if call.want_head else (0,), dtype=saved)
    d_bias = hidden_NH.new_zeros(
        sides.student_head.shape[0] if call.want_bias else 0, dtype=torch.float32
    )
    if count == 0:
        return stats, d_hidden_NH, d_head, d_bias
    # The rows of padding have no gradient.
    d_head[sides.vocabulary :].zero_()
    d_head_VH, d_bias_V = d_head[: sides.vocabulary], d_bias[: sides.vocabulary]
    # Several slabs are summed in fp32; a single one is written as it is.
    sum_VH = d_head_VH
    if call.want_head and slab < count and saved != torch.float32:
        sum_VH = d_head_VH.new_empty(head_VH.shape, dtype=torch.float32)
    width, d_dtype = _width(sides), _d_logits_dtype(sides)
    student_nV = hidden_NH.new_empty(tile, width, dtype=torch.float32)
    teacher_nV = torch.empty_like(student_nV) if sides.teacher is not None else None
    d_logits_SV = hidden_NH.new_empty(slab, width, dtype=d_dtype) if call.wants else None
    active = call.tokens.active
    for first in range(0, count, slab):
        last = min(first + slab, count)
        # The last slab may be shorter, and its tiles are then as well.
        step = _even_part(last - first, _ceil(last - first, tile))
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            d_logits_nV = None if d_logits_SV is None else d_logits_SV[start - first :]
            _tile(call, part, student_nV, teacher_nV, d_logits_nV, stats)
        if d_logits_SV is None:
            continue
        if call.want_bias:
            d_bias_V += d_logits_SV[: last - first, : sides.vocabulary].sum(0, dtype=torch.float32)
        hidden_SH = hidden_NH[first:last]
        if call.want_head:
            # A row without weight has no gradient, whatever stands in its hidden state.
            hidden_SH = hidden_SH.masked_fill(~active[first:last, None], 0)
        multiply_gradients(
            d_logits_SV[: last - first, : sides.vocabulary],
            head_VH,
            hidden_SH,
            d_hidden_NH[first:last] if call.want_student else None,
            sum_VH if call.want_head else None,
            is_first=first == 0,
        )
    if sum_VH is not d_head_VH:
        d_head_VH.copy_(sum_VH)
    return stats, d_hidden_NH, d_head, d_bias


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
    student_nV = student_nV[:count]
    _project(sides.student[part], *sides.student_layer, student_nV[:, :vocabulary])
    if teacher_nV is not None and sides.teacher is not None:
        teacher_nV = teacher_nV[:count]
        _project(sides.teacher[part], *sides.teacher_layer, teacher_nV[:, :vocabulary])
    if d_logits_nV is not None:
        d_logits_nV = d_logits_nV[:count]
    launch_rows(call, part, student_nV, teacher_nV, d_logits_nV, stats)
    if call.labels_apart:
        launch_cross_entropy(call, part, student_nV, d_logits_nV, stats)


def _project(
    hidden_nH: Tensor, head_VH: Tensor | None, bias_V: Tensor | None, logits_nV: Tensor
) -> None:
    """logits ← hidden · headᵀ + bias.

    The product is added to the bias: 8 bytes an element beside it. A column of ones in the hidden
    states would cost a copy of the head, whose rows would then no longer start on 16 bytes.
    """
    assert head_VH is not None
    if bias_V is not None:
        logits_nV.copy_(bias_V)
    multiply(hidden_nH, head_VH.T, logits_nV, beta=0.0 if bias_V is None else 1.0)


def scratch_bytes(sides: Sides, settings: Settings) -> int:
    """What a call without `max_scratch_bytes` takes beside its gradients: of the head and the
    hidden states, or of the latter alone, whichever takes more."""
    return max(
        _scratch(
            *_tile_and_slab(sides, settings, wants=True, want_head=want_head),
            sides,
            settings,
            wants=True,
            want_head=want_head,
        )
        for want_head in (True, False)
    )


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
    # The head's gradient gains from many rows in one product, the other one from enough.
    slabs = _ceil(rows, max(1, 2 * hidden)) if want_head else rows // FROZEN_SLAB_ROWS
    slabs = max(1, slabs)
    while True:
        slab = _even_part(rows, slabs)
        tile = _even_part(slab, _ceil(slab, TILE_ROWS))
        limit = settings.max_scratch_bytes
        if limit is None or _scratch(tile, slab, sides, settings, wants, want_head) <= limit:
            return tile, slab
        if slab == 1:
            raise ValueError(
                f"max_scratch_bytes={limit} is too small for one row of this call; raise it"
            )
        slabs = min(rows, 2 * slabs)


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
    slab_row += hidden * sides.student.dtype.itemsize if want_head else 0
    fixed = 4 * width if wants and sides.student_bias is not None else 0
    if wants and sides.student.dtype == torch.float16:
        fixed += split_bytes(slab, sides.vocabulary, hidden, want_head)
    if want_head and slab < rows and sides.gradient_dtype != torch.float32:
        fixed += 4 * hidden * width
    return fixed + tile * tile_row + slab * slab_row


def _even_part(rows: int, parts: int) -> int:
    """Rows of a part, at least 1, where `rows` are cut into so many of nearly equal size. All but
    small parts are of whole `PAD`s, so that what belongs to their rows starts on 16 bytes."""
    size = _ceil(rows, parts)
    return max(1, size if size <= PAD else min(rows, _ceil(size, PAD) * PAD))


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _rows(logits: Tensor) -> Tensor:
    """Rows may be strided, elements within a row may not."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
