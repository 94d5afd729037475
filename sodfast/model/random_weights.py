"""`model.random`: a model of a shipped shape with random weights, no directory and no network.

Its tokenizer is built here, too: a token for each byte of UTF-8, so that any task can be asked.
A prompt has more tokens than the shape's own tokenizer would make of it; ids beyond 255 are sampled
like others and decode to nothing. What such a model measures is time and memory. Its answers are
never right: with teacher.success_reward=0 any of them is a demonstration, so that there is
something to distil.
"""

import json
from typing import Any

import torch

from sodfast.config import PRESETS
from sodfast.errors import UsageError
from sodfast.model.language_model import LanguageModel
from sodfast.model.load import wrap_model


def shipped_shapes() -> dict[str, dict[str, Any]]:
    """The contents of config.json of the models whose shapes are shipped, by name."""
    shapes: dict[str, dict[str, Any]] = json.loads((PRESETS / "models.json").read_text())
    return shapes


def shape(name: str) -> dict[str, Any]:
    """The shipped shape of this name; raises `UsageError`, naming those known, for another."""
    known = shipped_shapes()
    if name not in known:
        raise UsageError(f"model.random={name} is no shipped shape: use one of {', '.join(known)}")
    return known[name]


def random_model(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> LanguageModel:
    """The shape `name` with weights drawn from `seed` on `device`, where a large model is made in
    seconds: so one seed gives other weights on another kind of device.

    torch's own generators are left as they were. Raises `UsageError` as `shape` and `wrap_model`
    do.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape(name))
    used = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=used), device:
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return wrap_model(network, byte_tokenizer(), device, name=f"model.random={name}")


def byte_tokenizer() -> Any:
    """A tokenizer of 256 tokens, one for each byte, without special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False
    )
