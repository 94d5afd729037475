"""Language models: loading, checks that this project can train them, prompts, decoder layers."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sodfast.errors import UsageError
from sodfast.model.packing import can_pack, own_attention, packed_hidden, use_packed_attention
from sodfast.tasks.base import Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer, and the ids that end an answer."""

    network: Any  # a transformers causal LM
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    base: str | None = None  # under LoRA the `weights_hash` of the frozen weights; else None

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
    # transformers reports missing weights as a table; the error below says it in one line.
    transformers_logging.set_verbosity_error()
    try:
        _require_safetensors_names(path)
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
    # transformers fills absent weights with random numbers.
    absent = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    if absent:
        raise UsageError(
            f"model.path={path}: {len(absent)} weights are missing or have another shape than "
            f"config.json says, such as {min(absent)}: give the weights that belong to it"
        )
    return wrap_model(network, tokenizer, device, name=f"model.path={path}")


def wrap_model(network: Any, tokenizer: Any, device: torch.device, name: str) -> LanguageModel:
    """Move a loaded network to `device`, have it run packed sequences, and check that this project
    can train it. Raises `UsageError` where it cannot."""
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {rows}")
    eos = network.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if eos_ids == (None,):
        raise UsageError(f"{name}: neither the model nor its tokenizer names an EOS token")
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Networks are always in eval mode: dropout would make teacher and student differ even where
    # their weights are equal.
    model = LanguageModel(network.to(device).eval(), tokenizer, eos_ids, pad_id)
    if not can_pack(model.network):
        raise UsageError(
            f"{name}: sequences of a {type(model.network).__name__} cannot be packed, since "
            "transformers has no FlashAttention for all of its layers: choose another model"
        )
    use_packed_attention(model.network)
    _require_plain_forward(model, name)
    return model


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters to `dtype`, in place; ties stay. Buffers stay as they are: rotary
    frequencies in 16 bits would turn far positions by a wrong angle."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def to_ids(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name: every parameter, or the adapters on a frozen base."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def output_head(network: Any) -> Tensor:
    return network.get_output_embeddings().weight


def decoder_layers(network: Any) -> list[nn.Module]:
    """The layers that a forward pass runs through once, in order.

    Raises `UsageError` where the model's body does not hold exactly one list of layers that share
    no weights.
    """
    lists = [m for m in network.base_model.children() if isinstance(m, nn.ModuleList)]
    layers = list(lists[0]) if len(lists) == 1 else []
    parameters = [id(p) for layer in layers for p in layer.parameters()]
    if not parameters or len(set(parameters)) < len(parameters):
        raise UsageError(
            f"a {type(network).__name__} is not one list of decoder layers with weights of their "
            "own: set teacher.storage=device and model.gradient_checkpointing=false"
        )
    return layers


def recompute_layers(network: Any, kept: int = 0) -> None:
    """Gradient checkpointing: a decoder layer keeps its input only, and the backward pass runs it
    again. (transformers' own switch works in train mode only, and this project's networks are
    always in eval mode.) Copies of the network do the same with their own weights.

    The last `kept` layers stay as they are. The backward pass has freed their activations before it
    runs another layer again, so the two do not add up.

    Raises `UsageError` as `decoder_layers` does, and where there are fewer layers.
    """
    layers = decoder_layers(network)
    if kept > len(layers):
        raise UsageError(f"model.kept_layers={kept}: the model has {len(layers)} decoder layers")
    for layer in layers[: len(layers) - kept]:
        layer.__class__ = _recomputed(type(layer))


def _recomputed(kind: type[Any]) -> type[Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        return checkpoint(
            kind.forward, self, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    # What is recomputed is `forward` rather than the whole call, so that hooks, which bring a
    # layer's weights, run outside of it.
    return type(kind.__name__, (kind,), {"forward": forward})


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


def _require_safetensors_names(path: str) -> None:
    """Refuse a model whose weights lie in other files than its own `*.safetensors`, before any of
    them is opened: transformers follows the names that config.json and the index of a model in
    several files give, and unpickles what is not called `*.safetensors`.

    `path`: a directory or a Hugging Face id, as for `load_model`.
    """
    index = "model.safetensors.index.json"
    single = _read_json(path, "config.json").get("transformers_weights")
    weight_map = _read_json(path, index).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise UsageError(f"model.path={path}: weight_map in {index} is not a mapping")
    for name in [*([] if single is None else [single]), *weight_map.values()]:
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise UsageError(
                f"model.path={path} names {str(name)[:100]!r} as a file of weights: only "
                "*.safetensors files beside config.json are read"
            )


def _read_json(path: str, name: str) -> dict[str, Any]:
    """A file of a model; empty where the model has none of that name."""
    from transformers.utils import cached_file

    file = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    value = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UsageError(f"model.path={path}: {name} is not a JSON object")
    return value


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


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
