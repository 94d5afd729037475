"""What is particular to transformers' own `generate`: padding, batches and its settings."""

from typing import Any

import pytest
import torch
from rollouts import PROMPTS, sample
from transformers import GenerationConfig

from sodfast.model.language_model import LanguageModel, to_ids
from sodfast.rollout.hf import HFEngine, left_padded


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = left_padded([to_ids([5, 6, 7]), to_ids([8]), to_ids([0, 9])], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]  # a padding token may be a token
    assert ids.dtype == mask.dtype == torch.int64


def test_batches_hold_at_most_so_many_prompts(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, sizes = model.network.generate, []

    def counting(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(len(input_ids))
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model.network, "generate", counting)
    assert len(sample(HFEngine(model, 4), max_new_tokens=2)) == len(PROMPTS) == 6
    assert sizes == [4, 2]


def test_a_failure_leaves_the_networks_settings_as_they_were(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, own = model.network, GenerationConfig(temperature=0.3)
    network.generation_config, attention = own, network.config._attn_implementation

    def fail(**options: Any) -> None:
        assert network.generation_config is not own
        assert network.config._attn_implementation != attention
        raise torch.OutOfMemoryError

    monkeypatch.setattr(network, "generate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        sample(HFEngine(model, 4))
    assert network.generation_config is own
    assert network.config._attn_implementation == attention
