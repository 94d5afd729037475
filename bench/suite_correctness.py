"""Part `correctness`: the compiled kernels against fp64, and what only a GPU can show.

The linear form at every α and k, at Qwen3-8B's head with more than 2³¹ logits, in several slabs, in
fp16 and fp32; the logits form; then what may surround a call (suite_situations.py), accuracy beside
the peers' (suite_accuracy.py), parameters and sampling (suite_state.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import suite_accuracy
import suite_situations
import suite_state
import torch
from sodfast_kernels import (
    distillation_loss,
    linear_distillation_loss,
    reference,
)
from suite_gradients import (
    Size,
    gradients,
    judged,
    make_inputs,
    relative_error,
)
from suite_record import Case, Plan, Result, check, worst

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = Size(77, 256, 5003)
# 16,384 · 151,936 logits are more than 2³¹; two slabs of 8,192 rows.
LARGE = Size(16_384, 4096, 151_936)
MEDIUM = Size(2048, 4096, 151_936)
TINY = Size(9, 16, 1203)
TINIER = Size(3, 8, 67)

ours = partial(linear_distillation_loss, backend="triton")


def cases(plan: Plan) -> list[Case]:
    return [*objective_cases(plan), *suite_accuracy.cases(plan), *suite_state.cases(plan)]


def objective_cases(plan: Plan) -> list[Case]:
    device, full = plan.device, plan.full
    small, large, medium = (SMALL, LARGE, MEDIUM) if full else (TINIER, TINY, TINY)
    # A slab has 2·H rows: three slabs, of which the last is shorter.
    slabs = Size(2100, 512, 151_936) if full else Size(21, 4, 1203)
    k = (20, 100, 1024) if full else (4, 30, 60)

    def linear(size: Size, dtype: torch.dtype, **settings: Any) -> Callable[[], Result]:
        return partial(against_fp64, size, dtype, device, **settings)

    found = [
        Case(
            f"every k and soft cap, α={alpha}",
            0.3,
            partial(grid, small, device, alpha, k if full else k[:1]),
        )
        for alpha in (0.0, 0.3, 0.5, 1.0)
    ]
    found += [
        Case("16,384 rows, KL", 0.3, linear(large, BF16, alpha=0.0)),
        Case("16,384 rows, JSD", 0.3, linear(large, BF16, alpha=0.5)),
        Case("16,384 rows, top-100 + tail", 0.4, linear(large, BF16, alpha=0.5, top_k=k[1])),
        Case("reverse KL", 0.1, linear(medium, BF16, alpha=1.0)),
        Case("top-20 + tail, KL", 0.1, linear(medium, BF16, alpha=0.0, top_k=k[0])),
        Case("top-1024 + tail", 0.1, linear(medium, BF16, alpha=0.5, top_k=k[2])),
        Case("several slabs", 0.1, linear(slabs, BF16, alpha=0.5)),
        Case("fp16", 0.1, linear(medium, FP16, alpha=0.5)),
        Case("fp32", 0.1, linear(medium, FP32, alpha=0.0)),
        Case("logits form", 0.2, partial(logits_form, large, device)),
    ]
    return found + suite_situations.cases(small, medium, device)


def against_fp64(
    size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0, **settings: Any
) -> Result:
    inputs = make_inputs(size, dtype, device, seed)
    found = gradients(ours, inputs, **settings)
    return {"size": size, "checks": judged(inputs, found, dtype, **settings)}


def grid(size: Size, device: torch.device, alpha: float, k: tuple[int, ...]) -> Result:
    """The settings of one α; the worst value of each check over them."""
    found: dict[str, list[Any]] = {}
    for top_k in (None, *k):
        for softcap in (None, 30.0):
            settings = {"alpha": alpha, "top_k": top_k, "softcap": softcap}
            for row in against_fp64(size, BF16, device, **settings)["checks"]:
                found.setdefault(row["check"], []).append(row)
    checks = []
    for name, rows in found.items():
        # By how much each limit is used, because limits differ between the settings.
        if name.startswith("least"):
            value = -worst(-row["value"] for row in rows)
            checks.append(check(name, value, 0.0, at_most=False))
        elif name.endswith("share of wrong rows"):
            # Some of these limits are 0, so by how much they are exceeded.
            over = worst(row["value"] - row["limit"] for row in rows)
            checks.append(check(f"{name} over its limit", over, 0.0))
        else:
            used = worst(row["value"] / row["limit"] for row in rows)
            checks.append(check(f"{name} over its limit", used, 1.0))
    return {"size": size, "checks": checks}


def logits_form(size: Size, device: torch.device) -> Result:
    """[N, V] logits of more than 2³¹ elements; d-logits of rows all over it against fp64."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (size.rows, size.vocabulary)
    student = torch.empty(shape, dtype=BF16, device=device).normal_(generator=generator)
    teacher = student + 0.05
    teacher[:, ::3] -= 0.1
    picked = torch.arange(0, size.rows, max(1, size.rows // 100), device=device)
    picked = torch.cat([picked, picked.new_tensor([size.rows - 1])])
    checks = []
    for alpha in (0.0, 0.5):
        leaf = student.detach().requires_grad_()
        distillation_loss(leaf, teacher, alpha=alpha, backend="triton").loss.backward()
        assert leaf.grad is not None
        got = leaf.grad[picked]
        rows = {}
        for dtype in (torch.float64, FP32):
            sample = student[picked].to(dtype).requires_grad_()
            weight = sample.new_full((len(picked),), 1 / size.rows)
            reference.distillation_loss(
                sample, teacher[picked].to(dtype), alpha=alpha, distill_weight=weight
            ).loss.backward()
            rows[dtype] = sample.grad
        usual = rows[FP32]
        assert usual is not None
        limit = 2 * relative_error(usual.to(BF16), rows[torch.float64]) + 3e-3
        error = relative_error(got, rows[torch.float64])
        checks.append(check(f"α={alpha}: d_logits: error", error, limit))
        checks.append(check(f"α={alpha}: NaN", float(leaf.grad.isnan().sum()), 0))
        del leaf
    return {"size": size, "checks": checks}
