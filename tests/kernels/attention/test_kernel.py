"""The Triton kernels of attention for decoding: splits, determinism, graphs, configurations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import attend_paged, attention_by_hand, paged_cache
from marks import slow
from sodfast_kernels.attention import kernel as attention_kernel


def agree(cache, **options):
    out = attend_paged(cache, backend="triton", **options)
    exact = attention_by_hand(cache, **options)
    torch.testing.assert_close(out.double().cpu(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.triton
@settings(max_examples=25)
@given(
    used=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    queries=st.integers(1, 6),
    group=st.sampled_from([1, 2, 4, 7]),
    page=st.sampled_from([16, 64, 128]),
    window=st.none() | st.integers(1, 160),
    softcap=st.none() | st.floats(0.1, 50),
    heads_first=st.booleans(),
)
def test_any_shape(used, queries, group, page, window, softcap, heads_first):
    cache = paged_cache(
        used, queries=queries, heads=group, cache_heads=1, page=page, window=window,
        heads_first=heads_first,
    )  # fmt: skip
    agree(cache, window=window, softcap=softcap)


@pytest.mark.triton
@pytest.mark.parametrize("splits", [3, *slow(1, 2, 5)])
@pytest.mark.parametrize("window", [None, 70])
def test_any_number_of_splits_and_some_of_them_empty(monkeypatch, splits, window):
    monkeypatch.setattr(attention_kernel, "count_splits", lambda *_: splits)
    used = [0, 2, 64, 65, 300]
    cache = paged_cache(used, queries=2, heads=2, cache_heads=1, page=64, window=window)
    agree(cache, window=window)


@pytest.mark.slow
@pytest.mark.triton
def test_scratch_that_no_split_wrote_is_never_read(monkeypatch):
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.dtype.is_floating_point else made

    cache = paged_cache([1, 70, 200], queries=3, page=64)
    monkeypatch.setattr(attention_kernel, "count_splits", lambda *_: 4)
    monkeypatch.setattr(torch, "empty", poisoned)
    agree(cache)


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_twice(dtype):
    cache = paged_cache([7, 130, 200], queries=3, page=64, dtype=dtype)
    first = attend_paged(cache, backend="triton")
    assert torch.equal(first, attend_paged(cache, backend="triton"))


@pytest.mark.triton
def test_the_order_of_pages_does_not_change_a_bit():
    cache = paged_cache([7, 130, 200], page=16)
    pages = len(cache.k_pages)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).to(cache.used.device)
    known = (cache.block_table >= 0) & (cache.block_table < pages)
    found = order.argsort().int()[cache.block_table.clamp(0, pages - 1).long()]
    moved = cache._replace(
        k_pages=cache.k_pages[order],
        v_pages=cache.v_pages[order],
        block_table=torch.where(known, found, cache.block_table),
    )
    out = attend_paged(cache, backend="triton")
    assert torch.equal(out, attend_paged(moved, backend="triton"))


def test_splits_occupy_the_gpu_and_bound_the_longest():
    # Programs without splits, longest possible length, positions of a block, multiprocessors.
    assert attention_kernel.count_splits(64 * 8, 2048, 64, 132) == 2
    assert attention_kernel.count_splits(4 * 8, 8192, 64, 132) == 17
    assert attention_kernel.count_splits(64 * 8, 10_240, 64, 132) == 5
    assert attention_kernel.count_splits(1, 100, 64, 132) == 2
    assert attention_kernel.count_splits(1, 10**6, 64, 132) == attention_kernel.MOST_SPLITS


def test_tiles_have_the_rows_that_a_product_takes():
    rows = [attention_kernel.tile_sizes(n, 128, 2)["ROWS"] for n in (1, 16, 17, 33, 64, 65, 999)]
    assert rows == [16, 16, 32, 64, 64, 64, 64]
    assert attention_kernel.tile_sizes(64, 128, 4)["ROWS"] == 16
    assert attention_kernel.tile_sizes(4, 80, 2) == {"DIMS": 128, "ROWS": 16, "BLOCK": 64}
    assert attention_kernel.tile_sizes(4, 256, 4)["BLOCK"] == 16


def test_production_configurations_are_complete():
    names = set()
    for configuration in attention_kernel.production_configurations():
        name, kernel, signature, constexprs, _, streamed, sweeps = configuration
        assert name not in names
        names.add(name)
        assert not signature.keys() & constexprs.keys()
        assert signature.keys() | constexprs.keys() == set(kernel.arg_names)
        assert set(streamed) <= signature.keys()
        assert all(callable(getattr(attention_kernel, function)) for function in sweeps)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 5])
def test_a_cuda_graph_reads_used_and_the_table_anew(queries):
    cache = paged_cache(
        [300, 300, 300], queries=queries, width=128, page=64, dtype=torch.bfloat16, spare=0
    )
    used = torch.full_like(cache.used, queries)
    growing = cache._replace(used=used)
    attend_paged(growing)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend_paged(growing)
    for lengths in ([queries, 64, 65], [66, 128, 300], [0, 299, 300]):
        used.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        exact = attend_paged(growing, backend="torch")
        torch.testing.assert_close(out, exact, rtol=1.6e-2, atol=1.6e-2)
    cache.block_table.copy_(cache.block_table.flip(0))
    graph.replay()
    exact = attend_paged(growing, backend="torch")
    torch.testing.assert_close(out, exact, rtol=1.6e-2, atol=1.6e-2)
