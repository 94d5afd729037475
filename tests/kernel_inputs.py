"""Where the tests of the kernels run, and inputs that several of them share.

Every call that may run a Triton kernel is given tensors on DEVICE: there the kernel is compiled on
a machine with a GPU and interpreted on others. Random numbers are drawn on the CPU and moved, so
that they are the same everywhere. What only PyTorch computes (the reference, the PyTorch path,
Philox, the number formats) is tested on the CPU.
"""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from sodfast_kernels import SampledTokens, decode_attention, sample_tokens

# With its index, as in bench/gpu_suite.py: some of torch's functions refuse a GPU without.
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# The marker skips a test where there is neither a GPU nor the interpreter.
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.triton)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# A vector of tensors that 16 divides (wide accesses), odd ones, one longer than a block.
SHAPES = [(64, 16), (3, 5), (16,), (1,), (1027,)]
HUGE_SEED, HUGE_STEP = 2**63 + 2**31 + 5, 2**40 + 2**31 + 7


def tensors(seed: int, dtype: torch.dtype, shapes=SHAPES) -> list[torch.Tensor]:
    """Values of very different sizes, with zeros, infinity and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        value = torch.randn(shape, generator=generator)
        value *= torch.exp(4 * torch.randn(shape, generator=generator))
        made.append(value)
    made[0].view(-1)[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    return [value.to(DEVICE, dtype) for value in made]


def clones(params):
    return [param.clone() for param in params]


def same_bits(left, right) -> bool:
    """Equal bit for bit; any NaN equals any other."""
    return all(
        bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())
        for a, b in zip(left, right, strict=True)
    )


TRUNCATIONS = [
    {},
    {"temperature": 0},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_p": 0.3},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"top_k": 30},
    {"top_k": 30, "top_p": 0.7},
    {"top_k": 10**6, "top_p": 0.5, "temperature": 2.5},
]


def draw_keys(rows: int, position: int = 0) -> dict[str, Any]:
    """A key for each of the rows, of large numbers."""
    return {
        "seed": 2**63 + 11,
        "step": 7,
        "sample": torch.arange(rows),
        "position": torch.full((rows,), position),
    }


def draw_tokens(logits: torch.Tensor, key: dict[str, Any], **options: Any) -> SampledTokens:
    """On the GPU where there is one; the results on the CPU."""
    key = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in key.items()}
    out = sample_tokens(logits.to(DEVICE), **key, **options)
    return SampledTokens(*(entry.cpu() for entry in out))


class Cache(NamedTuple):
    """Arguments of decode_attention, and what each sequence holds in order, [used, K, D]."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    used: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def paged_cache(
    used: list[int],
    *,
    queries: int = 1,
    heads: int = 4,
    cache_heads: int = 2,
    width: int = 16,
    page: int = 16,
    spare: int = 1,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    heads_first: bool = False,
    seed: int = 0,
) -> Cache:
    """Sequences in pages of any order; NaN wherever no position lies that a query sees, and table
    entries without such a position are −1 or huge. spare: entries more than the longest needs."""
    generator = torch.Generator().manual_seed(seed)
    columns = -(-max(used) // page) + spare
    pages = len(used) * columns + 2
    shape = (pages, cache_heads, page, width) if heads_first else (pages, page, cache_heads, width)
    caches = [torch.full(shape, float("nan")) for _ in range(2)]
    views = [cache.transpose(1, 2) if heads_first else cache for cache in caches]
    garbage = torch.tensor([-1, 2**31 - 1, pages, -(2**31)], dtype=torch.int32)
    table = garbage[torch.arange(len(used) * columns) % 4].view(len(used), columns).clone()
    order = torch.randperm(pages, generator=generator).int().tolist()
    contents: list[list[torch.Tensor]] = [[], []]
    for b, length in enumerate(used):
        first = 0 if window is None else max(0, length - queries + 1 - window)
        for m in range(first // page, -(-length // page)):
            table[b, m] = order.pop()
        position = torch.arange(first, length)
        places = table[b].repeat_interleave(page)[first:length].long(), position % page
        for view, sequences in zip(views, contents, strict=True):
            content = torch.randn(length, cache_heads, width, generator=generator)
            sequences.append(content.to(dtype).float())
            view[places] = sequences[-1][first:]
    q = torch.randn(len(used), queries, heads, width, generator=generator)
    return Cache(
        q.to(DEVICE, dtype),
        views[0].to(DEVICE, dtype),
        views[1].to(DEVICE, dtype),
        table.to(DEVICE),
        torch.tensor(used, dtype=torch.int32, device=DEVICE),
        *contents,
    )


def attention_by_hand(
    cache: Cache, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """fp64, a query and a head at a time."""
    q = cache.q.double().cpu()
    sequences, queries, heads, width = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = heads // cache.k_pages.shape[2]
    for b, j, a in itertools.product(range(sequences), range(queries), range(heads)):
        end = int(cache.used[b]) - queries + 1 + j
        first = 0 if window is None else max(0, end - window)
        if end <= 0:
            continue
        keys = cache.keys[b][first:end, a // group].double()
        scores = keys @ q[b, j, a] / math.sqrt(width)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[b, j, a] = scores.softmax(0) @ cache.values[b][first:end, a // group].double()
    return out


def attend_paged(cache: Cache, **options: Any) -> torch.Tensor:
    return decode_attention(*cache[:5], **options)
