"""A causal language model's forward written for decoding, on the student's live weights.

transformers' modules spend more time between operations than in them when each sequence has one
new token; here a layer is nine operations on tensors that it shares with the module. On a GPU each
but the attention is one kernel:

    norm → queries, keys, values → head norms, rotation, cache write → attention → output (+ x)
    norm → gate and up → silu·mul → down (+ x)

The residual is added inside the products, which costs no kernel and reads x once; a kernel for sum
and norm together would be no fewer and move more. The product of queries, keys and values is one
where their weights lie together (model/joined.py), and so is that of gate and up. Qwen2, Qwen3,
Llama and Mistral fit; `unsupported` says what does not.

Shapes: T tokens of any sequences in a row, W positions that a sequence can have, A query heads, K
key-value heads, D head size, H hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from sodfast_kernels import rope_and_cache, silu_and_mul
from torch import Tensor, nn

from sodfast.model.joined import joined

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
    """References to one block's weights; nothing is copied but the gains of the head norms."""

    attention_norm: Tensor  # [H]
    qkv: "Product"  # [H] → [(A + 2K)·D]
    head_gain: Tensor | None  # [A + K, D]: Qwen3 normalises every query and key head
    output: "Product"
    mlp_norm: Tensor
    gate_up: "Product"  # [H] → [2·I]
    down: "Product"
    window: int | None  # attends to this many last positions, itself included; None: to all


class Decoder:
    """`forward` runs tokens through the layers with a given attention; `logits` scores its result.

    Reads the weights at each call, so it must not outlive the module's parameters. Positions
    reach from 0 to `width` − 1.
    """

    def __init__(self, network: Any, width: int) -> None:
        config, body = network.config, network.model
        self.width = width
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
        self.cos_WD, self.sin_WD = cos_1WD[0], sin_1WD[0]

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
            Product(attention.q_proj, attention.k_proj, attention.v_proj),
            gain,
            Product(attention.o_proj),
            block.post_attention_layernorm.weight,
            Product(mlp.gate_proj, mlp.up_proj),
            Product(mlp.down_proj),
            getattr(owner, "sliding_window", None),
        )

    def forward(self, token_T: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, H] before the final norm."""
        angles = self.cos_WD[position_T], self.sin_WD[position_T]
        x_TH = F.embedding(token_T, self.embedding)
        for index, layer in enumerate(self.layers):
            layer.output.add_to(x_TH, self._attended(index, x_TH, angles, attend))
            y_TH = F.rms_norm(x_TH, x_TH.shape[1:], layer.mlp_norm, self.eps)
            layer.down.add_to(x_TH, silu_and_mul(layer.gate_up(y_TH)))
        return x_TH

    def _attended(
        self, index: int, x_TH: Tensor, angles: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """Attended values [T, A·D] of a layer."""
        layer, place = self.layers[index], attend.place(index)
        y_TH = F.rms_norm(x_TH, x_TH.shape[1:], layer.attention_norm, self.eps)
        qkv_TND = layer.qkv(y_TH).view(len(x_TH), -1, self.head_dim)
        q_TAD, k_TKD = rope_and_cache(
            qkv_TND, *angles, self.kv_heads, gain=layer.head_gain, eps=self.eps, cache=place
        )
        v_TKD = qkv_TND[:, -self.kv_heads :] if place is None else None
        return attend(index, q_TAD, k_TKD, v_TKD).flatten(1)

    def logits(self, x_TH: Tensor) -> Tensor:
        """Logits [T, V] of hidden states of `forward`, fp32 whatever the weights are, as in the
        objective: rounded to 16 bits they would move the policy's ratios by percents."""
        x_TH = F.rms_norm(x_TH, x_TH.shape[1:], self.norm, self.eps)
        if x_TH.is_cuda and x_TH.dtype != torch.float32:
            return torch.mm(x_TH, self.head.t(), out_dtype=torch.float32)
        return F.linear(x_TH.float(), self.head.float())


class Product:
    """Linear layers that read the same input, their outputs side by side: [T, H] → [T, N].

    One matrix product where all are plain and their weights lie together. Otherwise, and beside
    adapters, each makes its own.
    """

    def __init__(self, *linears: Any) -> None:
        self.linears = linears
        self.widths = [getattr(x, "base_layer", x).out_features for x in linears]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if all(isinstance(linear, nn.Linear) for linear in linears):
            biases = [linear.bias for linear in linears if linear.bias is not None]
            self.bias = joined(biases) if len(biases) == len(linears) else None
            if not biases or self.bias is not None:
                self.weight = joined([linear.weight for linear in linears])

    def __call__(self, x_TH: Tensor) -> Tensor:
        if self.weight is not None:
            return F.linear(x_TH, self.weight, self.bias)
        out_TN = x_TH.new_empty(len(x_TH), sum(self.widths))
        for linear, part in zip(self.linears, out_TN.split(self.widths, 1), strict=True):
            _linear_into(part, x_TH, linear)
        return out_TN

    def add_to(self, residual_TN: Tensor, x_TH: Tensor) -> None:
        """Add the outputs to `residual_TN`, where there is one product within it."""
        if self.weight is None:
            residual_TN += self(x_TH)
            return
        residual_TN.addmm_(x_TH, self.weight.t())
        if self.bias is not None:
            residual_TN += self.bias


def _linear_into(out_TN: Tensor, x_TH: Tensor, linear: nn.Module) -> None:
    if not isinstance(linear, nn.Linear):  # one with an adapter
        out_TN.copy_(linear(x_TH))
    elif linear.bias is None:
        torch.mm(x_TH, linear.weight.t(), out=out_TN)
    else:
        torch.addmm(linear.bias, x_TH, linear.weight.t(), out=out_TN)
