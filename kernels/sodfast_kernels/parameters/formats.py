"""Number formats of the optimizer's state: fp32 as bf16 and a remainder, moments in 8 bits.

Weight + remainder is an fp32 number: the weight is that number rounded to bf16 with ties away from
zero, the remainder the difference of the two bit patterns, which just fits 16 signed bits.

8-bit moments are small floating-point codes (m: sign, 4 exponent and 3 mantissa bits; v: 5 and 3)
relative to a power of two that every 256 neighbours share. Both are rounded stochastically:
rounding to nearest would ignore a change of v smaller than half a spacing (3 %), and v changes by
about 0.1 % a step. v > 0 never becomes 0, which would make the optimizer's step huge.

Shapes: P elements of one flattened parameter, B blocks of X = 256 of them.
"""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256  # elements that share an exponent
M_TOP, V_TOP = 15, 31  # largest exponent field of a code of m (4 bits) and of v (5 bits)


def join(weight_P: Tensor, remainder_P: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its int16 remainder."""
    high_P = weight_P.view(torch.int16).to(torch.int32) << 16
    return (high_P + remainder_P).view(torch.float32)


def split(master_P: Tensor) -> tuple[Tensor, Tensor]:
    """A master as (bf16 weight, rounded with ties away from zero; int16 remainder)."""
    raw_P = master_P.view(torch.int32)
    raw_P = torch.where(master_P.isnan(), 0x7FC00000, raw_P)  # a NaN without a remainder
    high_P = (raw_P + 0x8000) >> 16
    remainder_P = (raw_P - (high_P << 16)).to(torch.int16)
    return high_P.to(torch.int16).view(torch.bfloat16), remainder_P


def encode(values_P: Tensor, bits_P: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """8-bit codes [P] and block exponents [B], both uint8, of fp32 values.

    top: largest exponent field, M_TOP or V_TOP, which also says whether codes have a sign.

    A value of a block with exponent e is first scaled by 2**(127 − e), which brings the largest
    to at most 1.875, and then by 2**(top − 127), which makes its fp32 exponent field the one wanted
    in the code (0 … top), subnormals included. Then the upper bits of the fp32 pattern are the
    code, and adding random bits below them rounds it.
    The exponent 255 marks a block with NaN or infinity: all of it decodes to NaN or infinity.
    """
    count = values_P.numel()
    padding = -count % BLOCK
    values_BX = functional.pad(values_P, (0, padding)).view(-1, BLOCK)
    bits_BX = functional.pad(bits_P, (0, padding)).view(-1, BLOCK)
    peak_B1 = (values_BX.view(torch.int32) & 0x7FFFFFFF).amax(dim=1, keepdim=True)
    exponent_B1 = (peak_B1.clamp(max=0x7F800000) + 0xFFFFF) >> 23
    exponent_B1 = torch.where(exponent_B1 >= 254, 255, exponent_B1)
    scale_B1 = ((254 - exponent_B1) << 23).view(torch.float32)
    scaled_BX = values_BX.abs() * scale_B1 * 2.0 ** (top - 127)
    codes_BX = (scaled_BX.view(torch.int32) + ((bits_BX << 4) + 8)) >> 20
    if top == V_TOP:
        codes_BX = torch.where(values_BX > 0.0, codes_BX.clamp(min=1), codes_BX)
    else:
        codes_BX |= torch.where(values_BX < 0.0, 128, 0)
    return codes_BX.to(torch.uint8).flatten()[:count], exponent_B1.flatten().to(torch.uint8)


def decode(codes_P: Tensor, exponent_B: Tensor, top: int) -> Tensor:
    """The fp32 values of `encode`'s codes."""
    raw_P = codes_P.to(torch.int32)
    magnitude_P, sign_P = (raw_P, 0) if top == V_TOP else (raw_P & 127, (raw_P & 128) << 24)
    unit_P = ((magnitude_P << 20) | sign_P).view(torch.float32) * 2.0 ** (127 - top)
    scale_B = (exponent_B.to(torch.int32) << 23).view(torch.float32)
    return unit_P * scale_B.repeat_interleave(BLOCK)[: codes_P.numel()]
