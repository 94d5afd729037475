"""Keys and values of the sequences that are being decoded.

Shapes: T tokens of any sequences in a row, B sequences with one new token each, S slots of the
cache, W positions of a slot, A query heads, K key-value heads, D head size.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from sodfast.model.attention import PackedAttention, SlotAttention
from sodfast.rollout.decoder import Attend, Decoder


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

        def attend(index: int, q_TAD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
            for cached_SWKD, new_TKD in zip(self.layers[index], (k_TKD, v_TKD), strict=True):
                cached_SWKD[slot_N, position_N] = new_TKD[token_N]
            window = self.decoder.layers[index].window
            return packed(q_TAD, k_TKD, v_TKD, self.decoder.scale, window)

        return attend

    def decoding(self, length_B: Tensor, width: int) -> Attend:
        """Attention of one new token in each of the slots 0 … B−1, whose `length_B` (int32)
        positions before it are cached. `width` bounds their lengths after it; a GPU, whose
        kernel reads the lengths themselves, takes any bound."""
        row_B = torch.arange(len(length_B), device=length_B.device)
        position_B = length_B.long()
        attention = SlotAttention(length_B + 1, width, self.decoder.embedding.dtype)

        def attend(index: int, q_BAD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
            keys_SWKD, values_SWKD = self.layers[index]
            keys_SWKD[row_B, position_B] = k_BKD
            values_SWKD[row_B, position_B] = v_BKD
            window = self.decoder.layers[index].window
            return attention(q_BAD, keys_SWKD, values_SWKD, self.decoder.scale, window)

        return attend
