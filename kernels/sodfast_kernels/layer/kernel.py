"""Triton: the kernels between the products of a decoder layer. Defined in rope.py and silu.py.

Both are launched once for every layer of every decode step, on as little as one token: a launch
takes longer than the work. So each is one launch, straight through and without a loop, and what is
left is to read and write 16 bytes at a time for the thousands of tokens of a prefill.

A program of the first takes a few heads of one token, be they queries, keys or values. Queries and
keys are normalised and turned; each head is stored where its kind belongs, by masks, so that any
numbers of heads fit. Elements i and i + D/2 turn together: they lie in two tiles of half the width.
"""

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Configuration, Sweep, on_device, power_of_two
from ..rounding import round_nearest
from ..softmax import LOG2E

if TYPE_CHECKING:
    from .rope import CacheSlots

# Elements of each half that a warp holds, 8 a thread: 16 bytes of a 16-bit dtype.
ELEMENTS = 256
BLOCK, WARPS = 1024, 4  # of silu_and_mul, 8 elements a thread
CACHE = ("keys_ptr", "values_ptr", "page_ptr", "offset_ptr")
CACHE_STRIDES = tuple(
    f"{name}_{part}_stride"
    for name in ("key", "value")
    for part in ("page", "offset", "head", "dim")
)


@triton.jit
def rope_and_cache_kernel(
    qkv_ptr, gain_ptr, cos_ptr, sin_ptr, out_ptr, keys_ptr, values_ptr, page_ptr, offset_ptr,
    qkv_stride, cos_stride, sin_stride, eps,
    key_page_stride, key_offset_stride, key_head_stride, key_dim_stride,
    value_page_stride, value_offset_stride, value_head_stride, value_dim_stride,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token. keys_ptr: None where there is no cache. out: [T, A, D], or
    [T, A + K, D] without a cache. gain_ptr: None where heads are not normalised."""
    ROTATED: tl.constexpr = QUERY_HEADS + KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    dim = tl.arange(0, HALF)[None, :]
    rotated = head < ROTATED
    exists = head < ROTATED + KV_HEADS
    if D != 2 * HALF:
        rotated = rotated & (dim < D // 2)
        exists = exists & (dim < D // 2)
    x_ptr = qkv_ptr + token * qkv_stride + head * D + dim
    raw_first = tl.load(x_ptr, mask=exists, other=0.0)
    raw_second = tl.load(x_ptr + D // 2, mask=exists, other=0.0)
    first = raw_first.to(tl.float32)
    second = raw_second.to(tl.float32)
    if gain_ptr is not None:
        gain_ptr += head * D + dim
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / D + eps)[:, None]
        first = first * scale * tl.load(gain_ptr, mask=rotated, other=0.0).to(tl.float32)
        second = second * scale * tl.load(gain_ptr + D // 2, mask=rotated, other=0.0).to(tl.float32)
    inner = dim < D // 2
    cos_ptr += token * cos_stride + dim
    sin_ptr += token * sin_stride + dim
    cos_first = tl.load(cos_ptr, mask=inner, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + D // 2, mask=inner, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr, mask=inner, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + D // 2, mask=inner, other=0.0).to(tl.float32)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    turned_first = round_nearest(first * cos_first + second * sin_first, dtype)
    turned_second = round_nearest(second * cos_second + first * sin_second, dtype)
    if keys_ptr is None:
        out_ptr += (token * ROTATED + head) * D + dim
        tl.store(out_ptr, turned_first, mask=rotated)
        tl.store(out_ptr + D // 2, turned_second, mask=rotated)
    else:
        query = rotated & (head < QUERY_HEADS)
        out_ptr += (token * QUERY_HEADS + head) * D + dim
        tl.store(out_ptr, turned_first, mask=query)
        tl.store(out_ptr + D // 2, turned_second, mask=query)
        page = tl.load(page_ptr + token)
        offset = tl.load(offset_ptr + token)
        key = rotated & (head >= QUERY_HEADS)
        keys_ptr += page * key_page_stride + offset * key_offset_stride
        keys_ptr += (head - QUERY_HEADS).to(tl.int64) * key_head_stride
        keys_ptr += dim.to(tl.int64) * key_dim_stride
        tl.store(keys_ptr, turned_first, mask=key)
        tl.store(keys_ptr + D // 2 * key_dim_stride, turned_second, mask=key)
        value = exists & (head >= ROTATED)
        values_ptr += page * value_page_stride + offset * value_offset_stride
        values_ptr += (head - ROTATED).to(tl.int64) * value_head_stride
        values_ptr += dim.to(tl.int64) * value_dim_stride
        tl.store(values_ptr, raw_first, mask=value)
        tl.store(values_ptr + D // 2 * value_dim_stride, raw_second, mask=value)


@triton.jit
def silu_and_mul_kernel(gate_up_ptr, out_ptr, row_stride, width, BLOCK_SIZE: tl.constexpr):
    """BLOCK_SIZE columns of one row. width: [I]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = column < width
    gate_up_ptr += row * row_stride + column
    gate = tl.load(gate_up_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + width, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp2(gate * -LOG2E)) * up
    value = round_nearest(value, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, value, mask=inside)


def tile_sizes(width: int) -> dict[str, int]:
    """What a program of the first kernel holds, for heads of `width` elements."""
    half = power_of_two(width // 2)
    return {"HALF": half, "HEADS": max(1, ELEMENTS // half)}


def rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    gain: Tensor | None,
    eps: float,
    cache: "CacheSlots | None",
) -> tuple[Tensor, Tensor | None]:
    """Queries, and keys where there is no cache; the arguments are checked."""
    tokens, heads, width = qkv.shape
    queries = heads - 2 * kv_heads
    out = qkv.new_empty(tokens, queries if cache is not None else queries + kv_heads, width)
    if tokens:
        if qkv.stride(2) != 1 or qkv.stride(1) != width:
            qkv = qkv.contiguous()
        cos, sin = (x if x.stride(1) == 1 else x.contiguous() for x in (cos, sin))
        sizes = tile_sizes(width)
        programs = -(-(heads if cache is not None else queries + kv_heads) // sizes["HEADS"])
        with on_device(qkv.device):
            rope_and_cache_kernel[(tokens, programs)](
                qkv_ptr=qkv,
                gain_ptr=None if gain is None else gain.contiguous(),
                cos_ptr=cos,
                sin_ptr=sin,
                out_ptr=out,
                **_slots(cache),
                qkv_stride=qkv.stride(0),
                cos_stride=cos.stride(0),
                sin_stride=sin.stride(0),
                eps=eps,
                QUERY_HEADS=queries,
                KV_HEADS=kv_heads,
                D=width,
                **sizes,
                num_warps=1,
            )
    return (out, None) if cache is not None else (out[:, :queries], out[:, queries:])


def _slots(cache: "CacheSlots | None") -> dict[str, Any]:
    """The kernel's arguments of a cache."""
    if cache is None:
        return dict.fromkeys((*CACHE, *CACHE_STRIDES))
    keys, values, page, offset = cache
    tensors = (keys, values, page.contiguous(), offset.contiguous())
    strides = (*keys.stride(), *values.stride())
    return dict(zip((*CACHE, *CACHE_STRIDES), (*tensors, *strides), strict=True))


def gated(gate_up: Tensor) -> Tensor:
    """[T, I]; the argument is checked."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    if out.numel():
        gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
        with on_device(gate_up.device):
            silu_and_mul_kernel[(tokens, -(-width // BLOCK))](
                gate_up_ptr=gate_up,
                out_ptr=out,
                row_stride=gate_up.stride(0),
                width=width,
                BLOCK_SIZE=BLOCK,
                num_warps=WARPS,
            )
    return out


def _rope(
    name: str, dtype: str, width: int = 128, gains: bool = True, cached: bool = True
) -> Configuration:
    """32 query heads, 8 of a cache whose heads are contiguous."""
    sizes = tile_sizes(width)
    signature = {
        **{f"{tensor}_ptr": f"*{dtype}" for tensor in ("qkv", "cos", "sin", "out")},
        **{f"{tensor}_stride": "i32:16" for tensor in ("qkv", "cos", "sin")},
        "eps": "fp32",
    }
    constexprs: dict[str, Any] = {"QUERY_HEADS": 32, "KV_HEADS": 8, "D": width, **sizes}
    if gains:
        signature["gain_ptr"] = f"*{dtype}"
    else:
        constexprs["gain_ptr"] = None
    if cached:
        signature |= dict(zip(CACHE, (f"*{dtype}", f"*{dtype}", "*i64", "*i64"), strict=True))
        signature |= {stride: "i32:16" for stride in CACHE_STRIDES if "dim" not in stride}
        constexprs |= {stride: 1 for stride in CACHE_STRIDES if "dim" in stride}
    else:
        constexprs |= dict.fromkeys((*CACHE, *CACHE_STRIDES))
    itemsize = 4 if dtype == "fp32" else 2
    # The model's bytes are those of the heads, read and written: angles and gains stay in the L2.
    elements = 2 * sizes["HALF"] * sizes["HEADS"] // 32
    return Configuration(
        name,
        rope_and_cache_kernel,
        signature,
        constexprs,
        {"num_warps": 1},
        {"page_ptr": 8 * itemsize} if cached else ["qkv_ptr", "out_ptr"],
        {"rope_and_cache_kernel": Sweep(2 * itemsize, elements=elements)},
    )


def _silu(name: str, dtype: str) -> Configuration:
    signature = {f"{tensor}_ptr": f"*{dtype}" for tensor in ("gate_up", "out")}
    signature |= {"row_stride": "i32:16", "width": "i32:16"}
    return Configuration(
        name,
        silu_and_mul_kernel,
        signature,
        {"BLOCK_SIZE": BLOCK},
        {"num_warps": WARPS},
        ["gate_up_ptr", "out_ptr"],
        {"silu_and_mul_kernel": Sweep(12 if dtype == "fp32" else 6)},
    )


def production_configurations() -> list[Configuration]:
    """What bench/compile_report.py checks: strides that 16 divides."""
    return [
        _rope("rope_cache_bf16", "bf16"),
        _rope("rope_cache_fp16", "fp16"),
        _rope("rope_cache_fp32", "fp32"),
        _rope("rope_cache_no_gain_bf16", "bf16", gains=False),
        _rope("rope_cache_head_64_bf16", "bf16", width=64),
        _rope("rope_cache_head_256_bf16", "bf16", width=256),
        _rope("rope_bf16", "bf16", cached=False),
        _rope("rope_no_gain_bf16", "bf16", gains=False, cached=False),
        _silu("silu_bf16", "bf16"),
        _silu("silu_fp16", "fp16"),
        _silu("silu_fp32", "fp32"),
    ]
