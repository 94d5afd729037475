"""The decoder's forward and its cache against the network whose weights they read.

Suffixes: T tokens, H hidden size, V vocabulary.
"""

import pytest
import torch
from rollouts import NETWORKS, SHAPE, tiny
from torch import Tensor

from sodfast.model.load import LanguageModel
from sodfast.rollout.decoder import Cache, Decoder, unsupported


@pytest.fixture(params=NETWORKS)
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny(request.param)


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, 97, (length,), generator=generator) for length in lengths]


def prefill(cache: Cache, prompts: list[Tensor], copies: list[list[int]]) -> Tensor:
    """Logits of every prompt token, the prompts packed one after the other."""
    lengths = [len(prompt) for prompt in prompts]
    position_T = torch.cat([torch.arange(length) for length in lengths])
    attend = cache.prefilling(lengths, copies)
    return cache.decoder.logits(cache.decoder.forward(torch.cat(prompts), position_T, attend))


@torch.no_grad()
def test_prefill_and_single_tokens_give_the_networks_logits(any_model: LanguageModel) -> None:
    """Ragged prompts, then nine tokens one at a time: beyond every window, with grouped heads."""
    network, starts = any_model.network, [11, 1, 5]
    whole = sequences(20, 10, 14)
    decoder = Decoder(network, 20)
    cache = Cache(decoder, 4, 20)
    prompts = [ids[:start] for ids, start in zip(whole, starts, strict=True)]
    found = [[rows] for rows in prefill(cache, prompts, [[0], [1], [2]]).split(starts)]
    for step in range(9):
        length_B = torch.tensor([start + step for start in starts])
        token_B = torch.stack([ids[at] for ids, at in zip(whole, length_B, strict=True)])
        attend = cache.decoding(length_B.int(), 20)
        logits_BV = decoder.logits(decoder.forward(token_B, length_B, attend))
        for rows, row in zip(found, logits_BV, strict=True):
            rows.append(row[None])
    for ids, rows in zip(whole, found, strict=True):
        expected = network(ids[None]).logits[0]
        torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=1e-4)


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


@torch.no_grad()
def test_a_token_is_written_where_the_attention_places_it() -> None:
    """And nowhere else: what positions out of use hold stays."""
    decoder = Decoder(tiny("qwen3").network, 8)
    cache = Cache(decoder, 4, 8)
    cache.memory.fill_(123.0)
    length_B = torch.tensor([0, 5, 2], dtype=torch.int32)
    attend = cache.decoding(length_B, 8)
    for layer, (keys_SWKD, values_SWKD) in enumerate(cache.layers):
        place = attend.place(layer)
        assert place is not None
        assert place.keys is keys_SWKD and place.values is values_SWKD
        assert place.page_T.tolist() == [0, 1, 2] and place.offset_T.tolist() == [0, 5, 2]
    decoder.forward(torch.tensor([3, 4, 5]), length_B.long(), attend)
    for index, cached_SWKD in enumerate(tensor for pair in cache.layers for tensor in pair):
        written_SW = (cached_SWKD != 123.0).all(3).all(2)
        assert written_SW.nonzero().tolist() == [[0, 0], [1, 5], [2, 2]], index
    assert cache.prefilling([3], [[0]]).place(0) is None


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


@torch.no_grad()
def test_weights_are_referred_to_and_not_copied() -> None:
    """An optimizer's write is seen by a decoder that was built before it."""
    network, (ids,) = tiny("llama").network, sequences(9)
    decoder = Decoder(network, 9)
    before = prefill(Cache(decoder, 1, 9), [ids], [[0]])
    for name, parameter in network.named_parameters():
        parameter.mul_(0.9 if "norm" in name else 1.1)
    after = prefill(Cache(decoder, 1, 9), [ids], [[0]])
    torch.testing.assert_close(after, network(ids[None]).logits[0], rtol=0, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)


def test_logits_of_16_bit_weights_are_not_rounded_to_16_bits() -> None:
    network = NETWORKS["qwen3"]().bfloat16()
    decoder = Decoder(network, 16)
    hidden_TH = 30 * torch.randn(5, SHAPE["hidden_size"]).bfloat16()
    logits_TV = decoder.logits(hidden_TH)
    normed_TH = network.model.norm(hidden_TH).detach()
    exact_TV = normed_TH.double() @ network.lm_head.weight.detach().double().T
    assert logits_TV.dtype == torch.float32
    torch.testing.assert_close(logits_TV.double(), exact_TV, rtol=1e-5, atol=1e-5)


def test_bytes_per_token_are_those_of_the_cache(any_model: LanguageModel) -> None:
    cache = Cache(Decoder(any_model.network, 8), 5, 8)
    assert cache.memory.nbytes == 5 * 8 * Cache.bytes_per_token(any_model.network)


def test_what_the_forward_does_not_know_is_named() -> None:
    assert unsupported(tiny("qwen3").network) is None
    network = tiny("llama").network
    network.config.hidden_act = "gelu"
    assert "gelu" in str(unsupported(network))
    network = tiny("llama").network
    network.model.rotary_emb.rope_type = "dynamic"
    assert "dynamic" in str(unsupported(network))
    network = tiny("llama").network
    network.model.layers[1].mlp.up_proj = torch.nn.Sequential(network.model.layers[1].mlp.up_proj)
    assert "model.layers.1.mlp.up_proj is a Sequential" in str(unsupported(network))
