"""What tests of sampling share: tiny networks of every architecture that is decoded natively,
prompts, and answers to compare."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sodfast.model.language_model import LanguageModel, to_ids
from sodfast.rollout.cache import Cache
from sodfast.rollout.engine import Engine, Sample, SampleKey, Sampling

EOS = 0
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.15,
    "eos_token_id": EOS,
    "pad_token_id": 1,
    "bos_token_id": None,
}
NETWORKS: dict[str, Any] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen2-window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**{**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2}, head_dim=40)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SHAPE,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=11)),
}


def tiny(name: str) -> LanguageModel:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    with torch.no_grad():
        for path, parameter in network.named_parameters():
            if path.endswith("bias") or "norm" in path:  # ones and zeros would hide a mistake
                parameter.add_(0.3 * torch.randn_like(parameter))
    return LanguageModel(network.eval(), None, (EOS,), 1)


PROMPTS = ["17*8+6=", "2*2+1=", "9*9", "11*7+3=", "+", "5*5+5=10*2+"]


def ragged(count: int, longest: int = 23) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, 97, (length,), generator=generator) for length in lengths]


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, 97, (length,), generator=generator) for length in lengths]


def prefill(cache: Cache, prompts: list[Tensor], copies: list[list[int]]) -> Tensor:
    """Logits of every prompt token, the prompts packed one after the other."""
    lengths = [len(prompt) for prompt in prompts]
    position_T = torch.cat([torch.arange(length) for length in lengths])
    attend = cache.prefilling(lengths, copies)
    return cache.decoder.logits(cache.decoder.forward(torch.cat(prompts), position_T, attend))


def answer(engine: Any, prompts: Sequence[Tensor], cap: int, **sampling: Any) -> list[Sample]:
    wanted = Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": cap, **sampling})
    return engine.generate(prompts, range(len(prompts)), wanted, SampleKey(2**63 + 11, 4))


def equal_bits(left: Sequence[Sample], right: Sequence[Sample]) -> bool:
    return len(left) == len(right) and all(
        a.response.equal(b.response)
        and a.logprob.equal(b.logprob)
        and a.entropy.equal(b.entropy)
        and a.capped == b.capped
        for a, b in zip(left, right, strict=True)
    )


def sample(
    engine: Engine,
    prompts: Sequence[str] = PROMPTS,
    order: Sequence[int] | None = None,
    step: int = 1,
    **sampling: Any,
) -> list[Sample]:
    """Samples of the prompts, asked in `order`, returned in the prompts' own order."""
    order = range(len(prompts)) if order is None else order
    wanted = Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20, **sampling})
    encode = engine.model.encode  # type: ignore[attr-defined]
    samples = engine.generate(
        [to_ids(encode(prompts[index])) for index in order], order, wanted, SampleKey(3, step)
    )
    return [samples[list(order).index(index)] for index in range(len(order))]


def same_tokens(left: Sequence[Sample], right: Sequence[Sample]) -> bool:
    return all(
        a.response.equal(b.response) and a.capped == b.capped
        for a, b in zip(left, right, strict=True)
    )
