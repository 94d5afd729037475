"""Part `rollout`: the cases of bench_rollout.py that need a GPU. Only their runs import sodfast."""

import math
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from suite_record import Case, Plan, Result, check

# Besides this file and the kernels.
SOURCES = [
    Path(__file__).with_name("bench_rollout.py"),
    *(Path(__file__).parents[1] / "sodfast").rglob("*.py"),
]
# Few rows read their weights for few tokens, and their long contexts leave SMs without work.
ROOFLINE_SHARE, OF_FEW_ROWS = 0.70, 0.60
# Of the attention alone: the goal of kernels/sodfast_kernels/attention.
COPY_SHARE = 0.80
MEMORY_BYTES = 80e9


class Engine:
    """What the cases share: the module, rates of memory, and the model, made when first asked for.

    At full size the shape is that of Qwen3-8B in bf16, with random weights.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cached_property
    def bench(self) -> Any:
        import bench_rollout

        return bench_rollout

    @cached_property
    def rates(self) -> dict[str, float]:
        size = 4 << 30 if self.plan.full else 1 << 20
        found: dict[str, float] = self.bench.bandwidth(self.plan.device, size)
        return found

    @cached_property
    def model(self) -> Any:
        shape = self.bench.Shape() if self.plan.full else self.bench.TINY_SHAPE
        dtype = torch.bfloat16 if self.plan.full else torch.float32
        return self.bench.build(shape, self.plan.device, dtype, 0.02)

    def equality(self) -> Result:
        return {"checks": as_checks(self.bench.check_equality(self.plan.device))}

    def repeatability(self) -> Result:
        dtype = torch.bfloat16 if self.plan.full else torch.float32
        return {"checks": as_checks(self.bench.check_repeatability(self.plan.device, dtype))}

    def attention(self, slots: int, context: int, layers: int) -> Result:
        shape = None if self.plan.full else self.bench.TINY_SHAPE
        row = self.bench.attention_step(self.plan.device, slots, context, layers, shape)
        row["share_of_copy"] = row["bytes_per_second"] / self.rates["copy"]
        checks = []
        if self.plan.full:
            share = row["share_of_copy"]
            checks.append(check("share of a copy's bandwidth", share, COPY_SHARE, at_most=False))
        name = "decode_attention"
        return {"bytes_per_second": self.rates, "checks": checks, "rows": [{"name": name, **row}]}

    def decode(self, slots: int, context: int, steps: int) -> Result:
        if self.plan.full:
            torch.cuda.reset_peak_memory_stats()
        row = self.bench.decode_step(self.model, slots, context, steps, self.rates)
        checks = []
        if self.plan.full:
            share = row["share_of_roofline"]
            least = OF_FEW_ROWS if slots < 64 else ROOFLINE_SHARE
            checks.append(check("share of the roofline", share, least, at_most=False))
            checks.append(check("peak bytes", torch.cuda.max_memory_reserved(), MEMORY_BYTES))
        rates = self.rates
        return {"bytes_per_second": rates, "checks": checks, "rows": [{"name": "decode", **row}]}

    def answers(self, slots: int, prompt: int, tokens: int) -> Result:
        found = self.bench.whole_answers(self.model, slots, prompt, tokens, rounds=2)
        checks = []
        for name, row in found.items():
            if name != "native" and self.plan.full:
                faster = row.get("ours_is_faster", math.nan)  # a rival that failed is a miss
                checks.append(check(f"native over {name}", faster, 1.0, at_most=False))
        return {"checks": checks, "rows": [{"name": name, **row} for name, row in found.items()]}


def as_checks(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"check": row.pop("target"), **row} for row in targets]


def cases(plan: Plan) -> list[Case]:
    engine = Engine(plan)
    found = [
        Case("answers equal to generate's", 0.5, engine.equality),
        Case("samples do not depend on their batch", 0.5, engine.repeatability),
    ]
    shapes = ((64, 2048, 8), (4, 8192, 16)) if plan.full else ((2, 40, 2),)
    for slots, context, layers in shapes:
        name = f"decode attention, {slots} × {context}"
        found.append(Case(name, 0.5, partial(engine.attention, slots, context, layers)))
    sizes = ((64, 2048, 128), (128, 1536, 128), (4, 8192, 128)) if plan.full else ((4, 40, 8),)
    for slots, context, steps in sizes:
        name = f"decode, {slots} slots at {context}"
        found.append(Case(name, 1.0, partial(engine.decode, slots, context, steps)))
    size = (64, 256, 256) if plan.full else (3, 5, 7)
    found.append(Case("whole answers", 3.0, partial(engine.answers, *size)))
    return found
