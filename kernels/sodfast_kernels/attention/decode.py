"""Attention for decoding: the newest tokens of each sequence over its cache of keys and values.

The cache is paged as in vLLM (Kwon et al. 2023, arXiv:2309.06180): position p of sequence b is slot
p % page of page block_table[b, p // page]. Query j of sequence b sees the positions
max(0, e − window) … e − 1 with e = used[b] − Q + 1 + j. Its head a reads head a // (A / K) of the
cache:

    z_p = scale · q · k_p,  then softcap · tanh(z_p / softcap) if there is one
    out = Σ_p softmax(z)_p · v_p, and 0 where no position is seen

This file is the definition; kernel.py computes the same on a GPU, in 2·K·D elements of cache a
position, each read once for every 64 query rows (16 in fp32) of a head of the cache.

Suffixes: B sequences, Q new tokens of each, A query heads, K heads of the cache, D elements of a
head, P pages, M pages of a sequence at most.
"""

import math

import torch
from torch import Tensor

from ..backend import uses_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_PAGE = 16
MAX_HEAD = 256
# The kernel's offsets within a page have 32 bits.
MAX_PAGE_SPAN = 1 << 31


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    used: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of Q new tokens of each sequence, whose keys and values are in the cache already.

    Table entries of positions that are not in use or lie before every query's window, their slots
    and the tail of the last page may hold anything, NaN among them: they are never used. With
    backend="triton" the result is the same bits at every call of the same shapes, and nothing is
    read back from the GPU, so the call can be captured in a CUDA graph; a replay reads `used` and
    `block_table` anew. backend="torch" reads `used` on the host. Never differentiated.

    A prediction, nothing of it measured: by the counts of bench/compile_report.py the loop over the
    cache is bound by its bytes alone on an A100, H100 and H200 (bf16, D = 128, pages of 64, 8 heads
    of the cache, groups of 4, Q = 1). With launches and with programs that end unevenly, 89 % of
    the bandwidth of a copy on an H100 and 88 % on an H200 for 64 sequences of 2,048 positions, 82
    and 78 % for 4 of 8,192; these four were estimated for a prototype with the same counts.

    Args:
        q: [B, Q, A, D], Q ≥ 1, 1 ≤ D ≤ 256, fp32, bf16 or fp16; fp64 on the PyTorch path alone.
        k_pages: [P, page, K, D] in q's dtype, page a power of two ≥ 16, A a multiple of K. Any
            strides, such as those of a cache of shape [P, K, page, D], but the elements of a head
            must be adjacent.
        v_pages: like `k_pages`.
        block_table: [B, M] int32, the page of positions m·page … (m + 1)·page − 1 of a sequence.
        used: [B] int32, positions in use, the Q new ones the last; taken as at most M·page. Where
            it is 0 the output is 0, and so it is for the first queries where 0 < used < Q.
        scale: of the products. None: 1/√D.
        window: ≥ 1, positions that a query sees, its own the last. None: all.
        softcap: > 0. None: off.
        backend: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "torch".

    Returns:
        [B, Q, A, D] in q's dtype, contiguous; softmax and sums in fp32, in fp64 for fp64.

    Raises:
        ValueError: naming the argument that is out of range, or of a wrong shape, dtype or device.
    """
    _check_tensors(q, k_pages, v_pages, block_table, used)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if window is not None and (
        isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < 1 << 31
    ):
        raise ValueError(f"window must be a positive integer below 2**31 or None, got {window!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite or None, got {softcap}")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not uses_triton(backend, (q, k_pages, v_pages, block_table, used)):
        return _attend(q, k_pages, v_pages, block_table, used, scale, window, softcap)
    from .kernel import attend

    return attend(q, k_pages, v_pages, block_table, used, scale, window, softcap)


def _check_tensors(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, used: Tensor
) -> None:
    if not isinstance(q, Tensor) or q.dim() != 4 or 0 in q.shape[1:]:
        raise ValueError("q must be a tensor of shape [B, Q, A, D] with Q, A and D at least 1")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be fp32, bf16, fp16 or fp64, got {q.dtype}")
    sequences, _, heads, width = q.shape
    if width > MAX_HEAD:
        raise ValueError(f"q must have heads of at most {MAX_HEAD} elements, got {width}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        _check_pages(name, pages, q)
    if v_pages.shape != k_pages.shape:
        raise ValueError(
            f"v_pages must have the shape of k_pages, {tuple(k_pages.shape)}, "
            f"got {tuple(v_pages.shape)}"
        )
    if heads % k_pages.shape[2]:
        raise ValueError(
            f"q must have a multiple of the {k_pages.shape[2]} heads of k_pages, got {heads}"
        )
    for name, value, dimensions in (("block_table", block_table, 2), ("used", used, 1)):
        if not isinstance(value, Tensor) or value.dim() != dimensions or len(value) != sequences:
            shape = "[B, M]" if dimensions == 2 else "[B]"
            raise ValueError(f"{name} must be a tensor of shape {shape} with B = {sequences}")
        if value.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {value.dtype}")
        if value.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, got {value.device}")


def _check_pages(name: str, pages: Tensor, q: Tensor) -> None:
    if not isinstance(pages, Tensor) or pages.dim() != 4 or pages.shape[3] != q.shape[3]:
        raise ValueError(f"{name} must be a tensor of shape [P, page, K, {q.shape[3]}]")
    if (pages.dtype, pages.device) != (q.dtype, q.device):
        raise ValueError(
            f"{name} must be {q.dtype} on {q.device}, got {pages.dtype} on {pages.device}"
        )
    page, heads = pages.shape[1:3]
    if page < MIN_PAGE or page & (page - 1):
        raise ValueError(f"{name} must have pages of a power of two ≥ {MIN_PAGE}, got {page}")
    if heads == 0:
        raise ValueError(f"{name} must have at least one head")
    if pages.stride(3) != 1 and pages.shape[3] > 1:
        raise ValueError(f"{name} must be contiguous along the elements of a head")
    if page * pages.stride(1) >= MAX_PAGE_SPAN:
        raise ValueError(f"{name} must have pages that span fewer than 2**31 elements")


@torch.no_grad()
def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    used: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One sequence after the other, each over the positions that some query of it sees."""
    _, queries, heads, width = q.shape
    page, cache_heads = k_pages.shape[1:3]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    for b, stop in enumerate(used.clamp(0, block_table.shape[1] * page).tolist()):
        first = 0 if window is None else max(0, stop - queries + 1 - window)
        unseen = max(0, queries - stop)  # queries before the first position
        if stop == 0:
            continue
        begin = first // page
        pages = block_table[b, begin : -(-stop // page)].long()
        seen = slice(first - begin * page, stop - begin * page)
        keys, values = (cache[pages].flatten(0, 1)[seen].to(dtype) for cache in (k_pages, v_pages))
        rows = q[b, unseen:].to(dtype).unflatten(1, (cache_heads, heads // cache_heads))
        scores = torch.einsum("jkgd,pkd->kgjp", rows, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        ends = torch.arange(stop - queries + 1 + unseen, stop + 1, device=q.device)[:, None]
        position = torch.arange(first, stop, device=q.device)
        visible = position < ends
        if window is not None:
            visible &= position >= ends - window
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        mixed = torch.einsum("kgjp,pkd->jkgd", weights, values)
        out[b, unseen:] = mixed.reshape(-1, heads, width).to(q.dtype)
    return out
