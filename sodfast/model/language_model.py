"""A language model: a network with its tokenizer, prompts and answers as tokens, and the parts of
a network that others work on: its head, what is trained, its decoder layers.

load.py makes one of a directory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sodfast.errors import UsageError
from sodfast.model.chat import encode_messages, encode_text
from sodfast.tasks.base import Question


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer, the ids that end an answer, and what its chat
    template is given for each prompt."""

    network: Any  # a transformers causal LM
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    base: str | None = None  # under LoRA the `weights_hash` of the frozen weights; else None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

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

    def encode(
        self,
        prompt: str,
        system: str | None = None,
        history: Sequence[Mapping[str, str]] = (),
    ) -> list[int]:
        """Token ids of a prompt: the chat template where there is one, with thinking off unless
        `chat_template_kwargs` says otherwise; else the text of the messages as it is. `history`
        stands between `system` and `prompt`. No text becomes a special token.

        Raises `UsageError` where the template refuses the messages, such as a system message, and
        for whatever else `encode_messages` refuses.
        """
        messages = [*history, {"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return encode_messages(self.tokenizer, messages, self.chat_template_kwargs)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text by itself, without special tokens."""
        return encode_text(self.tokenizer, text)

    def encode_question(self, question: Question) -> list[int]:
        return self.encode(question.prompt, question.system, question.history)

    def decode(self, ids: Sequence[int] | Tensor, special: bool = False) -> str:
        """The text of `ids`; `special`: with the names of special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=not special)


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
