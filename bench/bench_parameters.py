"""Teacher copy, average and AdamW against the bandwidth of a plain copy, and against peers.

    python bench/bench_parameters.py      (or make bench; on a CPU; the last line is JSON)
    python bench/gpu_suite.py parameters

On a GPU over the tensors of Qwen3-8B, as many layers as fit beside everything that takes turns with
them; on a CPU over 4 M parameters, which shows only that nothing has become slow. Optimizers take
turns in two groups, 8-bit ones and those with wider moments. A group's tensors are gone before the
next one is built.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from sodfast_kernels import AdamW, copy_teacher_, ema_update_
from suite_peers import torchao_adamw
from suite_record import Case, Plan, Result, cpu_result
from suite_timing import Work, ceilings, copy_ceiling, take_turns
from torch import Tensor, nn

# Of the memory that the process may take, what is left free for temporaries.
SPARE = 0.15
TINY_SHAPES = [(1024, 1024), (1024,)] * 4
TORCHAO = "torchao: AdamW8bit (no norm)"
Shapes = list[tuple[int, ...]]


class Update(NamedTuple):
    """bytes: what one parameter moves, read and written. run: one update of all."""

    bytes: int
    run: Callable[[], object]


def qwen3_8b(layers: int) -> Shapes:
    hidden, inner, keys, vocabulary = 4096, 12288, 1024, 151936
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    layer += [(hidden,), (hidden,), (128,), (128,)]
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


def count(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def shapes_that_fit(plan: Plan, bytes_per_parameter: float, limit: float) -> Shapes:
    """limit: bytes that the process may take."""
    if not plan.full:
        return TINY_SHAPES
    for layers in range(36, 0, -1):
        shapes = qwen3_8b(layers)
        if count(shapes) * bytes_per_parameter < (1 - SPARE) * limit:
            return shapes
    raise ValueError(f"{limit / 2**30:.0f} GiB are too few for one layer of Qwen3-8B")


def memory_limit(plan: Plan) -> float:
    if plan.device.type == "cpu":
        return 0.0
    fraction = torch.cuda.get_per_process_memory_fraction(plan.device)
    total = torch.cuda.get_device_properties(plan.device).total_memory
    free, _ = torch.cuda.mem_get_info(plan.device)
    return min(fraction * total, free)


def make(shapes: Shapes, device: torch.device) -> list[Tensor]:
    return [0.02 * torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]


def trainable(shapes: Shapes, device: torch.device) -> list[nn.Parameter]:
    params = [nn.Parameter(value) for value in make(shapes, device)]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    return params


def teachers(shapes: Shapes, device: torch.device) -> dict[str, Update]:
    teacher, student = make(shapes, device), make(shapes, device)
    return {
        "copy": Update(6, lambda: copy_teacher_(teacher, student)),
        "torch._foreach_copy_ (no norm)": Update(4, lambda: torch._foreach_copy_(teacher, student)),
        "average": Update(6, lambda: ema_update_(teacher, student, 0.04, step=1)),
        "torch._foreach_lerp_ (nearest, no norm)": Update(
            6, lambda: torch._foreach_lerp_(teacher, student, 0.04)
        ),
    }


# Weight and moments as in adamw.py, and the pass over the gradients for their norm.
TRAFFIC = {"8bit": 12, "fp32": 24, "exact": 28}


def ours(params: list[nn.Parameter], state: str) -> Update:
    optimizer = AdamW(params, 1e-5, state=state)
    return Update(TRAFFIC[state], lambda: optimizer.step(clip_norm=1.0))


def fused(params: list[nn.Parameter]) -> Update:
    return Update(14, torch.optim.AdamW(params, 1e-5, fused=True).step)


def torchao(params: list[nn.Parameter]) -> Update:
    """Made at the first step, so that its absence is a failed row like any other fault."""
    made: list[Any] = []

    def step() -> None:
        if not made:
            made.append(torchao_adamw(params)())
        made[0].step()

    return Update(10, step)


def small_optimizers(shapes: Shapes, device: torch.device) -> dict[str, Update]:
    params = trainable(shapes, device)
    found = {
        "adamw 8bit": ours(params, "8bit"),
        "torch.optim.AdamW fused (nearest, no norm)": fused(params),
    }
    # On a CPU torchao compiles for longer than all the rest takes.
    return found | ({TORCHAO: torchao(params)} if device.type == "cuda" else {})


def wide_optimizers(shapes: Shapes, device: torch.device) -> dict[str, Update]:
    params = trainable(shapes, device)
    return {f"adamw {state}": ours(params, state) for state in ("fp32", "exact")}


# What takes turns, and the bytes a parameter that stand in memory then: weights and gradients 4;
# moments of 8 bits 2 and of torch's 4, torchao's 2 and its temporaries; fp32 moments 8 and 8, and a
# remainder of 2.
GROUPS: dict[str, tuple[Callable[[Shapes, torch.device], dict[str, Update]], float]] = {
    "teacher": (teachers, 4),
    "AdamW, 8-bit moments": (small_optimizers, 16),
    "AdamW, wider moments": (wide_optimizers, 22),
}


def cases(plan: Plan) -> list[Case]:
    found = [
        Case("ceilings", 0.1, lambda: {"ceilings": ceilings(plan.device, plan.full)}),
        Case("host", 0.3, partial(host, plan)),
    ]
    for name in GROUPS:
        found.append(Case(name, 2.0 if "8-bit" in name else 0.7, partial(group, name, plan)))
    return found


def group(name: str, plan: Plan) -> Result:
    build, bytes_per_parameter = GROUPS[name]
    shapes = shapes_that_fit(plan, bytes_per_parameter, memory_limit(plan))
    updates = build(shapes, plan.device)
    ceiling = copy_ceiling(plan.device, plan.full)
    works = {"plain copy": ceiling.work}
    works |= {name: Work(update.run) for name, update in updates.items()}
    found = take_turns(works, plan.device)
    bandwidth = ceiling.amount / found.pop("plain copy")["milliseconds"] * 1e3
    rows = []
    for name, row in found.items():
        row |= {"name": name, "parameters": count(shapes), "tensors": len(shapes)}
        if "milliseconds" in row:
            rate = count(shapes) * updates[name].bytes / row["milliseconds"] * 1e3
            row["gigabytes_per_second"] = rate / 1e9
            row["share_of_copy_bandwidth"] = rate / bandwidth
        rows.append(row)
    return {"rows": rows}


def host(plan: Plan) -> Result:
    """What the host needs for the 399 tensors of Qwen3-8B: tensors so small that the GPU needs
    nothing."""
    shapes: Shapes = [(256,)] * len(qwen3_8b(36 if plan.full else 1))
    updates = {
        name: update
        for build in (teachers, small_optimizers, wide_optimizers)
        for name, update in build(shapes, plan.device).items()
        if name in ("copy", "average") or name.startswith("adamw")
    }
    found = take_turns({name: Work(u.run) for name, u in updates.items()}, plan.device)
    rows = [{"name": name, "tensors": len(shapes), **row} for name, row in found.items()]
    return {"rows": rows}


def measure(progress: Callable[[str], None]) -> dict[str, Any]:
    """The CPU bench, by PyTorch's path."""
    plan = Plan(torch.device("cpu"), full=False)
    return cpu_result([row for name in GROUPS for row in group(name, plan)["rows"]], progress)


def test_parameters(benchmark: Any) -> None:
    benchmark.group = "parameters"
    benchmark.extra_info.update(
        benchmark.pedantic(measure, args=(lambda text: None,), rounds=1, iterations=1)
    )


if __name__ == "__main__":
    print(json.dumps(measure(lambda text: print(text, flush=True))))
