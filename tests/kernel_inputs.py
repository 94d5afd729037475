"""Where the tests of the kernels run, and inputs that several of them share.

Every call that may run a Triton kernel is given tensors on DEVICE: there the kernel is compiled on
a machine with a GPU and interpreted on others. Random numbers are drawn on the CPU and moved, so
that they are the same everywhere. What only PyTorch computes (the reference, the PyTorch path,
Philox, the number formats) is tested on the CPU.
"""

from typing import Any

import pytest
import torch
from sodfast_kernels import SampledTokens, sample_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The marker skips a test where there is neither a GPU nor the interpreter.
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.triton)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# A vector of tensors that 16 divides (wide accesses), odd ones, one longer than a block.
SHAPES = [(64, 16), (3, 5), (16,), (1,), (1027,)]
HUGE_SEED, HUGE_STEP = 2**63 + 2**31 + 5, 2**40 + 2**31 + 7


def tensors(seed: int, dtype: torch.dtype, shapes=SHAPES) -> list[torch.Tensor]:
    """Values of very different sizes, with zeros, infinity and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        value = torch.randn(shape, generator=generator)
        value *= torch.exp(4 * torch.randn(shape, generator=generator))
        made.append(value)
    made[0].view(-1)[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    return [value.to(DEVICE, dtype) for value in made]


def clones(params):
    return [param.clone() for param in params]


def same_bits(left, right) -> bool:
    """Equal bit for bit; any NaN equals any other."""
    return all(
        bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())
        for a, b in zip(left, right, strict=True)
    )


TRUNCATIONS = [
    {},
    {"temperature": 0},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_p": 0.3},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"top_k": 30},
    {"top_k": 30, "top_p": 0.7},
    {"top_k": 10**6, "top_p": 0.5, "temperature": 2.5},
]


def draw_keys(rows: int, position: int = 0) -> dict[str, Any]:
    """A key for each of the rows, of large numbers."""
    return {
        "seed": 2**63 + 11,
        "step": 7,
        "sample": torch.arange(rows),
        "position": torch.full((rows,), position),
    }


def draw_tokens(logits: torch.Tensor, key: dict[str, Any], **options: Any) -> SampledTokens:
    """On the GPU where there is one; the results on the CPU."""
    key = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in key.items()}
    out = sample_tokens(logits.to(DEVICE), **key, **options)
    return SampledTokens(*(entry.cpu() for entry in out))
