"""Attention over packed sequences and over a cache's slots, against plain arithmetic in fp64.

Suffixes as in the module: T packed tokens, B sequences with one new token each, S slots of W
positions, A query heads, K key-value heads, D head size.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sodfast.errors import UsageError
from sodfast.model import attention
from sodfast.model.attention import (
    FLASH,
    PackedAttention,
    Paths,
    SlotAttention,
    describe,
    paths,
    require_flash,
    without_cudnn,
)


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor, softcap: float | None = None
) -> Tensor:
    """softmax(q·k·scale) v in fp64: q [Q, A, D], k and v [L, K, D], seen [Q, L]."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qad,lad->aql", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("aql,lad->qad", weights, v)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_keeps_sequences_apart(
    kv_heads: int, window: int | None, softcap: float | None
) -> None:
    """Values and gradients; lengths that stand alone and runs of equal ones."""
    generator = torch.Generator().manual_seed(3)
    lengths, padding = [5, 1, 9, 9, 9, 2, 2, 5], 3
    total = sum(lengths) + padding
    q = torch.randn(total, 4, 8, generator=generator).requires_grad_()
    k, v = torch.randn(2, total, kv_heads, 8, generator=generator).requires_grad_()
    attention = PackedAttention(lengths, torch.device("cpu"), q.dtype)
    attended = attention(q, k, v, 0.3, window, softcap)
    assert attended.shape == q.shape and not attended[sum(lengths) :].any()
    parts, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        back = torch.arange(length)[:, None] - torch.arange(length)
        seen = (back >= 0) & (back < (window or length))
        parts.append(attend_plainly(q[part], k[part], v[part], 0.3, seen, softcap))
        start += length
    expected = torch.cat(parts)
    torch.testing.assert_close(attended[:start].double(), expected, rtol=0, atol=1e-5)
    upstream = torch.randn(expected.shape, generator=generator)
    inputs = q, k, v
    found = torch.autograd.grad(attended[:start], inputs, upstream, retain_graph=True)
    exact = torch.autograd.grad(expected, inputs, upstream.double())
    for gradient, reference in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_slot_attention_sees_what_is_cached(window: int | None) -> None:
    """On the memory order of a CPU's cache."""
    generator = torch.Generator().manual_seed(4)
    used = torch.tensor([1, 4, 11, 7], dtype=torch.int32)
    keys = torch.randn(6, 2, 8, 16, generator=generator).permute(0, 3, 1, 2)
    values = torch.randn(6, 2, 16, 8, generator=generator).transpose(1, 2)
    q = torch.randn(4, 4, 8, generator=generator)
    attended = SlotAttention(used, 12)(q, keys, values, 0.4, window)
    for row, count in enumerate(used.tolist()):
        seen = torch.arange(count)[None] >= count - (window or count)
        expected = attend_plainly(
            q[row : row + 1], keys[row, :count], values[row, :count], 0.4, seen
        )
        torch.testing.assert_close(attended[row : row + 1].double(), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- properties


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def band(length: int, window: int | None) -> Tensor:
    """Which of `length` positions each of them sees."""
    back = torch.arange(length)[:, None] - torch.arange(length)
    return (back >= 0) & (back < (window or length))


HEADS = st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3), (5, 5)])  # A, K
WINDOWS = st.none() | st.integers(1, 20)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=6),
    padding=st.integers(0, 3),
    heads=HEADS,
    size=st.sampled_from([1, 5, 8]),
    window=WINDOWS,
    softcap=st.none() | st.sampled_from([0.5, 3.0]),
)
def test_any_packed_sequences_are_attended_as_plain_arithmetic_says(
    lengths: list[int],
    padding: int,
    heads: tuple[int, int],
    size: int,
    window: int | None,
    softcap: float | None,
) -> None:
    total = sum(lengths)
    q, k, v = (
        randn(seed, total + padding, count, size)
        for seed, count in enumerate((heads[0], heads[1], heads[1]))
    )
    packed = PackedAttention(lengths, torch.device("cpu"), q.dtype)
    attended = packed(q, k, v, 0.7, window, softcap)
    assert attended.shape == q.shape and not attended[total:].any()
    for part in torch.arange(total).split(lengths):
        seen = band(len(part), window)
        expected = attend_plainly(q[part], k[part], v[part], 0.7, seen, softcap)
        torch.testing.assert_close(attended[part].double(), expected, rtol=0, atol=1e-5)


@settings(max_examples=50)
@given(
    used=st.lists(st.integers(1, 13), min_size=1, max_size=6),
    spare=st.integers(0, 2),
    behind=st.integers(0, 3),
    heads=HEADS,
    size=st.sampled_from([1, 5, 8]),
    window=WINDOWS,
)
def test_any_slots_are_attended_as_plain_arithmetic_says(
    used: list[int], spare: int, behind: int, heads: tuple[int, int], size: int, window: int | None
) -> None:
    """More slots than queries, and slots longer than `width`."""
    width, slots = max(used), len(used) + spare
    q = randn(0, len(used), heads[0], size)
    keys, values = (randn(seed, slots, width + behind, heads[1], size) for seed in (1, 2))
    slot_attention = SlotAttention(torch.tensor(used, dtype=torch.int32), width)
    attended = slot_attention(q, keys, values, 0.7, window)
    for row, count in enumerate(used):
        seen = band(count, window)[-1:]
        expected = attend_plainly(
            q[row : row + 1], keys[row, :count], values[row, :count], 0.7, seen
        )
        found = attended[row : row + 1].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_window_of_one_gives_each_token_its_own_value(softcap: float | None) -> None:
    q, k, v = randn(0, 12, 4, 8), randn(1, 12, 2, 8), randn(2, 12, 2, 8)
    attended = PackedAttention([5, 7], q.device, q.dtype)(q, k, v, 0.7, 1, softcap)
    torch.testing.assert_close(attended, v.repeat_interleave(2, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_window_that_holds_the_longest_sequence_is_none(softcap: float | None) -> None:
    q, k, v = randn(0, 12, 4, 8), randn(1, 12, 2, 8), randn(2, 12, 2, 8)
    packed = PackedAttention([5, 7], q.device, q.dtype)
    assert packed(q, k, v, 0.7, 7, softcap).equal(packed(q, k, v, 0.7, None, softcap))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_what_a_token_may_not_see_moves_nothing(window: int | None, softcap: float | None) -> None:
    """Other sequences, later tokens, and tokens in front of the window, at 1000 times the size."""
    lengths = [6, 9, 9]
    q, k, v = randn(0, 24, 4, 8), randn(1, 24, 2, 8), randn(2, 24, 2, 8)
    packed = PackedAttention(lengths, q.device, q.dtype)
    before = packed(q, k, v, 0.7, window, softcap)
    token = 11  # the sixth of the second sequence
    seen = range(6 if window is None else token - window + 1, token + 1)
    hidden = torch.tensor([index for index in range(24) if index not in seen])
    k[hidden], v[hidden] = 1e3 * k[hidden], 1e3 * v[hidden]
    after = packed(q, k, v, 0.7, window, softcap)
    torch.testing.assert_close(after[token], before[token], rtol=0, atol=1e-6)
    assert not torch.allclose(after[23], before[23], atol=1e-2)


@pytest.mark.parametrize("window", [None, 3])
def test_what_lies_behind_a_slots_tokens_moves_nothing(window: int | None) -> None:
    """A slot keeps what an earlier, longer sequence left in it; and its neighbours differ."""
    used = torch.tensor([5, 9], dtype=torch.int32)
    q, keys, values = randn(0, 2, 4, 8), randn(1, 2, 12, 2, 8), randn(2, 2, 12, 2, 8)
    attend = SlotAttention(used, 12)
    before = attend(q, keys, values, 0.7, window)
    for cached in (keys, values):
        cached[0, 5:] *= 1e3
        cached[1] *= 2.0
    after = attend(q, keys, values, 0.7, window)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-6)
    assert not torch.allclose(after[1], before[1], atol=1e-2)


def test_a_cpu_never_runs_flash_attention() -> None:
    packed = PackedAttention([2], torch.device("cpu"), torch.bfloat16)
    assert packed.attend == packed.attend_capped == packed._sdpa
    assert paths(CPU, torch.bfloat16).slots == "products"


# ---------------------------------------------------------------- which kernel runs

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# The arguments after `max_k` of the versions of `varlen_attn`, and of one from before its window.
VARLEN = {
    "none": None,
    "2.10": {"is_causal"},
    "2.11": {"scale", "window_size"},
    "only seqused_k": {"scale", "window_size", "seqused_k"},
    "only enable_gqa": {"scale", "window_size", "enable_gqa"},
    "2.13": {"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"},
}
Calls = list[dict[str, Any]]


def attend_within_window(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sides: tuple[int, int]
) -> Tensor:
    """One sequence under FlashAttention's window (left, right), a negative side being open; the
    last query stands at the last key."""
    ahead = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
    left, right = (len(k) if side < 0 else side for side in sides)
    return attend_plainly(q, k, v, scale, (ahead >= -left) & (ahead <= right)).to(q.dtype)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """`install(torch, package)`: stand in for a version of torch, with flash-attn or without. The
    kernels compute in fp64 and every call's keywords are appended to the list that is returned."""

    def stand_in(torch_version: str, package: bool) -> Calls:
        calls: Calls = []
        names = VARLEN[torch_version]

        def varlen_attn(
            q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor,
            longest_q: int, longest_k: int, **keywords: Any,
        ) -> Tensor:  # fmt: skip
            assert names is not None and keywords.keys() <= names
            calls.append(keywords)
            starts = bounds_k.tolist()
            ends = [
                start + used
                for start, used in zip(
                    starts, keywords.get("seqused_k", bounds_k.diff()).tolist(), strict=False
                )
            ]
            parts = [
                attend_within_window(
                    one, k[start:end], v[start:end], keywords["scale"], keywords["window_size"]
                )
                for one, start, end in zip(
                    q.split(bounds_q.diff().tolist()), starts, ends, strict=False
                )
            ]
            return torch.cat(parts)

        def flash_attn_varlen_func(
            q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor,
            longest_q: int, longest_k: int, *, softmax_scale: float, causal: bool,
            window_size: tuple[int, int], softcap: float,
        ) -> Tensor:  # fmt: skip
            calls.append({"package": "varlen", "window_size": window_size, "softcap": softcap})
            sizes = bounds_q.diff().tolist()
            rows = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
            return torch.cat(
                [attend_within_window(*row, softmax_scale, window_size) for row in rows]
            )

        kinds = inspect.Parameter
        parameters = [kinds(name, kinds.KEYWORD_ONLY) for name in sorted(names or ())]
        varlen_attn.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        module: Any = ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = varlen_attn
        flash: Any = ModuleType("flash_attn")
        flash.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        monkeypatch.setitem(sys.modules, "flash_attn", flash)
        there = {"torch.nn.attention.varlen": names is not None, "flash_attn": package}
        monkeypatch.setattr(
            attention,
            "find_spec",
            lambda name: there[name.removesuffix(".flash_attn_interface")] or None,
        )
        return calls

    return stand_in


@pytest.mark.parametrize("package", [False, True])
@pytest.mark.parametrize("version", VARLEN)
def test_the_path_follows_from_what_is_installed(
    version: str, package: bool, install: Callable[..., Calls]
) -> None:
    install(version, package)
    other = "flash-attn" if package else "sdpa"
    packed = other if version in ("none", "2.10") else "varlen_attn"
    for dtype in (torch.bfloat16, torch.float16):
        found = Paths(packed, other, "decode_attention")  # type: ignore[arg-type]
        assert paths(CUDA, dtype) == found
        assert paths(CPU, dtype) == Paths("sdpa", "sdpa", "products")
    assert paths(CUDA, torch.float32) == Paths("sdpa", "sdpa", "decode_attention")
    for softcap in (False, True):
        met = (other if softcap else packed) in attention.FLASH
        with (
            nullcontext() if met else pytest.raises(UsageError, match=r"^model\.attention=flash: ")
        ):
            require_flash(CUDA, torch.bfloat16, softcap)


def test_the_path_of_the_installed_versions() -> None:
    """Run in both environments of CI: torch 2.11 and torch 2.13, neither with flash-attn."""
    if find_spec("flash_attn") is None:
        version = ".".join(torch.__version__.split(".")[:2])
        found = Paths("varlen_attn", "sdpa", "decode_attention")
        assert paths(CUDA, torch.bfloat16) == found
        grouped = isinstance(attention._varlen_attn(), functools.partial)
        assert grouped == (version != "2.11")


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("version", ["2.11", "only seqused_k", "only enable_gqa", "2.13", "none"])
def test_flash_kernels_are_called_as_their_versions_can_be(
    version: str,
    window: int | None,
    install: Callable[..., Calls],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With grouped heads: the keywords of a call, and that they mean what ours mean."""
    calls = install(version, package=True)
    on_gpu, lengths = paths(CUDA, torch.bfloat16), [5, 1, 9]
    q, k, v = randn(0, 15, 4, 8), randn(1, 15, 2, 8), randn(2, 15, 2, 8)
    expected = PackedAttention(lengths, CPU, q.dtype)(q, k, v, 0.3, window)
    monkeypatch.setattr(attention, "paths", lambda device, dtype: on_gpu)
    attended = PackedAttention(lengths, CPU, q.dtype)(q, k, v, 0.3, window)
    torch.testing.assert_close(attended, expected, rtol=0, atol=1e-5)
    (packed,) = calls
    assert packed["window_size"] == (-1 if window is None else window - 1, 0)
    if version != "none":
        assert packed.get("enable_gqa", False) == ("enable_gqa" in (VARLEN[version] or set()))


def test_a_run_can_say_which_kernels_it_takes(install: Callable[..., Calls]) -> None:
    def said(device: torch.device, softcap: bool = False, slots: bool = True) -> str:
        return describe(device, torch.bfloat16, softcap, slots).removeprefix("attention: ")

    assert said(CPU) == "sdpa over packed sequences, products in decoding"
    install("2.11", package=True)
    ours = "sodfast's decode_attention in decoding"
    assert said(CUDA) == f"torch's varlen_attn over packed sequences, {ours}"
    assert said(CUDA, softcap=True) == f"flash-attn over packed sequences, {ours}"
    install("2.11", package=False)
    assert said(CUDA) == f"torch's varlen_attn over packed sequences, {ours}"
    assert said(CUDA, softcap=True) == f"sdpa over packed sequences, {ours}"
    assert said(CUDA, slots=False).endswith("the engine's own in decoding")


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32)])
def test_flash_attention_needs_16_bits_on_a_gpu(device: torch.device, dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match="16 bits on a GPU"):
        require_flash(device, dtype, False)


@pytest.mark.parametrize("window", [None, 3])
def test_sdpa_on_a_gpu_is_given_no_groups(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 and with masks, torch's only kernel there for groups stores the scores of all pairs.
    A device that computes nothing stands for the GPU."""
    asked: list[tuple[int, int, bool]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        asked.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for device in ("meta", "cpu"):
        q, k, v = (torch.ones(9, heads, 8, device=device) for heads in (4, 2, 2))
        assert PackedAttention([5, 4], q.device, q.dtype)(q, k, v, 0.3, window).shape == q.shape
    assert asked == [(4, 4, False)] * 2 + [(2, 2, True)] * 2


def test_cudnn_is_taken_out_of_sdpa_for_gpus_alone() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        without_cudnn(CPU)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        without_cudnn(CUDA)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 7])
def test_flash_attention_is_as_exact_as_sdpa(window: int | None, softcap: float | None) -> None:
    """Values and gradients in bf16: at most twice sdpa's error against fp64."""
    found = paths(torch.device("cuda"), torch.bfloat16)
    if (found.packed if softcap is None else found.capped) not in FLASH:
        pytest.skip("no FlashAttention that is installed caps scores")
    lengths = [300, 41, 41, 1]
    generator = torch.Generator().manual_seed(1)
    shapes = [(383, heads, 64) for heads in (8, 2, 2, 8)]
    *qkv, upstream = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)

    def run(kernel: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        attention = PackedAttention(lengths, torch.device(device), dtype)
        inputs = [x.to(device, dtype).requires_grad_() for x in qkv]
        attend = attention._sdpa if kernel == "sdpa" else attention
        attended = attend(*inputs, 0.125, window, softcap)
        found = torch.autograd.grad(attended, inputs, upstream.to(device, dtype))
        return [x.double().cpu() for x in (attended.detach(), *found)]

    exact = run("sdpa", "cpu", torch.float64)
    flash, sdpa = (run(kernel, "cuda", torch.bfloat16) for kernel in ("flash", "sdpa"))
    for ours, theirs, reference in zip(flash, sdpa, exact, strict=True):
        assert (ours - reference).norm() <= 2 * (theirs - reference).norm()
