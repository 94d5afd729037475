"""Part `correctness`, of what keeps state or draws: copy, EMA, AdamW and sampling.

The two paths of every update, Triton and PyTorch, must write the same bits, also beyond 2³¹
elements of one tensor. A token may differ from the definition only where two scores nearly tie.
"""

import math
from functools import partial
from typing import Any

import torch
from sodfast_kernels import AdamW, copy_teacher_, ema_update_, sample_tokens
from suite_record import Case, Plan, Result, check, worst
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Vectors and matrices, tails that no vector access fits, and one element.
SHAPES = ((4096, 4096), (1027, 33), (12_288,), (128,), (5,), (1,))
TINY_SHAPES = ((64, 16), (3, 5), (5,), (1,))
TRUNCATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_k": 20, "top_p": 0.9},
)
CHUNK = 1 << 26


def cases(plan: Plan) -> list[Case]:
    device, full = plan.device, plan.full
    shapes = SHAPES if full else TINY_SHAPES
    # More than 2³¹ elements, in a prime number that no block divides.
    many = ((2**31 + 11,),) if full else ((2**10 + 7,),)
    batch = (256, 151_936, 8) if full else (4, 1203, 1)
    found = [
        Case("copy and average", 0.2, partial(teachers, shapes, DTYPES, device)),
        Case("copy and average, 2³¹ elements", 0.5, partial(teachers, many, DTYPES[:1], device)),
    ]
    for state in ("8bit", "fp32", "exact"):
        found.append(Case(f"AdamW {state}", 0.2, partial(adamw, state, shapes, device, 3)))
    found.append(Case("AdamW 8bit, 2³¹ elements", 0.8, partial(adamw, "8bit", many, device, 1)))
    for dtype in DTYPES:
        run = partial(sampling, *batch, dtype, device)
        found.append(Case(f"sampling, {str(dtype)[6:]}", 0.2, run))
    return found


def values(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """Of very different sizes, so that every exponent of the 8-bit formats is used."""
    generator = torch.Generator(device).manual_seed(seed)
    made = []
    for shape in shapes:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        for part in tensor.view(-1).split(CHUNK):
            normal = torch.randn(2, len(part), generator=generator, device=device)
            part.copy_(0.02 * normal[0] * torch.exp(normal[1]))
        made.append(tensor)
    return made


def bits_that_differ(left: list[Tensor], right: list[Tensor]) -> int:
    """Elements whose bytes differ, NaN or not. Nothing to compare is an error."""
    assert left and len(left) == len(right)
    count = 0
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
        flat = (tensor.reshape(-1).view(width).split(CHUNK) for tensor in (one, other))
        for a, b in zip(*flat, strict=True):
            count += int((a != b).sum())
    return count


def teachers(
    shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> Result:
    checks = []
    for dtype in dtypes:
        student = values(shapes, dtype, device, 1)
        start = values(shapes, dtype, device, 0)
        squares = [
            float((a.double() - b.double()).square().sum())
            for one, other in zip(student, start, strict=True)
            for a, b in zip(one.view(-1).split(CHUNK), other.view(-1).split(CHUNK), strict=True)
        ]
        exact = math.sqrt(math.fsum(squares))
        del start
        for name, update in (
            ("copy", copy_teacher_),
            ("average", partial(ema_update_, rate=0.04, seed=2**63 + 5, step=7)),
        ):
            found = []
            for backend in ("triton", "torch"):
                teacher = values(shapes, dtype, device, 0)
                distance = float(update(teacher, student, backend=backend))
                error = abs(distance - exact) / exact
                label = f"{name}, {str(dtype)[6:]}"
                checks.append(check(f"{label}: distance by {backend}: error", error, 1e-6))
                found.append(teacher)
            differ = bits_that_differ(*found)
            checks.append(check(f"{label}: elements that differ", differ, 0))
            del found, teacher
    return {"checks": checks}


def adamw(
    state: str, shapes: tuple[tuple[int, ...], ...], device: torch.device, steps: int
) -> Result:
    """Weights, moments and norm after some steps with clipping, on both paths."""
    checks = []
    for dtype in (torch.bfloat16, torch.float32)[: 1 if steps == 1 else 2]:
        ends, norms = [], []
        for backend in ("triton", "torch"):
            params = [nn.Parameter(tensor) for tensor in values(shapes, dtype, device, 0)]
            optimizer = AdamW(params, 1e-3, state=state, seed=2**63 + 5, backend=backend)
            for step in range(steps):
                for param, grad in zip(
                    params, values(shapes, dtype, device, 9 + step), strict=True
                ):
                    param.grad = grad
                norms.append(float(optimizer.step(clip_norm=0.5)))
            left = [param.detach() for param in params]
            for param in params:
                left += [v for name, v in optimizer.state[param].items() if name != "step"]
                param.grad = None
            ends.append(left)
            del params, optimizer
        label = f"{str(dtype)[6:]}: "
        checks.append(check(f"{label}elements that differ", bits_that_differ(*ends), 0))
        pairs = zip(norms[:steps], norms[steps:], strict=True)
        error = worst(abs(one - other) / other for one, other in pairs)
        checks.append(check(f"{label}norm: error", error, 1e-6))
        del ends
    return {"checks": checks}


def likely_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A bulk, and 20 tokens a row far above it, as a language model has."""
    bulk = 2.5 * torch.randn(rows, vocabulary, device=device)
    likely = torch.randint(vocabulary, (rows, min(20, vocabulary)), device=device)
    return bulk.scatter(1, likely, 10 + 3 * torch.randn(likely.shape, device=device)).to(dtype)


def sampling(
    rows: int, vocabulary: int, turns: int, dtype: torch.dtype, device: torch.device
) -> Result:
    """Tokens and statistics against the definition, and a row's draw alone and in its batch."""
    torch.manual_seed(0)
    sample = torch.arange(rows, device=device)
    other, drawn, errors, alone_differ = 0, 0, [], 0
    for options in TRUNCATIONS:
        for turn in range(turns):
            logits = likely_logits(rows, vocabulary, dtype, device)
            position = torch.full_like(sample, turn)
            key = {"seed": 2**63 + 1, "step": 2, "sample": sample, "position": position}
            ours, exact = (
                sample_tokens(logits, **key, **options, backend=backend)
                for backend in ("triton", "torch")
            )
            same = ours.token == exact.token
            other += int((~same).sum())
            drawn += rows
            # A log-prob is of its own token, so it is compared where the tokens agree.
            gaps = [(ours.logprob - exact.logprob).where(same, 0), ours.entropy - exact.entropy]
            errors += [float(gap.abs().max()) for gap in gaps]
            half = {name: v[::2] if torch.is_tensor(v) else v for name, v in key.items()}
            part = sample_tokens(logits[::2], **half, **options, backend="triton")
            alone_differ += int((part.token != ours.token[::2]).sum())
            alone_differ += int((part.logprob != ours.logprob[::2]).sum())
    checks = [
        check("share of other tokens", other / drawn, 1e-3),
        check("log-prob and entropy: error", worst(errors), 1e-4),
        check("rows that depend on their batch", alone_differ, 0),
    ]
    return {"checks": checks}
