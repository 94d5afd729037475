"""Triton: the look-up of drafts. Defined in lookup.py.

The first launch gives each program a stretch of one source of one row and joins what they find by
`atomic_max`, which takes any order; the second reads the drafts. A program compares two tokens of
every position and more only where these match, about 3 instructions a token beside the loads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Configuration, on_device, power_of_two
from .key import LONGEST, NONE, POSITION_BITS, RANK_BITS, SHORTEST

BLOCK, WARPS = 256, 4
BLOCKS = 16  # of a program
_KEY = {"RANK": RANK_BITS, "POSITION": POSITION_BITS}
_MATCH = {**_KEY, "LONGEST_MATCH": LONGEST, "SHORTEST_MATCH": SHORTEST, "BLOCK_SIZE": BLOCK}


@triton.jit
def match_kernel(
    token_ptr, length_ptr, own_ptr, source_ptr, best_ptr, columns, sources,
    LONGEST_MATCH: tl.constexpr, SHORTEST_MATCH: tl.constexpr,
    RANK: tl.constexpr, POSITION: tl.constexpr, BLOCK_SIZE: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """STRETCH positions of one source. best: [B] int32, zero before the first program."""
    row = tl.program_id(0)
    rank = tl.program_id(1)
    source = tl.load(source_ptr + row * sources + rank)
    if source >= 0:
        own = tl.load(own_ptr + row)
        used = tl.load(length_ptr + own)
        begin = 1 + tl.program_id(2) * STRETCH
        end = tl.minimum(begin + STRETCH, tl.load(length_ptr + source))
        if used >= SHORTEST_MATCH:
            tail_ptr = token_ptr + own * columns + used - 1
            token_ptr += source.to(tl.int64) * columns
            last = tl.load(tail_ptr)
            prior = tl.load(tail_ptr - 1)
            best = tl.zeros([BLOCK_SIZE], tl.int32)
            for start in range(begin, end, BLOCK_SIZE):
                at = start + tl.arange(0, BLOCK_SIZE)
                there = (at < end) & (at >= SHORTEST_MATCH)
                newest = tl.load(token_ptr + at - 1, mask=there, other=0)
                before = tl.load(token_ptr + at - 2, mask=there, other=0)
                alive = there & (newest == last) & (before == prior)
                if tl.max(alive.to(tl.int32), 0) > 0:
                    size = tl.where(alive, SHORTEST_MATCH, 0)
                    for back in tl.static_range(SHORTEST_MATCH, LONGEST_MATCH):
                        alive = alive & (at > back) & (used > back)
                        wanted = tl.load(tail_ptr - back, mask=used > back, other=0)
                        found = tl.load(token_ptr + at - 1 - back, mask=alive, other=0)
                        alive = alive & (found == wanted)
                        size += alive.to(tl.int32)
                    first = ((1 << RANK) - 1 - rank) << POSITION
                    key = (size << (RANK + POSITION)) | first | at
                    best = tl.maximum(best, tl.where(size > 0, key, 0))
            top = tl.max(best, 0)
            if top > 0:
                tl.atomic_max(best_ptr + row, top, sem="relaxed")


@triton.jit
def draft_kernel(
    token_ptr, length_ptr, source_ptr, best_ptr, out_ptr, columns, sources, count,
    RANK: tl.constexpr, POSITION: tl.constexpr, NOTHING: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The draft of one row. out: [B, K] int32."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK_SIZE)
    best = tl.load(best_ptr + row)
    rank = ((1 << RANK) - 1) - ((best >> POSITION) & ((1 << RANK) - 1))
    source = tl.load(source_ptr + row * sources + rank, mask=best > 0, other=0)
    length = tl.load(length_ptr + source)
    at = (best & ((1 << POSITION) - 1)) + lane
    inside = (best > 0) & (at < length) & (lane < count)
    token_ptr += source.to(tl.int64) * columns
    token = tl.load(token_ptr + at, mask=inside, other=NOTHING)
    tl.store(out_ptr + row * count + lane, token, mask=lane < count)


def find(tokens: Tensor, length: Tensor, own: Tensor, sources: Tensor, count: int) -> Tensor:
    """What `find_drafts` returns, in two launches and a fill."""
    rows, ranks = sources.shape
    columns = tokens.shape[1]
    best = torch.zeros(rows, dtype=torch.int32, device=tokens.device)
    out = torch.empty(rows, count, dtype=torch.int32, device=tokens.device)
    if rows == 0:
        return out
    stretch = BLOCK * BLOCKS
    with on_device(tokens.device):
        match_kernel[(rows, ranks, triton.cdiv(columns, stretch))](
            tokens, length, own, sources, best, columns, ranks,
            **_MATCH, STRETCH=stretch, num_warps=WARPS,
        )  # fmt: skip
        draft_kernel[(rows,)](
            tokens, length, sources, best, out, columns, ranks, count,
            **_KEY, NOTHING=NONE, BLOCK_SIZE=power_of_two(count), num_warps=1,
        )  # fmt: skip
    return out


def production_configurations() -> list[Configuration]:
    """For bench/compile_report.py: texts of any length, 16 tokens of a row in a pass. The searched
    tokens start at any place, so that no access can be promised to be wide."""
    pointers = {name: "*i32" for name in ("token_ptr", "length_ptr", "source_ptr", "best_ptr")}
    sizes = {"columns": "i32", "sources": "i32"}
    match = Configuration(
        "find_drafts/match",
        match_kernel,
        {**pointers, "own_ptr": "*i64", **sizes},
        {**_MATCH, "STRETCH": BLOCK * BLOCKS},
        {"num_warps": WARPS},
        [],
        {},
    )
    draft = Configuration(
        "find_drafts/draft",
        draft_kernel,
        {**pointers, "out_ptr": "*i32", **sizes, "count": "i32"},
        {**_KEY, "NOTHING": NONE, "BLOCK_SIZE": 16},
        {"num_warps": 1},
        [],
        {},
    )
    return [match, draft]
