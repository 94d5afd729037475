"""Which path a call takes, Triton or PyTorch: the one place that decides it.

"auto"      Triton on CUDA, PyTorch elsewhere and for what Triton does not take: fp64, a top_k
            above MAX_TOP_K, an environment without the package triton
"triton"    Triton, or a ValueError that says what is in its way; off CUDA its interpreter
"torch"     PyTorch
"""

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
# The loss's kernel has a buffer of candidates for the top k that is sized for this many.
MAX_TOP_K = 1024
# Asked once, at import: torch.compile cannot trace the question.
INSTALLED = find_spec("triton") is not None


def uses_triton(backend: str, tensors: Iterable[Tensor], top_k: int | None = None) -> bool:
    """Whether the call on these tensors, with this `top_k` if it has one, runs Triton's kernels.

    Raises ValueError naming `backend` or `top_k` when Triton is asked for and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "torch":
        return False
    tensors = list(tensors)
    cuda = all(tensor.device.type == "cuda" for tensor in tensors)
    if backend == "auto" and not cuda:
        return False
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    too_many = top_k is not None and top_k > MAX_TOP_K
    if backend == "auto":
        return INSTALLED and len(tensors) > 0 and not double and not too_many
    if double:
        raise ValueError('backend "triton" does not take fp64 tensors; use backend="torch"')
    if too_many:
        raise ValueError(f'top_k must be ≤ {MAX_TOP_K} with backend "triton", got {top_k}')
    if not INSTALLED:
        raise ValueError('backend "triton" needs the package triton; use backend="torch"')
    from .launch import INTERPRETED

    if not cuda and not INTERPRETED:
        raise ValueError(
            'backend "triton" needs CUDA tensors, or TRITON_INTERPRET=1 in the environment '
            'before the first import; use backend="torch"'
        )
    return len(tensors) > 0  # not bool(): torch 2.11 cannot trace it
