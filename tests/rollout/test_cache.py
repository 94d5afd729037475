"""The cache of keys and values: what lies where, and what a copy leaves alone."""

import pytest
import torch
from rollouts import NETWORKS, prefill, sequences, tiny

from sodfast.model.load import LanguageModel
from sodfast.rollout.cache import Cache
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
    cache.move(torch.tensor([3, 2]), torch.tensor([0, 1]), 4)
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
