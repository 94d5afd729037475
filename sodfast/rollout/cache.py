"""Keys and values of the sequences that are being decoded, in pages.

A page holds so many positions of one sequence, in every layer; the table says which pages the
sequence of each row has, in order (Kwon et al. 2023, arXiv:2309.06180). `PAGE` says how large one
is:

* On a GPU it has 64 positions. A sequence takes pages as it grows, and `decode_attention` follows
  the table. The full pages of a prompt are shared by its samples, which only read them; its last,
  partial page is each sample's own. Page 0 belongs to nobody: idle rows write there.
* On a CPU it is as wide as a sequence can get, and row r has page r, with nothing to allocate:
  attention is then a batched product over the pages, without a table.

Shapes: T tokens of any sequences in a row, B rows with Q new tokens each, R rows, P pages, M pages
of a sequence at most, W positions of a sequence at most, K key-value heads, D head size.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sodfast_kernels import decode_attention
from torch import Tensor

from sodfast.model.attention import PackedAttention, SlotAttention
from sodfast.rollout.decoder import Attend, Decoder, Place

# Positions of a page by kind of device; None: as many as a sequence can have.
PAGE: dict[str, int | None] = {"cuda": 64, "cpu": None}
# Attention on a CPU covers the longest sequence rounded up to a multiple of this: what lies behind
# a sequence then changes no bit of it either (with MKL, from a head size of 32 on; smaller ones
# keep their tokens, not all their bits).
WIDTH_STEP = 16
# Rows whose keys and values stay in a CPU's own cache while several of their tokens attend.
ROWS_TOGETHER = 32
# Where idle rows write, so that every entry of a table names a page that exists.
SCRATCH = 0


class Cache:
    """P pages for the sequences of R rows, each of W positions at most, for every layer.

    `page`: positions of a page; None: W, one page for each row, and `pages` is not asked. `memory`
    of an earlier cache is used again where it is large enough. `start`, `grow` and `move` change
    the host's table, and `upload` brings it to the device.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        width: int,
        memory: Tensor | None = None,
        page: int | None = None,
        pages: int = 0,
    ) -> None:
        self.decoder = decoder
        self.device = decoder.embedding.device
        self.whole = page is None
        self.page, pages = (width, rows) if page is None else (page, pages)
        self.memory, self.all_layers = self._lay_out(pages, memory)
        keys, values = (stored.unbind() for stored in self.all_layers)
        self.layers = list(zip(keys, values, strict=True))
        # The pages of each row: as lists, and as tables of which some rows end in entries that mean
        # nothing.
        self.held: list[list[int]] = [[row] if self.whole else [] for row in range(rows)]
        self.table = np.full((rows, -(-width // self.page)), SCRATCH, np.int32)
        self.table_RM = torch.full(self.table.shape, SCRATCH, dtype=torch.int32, device=self.device)
        self.free = list(range(SCRATCH + 1, pages))[::-1]
        self.holders = [0] * pages  # rows that hold a page

    def _lay_out(self, pages: int, memory: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Keys and values [layers, P, page, K, D]. In memory that is the order of small pages, as
        `decode_attention` reads them; whole ones have keys as [P, K, D, page] and values as
        [P, K, page, D], which makes both products of attention plain batched ones."""
        weight, page = self.decoder.embedding, self.page
        kv, size = self.decoder.kv_heads, self.decoder.head_dim
        shape = (len(self.decoder.layers), 2, pages * page * kv * size)
        # Zeros, or what an earlier cache has left: the products need what is masked to be finite.
        if memory is None or memory.numel() < prod(shape) or memory.dtype != weight.dtype:
            memory = weight.new_zeros(prod(shape))
        keys, values = memory[: prod(shape)].view(shape).unbind(1)
        if self.whole:
            keys = keys.unflatten(1, (pages, kv, size, page)).permute(0, 1, 4, 2, 3)
            values = values.unflatten(1, (pages, kv, page, size)).transpose(2, 3)
        else:
            keys, values = (x.unflatten(1, (pages, page, kv, size)) for x in (keys, values))
        return memory, (keys, values)

    @staticmethod
    def bytes_per_token(network: Any) -> int:
        """Bytes of one position over all layers, for any of transformers' networks."""
        config = network.config.get_text_config()
        query_heads = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or query_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // query_heads
        layers, head = config.num_hidden_layers, network.get_output_embeddings().weight
        return layers * 2 * heads * size * head.element_size()

    # ---------------------------------------------------------------- pages

    def missing(self, row: int, positions: int) -> int:
        """How many more pages a row needs to hold so many positions."""
        return max(0, -(-positions // self.page) - len(self.held[row]))

    def start(self, rows: Sequence[int], tokens: int) -> None:
        """Give rows that hold nothing the pages of one prompt, the full ones shared by all."""
        if self.whole:
            return
        shared = [self.free.pop() for _ in range(tokens // self.page)]
        for row in rows:
            self._append(row, shared)
            self._append(row, [self.free.pop() for _ in range(self.missing(row, tokens))])

    def grow(self, positions: Mapping[int, int]) -> bool:
        """Let each of these rows hold so many positions; False, with nothing changed, where there
        are too few free pages."""
        missing = {row: self.missing(row, count) for row, count in positions.items()}
        if sum(missing.values()) > len(self.free):
            return False
        for row, count in missing.items():
            if count:
                self._append(row, [self.free.pop() for _ in range(count)])
        return True

    def release(self, row: int) -> None:
        """Free the pages of a row that no other row holds."""
        if self.whole:
            return
        for page in self.held[row]:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free.append(page)
        self.held[row] = []

    def move(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Give the pages of some rows to rows that hold nothing. A whole page stays where it is,
        and its first `width` positions are copied."""
        if self.whole:
            for stored in self.all_layers:
                for source, target in zip(sources, targets, strict=True):
                    stored[:, target, :width] = stored[:, source, :width]
            return
        for source, target in zip(sources, targets, strict=True):
            self._append(target, self.held[source])
            self.release(source)

    def _append(self, row: int, pages: Sequence[int]) -> None:
        held = self.held[row]
        self.table[row, len(held) : len(held) + len(pages)] = pages
        held += pages
        for page in pages:
            self.holders[page] += 1

    def upload(self) -> None:
        """Bring the table to the device, after what is queued there and without waiting."""
        if not self.whole:
            table_RM = staged(torch.from_numpy(self.table), self.device)
            self.table_RM.copy_(table_RM, non_blocking=True)

    # ---------------------------------------------------------------- attention

    def prefilling(self, lengths: Sequence[int], copies: Sequence[Sequence[int]]) -> Attend:
        """Causal attention within each of the prompts of these `lengths`, packed one after the
        other; each prompt's keys and values go to the pages of its rows, an entry of `copies`.
        Tokens after the last prompt attend to nothing."""
        return _Prefilling(self, lengths, copies)

    def decoding(
        self, cached_B: Tensor, idle_BQ: Tensor, width: int, chosen_T: Tensor | None = None
    ) -> Attend:
        """Attention of Q new tokens of each of the first B rows, of whose positions `cached_B`
        (int32) are in the cache already. Those that are `idle_BQ` (bool), all or the last ones of a
        row, are read by nobody. `width` bounds the lengths after it; small pages, whose kernel
        reads the lengths themselves, take any. `chosen_T` (int64) are the B·Q tokens that
        `forward` is given; None: all."""
        return _Decoding(self, cached_B, idle_BQ, width, chosen_T)


class _Prefilling:
    """Implements `Attend`."""

    def __init__(
        self, cache: Cache, lengths: Sequence[int], copies: Sequence[Sequence[int]]
    ) -> None:
        self.cache = cache
        starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        # Of each page to be written: the first token that it gets, how many, and which page it is.
        # A page that several rows share is written once.
        spans: dict[int, tuple[int, int]] = {}
        for first, length, rows in zip(starts, lengths, copies, strict=True):
            behind = range(0, length, cache.page)
            for row in rows:
                for page, before in zip(cache.held[row], behind, strict=True):
                    spans[page] = (first + before, min(cache.page, length - before))
        tokens = [torch.arange(first, first + count) for first, count in spans.values()]
        offsets = [torch.arange(count) for _, count in spans.values()]
        pages = [torch.full((count,), page) for page, (_, count) in spans.items()]
        self.token_N, self.offset_N, self.page_N = (
            staged(torch.cat(parts), cache.device).to(cache.device, non_blocking=True)
            for parts in (tokens, offsets, pages)
        )
        self.packed = PackedAttention(lengths, cache.device, cache.decoder.embedding.dtype)

    def place(self, layer: int) -> None:
        """A token may belong in the pages of several samples, so this writes it itself."""

    def __call__(
        self, layer: int, q_TAD: Tensor, k_TKD: Tensor | None, v_TKD: Tensor | None
    ) -> Tensor:
        assert k_TKD is not None and v_TKD is not None
        for cached_PLKD, new_TKD in zip(self.cache.layers[layer], (k_TKD, v_TKD), strict=True):
            cached_PLKD[self.page_N, self.offset_N] = new_TKD[self.token_N]
        decoder = self.cache.decoder
        return self.packed(q_TAD, k_TKD, v_TKD, decoder.scale, decoder.layers[layer].window)


class _Decoding:
    """Implements `Attend`. Idle tokens write to the scratch page, so that a row's own pages may
    have gone to others, and rows of them alone see no position; whole pages stay theirs, and the
    last position of one is nobody's but the longest sequence's last token, which is not cached."""

    def __init__(
        self,
        cache: Cache,
        cached_B: Tensor,
        idle_BQ: Tensor,
        width: int,
        chosen_T: Tensor | None,
    ) -> None:
        self.cache, self.shape, self.chosen_T = cache, idle_BQ.shape, chosen_T
        self.slots: SlotAttention | None = None  # over whole pages, of one token of each row
        rows, queries = self.shape
        ahead_Q = torch.arange(queries, device=cached_B.device)
        position_BQ = cached_B.long()[:, None] + ahead_Q
        if cache.whole:
            row_B1 = torch.arange(rows, device=cached_B.device)[:, None]
            page_BQ = row_B1.expand(-1, queries)
            offset_BQ = position_BQ.clamp(max=cache.page - 1)
            # One position for idle tokens, whose own may lie behind `width`: attention over none
            # would leave NaN in the cache.
            used_BQ = (position_BQ + 1).masked_fill(idle_BQ, 1)
            if queries == 1:
                self.slots = SlotAttention(used_BQ[:, 0], width)
            else:
                depth_B, longest_B = (~idle_BQ).sum(1).tolist(), used_BQ.amax(1).tolist()
                parts = [
                    slice(first, min(first + ROWS_TOGETHER, rows))
                    for first in range(0, rows, ROWS_TOGETHER)
                ]
                self.parts = [
                    _Together(
                        part,
                        used_BQ[part, : max(depth_B[part])],
                        min(width, up_to_step(max(longest_B[part]))),
                    )
                    for part in parts
                ]
        else:
            self.table_BM = cache.table_RM[:rows]
            page_BQ = self.table_BM.gather(1, position_BQ // cache.page).long()
            page_BQ = page_BQ.masked_fill(idle_BQ, SCRATCH)
            offset_BQ = position_BQ % cache.page
            self.used_B = (cached_B + queries).masked_fill(idle_BQ[:, 0], 0)
        self.page_T, self.offset_T = page_BQ.flatten(), offset_BQ.flatten()
        if chosen_T is not None:
            self.page_T, self.offset_T = self.page_T[chosen_T], self.offset_T[chosen_T]

    def place(self, layer: int) -> Place:
        """Each row's next positions."""
        return Place(*self.cache.layers[layer], self.page_T, self.offset_T)

    def __call__(
        self, layer: int, q_TAD: Tensor, k_TKD: Tensor | None, v_TKD: Tensor | None
    ) -> Tensor:
        if self.chosen_T is None:
            return self._attended(layer, q_TAD)
        every_TAD = q_TAD.new_zeros(self.shape.numel(), *q_TAD.shape[1:])
        every_TAD.index_copy_(0, self.chosen_T, q_TAD)
        return self._attended(layer, every_TAD)[self.chosen_T]

    def _attended(self, layer: int, q_TAD: Tensor) -> Tensor:
        """Of all B·Q tokens."""
        keys_PLKD, values_PLKD = self.cache.layers[layer]
        scale, window = self.cache.decoder.scale, self.cache.decoder.layers[layer].window
        if self.slots is not None:
            return self.slots(q_TAD, keys_PLKD, values_PLKD, scale, window)
        q_BQAD = q_TAD.unflatten(0, self.shape)
        if self.cache.whole:
            parts = [part(q_BQAD, keys_PLKD, values_PLKD, scale, window) for part in self.parts]
            return torch.cat(parts).flatten(0, 1)
        attended_BQAD = decode_attention(
            q_BQAD,
            keys_PLKD,
            values_PLKD,
            self.table_BM,
            self.used_B,
            scale=scale,
            window=window,
        )
        return attended_BQAD.flatten(0, 1)


class _Together:
    """Attention of several tokens of each of some rows over whole pages.

    Each token has products of its own, since one for all of a row's would sum in another order than
    that of one; but they follow each other so closely that the keys and values are read from memory
    once. So few rows are no wider than they need.
    """

    def __init__(self, rows: slice, used_BQ: Tensor, width: int) -> None:
        self.rows, self.used_BQ, self.width = rows, used_BQ, width
        self.biases: dict[int | None, tuple[Tensor, ...]] = {}

    def __call__(
        self,
        q_BQAD: Tensor,
        keys_PLKD: Tensor,
        values_PLKD: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attended values [B, Q, A, D] of these rows; zeros for tokens that idle in all of them."""
        count, queries = self.used_BQ.shape
        q_BQAD = q_BQAD[self.rows]
        if queries == 0:
            return torch.zeros_like(q_BQAD)
        kv_heads, size = keys_PLKD.shape[2:]
        keys_NDW = keys_PLKD[self.rows, : self.width].permute(0, 2, 3, 1).flatten(0, 1)
        values_NWD = values_PLKD[self.rows, : self.width].transpose(1, 2).flatten(0, 1)
        q_QBAD = q_BQAD[:, :queries].transpose(0, 1)
        q_QNGD = q_QBAD.reshape(queries, count * kv_heads, -1, size)
        scores_QNGW = torch.stack(
            [
                torch.baddbmm(bias_N1W, q_NGD, keys_NDW, alpha=scale)
                for bias_N1W, q_NGD in zip(
                    self._bias(window, kv_heads, q_BQAD.dtype), q_QNGD.unbind(), strict=True
                )
            ]
        )
        weights = scores_QNGW.softmax(-1).unbind()
        attended_BQKGD = (
            torch.stack([torch.bmm(weights_NGW, values_NWD) for weights_NGW in weights], 1)
            .unflatten(0, (count, kv_heads))
            .transpose(1, 2)
        )
        attended_BQAD = attended_BQKGD.flatten(2, 3)
        return F.pad(attended_BQAD, (0, 0, 0, 0, 0, q_BQAD.shape[1] - queries))

    def _bias(self, window: int | None, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Of each query, what makes it see the positions that it may [B·K, 1, W]."""
        if window not in self.biases:
            position_W = torch.arange(self.width)
            used_QB1 = self.used_BQ.t()[..., None]
            seen_QBW = position_W < used_QB1
            if window is not None:
                seen_QBW &= position_W >= used_QB1 - window
            bias_QBW = torch.zeros(seen_QBW.shape, dtype=dtype).masked_fill_(~seen_QBW, -torch.inf)
            bias_QN1W = bias_QBW.repeat_interleave(kv_heads, 1)[:, :, None]
            self.biases[window] = bias_QN1W.unbind()
        return self.biases[window]


def up_to_step(positions: int) -> int:
    """The next multiple of WIDTH_STEP."""
    return positions + -positions % WIDTH_STEP


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy from which a transfer to a GPU, with non_blocking=True, does not wait for what is
    queued there; for other devices the tensor itself."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
