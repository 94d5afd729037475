"""Triton: attention of new tokens over a paged cache, split along the positions. Defined in
decode.py.

Few sequences must still occupy a GPU, so the positions of each are split among several programs, as
in Flash-Decoding (Dao et al. 2023). Two launches: a program of the first takes one head of the
cache, a tile of the query rows that read it (the queries j times the heads of its group) and one
split, and writes unnormalised sums relative to its own peak; a program of the second merges the
splits of one query head, always in the same order. Neither uses atomics, so a result is the same
bits every time.

The grid depends on shapes alone, so that a CUDA graph stays valid while sequences grow: a sequence
is cut into as many splits however long it is, each an even share of the blocks in use. A split
without a block writes nothing, and the merge knows which ones those are.

The loop copies blocks of keys and values ahead of their use. For that the page of a block must be
known one turn before the block is copied: if it is read in the same turn, Triton still compiles the
loop, but waits for every copy at once. So the loop carries the next page's index along, and
bench/compile_report.py asserts that no wait is for all copies.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Configuration, Sweep, on_device, power_of_two
from ..rounding import NATIVE, round_nearest
from ..softmax import LOG2E, soft_cap

STAGES = 3  # blocks that the loop holds: one in use, the others on their way
# Rows of a tile: a product has 16 at least, and 128 would spill.
LEAST_ROWS, MOST_ROWS = 16, 64
# Positions of a block: a product has 16 at least; 64 of 128 elements and of 16 bits are 16 KiB.
LEAST_POSITIONS, MOST_POSITIONS, MOST_ELEMENTS = 16, 64, 8192
# Programs a multiprocessor that the splits aim at; the longest split, so that a long sequence among
# short ones does not end alone; the most splits that a merge holds in registers.
PROGRAMS, LONGEST_SPLIT, MOST_SPLITS = 4, 2048, 64
PARTIAL_WARPS, MERGE_WARPS = 4, 4


@triton.jit
def _span(used_ptr, sequence, longest, window, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """Positions in use; the first block that some query sees and the one behind the last."""
    used = tl.minimum(tl.maximum(tl.load(used_ptr + sequence), 0), longest)
    first = used * 0
    if window is not None:
        first = tl.maximum(used - QUERIES + 1 - window, 0) // BLOCK
    return used, first, tl.cdiv(used, BLOCK)


@triton.jit
def _page_of(table_ptr, block, used, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of a block; where a block has several pages, that of each of its positions."""
    if PAGE >= BLOCK:
        return tl.load(table_ptr + block * BLOCK // PAGE)
    else:
        position = block * BLOCK + tl.arange(0, BLOCK)
        return tl.load(table_ptr + position // PAGE, mask=position < used, other=0)


@triton.jit
def _pointers(
    pages_ptr, page, block, page_stride, position_stride,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """[BLOCK, DIMS]; `page` as _page_of gives it."""
    position = tl.arange(0, BLOCK)
    if PAGE >= BLOCK:
        pages_ptr += page.to(tl.int64) * page_stride + block * BLOCK % PAGE * position_stride
        offset = position * position_stride
    else:
        slot = (block * BLOCK + position) % PAGE
        offset = page.to(tl.int64) * page_stride + slot * position_stride
    return pages_ptr + offset[:, None] + tl.arange(0, DIMS)[None, :]


@triton.jit
def _add_block(
    sums, q, k_at, v_at, position, used, edge, scale2, softcap2, window,
    QUERIES: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The sums (peak, Σ 2^(z − peak), Σ 2^(z − peak)·v) of a tile of query rows after one more
    block. Values are masked like keys: 0 · NaN of a slot out of use would be NaN."""
    peak, total, mixed = sums
    inside = position < used
    if window is not None:
        inside = inside & (position > used - QUERIES - window)
    real = inside[:, None]
    if D != DIMS:
        real = real & (tl.arange(0, DIMS) < D)[None, :]
    k = tl.load(k_at, mask=real, other=0.0)
    v = tl.load(v_at, mask=real, other=0.0)
    if not NATIVE:  # the interpreter multiplies the bits of bf16 as if they were integers
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
    if softcap2 is not None:
        z, _ = soft_cap(z, softcap2)
    visible = position[None, :] < edge[:, None]
    if window is not None:
        visible = visible & (position[None, :] >= edge[:, None] - window)
    z = tl.where(visible, z, float("-inf"))
    top = tl.maximum(peak, tl.max(z, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.exp2(peak - base)
    weight = tl.exp2(z - base[:, None])
    total = total * factor + tl.sum(weight, 1)
    mixed = tl.dot(weight.to(v.dtype), v, mixed * factor[:, None], input_precision="ieee")
    return top, total, mixed


@triton.jit
def partial_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, used_ptr, mixed_ptr, mass_ptr,
    q_sequence_stride, q_query_stride, q_head_stride,
    k_page_stride, k_position_stride, k_head_stride,
    v_page_stride, v_position_stride, v_head_stride,
    table_stride, longest, scale2, softcap2, window,
    QUERIES: tl.constexpr, CACHE_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DIMS: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of one tile of query rows of one head of the cache, over one split of the positions.

    mixed: [B, K, splits, Q·GROUP, D], mass: [B, K, splits, 2, Q·GROUP], fp32. scale2 and softcap2
    are times log2(e), so that the scores come out in base 2.
    """
    TILES: tl.constexpr = (QUERIES * GROUP + ROWS - 1) // ROWS
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % CACHE_HEADS
    sequence = (tl.program_id(0) // (TILES * CACHE_HEADS)).to(tl.int64)
    used, first, stop = _span(used_ptr, sequence, longest, window, QUERIES, BLOCK)
    share = tl.cdiv(stop - first, tl.num_programs(1))
    begin = first + tl.program_id(1) * share
    end = tl.minimum(begin + share, stop)
    if begin >= end:
        return
    row = tile * ROWS + tl.arange(0, ROWS)
    exists = row < QUERIES * GROUP
    dims = tl.arange(0, DIMS)
    inner = exists[:, None] & (dims < D)[None, :]
    query = row // GROUP
    q_ptr += sequence * q_sequence_stride
    q_offset = query * q_query_stride + (head * GROUP + row % GROUP) * q_head_stride
    q = tl.load(q_ptr + q_offset[:, None] + dims[None, :], mask=inner, other=0.0)
    if not NATIVE:
        q = q.to(tl.float32)
    edge = used - QUERIES + 1 + query
    k_ptr += head.to(tl.int64) * k_head_stride
    v_ptr += head.to(tl.int64) * v_head_stride
    table_ptr += sequence * table_stride
    sums = (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, DIMS], tl.float32),
    )
    following = _page_of(table_ptr, begin, used, PAGE, BLOCK)
    for block in tl.range(begin, end, num_stages=STAGES):
        page = following
        following = _page_of(table_ptr, tl.minimum(block + 1, end - 1), used, PAGE, BLOCK)
        k_at = _pointers(k_ptr, page, block, k_page_stride, k_position_stride, PAGE, BLOCK, DIMS)
        v_at = _pointers(v_ptr, page, block, v_page_stride, v_position_stride, PAGE, BLOCK, DIMS)
        position = block * BLOCK + tl.arange(0, BLOCK)
        sums = _add_block(
            sums, q, k_at, v_at, position, used, edge, scale2, softcap2, window, QUERIES, D, DIMS
        )
    peak, total, mixed = sums
    slot = (sequence * CACHE_HEADS + head) * tl.num_programs(1) + tl.program_id(1)
    mass_ptr += slot * (2 * QUERIES * GROUP)
    tl.store(mass_ptr + row, peak, mask=exists)
    tl.store(mass_ptr + QUERIES * GROUP + row, total, mask=exists)
    mixed_ptr += slot * (QUERIES * GROUP * D)
    tl.store(mixed_ptr + row[:, None] * D + dims[None, :], mixed, mask=inner)


@triton.jit
def merge_kernel(
    mixed_ptr, mass_ptr, used_ptr, out_ptr, splits, longest, window,
    QUERIES: tl.constexpr, CACHE_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DIMS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query head: the sums of its splits joined. SPLITS: a power of two, `splits` at least."""
    place = tl.program_id(0).to(tl.int64)
    sequence = place // (QUERIES * CACHE_HEADS * GROUP)
    query = place // (CACHE_HEADS * GROUP) % QUERIES
    head = place // GROUP % CACHE_HEADS
    row = query * GROUP + place % GROUP
    _, first, stop = _span(used_ptr, sequence, longest, window, QUERIES, BLOCK)
    split = tl.arange(0, SPLITS)
    written = (split < splits) & (first + split * tl.cdiv(stop - first, splits) < stop)
    slot = (sequence * CACHE_HEADS + head) * splits + split
    mass_ptr += slot * (2 * QUERIES * GROUP) + row
    peak = tl.load(mass_ptr, mask=written, other=float("-inf"))
    total = tl.load(mass_ptr + QUERIES * GROUP, mask=written, other=0.0)
    dims = tl.arange(0, DIMS)
    inner = written[:, None] & (dims < D)[None, :]
    offset = (slot * (QUERIES * GROUP) + row) * D
    mixed = tl.load(mixed_ptr + offset[:, None] + dims[None, :], mask=inner, other=0.0)
    top = tl.max(peak, 0)
    factor = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    mass = tl.sum(total * factor, 0)
    value = tl.sum(mixed * factor[:, None], 0) / tl.where(mass == 0, 1.0, mass)
    value = round_nearest(value, out_ptr.dtype.element_ty)
    tl.store(out_ptr + place * D + dims, value, mask=dims < D)


def tile_sizes(rows_in_all: int, width: int, itemsize: int) -> dict[str, int]:
    """What a program of the first launch holds. rows_in_all: query rows that read one head of the
    cache; width: elements of a head; itemsize: bytes of an element."""
    dims = max(16, power_of_two(width))
    # Products of fp32 take more registers, and heads of 256 have longer sums.
    rows = LEAST_ROWS if itemsize == 4 or dims > 128 else MOST_ROWS
    elements = MOST_ELEMENTS // 4 if itemsize == 4 else MOST_ELEMENTS
    return {
        "DIMS": dims,
        "ROWS": min(max(LEAST_ROWS, power_of_two(rows_in_all)), rows),
        "BLOCK": min(max(LEAST_POSITIONS, elements // dims), MOST_POSITIONS),
    }


def count_splits(programs: int, longest: int, block: int, multiprocessors: int) -> int:
    """Splits of each sequence. programs: of the first launch, without splits; longest: positions
    that a sequence can have."""
    wanted = max(-(-PROGRAMS * multiprocessors // programs), -(-longest // LONGEST_SPLIT))
    return min(wanted, -(-longest // block), MOST_SPLITS)


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    used: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[B, Q, A, D]; the arguments are checked."""
    sequences, queries, heads, width = q.shape
    page, cache_heads = k_pages.shape[1:3]
    rows = queries * (heads // cache_heads)
    longest = block_table.shape[1] * page
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if sequences == 0 or longest == 0:
        return out.zero_()
    # The elements of a head and the entries of a sequence must be adjacent.
    q = q if q.stride(3) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    sizes = tile_sizes(rows, width, q.element_size())
    programs = sequences * cache_heads * -(-rows // sizes["ROWS"])
    cuda = q.device.type == "cuda"
    multiprocessors = (
        torch.cuda.get_device_properties(q.device).multi_processor_count if cuda else 1
    )
    splits = count_splits(programs, longest, sizes["BLOCK"], multiprocessors)
    parts = (sequences, cache_heads, splits)
    common: dict[str, Any] = {
        "mixed_ptr": torch.empty(*parts, rows, width, dtype=torch.float32, device=q.device),
        "mass_ptr": torch.empty(*parts, 2, rows, dtype=torch.float32, device=q.device),
        "used_ptr": used.contiguous(),
        "longest": longest,
        "window": window,
        "QUERIES": queries,
        "CACHE_HEADS": cache_heads,
        "GROUP": heads // cache_heads,
        "D": width,
        "DIMS": sizes["DIMS"],
        "BLOCK": sizes["BLOCK"],
    }
    strides = {
        f"{name}_{part}_stride": pages.stride(axis)
        for name, pages in (("k", k_pages), ("v", v_pages))
        for axis, part in enumerate(("page", "position", "head"))
    }
    with on_device(q.device):
        partial_kernel[(programs, splits)](
            **common,
            **strides,
            q_ptr=q,
            k_ptr=k_pages,
            v_ptr=v_pages,
            table_ptr=block_table,
            q_sequence_stride=q.stride(0),
            q_query_stride=q.stride(1),
            q_head_stride=q.stride(2),
            table_stride=block_table.stride(0),
            scale2=scale * LOG2E.value,
            softcap2=None if softcap is None else softcap * LOG2E.value,
            PAGE=page,
            ROWS=sizes["ROWS"],
            STAGES=STAGES,
            num_warps=PARTIAL_WARPS,
        )
        merge_kernel[(sequences * queries * heads,)](
            **common,
            out_ptr=out,
            splits=splits,
            SPLITS=power_of_two(splits),
            num_warps=MERGE_WARPS,
        )
    return out


SCRATCH = {"mixed_ptr": "*fp32", "mass_ptr": "*fp32", "used_ptr": "*i32", "longest": "i32:16"}


def _partial(
    name: str, dtype: str, queries: int = 1, page: int = 64, width: int = 128, capped: bool = False
) -> Configuration:
    """Eight heads of the cache, groups of four; capped: with window and softcap."""
    itemsize = 4 if dtype == "fp32" else 2
    sizes = tile_sizes(queries * 4, width, itemsize)
    strides = {"q": ("sequence", "query", "head"), "k": ("page", "position", "head")}
    strides["v"] = strides["k"]
    optional = {"softcap2": "fp32", "window": "i32"}
    signature = {
        **SCRATCH,
        **{f"{tensor}_ptr": f"*{dtype}" for tensor in strides},
        **{f"{tensor}_{part}_stride": "i32:16" for tensor in strides for part in strides[tensor]},
        "table_ptr": "*i32",
        "table_stride": "i32",
        "scale2": "fp32",
        **(optional if capped else {}),
    }
    shape = {"QUERIES": queries, "CACHE_HEADS": 8, "GROUP": 4, "D": width, "PAGE": page}
    constexprs: dict[str, Any] = {**shape, **sizes, "STAGES": STAGES}
    constexprs |= {} if capped else dict.fromkeys(optional)
    # Of keys and values together, by one thread of a program.
    elements = 2 * sizes["BLOCK"] * sizes["DIMS"] // (32 * PARTIAL_WARPS)
    return Configuration(
        name,
        partial_kernel,
        signature,
        constexprs,
        {"num_warps": PARTIAL_WARPS},
        {"table_ptr": 8 * itemsize},  # where a page lies, the table says
        {"_add_block": Sweep(itemsize, elements=elements)},
    )


def _merge(name: str, splits: int, width: int = 128) -> Configuration:
    sizes = tile_sizes(4, width, 2)
    constexprs = {"QUERIES": 1, "CACHE_HEADS": 8, "GROUP": 4, "D": width, "window": None}
    constexprs |= {"DIMS": sizes["DIMS"], "BLOCK": sizes["BLOCK"], "SPLITS": splits}
    signature = {**SCRATCH, "out_ptr": "*bf16", "splits": "i32"}
    return Configuration(
        name, merge_kernel, signature, constexprs, {"num_warps": MERGE_WARPS}, [], {}
    )


def production_configurations() -> list[Configuration]:
    """What bench/compile_report.py checks: a cache whose strides 16 divides."""
    return [
        _partial("decode_bf16", "bf16"),
        _partial("decode_fp16", "fp16"),
        _partial("decode_fp32", "fp32"),
        _partial("decode_capped_bf16", "bf16", capped=True),
        _partial("decode_5_bf16", "bf16", queries=5),
        _partial("decode_16_bf16", "bf16", queries=16),
        _partial("decode_16_capped_bf16", "bf16", queries=16, capped=True),
        _partial("decode_page_16_bf16", "bf16", page=16),
        _partial("decode_head_64_bf16", "bf16", width=64),
        _partial("decode_head_256_bf16", "bf16", width=256),
        _merge("decode_merge_4", 4),
        _merge("decode_merge_64", MOST_SPLITS),
        _merge("decode_merge_head_256", MOST_SPLITS, width=256),
    ]
