"""Attention for decoding, on both paths: values, what is never read, what is refused."""

import math

import pytest
import torch
from kernel_inputs import BACKENDS, DEVICE, FLOATS, attend_paged, attention_by_hand, paged_cache
from marks import slow
from sodfast_kernels import decode_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def agree(cache, backend, **options):
    """The output is that of the definition by hand; what no query sees is NaN in the cache."""
    out = attend_paged(cache, backend=backend, **options)
    assert out.shape == cache.q.shape and out.dtype == cache.q.dtype and out.is_contiguous()
    tolerance = TOLERANCE[cache.q.dtype]
    exact = attention_by_hand(cache, **options)
    torch.testing.assert_close(out.double().cpu(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [16, *slow(64, 128)])
def test_odd_lengths_in_pages_of_any_order(backend, page):
    agree(paged_cache([1, 15, 64, 129, 197], page=page), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("options", [{"window": 21}, *slow({}, {"softcap": 0.7})], ids=str)
def test_dtypes_windows_and_softcaps(backend, dtype, options):
    window = options.get("window")
    cache = paged_cache([3, 70, 133], queries=3, page=32, dtype=dtype, window=window)
    agree(cache, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "cache_heads"), [(8, 2), *slow((3, 3), (7, 1))])
@pytest.mark.parametrize("queries", [5, *slow(1, 2, 16)])
def test_groups_of_heads_and_several_queries(backend, heads, cache_heads, queries):
    used = [queries, queries + 1, 90]
    agree(paged_cache(used, queries=queries, heads=heads, cache_heads=cache_heads), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [24, 80, *slow(1, 64, 256)])
def test_heads_of_any_width(backend, width):
    agree(paged_cache([5, 33], width=width, queries=2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [2, *slow(None, 1, 40)])
def test_a_query_that_sees_nothing_gives_zeros(backend, window):
    cache = paged_cache([0, 1, 3], queries=3, heads=2, cache_heads=1, window=window)
    out = attend_paged(cache, backend=backend, window=window)
    for b, used in enumerate([0, 1, 3]):
        assert (out[b, : 3 - used] == 0).all() and (out[b, 3 - used :] != 0).all()
    agree(cache, backend, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [16, *slow(64)])
@pytest.mark.parametrize("window", [16, *slow(1, 64, 100, 10**9)])
def test_pages_before_the_window_are_never_read(backend, page, window):
    agree(paged_cache([63, 64, 200], page=page, queries=2, window=window), backend, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_cache_with_its_heads_first(backend, dtype):
    cache = paged_cache([17, 100], page=64, heads_first=True, dtype=dtype)
    assert not cache.k_pages.is_contiguous()
    agree(cache, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_lengths_and_tables_by_strides(backend):
    cache = paged_cache([17, 100], queries=2, spare=2)
    exact = attend_paged(cache, backend=backend)
    product = torch.cat((cache.q, torch.full_like(cache.q, math.nan)), 2)
    doubled = torch.stack((cache.q, cache.q), 4).flatten(3)[..., ::2]
    spread = cache._replace(
        block_table=cache.block_table.T.contiguous().T,
        used=torch.stack((cache.used, cache.used), 1)[:, 0],
    )
    for q in (product[:, :, : cache.q.shape[2]], doubled):
        assert not q.is_contiguous()
        assert torch.equal(attend_paged(spread._replace(q=q), backend=backend), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_used_is_taken_as_what_the_table_can_hold(backend):
    cache = paged_cache([32, 32], spare=0)
    beyond = cache._replace(used=torch.tensor([33, 2**31 - 1], dtype=torch.int32, device=DEVICE))
    exact = attend_paged(cache, backend=backend)
    assert torch.equal(attend_paged(beyond, backend=backend), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_that_share_a_page(backend):
    cache = paged_cache([40, 40])
    table = cache.block_table.clone()
    table[1] = table[0]
    out = attend_paged(cache._replace(block_table=table), backend=backend)
    alone = cache._replace(q=cache.q[1:], block_table=table[:1], used=cache.used[:1])
    torch.testing.assert_close(out[1:], attend_paged(alone, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0])
def test_scale_stands_in_for_the_root_of_the_width(backend, scale):
    cache = paged_cache([50])
    out = attend_paged(cache, backend=backend, scale=scale)
    scaled = cache._replace(q=cache.q * scale * math.sqrt(cache.q.shape[3]))
    torch.testing.assert_close(out.double().cpu(), attention_by_hand(scaled), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=str)
def test_a_score_that_is_not_finite_comes_out_as_nan(backend, poison, options):
    cache = paged_cache([30, 90])
    cache.q[0, 0] = 0.5
    cache.k_pages[cache.block_table[0, 1].long(), 3, 0, 0] = poison
    out = attend_paged(cache, backend=backend, **options)
    if math.isnan(poison) or not options:
        assert out[0, 0, :2].isnan().all()
    assert out[0, 0, 2:].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_from_or_to(backend):
    cache = paged_cache([3])
    nobody = cache._replace(q=cache.q[:0], block_table=cache.block_table[:0], used=cache.used[:0])
    assert attend_paged(nobody, backend=backend).shape == (0, 1, 4, 16)
    empty = cache._replace(block_table=cache.block_table[:, :0])
    assert (attend_paged(empty, backend=backend) == 0).all()


def test_fp64_is_exact_on_the_pytorch_path():
    cache = paged_cache([5, 77], dtype=torch.float64)
    out = attend_paged(cache)
    torch.testing.assert_close(out.cpu(), attention_by_hand(cache), rtol=1e-12, atol=1e-12)


def test_no_gradient_is_recorded():
    cache = paged_cache([5])
    assert not attend_paged(cache._replace(q=cache.q.requires_grad_())).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"window": 4097}], ids=str)
def test_lengths_past_4096(backend, options):
    cache = paged_cache(
        [4097, 5003], page=64, heads=2, cache_heads=1, queries=2, window=options.get("window")
    )
    agree(cache, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [16, 64])  # less than a block, and a whole one
def test_pages_beyond_2_31_elements(backend, page):
    """Their offsets do not fit 32 bits. Nobody writes to the pages between, so that on a CPU they
    take no memory."""
    small = paged_cache([100], page=page)
    count = 2**31 // small.k_pages[0].numel() + 3
    far = torch.empty((count, *small.k_pages.shape[1:]), dtype=torch.float32, device=DEVICE)
    k_pages, v_pages = far[1:], far[:-1]
    table = torch.zeros_like(small.block_table)
    for place, index in enumerate(small.block_table[0, : -(-100 // page)].tolist()):
        last = count - 2 - 2 * place  # a page of v's lies before the like of k's
        table[0, place] = last
        k_pages[last], v_pages[last] = small.k_pages[index], small.v_pages[index]
    cache = small._replace(k_pages=k_pages, v_pages=v_pages, block_table=table)
    near = attend_paged(small, backend=backend)
    assert attend_paged(cache, backend=backend).equal(near)


def wrong_arguments():
    zeros = torch.zeros
    int32 = {"dtype": torch.int32}
    return [
        ("q", {"q": zeros(2, 4, 16)}),
        ("q", {"q": zeros(2, 0, 4, 16)}),
        ("q", {"q": zeros(2, 1, 3, 16)}),
        ("q", {"q": zeros(2, 1, 4, 16, **int32)}),
        ("q", {"q": zeros(2, 1, 4, 257)}),
        ("k_pages", {"k_pages": zeros(5, 16, 2)}),
        ("k_pages", {"k_pages": zeros(5, 16, 2, 8)}),
        ("k_pages", {"k_pages": zeros(5, 16, 0, 16)}),
        ("k_pages", {"k_pages": zeros(5, 8, 2, 16)}),
        ("k_pages", {"k_pages": zeros(5, 48, 2, 16)}),
        ("k_pages", {"k_pages": zeros(5, 16, 2, 16).half()}),
        ("k_pages", {"k_pages": zeros(5, 16, 16, 2).mT}),
        ("v_pages", {"v_pages": zeros(5, 32, 2, 16)}),
        ("v_pages", {"v_pages": zeros(5, 16, 2, 16).double()}),
        ("v_pages", {"v_pages": zeros(5, 16, 2, 16, device="meta")}),
        ("block_table", {"block_table": zeros(2, **int32)}),
        ("block_table", {"block_table": zeros(3, 2, **int32)}),
        ("block_table", {"block_table": zeros(2, 2).long()}),
        ("block_table", {"block_table": [[0, 1], [2, 3]]}),
        ("used", {"used": zeros(3, **int32)}),
        ("used", {"used": zeros(2)}),
        ("used", {"used": 3}),
        ("scale", {"scale": math.nan}),
        ("window", {"window": 0}),
        ("window", {"window": 2.0}),
        ("window", {"window": True}),
        ("softcap", {"softcap": 0.0}),
        ("softcap", {"softcap": math.inf}),
        ("backend", {"backend": "cuda"}),
    ]


@pytest.mark.parametrize(("name", "wrong"), wrong_arguments())
def test_wrong_arguments_are_named(name, wrong):
    given = {
        "q": torch.zeros(2, 1, 4, 16),
        "k_pages": torch.zeros(5, 16, 2, 16),
        "v_pages": torch.zeros(5, 16, 2, 16),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "used": torch.ones(2, dtype=torch.int32),
    } | wrong
    given = {
        key: value.to(DEVICE) if torch.is_tensor(value) and not value.is_meta else value
        for key, value in given.items()
    }
    with pytest.raises(ValueError, match=f"^{name} "):
        decode_attention(**given)


def test_a_page_may_not_span_more_than_32_bits():
    def on_meta(shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = torch.empty_strided((1, 16, 1, 16), (0, 2**27, 0, 1), device="meta")
    table, used = on_meta((1, 1), torch.int32), on_meta((1,), torch.int32)
    with pytest.raises(ValueError, match="k_pages must have pages that span"):
        decode_attention(on_meta((1, 1, 1, 16)), wide, wide, table, used)
