"""Language models from files, and the checks that this project can train them."""

from pathlib import Path
from typing import Any

import torch

from sodfast.errors import UsageError
from sodfast.model.chat import require_prompts
from sodfast.model.directory import find_model, name_no_code, refusing, stored_sizes
from sodfast.model.joined import join_weights
from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import can_pack, own_attention, packed_hidden, use_packed_attention


def load_model(
    path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load a Hugging Face id or directory as `dtype`, rounded to nearest where that is narrower
    than what is stored. Only safetensors, never remote code.

    Raises `UsageError` for a directory without a model or tokenizer, a file in it that is damaged
    or says what no model can be, weights that are incomplete or in a format that would have to be
    unpickled, a chat template that cannot be rendered, or a head that is not a plain linear
    projection.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    name = f"model.path={path}"
    folder = find_model(path)
    verbosity = transformers_logging.get_verbosity()
    # transformers reports missing weights as a table; the error below says it in one line.
    transformers_logging.set_verbosity_error()
    try:
        config = _read_config(folder, dtype, name)
        with refusing(f"{name}: its tokenizer.json makes no tokenizer", "save it there anew"):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        with refusing(f"{name}: config.json and the weights make no model", "give fitting ones"):
            network, loading = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    # transformers fills absent weights with random numbers.
    absent = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    if absent:
        raise UsageError(
            f"model.path={path}: {len(absent)} weights are missing or have another shape than "
            f"config.json says, such as {min(absent)}: give the weights that belong to it"
        )
    network.name_or_path = network.config.name_or_path = path  # rather than a folder of the cache
    with refusing(f"{name}: config.json and tokenizer.json do not fit", "give fitting ones"):
        if not tokenizer.chat_template:
            file = "the tokenizer"
        elif (folder / "chat_template.jinja").is_file():
            file = "chat_template.jinja"
        else:
            file = "the chat template in tokenizer_config.json"
        require_prompts(tokenizer, f"{name}: {file}")
        return wrap_model(network, tokenizer, device, name)


def _read_config(folder: Path, dtype: torch.dtype, name: str) -> Any:
    """The configuration of a causal language model that is not beyond the weights beside it.

    Raises `UsageError`, which begins with `name`, for any other.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = stored_sizes(folder, name)
    with refusing(f"{name}: its config.json makes no model", "give that of the weights"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        name_no_code(config)
        layers = config.get_text_config().num_hidden_layers
        if not 0 < layers <= len(stored):
            raise UsageError(
                f"{name}: config.json says {layers} layers, and the weights hold {len(stored)} "
                "tensors: give the config.json that belongs to the weights"
            )
        with torch.device("meta"):  # shapes without memory
            network = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    described, held = sum(p.numel() for p in network.parameters()), sum(stored.values())
    # Far above what is stored, since transformers says best which weights are missing, but not so
    # far that memory ends while it makes up for them. (Quantized weights share elements.)
    if described > 10 * held:
        raise UsageError(
            f"{name}: config.json describes {described:,} weights, and {held:,} are stored: give "
            "the config.json that belongs to the weights"
        )
    return config


def wrap_model(network: Any, tokenizer: Any, device: torch.device, name: str) -> LanguageModel:
    """Move a loaded network to `device`, have it run packed sequences, and check that this project
    can train it. Raises `UsageError` where it cannot."""
    rows = network.get_input_embeddings().weight.shape[0]
    tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if tokens > rows:
        raise UsageError(f"{name}: the tokenizer has {tokens} tokens, the model {rows}")
    eos = network.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if eos_ids in ((), (None,)):
        raise UsageError(f"{name}: neither the model nor its tokenizer names an EOS token")
    for index in eos_ids:
        if type(index) is not int or not 0 <= index < rows:
            raise UsageError(
                f"{name}: eos_token_id {str(index)[:40]!r} in generation_config.json or "
                f"config.json is none of the tokens 0 to {rows - 1}: give one that ends an answer"
            )
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Networks are always in eval mode: dropout would make teacher and student differ even where
    # their weights are equal.
    join_weights(network, device)
    model = LanguageModel(network.to(device).eval(), tokenizer, eos_ids, pad_id)
    if not can_pack(model.network):
        raise UsageError(
            f"{name}: sequences of a {type(model.network).__name__} cannot be packed, since "
            "transformers has no FlashAttention for all of its layers: choose another model"
        )
    use_packed_attention(model.network)
    _require_plain_forward(model, name)
    return model


@torch.no_grad()
def _require_plain_forward(model: LanguageModel, name: str) -> None:
    """Refuse a model whose logits are not hidden @ head.T, as the objective computes them, or whose
    packed sequences differ from the same ones apart."""
    network = model.network
    ids = torch.arange(min(4, model.head.shape[0]), device=model.device)
    ids_BS = torch.stack([ids, ids.flip(0)])
    batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    with own_attention(network):
        expected = network(**batch, use_cache=False).logits
        apart = network.base_model(**batch, use_cache=False).last_hidden_state
    if not torch.isfinite(expected).all():
        broken = [key for key, p in network.named_parameters() if not torch.isfinite(p).all()]
        reason = f"{broken[0]} holds NaN or infinity" if broken else "its logits are not finite"
        raise UsageError(f"{name}: {reason}: give other weights")
    logits = apart @ model.head.T
    if model.softcap is not None:
        logits = model.softcap * torch.tanh(logits / model.softcap)
    exact = logits.dtype == torch.float32
    tolerance = 1e-3 if exact else 2e-2  # a few units of bf16's last place
    if not torch.allclose(logits.float(), expected.float(), rtol=tolerance, atol=tolerance):
        raise UsageError(
            f"{name}: its logits are not hidden states times output weights "
            "(a head with a bias or a logit scale), which the fused objective needs"
        )
    error = packed_hidden(network, list(ids_BS)) - apart.flatten(0, 1)
    # Other kernels round differently; in bf16 that adds up to percents over many layers.
    if not error.float().norm() <= (1e-3 if exact else 0.1) * apart.float().norm():
        raise UsageError(
            f"{name}: packed sequences of a {type(network).__name__} come out otherwise than apart "
            "(something beside attention joins positions): choose another model"
        )
