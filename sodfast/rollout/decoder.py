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

Shapes: T tokens of any sequences in a row, B sequences with one new token each, S slots of the
cache, W positions of a slot, A query heads, K key-value heads, D head size, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from sodfast_kernels import rope_and_cache, silu_and_mul
from torch import Tensor, nn

from sodfast.model.attention import PackedAttention, SlotAttention
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
    """Where the keys and values of T new tokens belong: page_T and offset_T (int64) of a cache of
    `keys` and `values` [P, page, K, D]."""

    keys: Tensor
    values: Tensor
    page_T: Tensor
    offset_T: Tensor


class Attend(Protocol):
    """Attention within a forward pass, layer by layer."""

    def place(self, layer: int) -> Place | None:
        """Where `forward` itself writes the keys and values of a layer; None: they are given to the
        call."""

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


class Cache:
    """Keys and values of S slots of W positions each, for every layer.

    Logically [S, W, K, D]. In memory that is the order on a GPU, where FlashAttention reads it;
    on a CPU keys lie as [S, K, D, W] and values as [S, K, W, D], which makes both products of
    attention plain batched ones without a copy. Zeros at first: what is masked must be finite.
    `memory` of an earlier cache is used again where it is large enough.
    """

    def __init__(
        self, decoder: Decoder, slots: int, width: int, memory: Tensor | None = None
    ) -> None:
        self.decoder = decoder
        weight = decoder.embedding
        kv, size = decoder.kv_heads, decoder.head_dim
        shape = (len(decoder.layers), 2, slots * width * kv * size)
        # What an earlier cache has left in it is finite, too.
        if memory is None or memory.numel() < prod(shape) or memory.dtype != weight.dtype:
            memory = weight.new_zeros(prod(shape))
        self.memory = memory
        self.layers: list[tuple[Tensor, Tensor]] = []
        for keys, values in memory[: prod(shape)].view(shape):
            if weight.device.type == "cpu":
                keys_SWKD = keys.view(slots, kv, size, width).permute(0, 3, 1, 2)
                values_SWKD = values.view(slots, kv, width, size).transpose(1, 2)
            else:
                keys_SWKD, values_SWKD = (x.view(slots, width, kv, size) for x in (keys, values))
            self.layers.append((keys_SWKD, values_SWKD))

    @staticmethod
    def bytes_per_token(network: Any) -> int:
        """Bytes of one position of one slot over all layers, for any of transformers' networks."""
        config = network.config.get_text_config()
        query_heads = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or query_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // query_heads
        layers, head = config.num_hidden_layers, network.get_output_embeddings().weight
        return layers * 2 * heads * size * head.element_size()

    def move(self, source_N: Tensor, target_N: Tensor, width: int) -> None:
        """Copy the first `width` positions of some slots to others."""
        for pair in self.layers:
            for cached_SWKD in pair:
                cached_SWKD[target_N, :width] = cached_SWKD[source_N, :width]

    def prefilling(self, lengths: Sequence[int], copies: Sequence[Sequence[int]]) -> Attend:
        """Causal attention within each of the prompts of these `lengths`, packed one after the
        other; each prompt's keys and values go to the slots of its entry of `copies`. Tokens
        after the last prompt attend to nothing."""
        device = self.decoder.embedding.device
        starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        sources = list(zip(starts, lengths, copies, strict=True))
        spans = [(first, n, slot) for first, n, slots in sources for slot in slots]
        token_N = torch.cat([torch.arange(first, first + n) for first, n, _ in spans]).to(device)
        position_N = torch.cat([torch.arange(n) for _, n, _ in spans]).to(device)
        slot_N = torch.cat([torch.full((n,), slot) for _, n, slot in spans]).to(device)
        packed = PackedAttention(lengths, device, self.decoder.embedding.dtype)

        return _Prefill(self, packed, slot_N, position_N, token_N)

    def decoding(self, length_B: Tensor, width: int) -> Attend:
        """Attention of one new token in each of the slots 0 … B−1, whose `length_B` (int32)
        positions before it are cached. `width` bounds their lengths after it; a GPU, whose
        kernel reads the lengths themselves, takes any bound."""
        row_B = torch.arange(len(length_B), device=length_B.device)
        attention = SlotAttention(length_B + 1, width, self.decoder.embedding.dtype)
        return _Decode(self, attention, row_B, length_B.long())


@dataclass(frozen=True)
class _Prefill:
    """See `Cache.prefilling`. Token token_N[n] of the prompts is position position_N[n] of slot
    slot_N[n]."""

    cache: Cache
    attention: PackedAttention
    slot_N: Tensor
    position_N: Tensor
    token_N: Tensor

    def place(self, layer: int) -> None:
        """None: a prompt's keys and values go to several slots."""

    def __call__(
        self, layer: int, q_TAD: Tensor, k_TKD: Tensor | None, v_TKD: Tensor | None
    ) -> Tensor:
        assert k_TKD is not None and v_TKD is not None
        for cached_SWKD, new_TKD in zip(self.cache.layers[layer], (k_TKD, v_TKD), strict=True):
            cached_SWKD[self.slot_N, self.position_N] = new_TKD[self.token_N]
        decoder = self.cache.decoder
        return self.attention(q_TAD, k_TKD, v_TKD, decoder.scale, decoder.layers[layer].window)


@dataclass(frozen=True)
class _Decode:
    """See `Cache.decoding`: a slot is a page, and the new token of slot b is position position_B[b]
    of it."""

    cache: Cache
    attention: SlotAttention
    row_B: Tensor
    position_B: Tensor

    def place(self, layer: int) -> Place:
        return Place(*self.cache.layers[layer], self.row_B, self.position_B)

    def __call__(
        self, layer: int, q_TAD: Tensor, k_TKD: Tensor | None, v_TKD: Tensor | None
    ) -> Tensor:
        assert k_TKD is None and v_TKD is None  # they are in the cache
        decoder = self.cache.decoder
        keys_and_values = self.cache.layers[layer]
        return self.attention(q_TAD, *keys_and_values, decoder.scale, decoder.layers[layer].window)
