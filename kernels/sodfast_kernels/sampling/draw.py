"""Drawing tokens: temperature, top-k, nucleus, and a draw that depends on its own key alone.

Gumbel-max: token = argmax_v (z_v / T + G_v), where G_v = −log E_v and E_v ~ Exp(1) is
−log1p(−u_v), u_v = (r_v + 1/2)·2^-32. r_v is word v % 4 of Philox-4x32-10 with the key `seed` and
the counter (v // 4, position, sample, step). So a token depends on (seed, step, sample, position)
and on the logits of its row: not on the batch, nor on how a kernel cuts the row. Small u, which
rare tokens win by, keeps the full relative precision of fp32, and so does 1 − u.

This file is the definition; kernel.py computes the same on a GPU.

Suffixes: B rows, V vocabulary.
"""

import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import uses_triton
from ..philox import WORD, philox

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_VOCABULARY = 1 << 18
# Below it logits divided by it would leave fp32.
MIN_TEMPERATURE = 1e-6
# Its product with a mass must not be 0 in fp32: the most probable token always stays.
MIN_TOP_P = 1e-30
# torch works with NumPy and without it, and so does this package.
NUMPY = find_spec("numpy") is not None


class SampledTokens(NamedTuple):
    """token [B] int64; logprob and entropy [B] fp32, nats, of the untruncated softmax."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor


def sample_tokens(
    logits: Tensor,
    *,
    seed: int,
    step: int,
    sample: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    noise: Tensor | None = None,
    backend: str = "auto",
) -> SampledTokens:
    """One token for each row, with log-prob and entropy of the softmax before truncation.

    Never reads a value back from a GPU, so it can be captured in a CUDA graph: `sample` and
    `position` are then read anew at every replay, everything else is constant.

    Args:
        logits: [B, V], fp32, bf16 or fp16, 1 ≤ V ≤ 262,144; rows may lie apart, elements not. −inf
            is probability 0. A row with NaN, +inf or nothing but −inf has entropy NaN, and its
            token is any valid index. Never differentiated.
        seed: 0 ≤ seed < 2**64, the key.
        step: 0 ≤ step < 2**32.
        sample: [B] int64 in [0, 2**32), on the device of the logits; on a GPU only the low 32 bits
            count.
        position: like `sample`.
        temperature: at least 1e-6, or 0 for the greatest logit, the lowest index among equals;
            log-prob and entropy are then those at temperature 1.
        top_p: 0 < top_p ≤ 1; of what `top_k` leaves, the smallest set of most probable tokens whose
            share of its mass reaches `top_p`, the lower index first among equals.
        top_k: keeps the k most probable tokens, the lower index among equals. None: all.
        noise: [B, V] fp32, `gumbel_noise` of the same key computed ahead for many positions, which
            is cheaper on a CPU. Only for the torch backend.
        backend: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "torch".

    Raises:
        ValueError: naming the argument that is out of range, or of a wrong shape, dtype or device.
    """
    _check_logits(logits)
    _check_key(seed, step)
    rows, vocabulary = logits.shape
    _check_counters(sample, position, logits.device, (rows,))
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or at least {MIN_TEMPERATURE}, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer or None, got {top_k!r}")
    triton = uses_triton(backend, (logits,))
    if noise is not None:
        if triton:
            raise ValueError('noise is for backend="torch": the kernel makes its own')
        if (noise.shape, noise.device) != (logits.shape, logits.device):
            raise ValueError(f"noise must have shape {tuple(logits.shape)}, on {logits.device}")
        if noise.dtype != torch.float32:
            raise ValueError(f"noise must be fp32, got {noise.dtype}")
    # torch.compile needs the op; a plain call is cheaper without its dispatch.
    call = _sample_op if torch.compiler.is_compiling() else _sample
    return SampledTokens(
        *call(
            logits.detach(),
            sample,
            position,
            noise,
            seed - (1 << 64) if seed >> 63 else seed,  # an op's integers are signed
            step,
            float(temperature),
            max(float(top_p), MIN_TOP_P),
            None if top_k is None or top_k >= vocabulary else top_k,
            triton,
        )
    )


def gumbel_noise(
    *, seed: int, step: int, sample: Tensor, position: Tensor, vocabulary: int
) -> Tensor:
    """The noise G of the draws, [..., vocabulary] fp32, for every pair of a sample and a position.

    sample, position: int64, of shapes that broadcast, [...]; values in [0, 2**32).
    Raises ValueError naming the argument that is out of range or of a wrong shape or dtype.
    """
    _check_key(seed, step)
    _check_counters(sample, position, getattr(sample, "device", None))
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"vocabulary must lie in [1, {MAX_VOCABULARY}], got {vocabulary}")
    return _gumbel_noise(seed, step, sample, position, vocabulary)


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("logits must be a tensor of two dimensions, [B, V]")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be fp32, bf16 or fp16, got {logits.dtype}")
    if not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"logits must have 1 to {MAX_VOCABULARY} columns, got {logits.shape[1]}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("logits must be contiguous along the vocabulary")


def _check_key(seed: int, step: int) -> None:
    for name, value, bits in (("seed", seed, 64), ("step", step, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must lie in [0, 2**{bits}), got {value}")


def _check_counters(
    sample: Tensor,
    position: Tensor,
    device: torch.device | None,
    shape: tuple[int, ...] | None = None,
) -> None:
    """`shape` None: any two that broadcast."""
    for name, counter in (("sample", sample), ("position", position)):
        if not isinstance(counter, Tensor) or counter.dtype != torch.int64:
            raise ValueError(f"{name} must be an int64 tensor")
        if shape is not None and counter.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(counter.shape)}")
        if counter.device != device:
            raise ValueError(f"{name} must be on {device}, got {counter.device}")
    sizes = zip(reversed(sample.shape), reversed(position.shape), strict=False)
    if any(one != other and 1 not in (one, other) for one, other in sizes):
        raise ValueError(
            f"position must broadcast against sample, got shapes {tuple(position.shape)} and "
            f"{tuple(sample.shape)}"
        )
    # Values are only read where that costs no synchronisation.
    on_cpu = sample.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and bool(((sample | position) >> 32).any()):
        raise ValueError("sample and position must lie in [0, 2**32)")


def _sample(
    logits: Tensor,
    sample: Tensor,
    position: Tensor,
    noise: Tensor | None,
    seed: int,
    step: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if triton:
        from . import kernel

        return kernel.sample(logits, sample, position, seed, step, temperature, top_p, top_k)
    if noise is None and temperature > 0:
        noise = _gumbel_noise(seed, step, sample, position, logits.shape[1])
    return _sample_torch(logits, noise, temperature, top_p, top_k)


_sample_op = torch.library.custom_op("sodfast_kernels::sample_tokens", _sample, mutates_args=())


@_sample_op.register_fake
def _(logits: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )


def _sample_torch(
    logits_BV: Tensor,
    noise_BV: Tensor | None,
    temperature: float,
    top_p: float,
    top_k: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in fp32 like the kernel's, statistics in fp64."""
    score_BV = logits_BV.float()
    scaled_BV = logits_BV.double() / (temperature or 1.0)
    logprob_BV = scaled_BV.log_softmax(1)
    entropy_B = torch.special.entr(logprob_BV.exp()).sum(1)
    if noise_BV is not None and temperature > 0:
        kept_BV = None
        if top_p < 1 or top_k is not None:
            kept_BV = _nucleus(scaled_BV, top_p, top_k)
        score_BV = score_BV * (1.0 / temperature) + noise_BV
        if kept_BV is not None:
            score_BV = score_BV.where(kept_BV, -math.inf)
    token_B1 = score_BV.argmax(1, keepdim=True)
    logprob_B = logprob_BV.gather(1, token_B1)[:, 0]
    return token_B1[:, 0], logprob_B.float(), entropy_B.float()


def _nucleus(scaled_BV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """The tokens that top-k and then top-p keep, [B, V] bool.

    A token stays if the mass of those before it is below the line, so the one that crosses the
    line does. Masses are relative to the greatest: those of equal logits are whole numbers and
    compare exactly. The line is a product in fp32 as in the kernel.
    """
    sorted_BV, order_BV = scaled_BV.sort(dim=1, descending=True, stable=True)
    mass_BK = (sorted_BV - sorted_BV[:, :1])[:, :top_k].exp()
    through_BK = mass_BK.cumsum(1)
    kept_BK = through_BK - mass_BK < through_BK[:, -1:].float() * top_p
    if top_p == 1:
        kept_BK.fill_(True)
    return torch.zeros_like(scaled_BV, dtype=torch.bool).scatter_(1, order_BV[:, :top_k], kept_BK)


def _gumbel_noise(
    seed: int, step: int, sample: Tensor, position: Tensor, vocabulary: int
) -> Tensor:
    group = torch.arange(-(-vocabulary // 4), device=sample.device)
    counter: tuple[Any, ...] = (group, position[..., None], sample[..., None])
    words: Any
    if NUMPY and sample.device.type == "cpu":
        # Small integer arrays cost a third in NumPy of what they cost in PyTorch.
        words = philox((*(word.numpy() for word in counter), step), seed)
        words = [torch.from_numpy(word) for word in words]
    else:
        words = philox((*counter, step), seed)
    return _gumbel(torch.stack(words, -1).flatten(-2)[..., :vocabulary])


def _gumbel(word: Tensor) -> Tensor:
    """−log E, fp32, of 32 random bits in an int64."""
    # u or 1 − u, whichever is less: in (0, 1/2] and correctly rounded.
    high = word > WORD >> 1
    smaller = (torch.where(high, WORD - word, word).float() + 0.5) * 2.0**-32
    return -(-torch.where(high, smaller.log(), torch.log1p(-smaller))).log()
