"""The gated activation of an MLP (SwiGLU, Shazeer 2020, arXiv:2002.05202), of one product:

    out = silu(gate) · up,  silu(x) = x / (1 + e^(−x)),  gate_up = [gate, up]

This file is the definition; kernel.py computes the same on a GPU. It moves 3·I elements a token.

Suffixes: T tokens, I elements of the inner layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import uses_triton

# Elements that a CPU takes at a time at most (two registers of AVX-512 in fp32, one in 16 bits),
# and those up to which ATen gives an elementwise operation to one thread (GRAIN_SIZE).
RUN, UNDIVIDED = 32, 32768
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def silu_and_mul(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu of the left half of the columns, times the right half.

    Rounding: on Triton's path in fp32 and rounded once; on PyTorch's path silu is rounded to the
    dtype of `gate_up`, and the product again. The call can be captured in a CUDA graph.

    Args:
        gate_up: [T, 2·I], fp32, bf16 or fp16, and fp64 on the PyTorch path alone. Rows may lie
            apart. Not written to.
        backend: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "torch".

    Returns:
        [T, I] in gate_up's dtype, contiguous.

    Raises:
        ValueError: naming the argument that is of a wrong shape or dtype, or for which a gradient
            would be recorded: there is none.
    """
    if not isinstance(gate_up, Tensor) or gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError("gate_up must be a tensor of shape [T, 2·I]")
    if gate_up.dtype not in DTYPES:
        raise ValueError(f"gate_up must be fp32, bf16, fp16 or fp64, got {gate_up.dtype}")
    if gate_up.requires_grad and torch.is_grad_enabled():
        raise ValueError("gate_up must not require a gradient; use torch.no_grad()")
    if not uses_triton(backend, [gate_up]):
        return _silu_and_mul(gate_up)
    from .kernel import gated

    return gated(gate_up)


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    # On a CPU the end of each run of adjacent elements, if it fills no register, goes through
    # another exp, and threads each take a run. So that no row's bits depend on the other rows or on
    # the threads, rows fill their registers, and no thread takes a part of one.
    width = gate.shape[1]
    if missing := -width % RUN:
        padded = F.pad(gate, (0, missing))
    else:
        padded = gate.clone(memory_format=torch.contiguous_format)
    if padded.numel() <= UNDIVIDED:
        F.silu(padded, inplace=True)
    else:
        for rows in padded.split(max(1, UNDIVIDED // padded.shape[1])):
            F.silu(rows, inplace=True)
    return padded[:, :width] * up if missing else padded.mul_(up)
