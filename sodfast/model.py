"""Language models: loading, prompts, and forward passes that stop at the last hidden state.

Shapes: B sequences, S padded positions, N response tokens, H hidden size, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn

from sodfast.errors import UsageError
from sodfast.tasks import Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer, and the ids that end an answer."""

    network: Any  # a transformers causal LM
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def head(self) -> Tensor:
        """The output projection [V, H]."""
        return output_head(self.network)

    @property
    def softcap(self) -> float | None:
        return getattr(self.network.config, "final_logit_softcapping", None)

    def encode(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of a prompt: the chat template with thinking off where there is one,
        otherwise system and user text as they are.

        Raises `UsageError` where the template refuses the messages, such as a system message.
        """
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        if not self.tokenizer.chat_template:
            return self.tokenizer("\n\n".join(message["content"] for message in messages)).input_ids
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except TemplateError as error:
            roles = " and ".join(message["role"] for message in messages)
            raise UsageError(
                f"the model's chat template refuses a {roles} message ({error}): change the rows "
                "of task.* or choose another model"
            ) from error
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_question(self, question: Question) -> list[int]:
        return self.encode(question.prompt, question.system)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_model(
    path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load a Hugging Face id or directory as `dtype`, rounded to nearest where that is narrower
    than what is stored. Only safetensors, never remote code.

    Raises `UsageError` for a directory without a model or tokenizer, weights that are damaged,
    incomplete or in a format that would have to be unpickled, or a head that is not a plain
    linear projection.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if Path(path).is_dir():
        _require_files(Path(path))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report on the weights is a table; ours below
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        network, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"model.path={path} cannot be loaded: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # Where weights are absent transformers puts random numbers.
    absent = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    if absent:
        raise UsageError(
            f"model.path={path}: {len(absent)} weights are missing or have another shape than "
            f"config.json says, such as {min(absent)}: give the weights that belong to it"
        )
    return wrap_model(network, tokenizer, device, name=f"model.path={path}")


def wrap_model(network: Any, tokenizer: Any, device: torch.device, name: str) -> LanguageModel:
    """Move a loaded network to `device` and check that this project can train it."""
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {rows}")
    eos = network.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if eos_ids == (None,):
        raise UsageError(f"{name}: neither the model nor its tokenizer names an EOS token")
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Dropout would make teacher and student differ where their weights agree: always eval mode.
    model = LanguageModel(network.to(device).eval(), tokenizer, eos_ids, pad_id)
    _require_plain_head(model, name)
    return model


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters to `dtype`, in place; ties stay. Buffers stay as they are: rotary
    frequencies in 16 bits would turn far positions by a wrong angle."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def to_ids(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64)


def output_head(network: Any) -> Tensor:
    return network.get_output_embeddings().weight


def last_hidden(network: Any, input_ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Last hidden states [B, S, H] after the final norm, without logits and without a cache."""
    return network.base_model(
        input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False
    ).last_hidden_state


def response_hidden(
    network: nn.Module, contexts: Sequence[Tensor], responses: Sequence[Tensor], pad_id: int
) -> Tensor:
    """Hidden states [N, H] whose logits predict the response tokens, sequences concatenated.

    Row p of the logits predicts token p+1, so the last response token is never an input.
    """
    device = output_head(network).device
    inputs = [
        torch.cat([context, response[:-1]])
        for context, response in zip(contexts, responses, strict=True)
    ]
    width = max(len(row) for row in inputs)
    input_ids_BS = torch.full((len(inputs), width), pad_id)
    mask_BS = torch.zeros((len(inputs), width), dtype=torch.int64)
    wanted_BS = torch.zeros((len(inputs), width), dtype=torch.bool)
    for index, (row, context) in enumerate(zip(inputs, contexts, strict=True)):
        input_ids_BS[index, : len(row)] = row
        mask_BS[index, : len(row)] = 1
        wanted_BS[index, len(context) - 1 : len(row)] = True
    hidden_BSH = last_hidden(network, input_ids_BS.to(device), mask_BS.to(device))
    return hidden_BSH.flatten(0, 1)[wanted_BS.flatten().nonzero().squeeze(1).to(device)]


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices grouped so that rows × longest row ≤ budget, longest first (so an oversized batch
    fails at once); a single row may exceed the budget."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def _require_files(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise UsageError(f"model.path={path} holds no config.json: give a Hugging Face model")
    if not any(path.glob("*.safetensors")):
        raise UsageError(
            f"model.path={path} holds no .safetensors file (other formats would be unpickled): "
            "save the model with safe_serialization=True"
        )
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"model.path={path} holds no tokenizer: save the tokenizer there too")


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@torch.no_grad()
def _require_plain_head(model: LanguageModel, name: str) -> None:
    """The objective computes logits as hidden @ head.T; refuse a model that does otherwise."""
    ids = torch.arange(min(4, model.head.shape[0]), device=model.device)[None]
    mask = torch.ones_like(ids)
    expected = model.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = last_hidden(model.network, ids, mask) @ model.head.T
    if model.softcap is not None:
        logits = model.softcap * torch.tanh(logits / model.softcap)
    tolerance = 1e-3 if logits.dtype == torch.float32 else 2e-2  # a few units of bf16's last place
    if not torch.allclose(logits.float(), expected.float(), rtol=tolerance, atol=tolerance):
        raise UsageError(
            f"{name}: its logits are not hidden states times output weights "
            "(a head with a bias or a logit scale), which the fused objective needs"
        )
