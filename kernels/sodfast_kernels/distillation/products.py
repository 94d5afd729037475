"""The matrix products of the GPU path: logits, and the gradients of hidden states and head.

Operands of 16 bits are multiplied as they are, on tensor cores, and summed in fp32.

fp16 inputs have fp32 d-logits, since fp16 ones would lose most of their entries (no loss scale has
reached them yet). Their product with an fp32 head would not run on tensor cores, TF32 being off. So
each block of `SPLIT_COLUMNS` columns is cut into two fp16 numbers,

    scale · d = high + low / 2¹¹ + rounding,   high = fp16(scale · d),

and multiplied twice, four products for both gradients in place of two. `scale` is the power of two
that puts the slab's greatest entry into [2¹⁴, 2¹⁵), so high and low together keep 22 bits of every
entry down to 2⁻²⁹ of the greatest, and an absolute error of 2⁻⁵¹ of it below. The gradients leave
as fp16, whose own range is 2⁴⁰. The cutting reads and writes 34 bytes an entry, and the products
read 8 (4 for each gradient).

Suffixes: S rows of a slab, V vocabulary, B columns of a block, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Columns of fp32 d-logits that are cut into two fp16 numbers at a time.
SPLIT_COLUMNS = 8192
# log2 of what the second number is multiplied by: a rounding error of fp16 at 2¹⁴ is at most 2³.
LOW_BITS = 11
# The greatest entry is less than two to this power.
TOP_BITS = 15
REDUCTIONS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
)


@contextmanager
def summed_in_fp32() -> Iterator[None]:
    """PyTorch may let cuBLAS add the parts of a 16-bit product in 16 bits; not within this context.

    The flags belong to the process and are put back at the end, after an exception too, with the
    second flag of each, which forbids split-K altogether and which this context leaves as it is.
    Other threads see them for as long as the context lasts.
    """
    matmul = torch.backends.cuda.matmul
    before = {
        name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in REDUCTIONS
    }
    accumulation = matmul.allow_fp16_accumulation
    try:
        for name, (_, split_k) in before.items():
            setattr(matmul, name, (False, split_k))
        matmul.allow_fp16_accumulation = False
        yield
    finally:
        for name, flags in before.items():
            setattr(matmul, name, flags)
        matmul.allow_fp16_accumulation = accumulation


def multiply(
    left: Tensor, right: Tensor, out: Tensor, *, beta: float = 0.0, alpha: float = 1.0
) -> None:
    """out ← beta · out + alpha · left · right; what `out` held is not read if beta is 0.

    left, right: of one dtype. out: of the same, or fp32.
    """
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, left.float(), right.float(), beta=beta, alpha=alpha, out=out)


def multiply_gradients(
    d_logits_SV: Tensor,
    head_VH: Tensor,
    hidden_SH: Tensor,
    d_hidden_SH: Tensor | None,
    d_head_VH: Tensor | None,
    is_first: bool,
) -> None:
    """d_hidden ← d_logits · head, and d_head ← d_logitsᵀ · hidden, or d_head += if not is_first.

    d_logits: of the dtype of head and hidden, or fp32 with fp16 of them.
    hidden_SH: finite wherever d_logits is not zero.
    d_hidden, d_head: None where not wanted; neither is read before it is written.
    """
    if d_logits_SV.dtype != head_VH.dtype:
        _multiply_halves(d_logits_SV, head_VH, hidden_SH, d_hidden_SH, d_head_VH, is_first)
        return
    if d_hidden_SH is not None:
        multiply(d_logits_SV, head_VH, d_hidden_SH)
    if d_head_VH is not None:
        multiply(d_logits_SV.T, hidden_SH, d_head_VH, beta=0.0 if is_first else 1.0)


def split_bytes(rows: int, columns: int, hidden: int, want_head: bool) -> int:
    """What multiplying fp32 d-logits [rows, columns] with fp16 takes beside the results."""
    block = min(SPLIT_COLUMNS, columns)
    return block * (8 * rows + (4 * hidden if want_head else 0))


def _multiply_halves(
    d_logits_SV: Tensor,
    head_VH: Tensor,
    hidden_SH: Tensor,
    d_hidden_SH: Tensor | None,
    d_head_VH: Tensor | None,
    is_first: bool,
) -> None:
    """`multiply_gradients` of fp32 d-logits with an fp16 head and fp16 hidden states."""
    scale, low_factor = _split_scale(d_logits_SV), 2.0**-LOW_BITS
    for first in range(0, head_VH.shape[0], SPLIT_COLUMNS):
        block = slice(first, first + SPLIT_COLUMNS)
        high_SB, low_SB = _split(d_logits_SV[:, block], scale)
        if d_hidden_SH is not None:
            multiply(high_SB, head_VH[block], d_hidden_SH, beta=0.0 if first == 0 else 1.0)
            multiply(low_SB, head_VH[block], d_hidden_SH, beta=1.0, alpha=low_factor)
        if d_head_VH is not None:
            sum_BH = d_head_VH[block]
            part_BH = torch.empty_like(sum_BH)
            multiply(high_SB.T, hidden_SH, part_BH)
            multiply(low_SB.T, hidden_SH, part_BH, beta=1.0, alpha=low_factor)
            if is_first:
                torch.div(part_BH, scale, out=sum_BH)
            else:
                torch.addcdiv(sum_BH, part_BH, scale, out=sum_BH)
    if d_hidden_SH is not None:
        d_hidden_SH.div_(scale)


def _split_scale(d_logits_SV: Tensor) -> Tensor:
    """The power of two, a scalar on the device, that puts the greatest entry below 2¹⁵.

    Rows with NaN or infinity have no say: their gradient is lost, that of the others must not be.
    """
    greatest_S = torch.linalg.vector_norm(d_logits_SV, torch.inf, dim=1)
    greatest = greatest_S.where(greatest_S.isfinite(), 0).amax()
    exponent = TOP_BITS - torch.frexp(greatest).exponent
    # 2¹²⁶ and its reciprocal are normal numbers.
    return torch.ldexp(torch.ones_like(greatest), exponent.clamp(max=126))


def _split(d_logits_SB: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 numbers with scale · d_logits ≈ high + low / 2¹¹."""
    scaled_SB = d_logits_SB * scale
    high_SB = scaled_SB.half()
    scaled_SB -= high_SB
    low_SB = torch.empty_like(high_SB)
    torch.mul(scaled_SB, 2.0**LOW_BITS, out=low_SB)
    return high_SB, low_SB
