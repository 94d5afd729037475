"""The choice between Triton and PyTorch for the updates of parameters."""

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")


def uses_triton(backend: str, tensors: Iterable[Tensor]) -> bool:
    """Whether the call on these tensors runs the Triton kernels.

    backend: "auto" (Triton on CUDA, except fp64; PyTorch elsewhere), "triton" or "torch".
    Raises ValueError naming `backend` when Triton is asked for and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "torch":
        return False
    tensors = list(tensors)
    cuda = all(tensor.device.type == "cuda" for tensor in tensors)
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    installed = find_spec("triton") is not None
    if backend == "auto":
        return bool(tensors) and cuda and not double and installed
    if double:
        raise ValueError('backend "triton" does not take fp64 tensors; use backend="torch"')
    if not installed:
        raise ValueError('backend "triton" needs the package triton; use backend="torch"')
    from .parameters.kernels import INTERPRETED

    if not cuda and not INTERPRETED:
        raise ValueError(
            'backend "triton" needs CUDA tensors, or TRITON_INTERPRET=1 in the environment '
            'before the first import; use backend="torch"'
        )
    return bool(tensors)
