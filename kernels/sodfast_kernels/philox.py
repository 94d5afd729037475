"""Random bits and stochastic rounding, a pure function of (seed, step, offset).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
128-bit counter and a 64-bit key into 128 random bits. Here the key is the seed and the counter is
(offset // 8, step): an element at `offset` takes 16 of the 128 bits, so one call serves eight
elements, and nothing depends on how the elements are cut into blocks or on the device.

The Triton kernels compute the same integers; this file is the definition they are tested against.

Shapes: P elements of a flattened parameter, G groups of eight elements.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
GROUP = 8  # elements served by one Philox call
CHUNK = 1 << 17  # elements that the PyTorch paths handle at a time, to bound their temporaries

Word = Tensor | int


def philox(counter: tuple[Word, Word, Word, Word], seed: int) -> tuple[Word, Word, Word, Word]:
    """Philox-4x32-10 of four 32-bit words, each an int or an int64 tensor of values < 2**32.

    An int64 product of two such words wraps modulo 2**64, which keeps all the bits needed.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & WORD) ^ c1 ^ key0,
            product1 & WORD,
            ((product0 >> 32) & WORD) ^ c3 ^ key1,
            product0 & WORD,
        )
        key0, key1 = (key0 + KEY_STEPS[0]) & WORD, (key1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def random_bits(count: int, *, seed: int, step: int, offset: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements offset … offset + count − 1.

    Returns int32 [count] in [0, 65536). `offset` must be a multiple of eight (ValueError).
    """
    if offset % GROUP:
        raise ValueError(f"offset must be a multiple of {GROUP}, got {offset}")
    first = offset // GROUP
    group_G = torch.arange(first, first + -(-count // GROUP), dtype=torch.int64, device=device)
    words = philox((group_G & WORD, group_G >> 32, step & WORD, (step >> 32) & WORD), seed)
    words_G4 = torch.stack([word for word in words if isinstance(word, Tensor)], dim=1)
    halves = torch.stack((words_G4 & 0xFFFF, words_G4 >> 16), dim=2)
    return halves.flatten()[:count].to(torch.int32)


def rng_offsets(sizes: Iterable[int], first: int = 0) -> tuple[list[int], int]:
    """Offsets in the stream of random bits of tensors that stand one after the other from `first`.

    sizes: their numbers of elements. Each begins at a multiple of GROUP, so no two share a call.
    Returns the offset of each tensor's first element, and the offset of what follows them all.
    """
    offsets = []
    for size in sizes:
        offsets.append(first)
        first += -(-size // GROUP) * GROUP
    return offsets, first


def round_stochastic(values_P: Tensor, bits_P: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 values to bf16 or fp16, up in magnitude with the probability of the lost fraction.

    bits_P: int32 in [0, 65536), one per value. Exact for bf16; for fp16 the probability is right to
    2**-16. Values that dtype represents stay as they are; NaN stays NaN and infinities stay.
    """
    raw_P = values_P.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded_P = ((raw_P + bits_P) >> 16).to(torch.int16).view(torch.bfloat16)
        # The carry would turn some NaN patterns into numbers.
        return torch.where(values_P.isnan(), torch.nan, rounded_P)
    if dtype == torch.float16:
        # The spacing of fp16 at the value, as a power of two: no finer than 2**-24 (subnormals).
        spacing = (raw_P & 0x7F800000).clamp(min=113 << 23) - (10 << 23)
        per_spacing = ((254 << 23) - spacing).view(torch.float32)
        scaled_P = values_P.abs() * per_spacing
        whole_P = scaled_P.floor()
        up_P = (scaled_P - whole_P) * 65536.0 > bits_P
        rounded_P = (whole_P + up_P) * spacing.view(torch.float32)
        rounded_P = torch.where(values_P.isfinite(), rounded_P.copysign(values_P), values_P)
        return rounded_P.to(torch.float16)
    raise ValueError(f"dtype must be bfloat16 or float16, got {dtype}")
