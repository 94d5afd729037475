"""Which engine a run samples with, and what it says about the choice."""

import pytest
import torch
from rollouts import PROMPTS, sample

from sodfast.config import RolloutConfig
from sodfast.errors import UsageError
from sodfast.lab.model import build_tokenizer
from sodfast.model.language_model import LanguageModel
from sodfast.model.load import wrap_model
from sodfast.rollout.build import build_engine


def test_auto_is_native_where_it_can_be(model: LanguageModel) -> None:
    heard: list[str] = []
    assert build_engine(RolloutConfig(), model, heard.append).name == "native"
    assert build_engine(RolloutConfig(engine="native"), model, heard.append).name == "native"
    assert build_engine(RolloutConfig(engine="hf"), model, heard.append).name == "hf"
    assert heard == []


def test_an_unknown_architecture_falls_to_hf_with_one_line_or_is_an_error() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = build_tokenizer()
    network = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=1,
            n_head=2,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model = wrap_model(network, tokenizer, torch.device("cpu"), "gpt2")
    heard: list[str] = []
    engine = build_engine(RolloutConfig(), model, heard.append)
    assert engine.name == "hf" and len(sample(engine)) == len(PROMPTS)
    assert len(heard) == 1 and "GPT2LMHeadModel" in heard[0] and "hf" in heard[0]
    with pytest.raises(UsageError, match=r"rollout.engine=native.*GPT2LMHeadModel.*auto or hf"):
        build_engine(RolloutConfig(engine="native"), model, heard.append)
