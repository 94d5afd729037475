"""A causal language model's forward written for decoding, on the student's live weights.

transformers' modules spend more time between operations than in them when each sequence has one
new token; here a layer is a dozen operations on tensors that it shares with the module. Qwen2,
Qwen3, Llama and Mistral fit; `unsupported` says what does not.

Shapes: T tokens of any sequences in a row, W positions that a sequence can have, A query heads, K
key-value heads, D head size, H hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
# Rotary embeddings whose angles do not depend on how long a sequence has become.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Place(NamedTuple):
    """Where the keys and values of new tokens belong in one layer of the cache."""

    keys: Tensor  # [P, page, K, D], of any strides
    values: Tensor  # [P, page, K, D]
    page_T: Tensor  # int64, the page of each token; idle rows name one that nobody reads
    offset_T: Tensor  # int64, its position within the page


class Attend(Protocol):
    """The attention that `Decoder.forward` is given, with the cache behind it."""

    def place(self, layer: int) -> Place | None:
        """Where `forward` itself writes the new keys and values of `layer`; None: the attention
        takes them as arguments."""

    def __call__(
        self, layer: int, q_TAD: Tensor, k_TKD: Tensor | None, v_TKD: Tensor | None
    ) -> Tensor:
        """Attended values [T, A, D]; keys and values are None where `place` gave a place."""


def unsupported(network: Any) -> str | None:
    """Why this forward cannot stand for `network`'s own; None where it can."""
    name = type(network).__name__
    if name not in ARCHITECTURES:
        return f"{name} is not one of {', '.join(ARCHITECTURES)}"
    config = network.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    rope = getattr(network.model.rotary_emb, "rope_type", None)
    if rope not in ROPE_TYPES:
        return f"its rotary embedding is of type {rope}, not one of {', '.join(ROPE_TYPES)}"
    for path, module in network.named_modules():
        linear = getattr(module, "base_layer", module)  # what an adapter of peft wraps
        if path.endswith(("_proj", "lm_head")) and type(linear) is not nn.Linear:
            return f"{path} is a {type(module).__name__}, not a plain linear layer"
    return None


@dataclass(frozen=True)
class Layer:
    """References to one block's weights; nothing is copied but the gains of the head norms. A
    projection is a plain linear layer or one with an adapter."""

    attention_norm: Tensor  # [H]
    projections: tuple[nn.Module, nn.Module, nn.Module]  # to queries, keys, values
    head_gain: Tensor | None  # [A + K, D]: Qwen3 normalises every query and key head
    output: nn.Module
    mlp_norm: Tensor
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    window: int | None  # attends to this many last positions, itself included; None: to all


class Decoder:
    """`forward` runs tokens through the layers with a given attention; `logits` scores its result.

    Reads the weights at each call, so it must not outlive the module's parameters. Positions
    reach from 0 to `width` − 1.
    """

    def __init__(self, network: Any, width: int) -> None:
        config, body = network.config, network.model
        attention = body.layers[0].self_attn
        self.embedding = body.embed_tokens.weight  # [V, H]
        self.norm = body.norm.weight
        self.eps: float = config.rms_norm_eps
        self.head = network.lm_head.weight  # [V, H]
        self.head_dim: int = attention.head_dim
        self.query_heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.scale: float = attention.scaling
        self.layers = [self._layer(block, config) for block in body.layers]
        position_W = torch.arange(width, device=self.embedding.device)
        cos_1WD, sin_1WD = body.rotary_emb(self.embedding, position_W[None])
        # rotate_half(x) is x rolled by half its width with its first half negated: the sign goes
        # into the sine once, and each rotation is one roll and one fused multiply-add.
        half = self.head_dim // 2
        sin_1WD[..., :half].neg_()
        self.cos_W1D, self.sin_W1D = cos_1WD[0, :, None], sin_1WD[0, :, None]

    def _layer(self, block: Any, config: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        gain = None
        if hasattr(attention, "q_norm"):
            gains = [attention.q_norm.weight] * self.query_heads
            gain = torch.stack(gains + [attention.k_norm.weight] * self.kv_heads)
        # Mistral's window holds for every layer and is kept in the configuration only.
        owner = config if config.model_type == "mistral" else attention
        return Layer(
            block.input_layernorm.weight,
            (attention.q_proj, attention.k_proj, attention.v_proj),
            gain,
            attention.o_proj,
            block.post_attention_layernorm.weight,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            getattr(owner, "sliding_window", None),
        )

    def forward(self, token_T: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, H] before the final norm."""
        cos_T1D, sin_T1D = self.cos_W1D[position_T], self.sin_W1D[position_T]
        rotated = self.query_heads + self.kv_heads
        x_TH = F.embedding(token_T, self.embedding)
        heads_TND = x_TH.new_empty(len(token_T), rotated + self.kv_heads, self.head_dim)
        sizes = [self.query_heads, self.kv_heads, self.kv_heads]
        parts = heads_TND.flatten(1).split([size * self.head_dim for size in sizes], 1)
        for index, layer in enumerate(self.layers):
            y_TH = F.rms_norm(x_TH, x_TH.shape[1:], layer.attention_norm, self.eps)
            for projection, part in zip(layer.projections, parts, strict=True):
                _linear_into(part, y_TH, projection)
            qk_TND = heads_TND[:, :rotated]
            if layer.head_gain is not None:
                qk_TND = F.rms_norm(qk_TND, qk_TND.shape[2:], None, self.eps) * layer.head_gain
            qk_TND = torch.addcmul(qk_TND * cos_T1D, qk_TND.roll(self.head_dim // 2, -1), sin_T1D)
            q_TAD, k_TKD = qk_TND.split([self.query_heads, self.kv_heads], 1)
            v_TKD = heads_TND[:, rotated:]
            place = attend.place(index)
            if place is None:
                attended_TAD = attend(index, q_TAD, k_TKD, v_TKD)
            else:
                place.keys[place.page_T, place.offset_T] = k_TKD
                place.values[place.page_T, place.offset_T] = v_TKD
                attended_TAD = attend(index, q_TAD, None, None)
            x_TH = _add_linear(x_TH, attended_TAD.flatten(1), layer.output)
            y_TH = F.rms_norm(x_TH, x_TH.shape[1:], layer.mlp_norm, self.eps)
            gated_TI = F.silu(layer.gate(y_TH)).mul_(layer.up(y_TH))
            x_TH = _add_linear(x_TH, gated_TI, layer.down)
        return x_TH

    def logits(self, x_TH: Tensor) -> Tensor:
        """Logits [T, V] of hidden states of `forward`, fp32 whatever the weights are, as in the
        objective: rounded to 16 bits they would move the policy's ratios by percents."""
        x_TH = F.rms_norm(x_TH, x_TH.shape[1:], self.norm, self.eps)
        if x_TH.is_cuda and x_TH.dtype != torch.float32:
            return torch.mm(x_TH, self.head.t(), out_dtype=torch.float32)
        return F.linear(x_TH.float(), self.head.float())


def _linear_into(out_TN: Tensor, x_TH: Tensor, linear: nn.Module) -> None:
    if not isinstance(linear, nn.Linear):  # one with an adapter
        out_TN.copy_(linear(x_TH))
    elif linear.bias is None:
        torch.mm(x_TH, linear.weight.t(), out=out_TN)
    else:
        torch.addmm(linear.bias, x_TH, linear.weight.t(), out=out_TN)


def _add_linear(residual_TH: Tensor, x_TI: Tensor, linear: nn.Module) -> Tensor:
    """residual + linear(x), the sum inside the matrix product."""
    if not isinstance(linear, nn.Linear):
        return residual_TH + linear(x_TI)
    sum_TH = torch.addmm(residual_TH, x_TI, linear.weight.t())
    return sum_TH if linear.bias is None else sum_TH.add_(linear.bias)
