"""The cache of keys and values: what lies where, and what a copy leaves alone."""

import pytest
import torch
from rollouts import NETWORKS, prefill, sequences, tiny

from sodfast.model.language_model import LanguageModel
from sodfast.rollout.cache import SCRATCH, Cache
from sodfast.rollout.decoder import Decoder


@pytest.fixture(params=NETWORKS)
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny(request.param)


@torch.no_grad()
def test_a_prompt_of_several_slots_is_in_each_of_them() -> None:
    decoder = Decoder(tiny("qwen3").network, 12)
    cache = Cache(decoder, 4, 12)
    prefill(cache, sequences(7, 3), [[2, 0], [1]])
    for cached_SWKD in (tensor for pair in cache.layers for tensor in pair):
        assert cached_SWKD[0].equal(cached_SWKD[2]) and cached_SWKD[0, :7].all()
        assert not cached_SWKD[0].equal(cached_SWKD[1])
        assert not cached_SWKD[[0, 2], 7:].any() and not cached_SWKD[1, 3:].any()
        assert not cached_SWKD[3].any()


def test_slots_move_by_their_first_positions_only() -> None:
    cache = Cache(Decoder(tiny("llama").network, 6), 4, 6)
    cache.memory.copy_(torch.arange(cache.memory.numel()))
    before = [[cached.clone() for cached in pair] for pair in cache.layers]
    cache.move([3, 2], [0, 1], 4)
    for pair, old in zip(cache.layers, before, strict=True):
        for cached_SWKD, old_SWKD in zip(pair, old, strict=True):
            assert cached_SWKD[[0, 1], :4].equal(old_SWKD[[3, 2], :4])
            assert cached_SWKD[:, 4:].equal(old_SWKD[:, 4:])
            assert cached_SWKD[2:].equal(old_SWKD[2:])


def test_memory_is_used_again_where_it_is_large_enough() -> None:
    decoder = Decoder(tiny("llama").network, 16)
    large = Cache(decoder, 4, 16).memory
    assert Cache(decoder, 3, 12, large).memory is large
    assert Cache(decoder, 5, 16, large).memory.numel() == large.numel() // 4 * 5
    half = Cache(decoder, 4, 16, large.half())
    assert half.memory.dtype == torch.float32 and not half.memory.any()


def test_bytes_per_token_are_those_of_the_cache(any_model: LanguageModel) -> None:
    cache = Cache(Decoder(any_model.network, 8), 5, 8)
    assert cache.memory.nbytes == 5 * 8 * Cache.bytes_per_token(any_model.network)


# ---------------------------------------------------------------- small pages


def paged(rows: int = 3, width: int = 64, pages: int = 9) -> Cache:
    return Cache(Decoder(tiny("llama").network, width), rows, width, page=16, pages=pages)


def test_a_prompts_full_pages_are_shared_and_its_last_one_is_not() -> None:
    cache = paged()
    cache.start([0, 2], 40)
    assert cache.held[0][:2] == cache.held[2][:2] and cache.held[0][2] != cache.held[2][2]
    assert [len(pages) for pages in cache.held] == [3, 0, 3]
    assert cache.table[0, :3].tolist() == cache.held[0] and len(cache.free) == 8 - 4
    cache.start([1], 32)  # without a partial page
    assert len(cache.held[1]) == 2
    cache.release(0)
    assert len(cache.free) == 3  # its own page alone
    cache.release(2)
    assert len(cache.free) == 6
    assert SCRATCH not in cache.free and sorted(cache.free + cache.held[1]) == list(range(1, 9))


def test_a_sequence_grows_by_pages_or_not_at_all() -> None:
    cache = paged(pages=6)
    cache.start([0], 10)
    cache.start([1], 16)
    assert cache.missing(0, 16) == 0 and cache.missing(0, 17) == 1 and cache.missing(2, 33) == 3
    assert cache.grow({0: 17, 1: 16}) and [len(pages) for pages in cache.held] == [2, 1, 0]
    before = [pages[:] for pages in cache.held]
    assert not cache.grow({0: 33, 1: 40})  # three pages, and two are free
    assert cache.held == before and len(cache.free) == 2
    assert cache.grow({0: 33, 1: 32}) and not cache.free


def test_moved_rows_keep_their_pages() -> None:
    cache = paged()
    cache.start([0, 2], 40)
    before, free = cache.held[2][:], sorted(cache.free)
    cache.release(0)
    cache.move([2], [0], 40)
    assert cache.held == [before, [], []] and cache.table[0, :3].tolist() == before
    cache.upload()
    assert cache.table_RM[0, :3].tolist() == before
    cache.release(0)
    assert len(cache.free) == 8 > len(free)


@torch.no_grad()
def test_a_prompt_is_written_once_to_the_pages_that_its_samples_share() -> None:
    network = tiny("qwen3").network
    decoder = Decoder(network, 64)
    small, large = Cache(decoder, 3, 64, page=16, pages=9), Cache(decoder, 3, 64)
    small.start([0, 2], 40)
    small.start([1], 7)
    prompts = sequences(40, 7)
    expected = prefill(large, prompts, [[0, 2], [1]])
    attend = small.prefilling([40, 7], [[0, 2], [1]])
    assert len(attend.token_N) == 40 + 8 + 7  # type: ignore[attr-defined]
    assert prefill(small, prompts, [[0, 2], [1]]).equal(expected)
    for pages, slots in zip(small.layers, large.layers, strict=True):
        for page_PLKD, slot_SWKD in zip(pages, slots, strict=True):
            for row, length in ((0, 40), (1, 7), (2, 40)):
                found = page_PLKD[small.held[row]].flatten(0, 1)
                assert found[:length].equal(slot_SWKD[row, :length])
                assert not found[length:].any()
    assert not any(page[SCRATCH].any() for pair in small.layers for page in pair)
