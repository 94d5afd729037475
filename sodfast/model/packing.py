"""Sequences through a network one after the other in a single row, without padding.

The row [1, T] carries every sequence's positions from 0 on. Attention is what could join sequences,
so a network that is to run packed uses an attention function of ours, which reads the sequences'
bounds from the keyword argument `packed` that transformers hands through to every layer. It raises
an error where that argument is missing. (transformers' own sdpa separates the sequences of such a
row only without a mask and without a cache; otherwise they see each other, and nothing says so.)

Shapes: T packed tokens, N response tokens, H hidden size, A query heads, D head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sodfast.model.attention import PackedAttention

# transformers looks for a mask function of this name, finds none, and so makes no mask.
ATTENTION = "sodfast"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedAttention | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [1, heads, T, D] → [1, T, A, D]."""
    if packed is None or len(query) != 1 or query.shape[2] != packed.tokens:
        raise RuntimeError(
            "this network's attention is that of packed sequences: call response_hidden, or call "
            "the network within own_attention"
        )
    if dropout or attention_mask is not None or s_aux is not None:
        raise NotImplementedError("packed attention has no dropout, no masks and no sinks")
    q_TAD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q_TAD.shape[2] ** -0.5 if scaling is None else scaling
    return packed(q_TAD, k_TKD, v_TKD, scale, sliding_window, softcap)[None], None


def can_pack(network: Any) -> bool:
    """Whether transformers runs this network with FlashAttention, whose contract ours is: every
    layer passes its window on and needs no mask."""
    kinds = set(getattr(network.config, "layer_types", None) or ())
    return (
        network._supports_attention_backend
        and network._supports_flash_attn
        and kinds <= {"full_attention", "sliding_attention"}
    )


def use_packed_attention(network: Any) -> None:
    """Make `network` run packed sequences from now on; other forwards need `own_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    network.set_attn_implementation(ATTENTION)


@contextmanager
def own_attention(network: Any) -> Iterator[None]:
    """`network` with transformers' attention, for forwards with padding or a cache.

    Run no forward with gradients in it: where layers are recomputed in the backward pass, that
    happens after this context has ended, with the attention of packed sequences.
    """
    before = network.config._attn_implementation
    if before == ATTENTION:
        # transformers 5.17 counts Gemma 2 among what its sdpa fits, which leaves the soft cap out.
        capped = getattr(network.config, "attn_logit_softcapping", None) is not None
        exact = network._supports_sdpa and not capped
        network.set_attn_implementation("sdpa" if exact else "eager")
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def packed_hidden(network: Any, sequences: Sequence[Tensor]) -> Tensor:
    """Last hidden states [T, H] after the final norm of all sequences, one after the other."""
    if network.config._attn_implementation != ATTENTION:
        raise RuntimeError("this network's attention would join packed sequences")
    embedding = network.get_input_embeddings().weight
    lengths = [len(sequence) for sequence in sequences]
    position_ids_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    return network.base_model(
        input_ids=torch.cat(list(sequences))[None].to(embedding.device),
        position_ids=position_ids_1T.to(embedding.device),
        use_cache=False,
        packed=PackedAttention(lengths, embedding.device, embedding.dtype),
    ).last_hidden_state[0]


def response_hidden(
    network: Any, contexts: Sequence[Tensor], responses: Sequence[Tensor]
) -> Tensor:
    """Hidden states [N, H] whose logits predict the response tokens, sequences concatenated.

    Row p of the logits predicts token p+1, so the last response token is never an input.
    """
    rows = list(zip(contexts, responses, strict=True))
    hidden_TH = packed_hidden(network, [torch.cat([c, r[:-1]]) for c, r in rows])
    wanted, start = [], 0
    for context, response in rows:
        first = start + len(context) - 1
        start = first + len(response)
        wanted.append(torch.arange(first, start))
    return hidden_TH[torch.cat(wanted).to(hidden_TH.device)]


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices grouped so that the lengths of a group add up to at most `budget` (one alone may
    exceed it): first fit over decreasing lengths.

    A group is in order of decreasing length, as `PackedAttention` likes it, and the group of the
    longest comes first, so that an oversized one fails at once.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = (group for group, left in enumerate(room) if lengths[index] <= left)
        group = next(fits, len(groups))
        if group == len(groups):
            groups.append([])
            room.append(budget)
        groups[group].append(index)
        room[group] -= lengths[index]
    yield from groups
