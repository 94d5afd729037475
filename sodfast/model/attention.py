"""Attention over packed sequences, called alike on every device, and over the slots of a cache.

`paths` decides which kernel runs, from the device, the dtype and what is installed:

* Packed sequences on a GPU in 16 bits: FlashAttention 2, torch's own (`varlen_attn`) where it has
  the arguments that are needed, otherwise the `flash-attn` package where it is installed, otherwise
  sdpa. In 32 bits sdpa, since FlashAttention takes 16 bits only. On a CPU: sdpa over runs of
  equally long sequences.
* New tokens over a cache on a GPU: `sodfast_kernels.decode_attention`, whatever is installed. On a
  CPU: two batched matrix products.

Shapes: T tokens of packed sequences, B sequences with one new token each, S slots of W positions,
A query heads, K key-value heads, D head size. `window`: a token attends to this many last
positions, itself included; None: to all. `softcap`: scores s become softcap·tanh(s / softcap)
before the softmax (Gemma 2); of the kernels only those of `flash-attn` can do it, and without them
plain operations compute it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from inspect import signature
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sodfast.errors import UsageError

Path = Literal["varlen_attn", "flash-attn", "sdpa", "decode_attention", "products"]
FLASH: tuple[Path, ...] = ("varlen_attn", "flash-attn")


@dataclass(frozen=True)
class Paths:
    """Which kernel attends: over packed sequences, over those with capped scores, and over the
    slots of a cache."""

    packed: Path
    capped: Path
    slots: Path


def paths(device: torch.device, dtype: torch.dtype) -> Paths:
    """The kernels for tensors of this `dtype` on this `device`, by what is installed now."""
    if device.type != "cuda":
        return Paths("sdpa", "sdpa", "products")
    if dtype.itemsize != 2:
        return Paths("sdpa", "sdpa", "decode_attention")
    otherwise: Path = "flash-attn" if _has_package() else "sdpa"
    return Paths(
        packed="varlen_attn" if "window_size" in _varlen_arguments() else otherwise,
        capped=otherwise,
        slots="decode_attention",
    )


def describe(device: torch.device, dtype: torch.dtype, softcap: bool, slots: bool) -> str:
    """One line for a person: the kernels of a run. `softcap`: whether the model caps its scores;
    `slots`: whether its rollouts decode from our own cache, or by kernels that are not ours."""
    found = paths(device, dtype)
    packed = found.capped if softcap else found.packed
    decode = _named(found.slots) if slots else "the engine's own"
    return f"attention: {_named(packed)} over packed sequences, {decode} in decoding"


def require_flash(device: torch.device, dtype: torch.dtype, softcap: bool) -> None:
    """What model.attention=flash asks for; the arguments are those of `describe`.

    Raises `UsageError` where the kernel over packed sequences would not be FlashAttention's. In
    decoding ours is always there.
    """
    found = paths(device, dtype)
    packed = found.capped if softcap else found.packed
    if device.type != "cuda" or dtype.itemsize != 2:
        reason = "FlashAttention takes 16 bits on a GPU: set device=cuda and model.dtype=bfloat16"
    elif packed not in FLASH:
        reason = "none that is installed serves this model's packed sequences: install flash-attn"
    else:
        return
    raise UsageError(f"model.attention=flash: {reason}, or set model.attention=auto")


def without_cudnn(device: torch.device) -> None:
    """Take cuDNN's kernels out of sdpa's choice, for the rest of this process.

    On Hopper torch prefers them, and cuDNN may build a plan for each new shape, half a second
    long; our shapes are new in nearly every call. The setting is the process's, so a command calls
    this when its run starts on a GPU, and importing or calling sodfast's modules does not.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _named(path: Path) -> str:
    owner = {"varlen_attn": "torch's ", "decode_attention": "sodfast's "}
    return owner.get(path, "") + path


def _varlen_arguments() -> frozenset[str]:
    """Names of the arguments of the installed torch's `varlen_attn`; none where it has none."""
    if find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)


def _has_package() -> bool:
    """Whether `flash-attn` is installed; `flash-attn-4` shares its folder, not its modules."""
    return (
        find_spec("flash_attn") is not None
        and find_spec("flash_attn.flash_attn_interface") is not None
    )


def _varlen_attn() -> Callable[..., Any]:
    """torch's `varlen_attn`, set to take fewer key-value heads than query heads.

    torch 2.11 has no argument for that and needs none: it hands the heads to the same operator,
    which takes groups, without the comparison that `enable_gqa` switches off in later versions.
    """
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in _varlen_arguments()
    return partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn


def _sides(window: int | None) -> tuple[int, int]:
    """FlashAttention's window of causal attention: positions to the left (−1: all) and right."""
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
        kernels: dict[Path, Callable[..., Tensor]] = {
            "varlen_attn": self._varlen,
            "flash-attn": self._package,
            "sdpa": self._sdpa,
        }
        found = paths(device, dtype)
        self.attend, self.attend_capped = kernels[found.packed], kernels[found.capped]

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

    def _varlen(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, _: None
    ) -> Tensor:
        bounds, longest = self.bounds, self.longest
        return _varlen_attn()(
            q, k, v, bounds, bounds, longest, longest,
            scale=scale, window_size=_sides(window),
        )  # fmt: skip

    def _package(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        bounds, longest = self.bounds, self.longest
        return flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest,
            softmax_scale=scale, causal=True, window_size=_sides(window), softcap=cap or 0.0,
        )  # fmt: skip

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
                grouped = q.shape[1] != k.shape[1]
                if grouped and q.device.type != "cpu":
                    # Here come fp32 and masks, which FlashAttention does not take. Of groups the
                    # next best kernel takes none, and the last one stores all L² scores.
                    k_BKLD, v_BKLD = _a_head_each(q_BALD, k_BKLD, v_BKLD)
                    grouped = False
                cut = window is not None and window < length
                attended_BALD = F.scaled_dot_product_attention(
                    q_BALD,
                    k_BKLD,
                    v_BKLD,
                    attn_mask=_band(length, window or length, q.device) if cut else None,
                    is_causal=not cut,
                    scale=scale,
                    enable_gqa=grouped,
                )
            parts.append(attended_BALD.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Which positions [L, L] each of `length` tokens sees."""
    position_L = torch.arange(length, device=device)
    back_LL = position_L[:, None] - position_L
    return (back_LL >= 0) & (back_LL < window)


def _a_head_each(q_BALD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for each query head of their group, [B, A, L, D]."""
    repeats = q_BALD.shape[1] // k_BKLD.shape[1]
    return k_BKLD.repeat_interleave(repeats, 1), v_BKLD.repeat_interleave(repeats, 1)


def _capped(
    q_BALD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, scale: float, seen_LL: Tensor, softcap: float
) -> Tensor:
    """Attention with capped scores, its softmax in fp32."""
    k_BALD, v_BALD = _a_head_each(q_BALD, k_BKLD, v_BKLD)
    scores_BALL = softcap * torch.tanh(q_BALD @ k_BALD.mT * (scale / softcap))
    weights_BALL = scores_BALL.masked_fill(~seen_LL, -torch.inf).softmax(-1, torch.float32)
    return weights_BALL.to(v_BALD.dtype) @ v_BALD


class SlotAttention:
    """One query token for each of the slots 0 … B−1, which attends to the first `used_B` (int32)
    positions of its slot, its own the last of them. No `used_B` exceeds `width`."""

    def __init__(self, used_B: Tensor, width: int) -> None:
        self.used_B = used_B
        self.width = width
        self.biases: dict[int | None, Tensor] = {}

    def __call__(
        self,
        q_BAD: Tensor,
        keys_SWKD: Tensor,
        values_SWKD: Tensor,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Attended values [B, A, D], by two batched products and a softmax. In the memory order of
        a CPU's cache (rollout/cache.py) the permuted keys and values are plain matrices, read
        without a copy."""
        count, width, kv_heads = len(q_BAD), self.width, keys_SWKD.shape[2]
        if window not in self.biases:
            bias_BW = torch.zeros(count, width, dtype=q_BAD.dtype, device=q_BAD.device)
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
