"""Small networks of every kind that packs, and what tests of them share.

Suffixes: N response tokens, H hidden size.
"""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sodfast.model.language_model import output_head
from sodfast.model.packing import (
    response_hidden,
    use_packed_attention,
)

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
MODELS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    # Soft caps low enough to bite; a window, in every other layer, that most sequences exceed.
    "gemma2": Gemma2Config(
        **SIZES,
        head_dim=16,
        sliding_window=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        query_pre_attn_scalar=16,
    ),
    "qwen2-window": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "mistral-window": MistralConfig(**SIZES, sliding_window=6),
}
Pairs = Sequence[tuple[Tensor, Tensor]]


@cache
def original(name: str) -> Any:
    torch.manual_seed(2)
    network = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in network.named_parameters():
            if path.endswith("bias") or "norm" in path:  # ones and zeros would hide a mistake
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def build(name: str) -> Any:
    return copy.deepcopy(original(name))


def packed(network: Any) -> Any:
    student = copy.deepcopy(network)
    use_packed_attention(student)
    return student


def random_pairs(sizes: Sequence[tuple[int, int]]) -> Pairs:
    """Prompts and responses of these lengths; the padding token may occur."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda length: torch.randint(0, 37, (length,), generator=generator)  # noqa: E731
    return [(draw(prompt), draw(response)) for prompt, response in sizes]


def hidden_of(network: Any, pairs: Pairs) -> Tensor:
    return response_hidden(network, *(list(column) for column in zip(*pairs, strict=True)))


def gradients(network: Any, hidden_NH: Tensor) -> dict[str, Tensor]:
    """Of the mean over random directions of the (capped) logits."""
    logits_NV = hidden_NH @ output_head(network).T
    cap = getattr(network.config, "final_logit_softcapping", None) or 100.0
    generator = torch.Generator().manual_seed(5)
    upstream_NV = torch.randn(logits_NV.shape, generator=generator) / len(logits_NV)
    upstream_NV = upstream_NV.to(logits_NV.device)
    (cap * torch.tanh(logits_NV / cap) * upstream_NV).sum().backward()
    found = {name: p.grad for name, p in network.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    network.zero_grad()
    return found  # type: ignore[return-value]
