"""From the product of a layer's queries, keys and values to what attention reads: norms of the
heads, rotary positions, and the write into the cache.

A head x of D elements is first normalised where the layer does so (Qwen3), then turned pair by pair
(RoPE, Su et al. 2021, arXiv:2104.09864), with the pairs D/2 apart as in Llama:

    x ← x / √(mean(x²) + eps) · gain            queries and keys, where there are gains
    y_i = x_i · cos_i + x_{(i + D/2) mod D} · sin_i      queries and keys

The first half of `sin` is negated, which is the sign in rotate_half(x) = [−x₂, x₁]: with it one
roll and one multiply-add turn a head. Keys, and values as they are, go to their places in the
cache, those of token t to keys[page[t], offset[t]].

This file is the definition; kernel.py computes the same on a GPU. It reads and writes each element
of the heads once: 2·(A + 2K)·D elements a token, beside the angles.

Suffixes: T tokens, A query heads, K heads of the cache, D elements of a head, P pages.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import uses_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD = 1024  # a program of the kernel holds a head in registers
CacheSlots = tuple[Tensor, Tensor, Tensor, Tensor]


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    *,
    gain: Tensor | None = None,
    eps: float = 1e-6,
    cache: CacheSlots | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Normalise and turn queries and keys; write keys and values into the cache if there is one.

    Rounding: on Triton's path a head is computed in fp32 and rounded once. On PyTorch's path each
    step rounds to the dtype of `qkv`, as in transformers: norm, gain, x·cos and the sum. In 16 bits
    the two differ by a few units of the last place of a head's largest element.

    Nothing is read back from a GPU, so the call can be captured in a CUDA graph; a replay reads
    `page` and `offset` anew. What the cache holds elsewhere stays as it is, NaN among it.

    A prediction, not measured: a decode step of up to 256 tokens takes as long as a launch, 2 to
    3 µs, since even 256 tokens of Qwen3-8B are 6 MB. For longer prefills bench/compile_report.py
    counts instructions and bytes.

    Args:
        qkv: [T, A + 2K, D], the A query heads, then K key and K value heads; D even and ≤ 1024;
            fp32, bf16 or fp16, and fp64 on the PyTorch path alone. Not written to.
        cos: [T, D] in qkv's dtype, of each token's position.
        sin: like `cos`, the first half negated.
        kv_heads: K ≥ 1.
        gain: [A + K, D] in qkv's dtype, of each query and key head. None: no norm.
        eps: ≥ 0, of the norm.
        cache: keys and values [P, page, K, D] in qkv's dtype, with any strides, and `page` and
            `offset` [T] int64: the page of each token, from 0 to P − 1, and its place there, from 0
            to page − 1. On a GPU nothing checks that they are in range. Where two tokens have the
            same place, either may stay. None: there is no cache.
        backend: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "torch".

    Returns:
        Queries [T, A, D], and keys [T, K, D] where there is no cache, otherwise None. Their
        elements of a head are adjacent.

    Raises:
        ValueError: naming the argument that is out of range, or of a wrong shape, dtype or device,
            or `qkv` where a gradient would be recorded: there is none.
    """
    _check(qkv, cos, sin, kv_heads, gain, eps)
    if cache is not None:
        _check_cache(qkv, kv_heads, *cache)
    if not uses_triton(backend, (qkv,)):  # the others are on its device
        return _rotate(qkv, cos, sin, kv_heads, gain, eps, cache)
    from .kernel import rotate

    return rotate(qkv, cos, sin, kv_heads, gain, eps, cache)


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, gain: Tensor | None, eps: float
) -> None:
    if not isinstance(qkv, Tensor) or qkv.dim() != 3:
        raise ValueError("qkv must be a tensor of shape [T, A + 2K, D]")
    if qkv.requires_grad and torch.is_grad_enabled():
        raise ValueError("qkv must not require a gradient; use torch.no_grad()")
    tokens, heads, width = qkv.shape
    if qkv.dtype not in DTYPES:
        raise ValueError(f"qkv must be fp32, bf16, fp16 or fp64, got {qkv.dtype}")
    if width % 2 or not 2 <= width <= MAX_HEAD:
        raise ValueError(
            f"qkv must have heads of an even number of elements ≤ {MAX_HEAD}, got {width}"
        )
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or not 1 <= 2 * kv_heads < heads:
        raise ValueError(
            f"kv_heads must be at least 1 and leave query heads among {heads}, got {kv_heads!r}"
        )
    for name, angles in (("cos", cos), ("sin", sin)):
        _check_like(qkv, name, angles, (tokens, width))
    if gain is not None:
        _check_like(qkv, "gain", gain, (heads - kv_heads, width))
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def _check_cache(
    qkv: Tensor, kv_heads: int, keys: Tensor, values: Tensor, page: Tensor, offset: Tensor
) -> None:
    tokens, _, width = qkv.shape
    if not isinstance(keys, Tensor) or keys.dim() != 4:
        raise ValueError(f"cache must have keys of shape [P, page, {kv_heads}, {width}]")
    shape = (*keys.shape[:2], kv_heads, width)
    _check_like(qkv, "cache's keys", keys, shape)
    _check_like(qkv, "cache's values", values, shape)
    for name, index in (("page", page), ("offset", offset)):
        if not isinstance(index, Tensor) or index.shape != (tokens,) or index.dtype != torch.int64:
            raise ValueError(f"cache's {name} must be int64 of shape [{tokens}]")
        if index.device != qkv.device:
            raise ValueError(f"cache's {name} must be on {qkv.device}, got {index.device}")


def _check_like(qkv: Tensor, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.shape != shape:
        raise ValueError(f"{name} must be a tensor of shape {list(shape)}")
    if value.dtype != qkv.dtype or value.device != qkv.device:
        raise ValueError(
            f"{name} must be {qkv.dtype} on {qkv.device}, got {value.dtype} on {value.device}"
        )


def _rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    gain: Tensor | None,
    eps: float,
    cache: CacheSlots | None,
) -> tuple[Tensor, Tensor | None]:
    rotated, width = qkv.shape[1] - kv_heads, qkv.shape[2]
    heads, v = qkv.split([rotated, kv_heads], 1)
    if gain is not None:
        heads = F.rms_norm(heads, (width,), None, eps).mul_(gain)
    rolled = heads.roll(width // 2, -1)
    turned = (heads * cos.unsqueeze(1)).addcmul_(rolled, sin.unsqueeze(1))
    q, k = turned.split([rotated - kv_heads, kv_heads], 1)
    if cache is None:
        return q, k
    keys, values, page, offset = cache
    keys[page, offset] = k
    values[page, offset] = v
    return q, None
