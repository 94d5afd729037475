"""The decoder's forward and its cache against the network whose weights they read.

Suffixes: T tokens, H hidden size, V vocabulary.
"""

import pytest
import torch
from rollouts import NETWORKS, SHAPE, prefill, sequences, tiny

from sodfast.model.language_model import LanguageModel
from sodfast.rollout.cache import Cache
from sodfast.rollout.decoder import Decoder, unsupported


@pytest.fixture(params=NETWORKS)
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny(request.param)


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
        attend = cache.decoding(length_B.int(), torch.zeros(3, 1, dtype=torch.bool), 20)
        logits_BV = decoder.logits(decoder.forward(token_B, length_B, attend))
        for rows, row in zip(found, logits_BV, strict=True):
            rows.append(row[None])
    for ids, rows in zip(whole, found, strict=True):
        expected = network(ids[None]).logits[0]
        torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=1e-4)


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
