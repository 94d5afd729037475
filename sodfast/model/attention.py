"""Attention over packed sequences and over the slots of a cache, called alike on every device.

* On a GPU in 16 bits: torch's own FlashAttention (`varlen_attn`) where the installed torch has what
  is needed, otherwise the `flash-attn` package where it is installed, otherwise sdpa.
* On a GPU in 32 bits: sdpa, since FlashAttention takes 16 bits only.
* On a CPU: sdpa over runs of equally long packed sequences; two batched matrix products where each
  sequence has one new token.

Shapes: T tokens of packed sequences, B sequences with one new token each, S slots of W positions,
A query heads, K key-value heads, D head size. `window`: a token attends to this many last
positions, itself included; None: to all. `softcap`: scores s become softcap·tanh(s / softcap)
before the softmax (Gemma 2); of the kernels only those of `flash-attn` can do it, and without them
plain operations compute it.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from inspect import signature
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(feature: str) -> Callable[..., Any] | None:
    """torch's `varlen_attn`, if the installed torch has it and it has the argument `feature`."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if feature in signature(varlen_attn).parameters else None


def _sides(window: int | None) -> tuple[int, int]:
    """FlashAttention's window: positions to the left (−1: all) and to the right."""
    return (-1 if window is None else window - 1, 0)


class PackedAttention:
    """Causal attention within each of the sequences of these `lengths`, which lie one after the
    other. Tokens after the last sequence are padding and come out as zeros. Differentiable.

    Equally long neighbours share a call on the CPU, so order the sequences by length.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self.lengths = list(lengths)
        self.tokens, self.longest = sum(lengths), max(lengths)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.bounds = ends.to(device, torch.int32)
        self.attend: Callable[..., Tensor] = self._sdpa
        self.attend_capped: Callable[..., Tensor] = self._sdpa
        if device.type == "cuda" and dtype.itemsize == 2:
            package = self._package_flash()
            self.attend = self._torch_flash() or package or self._sdpa
            self.attend_capped = package or self._sdpa

    def __call__(
        self,
        q_TAD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attended values [T, A, D]."""
        attend = self.attend if softcap is None else self.attend_capped
        q_TAD, padding = q_TAD.split([self.tokens, len(q_TAD) - self.tokens])
        k_TKD, v_TKD = k_TKD[: self.tokens], v_TKD[: self.tokens]
        attended_TAD = attend(q_TAD, k_TKD, v_TKD, scale, window, softcap)
        return (
            torch.cat([attended_TAD, torch.zeros_like(padding)]) if len(padding) else attended_TAD
        )

    def _torch_flash(self) -> Callable[..., Tensor] | None:
        varlen_attn = varlen_attention("enable_gqa")
        if varlen_attn is None:
            return None

        def attend(
            q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, _: None
        ) -> Tensor:
            bounds, longest = self.bounds, self.longest
            return varlen_attn(
                q, k, v, bounds, bounds, longest, longest,
                scale=scale, window_size=_sides(window), enable_gqa=True,
            )  # fmt: skip

        return attend

    def _package_flash(self) -> Callable[..., Tensor] | None:
        if find_spec("flash_attn") is None:
            return None
        from flash_attn import flash_attn_varlen_func

        def attend(
            q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None
        ) -> Tensor:
            bounds, longest = self.bounds, self.longest
            return flash_attn_varlen_func(
                q, k, v, bounds, bounds, longest, longest,
                softmax_scale=scale, causal=True, window_size=_sides(window), softcap=cap or 0.0,
            )  # fmt: skip

        return attend

    def _sdpa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        runs = [(length, len(list(run))) for length, run in groupby(self.lengths)]
        tokens = [length * count for length, count in runs]
        parts = []
        for (length, count), *qkv in zip(runs, *(x.split(tokens) for x in (q, k, v)), strict=True):
            q_BALD, k_BKLD, v_BKLD = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
            if softcap is not None:
                seen_LL = _band(length, window or length, q.device)
                attended_BALD = _capped(q_BALD, k_BKLD, v_BKLD, scale, seen_LL, softcap)
            else:
                cut = window is not None and window < length
                attended_BALD = F.scaled_dot_product_attention(
                    q_BALD,
                    k_BKLD,
                    v_BKLD,
                    attn_mask=_band(length, window or length, q.device) if cut else None,
                    is_causal=not cut,
                    scale=scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            parts.append(attended_BALD.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Which positions [L, L] each of `length` tokens sees."""
    position_L = torch.arange(length, device=device)
    back_LL = position_L[:, None] - position_L
    return (back_LL >= 0) & (back_LL < window)


def _capped(
    q_BALD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, scale: float, seen_LL: Tensor, softcap: float
) -> Tensor:
    """Attention with capped scores, its softmax in fp32."""
    k_BALD, v_BALD = (
        x.repeat_interleave(q_BALD.shape[1] // x.shape[1], 1) for x in (k_BKLD, v_BKLD)
    )
    scores_BALL = softcap * torch.tanh(q_BALD @ k_BALD.mT * (scale / softcap))
    weights_BALL = scores_BALL.masked_fill(~seen_LL, -torch.inf).softmax(-1, torch.float32)
    return weights_BALL.to(v_BALD.dtype) @ v_BALD


class SlotAttention:
    """One query token for each of the slots 0 … B−1, which attends to the first `used_B` (int32)
    positions of its slot, its own the last of them. No `used_B` exceeds `width`."""

    def __init__(self, used_B: Tensor, width: int, dtype: torch.dtype) -> None:
        self.used_B = used_B
        self.width = width
        self.biases: dict[int | None, Tensor] = {}
        self.attend: Callable[..., Tensor] = self._products
        if used_B.device.type == "cuda":
            flash = (self._torch_flash() or self._package_flash()) if dtype.itemsize == 2 else None
            self.attend = flash or self._sdpa

    def __call__(
        self,
        q_BAD: Tensor,
        keys_SWKD: Tensor,
        values_SWKD: Tensor,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Attended values [B, A, D]."""
        return self.attend(q_BAD, keys_SWKD, values_SWKD, scale, window)

    def _torch_flash(self) -> Callable[..., Tensor] | None:
        varlen_attn = varlen_attention("seqused_k")
        if varlen_attn is None:
            return None
        count = len(self.used_B)
        ends_B1 = torch.arange(count + 1, dtype=torch.int32, device=self.used_B.device)

        def attend(
            q_BAD: Tensor, keys_SWKD: Tensor, values_SWKD: Tensor, scale: float, window: int | None
        ) -> Tensor:
            slot = keys_SWKD.shape[1]
            keys, values = (x[:count].flatten(0, 1) for x in (keys_SWKD, values_SWKD))
            return varlen_attn(
                q_BAD, keys, values, ends_B1, ends_B1 * slot, 1, slot,
                scale=scale, window_size=_sides(window), enable_gqa=True, seqused_k=self.used_B,
            )  # fmt: skip

        return attend

    def _package_flash(self) -> Callable[..., Tensor] | None:
        if find_spec("flash_attn") is None:
            return None
        from flash_attn import flash_attn_with_kvcache

        count = len(self.used_B)

        def attend(
            q_BAD: Tensor, keys_SWKD: Tensor, values_SWKD: Tensor, scale: float, window: int | None
        ) -> Tensor:
            return flash_attn_with_kvcache(
                q_BAD[:, None],
                keys_SWKD[:count],
                values_SWKD[:count],
                cache_seqlens=self.used_B,
                softmax_scale=scale,
                causal=True,
                window_size=_sides(window),
            )[:, 0]

        return attend

    def _sdpa(
        self,
        q_BAD: Tensor,
        keys_SWKD: Tensor,
        values_SWKD: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        count, width = len(q_BAD), self.width
        return F.scaled_dot_product_attention(
            q_BAD[:, :, None],
            keys_SWKD[:count, :width].transpose(1, 2),
            values_SWKD[:count, :width].transpose(1, 2),
            attn_mask=self._seen(window)[:, None, None],
            scale=scale,
            enable_gqa=q_BAD.shape[1] != keys_SWKD.shape[2],
        )[:, :, 0]

    def _products(
        self,
        q_BAD: Tensor,
        keys_SWKD: Tensor,
        values_SWKD: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Two batched products and a softmax. In the memory order of a CPU's cache
        (rollout/decoder.py) the permuted keys and values are plain matrices, read without a copy.
        """
        count, width, kv_heads = len(q_BAD), self.width, keys_SWKD.shape[2]
        if window not in self.biases:
            bias_BW = torch.zeros(count, width, dtype=q_BAD.dtype)
            bias_BW.masked_fill_(~self._seen(window), -torch.inf)
            self.biases[window] = bias_BW.repeat_interleave(kv_heads, 0)[:, None]
        q_NGD = q_BAD.reshape(count * kv_heads, -1, q_BAD.shape[2])  # G queries of each key head
        keys_NDW = keys_SWKD[:count, :width].permute(0, 2, 3, 1).flatten(0, 1)
        values_NWD = values_SWKD[:count, :width].transpose(1, 2).flatten(0, 1)
        scores_NGW = torch.baddbmm(self.biases[window], q_NGD, keys_NDW, alpha=scale)
        return torch.bmm(scores_NGW.softmax(-1), values_NWD).view_as(q_BAD)

    def _seen(self, window: int | None) -> Tensor:
        """Which positions [B, width] each query sees."""
        position_W = torch.arange(self.width, device=self.used_B.device)
        seen_BW = position_W < self.used_B[:, None]
        if window is not None:
            seen_BW &= position_W >= self.used_B[:, None] - window
        return seen_BW
