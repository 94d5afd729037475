"""Drafts of the coming tokens by look-up: what followed where a text last had the same ending
(prompt look-up decoding; Yang et al. 2023, "Inference with Reference", arXiv:2304.04487).

A row has a text of its own and texts to search, its sources, in the order in which they are
preferred. Position p of a source, 1 ≤ p < its length, matches by n tokens when the n tokens before
p are the last n of the row's own text; n counts up to LONGEST, and fewer than SHORTEST are no
match. The best match has the greatest n, then the first source, then the greatest p, and the draft
is what stands from p on. All three are one integer, the greatest of which is the best:

    n · 2^27 + (63 − rank of the source) · 2^21 + p

so matches may be found in any order, and the result is the same at every call. This file is the
definition; kernel.py computes the same on a GPU, which reads each source once.

Suffixes: N texts of up to C tokens, B rows, S sources of a row, K tokens of a draft.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import uses_triton
from .key import LONGEST, MAX_SOURCES, MAX_TOKENS, NONE, POSITION_BITS, RANK_BITS, SHORTEST

# Tokens of sources that the PyTorch path compares at a time: about 8 bytes of scratch for each.
AT_ONCE = 1 << 20


def find_drafts(
    tokens: Tensor,
    length: Tensor,
    own: Tensor,
    sources: Tensor,
    count: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Up to `count` tokens that may follow each row's own text.

    With backend="triton" nothing is read back from the GPU, so the call can be captured in a CUDA
    graph; a replay reads all tensors anew, but not `count`.

    Args:
        tokens: [N, C] int32 ≥ 0, contiguous, C ≤ 2^21; what lies behind a text's length may be
            anything.
        length: [N] int32, from 0 to C.
        own: [B] int64, the row's own text.
        sources: [B, S] int32, S ≤ 64, the texts to search; −1: none. A row's own text may be among
            them. On a GPU nothing checks that `own` and `sources` are in range.
        count: K ≥ 1.
        backend: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "torch".

    Returns:
        [B, K] int32, −1 behind the end of a draft and where there is none.

    Raises:
        ValueError: naming the argument that is out of range, or of a wrong shape, dtype or device.
    """
    _check(tokens, length, own, sources, count)
    if uses_triton(backend, (tokens,)):
        from .kernel import find

        return find(tokens, length, own, sources, count)
    return _find(tokens, length, own, sources, count)


def _check(tokens: Tensor, length: Tensor, own: Tensor, sources: Tensor, count: int) -> None:
    wanted = (
        ("tokens", tokens, torch.int32, 2),
        ("length", length, torch.int32, 1),
        ("own", own, torch.int64, 1),
        ("sources", sources, torch.int32, 2),
    )
    for name, tensor, dtype, dims in wanted:
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != dims:
            raise ValueError(f"{name} must be a tensor of {dims} dimensions, {dtype}")
        if tensor.device != tokens.device:
            raise ValueError(f"{name} must be on {tokens.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if not 1 <= tokens.shape[1] <= MAX_TOKENS:
        raise ValueError(f"tokens must have 1 to {MAX_TOKENS} columns, got {tokens.shape[1]}")
    if len(length) != len(tokens):
        raise ValueError(f"length must have shape ({len(tokens)},), got {tuple(length.shape)}")
    if len(sources) != len(own) or not 1 <= sources.shape[1] <= MAX_SOURCES:
        raise ValueError(
            f"sources must have shape ({len(own)}, 1 to {MAX_SOURCES}), got {tuple(sources.shape)}"
        )
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def _find(tokens: Tensor, length: Tensor, own: Tensor, sources: Tensor, count: int) -> Tensor:
    ranks = sources.shape[1]
    best_B = _best(tokens, length, own, sources[:, :1])
    # The longest match in the first source is the best there can be.
    open_M = (best_B >> RANK_BITS + POSITION_BITS < LONGEST).nonzero()[:, 0]
    if ranks > 1:
        for rows_M in open_M.split(max(1, AT_ONCE // (ranks * max(1, tokens.shape[1])))):
            best_B[rows_M] = _best(tokens, length, own[rows_M], sources[rows_M])
    rank_B1 = ((1 << RANK_BITS) - 1 - (best_B >> POSITION_BITS & (1 << RANK_BITS) - 1))[:, None]
    rank_B1 = rank_B1.clamp(max=ranks - 1)
    place_BK = (best_B & (1 << POSITION_BITS) - 1)[:, None] + torch.arange(count, device=own.device)
    source_B1 = sources.gather(1, rank_B1).clamp(min=0).long()
    inside_BK = (best_B > 0)[:, None] & (place_BK < length[source_B1])
    found_BK = tokens[source_B1, place_BK.clamp(max=tokens.shape[1] - 1)]
    return found_BK.masked_fill(~inside_BK, NONE)


def _best(tokens: Tensor, length: Tensor, own: Tensor, sources: Tensor) -> Tensor:
    """The integer of each row's best match [B] int64; 0 where there is none."""
    rows = len(own)
    source_BS = sources.clamp(min=0).long()
    end_BS = length[source_BS].masked_fill(sources < 0, 0)
    columns = max(1, int(end_BS.max())) if rows else 1
    back_L = torch.arange(1, LONGEST + 1, device=own.device)
    place_BL = length[own].long()[:, None] - back_L
    tail_BL = tokens[own[:, None], place_BL.clamp(min=0)].masked_fill(place_BL < 0, NONE)
    text_BSC = tokens[:, :columns][source_BS]
    # The two tokens before each position from 1 on; before a text stands what matches nothing.
    last_BSP, prior_BSP = text_BSC[..., :-1], F.pad(text_BSC[..., :-2], (1, 0), value=NONE - 1)
    if columns == 1:
        prior_BSP = last_BSP
    tail_B11 = tail_BL[:, None, None]
    alive_BSP = (last_BSP == tail_B11[..., 0]) & (prior_BSP == tail_B11[..., 1])
    row_M, rank_M, before_M = alive_BSP.nonzero(as_tuple=True)
    position_M = before_M + 1
    alive_M = position_M < end_BS[row_M, rank_M]
    place_ML = position_M[:, None] - back_L[SHORTEST:]
    found_ML = text_BSC[row_M[:, None], rank_M[:, None], place_ML.clamp(min=0)]
    same_ML = (place_ML >= 0) & (found_ML == tail_BL[row_M, SHORTEST:])
    size_M = alive_M * (SHORTEST + same_ML.cumprod(1).sum(1))
    first_M = (1 << RANK_BITS) - 1 - rank_M
    key_M = size_M << RANK_BITS + POSITION_BITS | first_M << POSITION_BITS | position_M
    key_M = key_M.masked_fill(size_M == 0, 0)
    best_B = torch.zeros(rows, dtype=torch.int64, device=own.device)
    best_B.scatter_reduce_(0, row_M, key_M, "amax")
    return best_B
