"""Part `correctness`: the compiled kernels against fp64, and what only a GPU can show.

The linear form at every α and k, at Qwen3-8B's head with more than 2³¹ logits, in several slabs, in
fp16 and fp32, with a shared head and a head that FSDP has gathered; the logits form; NaN; on two
streams, on another device, in a CUDA graph. Then parameters, sampling (suite_state.py) and the
accuracy beside the peers' (suite_accuracy.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import suite_accuracy
import suite_state
import torch
import torch.distributed as dist
from sodfast_kernels import (
    distillation_loss,
    linear_distillation_loss,
    linear_scratch_bytes,
    reference,
)
from suite_gradients import (
    UPSTREAM,
    Found,
    Inputs,
    Size,
    compare,
    defined,
    differing,
    gradients,
    make_inputs,
    relative_error,
    statistics_of,
)
from suite_record import Case, Plan, Result, Skipped, check, worst
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = Size(77, 256, 5003)
# 16,384 · 151,936 logits are more than 2³¹; two slabs of 8,192 rows.
LARGE = Size(16_384, 4096, 151_936)
MEDIUM = Size(2048, 4096, 151_936)
TINY = Size(21, 16, 1203)
TINIER = Size(3, 8, 67)

ours = partial(linear_distillation_loss, backend="triton")


def cases(plan: Plan) -> list[Case]:
    return [*objective_cases(plan), *suite_accuracy.cases(plan), *suite_state.cases(plan)]


def objective_cases(plan: Plan) -> list[Case]:
    device, full = plan.device, plan.full
    small, large, medium = (SMALL, LARGE, MEDIUM) if full else (TINIER, TINY, TINY)
    # What four slabs of the medium size take, and a few of the tiny one.
    scratch = 3_300_000_000 if full else 150_000
    k = (20, 100, 1024) if full else (4, 30, 60)

    def linear(size: Size, dtype: torch.dtype, **settings: Any) -> Callable[[], Result]:
        return partial(against_fp64, size, dtype, device, **settings)

    found = [
        Case(f"every k and soft cap, α={alpha}", 0.3, partial(grid, small, device, alpha, k))
        for alpha in (0.0, 0.3, 0.5, 1.0)
    ]
    found += [
        Case("16,384 rows, KL", 0.3, linear(large, BF16, alpha=0.0)),
        Case("16,384 rows, JSD", 0.3, linear(large, BF16, alpha=0.5)),
        Case("16,384 rows, top-100 + tail", 0.4, linear(large, BF16, alpha=0.5, top_k=k[1])),
        Case("reverse KL", 0.1, linear(medium, BF16, alpha=1.0)),
        Case("top-20 + tail, KL", 0.1, linear(medium, BF16, alpha=0.0, top_k=k[0])),
        Case("top-1024 + tail", 0.1, linear(medium, BF16, alpha=0.5, top_k=k[2])),
        Case("several slabs", 0.1, partial(several_slabs, medium, device, scratch)),
        Case("fp16", 0.1, linear(medium, FP16, alpha=0.5)),
        Case("fp32", 0.1, linear(medium, FP32, alpha=0.0)),
        Case("logits form", 0.2, partial(logits_form, large, device)),
        Case("shared head", 0.1, partial(shared_head, medium, device)),
        Case("head gathered by FSDP", 0.2, partial(fsdp_head, medium, device)),
        Case("equal models", 0.1, partial(equal_models, medium, device)),
        Case("NaN comes out", 0.1, partial(nan_comes_out, small, device)),
        Case("two streams", 0.1, partial(two_streams, medium, device)),
        Case("another device", 0.1, partial(another_device, small, device)),
        Case("CUDA graph", 0.1, partial(cuda_graph, medium, device)),
    ]
    return found


def against_fp64(
    size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0, **settings: Any
) -> Result:
    inputs = make_inputs(size, dtype, device, seed)
    found = gradients(ours, inputs, **settings)
    return {"size": size, "checks": judged(inputs, found, dtype, **settings)}


def several_slabs(size: Size, device: torch.device, scratch: int) -> Result:
    """Head gradients summed over slabs, which `max_scratch_bytes` asks for."""
    inputs = make_inputs(size, BF16, device)
    found = gradients(ours, inputs, alpha=0.5, max_scratch_bytes=scratch)
    # With room for all rows there would be one slab.
    whole = linear_scratch_bytes(*inputs[:4], backend="triton")
    checks = [check("scratch of one slab over what there is", whole / scratch, 1.01, at_most=False)]
    return {"size": size, "checks": checks + judged(inputs, found, BF16, alpha=0.5)}


def judged(inputs: Inputs, found: Found, dtype: torch.dtype, **settings: Any) -> list[Any]:
    exact, plain = (defined(inputs, compute, **settings) for compute in (torch.float64, FP32))
    return compare(found, exact, plain, dtype, ties=settings.get("top_k") is not None)


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
            checks.append(check(name, worst(row["value"] for row in rows), 0.0))
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


def shared_head(size: Size, device: torch.device) -> Result:
    """One tensor is the head of both sides: the gradient is the student's side's alone."""
    inputs = make_inputs(size, BF16, device)
    inputs = inputs._replace(teacher_head=inputs.head)
    found = gradients(own_head_as_teachers, inputs, alpha=0.5)
    return {"size": size, "checks": judged(inputs, found, BF16, alpha=0.5)}


def own_head_as_teachers(
    state: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, **terms: Any
) -> Any:
    return ours(state, head, teacher, head, **terms)


def fsdp_head(size: Size, device: torch.device) -> Result:
    """The head is a parameter that FSDP has gathered, as in training over several ranks; here one
    rank is all there is."""
    inputs = make_inputs(size, BF16, device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = nn.Linear(size.hidden, size.vocabulary, bias=False, device=device, dtype=BF16)
        module.weight.data.copy_(inputs.head)
        fully_shard(module, mesh=init_device_mesh(device.type, (1,)))
        module.unshard()
        state = inputs.state.detach().requires_grad_()
        output = ours(state, module.weight, *inputs[2:4], alpha=0.5, **inputs.terms)
        output.loss.backward(torch.full_like(output.loss, UPSTREAM))
        assert state.grad is not None and module.weight.grad is not None
        found = Found(state.grad, module.weight.grad.clone(), statistics_of(output))
    finally:
        dist.destroy_process_group()
    return {"size": size, "checks": judged(inputs, found, BF16, alpha=0.5)}


def equal_models(size: Size, device: torch.device) -> Result:
    """Bit-equal sides: no divergence and no gradient, exactly."""
    inputs = make_inputs(size, BF16, device)
    terms = {"distill_weight": inputs.terms["distill_weight"]}
    inputs = inputs._replace(teacher=inputs.state, terms=terms)
    checks = []
    for alpha in (0.0, 0.5, 1.0):
        state, head = (tensor.detach().requires_grad_() for tensor in inputs[:2])
        output = ours(state, head, *inputs[2:4], alpha=alpha, **terms)
        tensors = (*torch.autograd.grad(output.loss, (state, head)), output.divergence)
        # NaN is not 0, either.
        other = sum(int((tensor != 0).sum()) for tensor in tensors)
        checks.append(check(f"α={alpha}: numbers that are not 0", other, 0))
    return {"size": size, "checks": checks}


def nan_comes_out(size: Size, device: torch.device) -> Result:
    """A row of NaN has NaN for a gradient, its neighbours do not; without a weight it has none."""
    inputs = make_inputs(size, BF16, device)
    state = inputs.state.clone()
    state[2, 1] = math.nan
    weight = torch.ones(size.rows, device=device)
    checks = []
    for alpha, top_k in ((0.0, None), (0.5, None), (0.5, 4)):
        name = f"α={alpha}, k={top_k}: "
        for factor in (1.0, 0.0):
            weight[2] = factor
            leaf = state.detach().requires_grad_()
            loss = ours(leaf, *inputs[1:4], alpha=alpha, top_k=top_k, distill_weight=weight).loss
            (d_state,) = torch.autograd.grad(loss, (leaf,))
            rows = d_state.isnan().any(1)
            expected = torch.zeros_like(rows)
            expected[2] = factor != 0
            wrong = float((rows != expected).sum())
            checks.append(check(f"{name}weight {factor}: wrong rows", wrong, 0))
    return {"size": size, "checks": checks}


def two_streams(size: Size, device: torch.device) -> Result:
    """Two calls at once, each on a stream of its own, give what each gives alone."""
    if device.type != "cuda":
        raise Skipped("needs a GPU")
    both = [make_inputs(size, BF16, device, seed) for seed in (0, 1)]
    alone = [gradients(ours, inputs, alpha=0.5) for inputs in both]
    streams = [torch.cuda.Stream(device) for _ in both]
    together: list[list[Found]] = [[], []]
    torch.cuda.synchronize(device)
    for _ in range(3):
        for number, (stream, inputs) in enumerate(zip(streams, both, strict=True)):
            with torch.cuda.stream(stream):
                together[number].append(gradients(ours, inputs, alpha=0.5))
    torch.cuda.synchronize(device)
    other = worst(
        differing(one, found) for one, turns in zip(alone, together, strict=True) for found in turns
    )
    return {"size": size, "checks": [check("share of tensors that differ", other, 0)]}


def another_device(size: Size, device: torch.device) -> Result:
    """Tensors on cuda:1 while cuda:0 is the current device."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    inputs = make_inputs(size, BF16, device)
    expected = gradients(ours, inputs, alpha=0.5)
    terms = {name: term.to("cuda:1") for name, term in inputs.terms.items()}
    moved = Inputs(*(tensor.to("cuda:1") for tensor in inputs[:4]), terms)
    found = gradients(ours, moved, alpha=0.5)
    back = Found(
        found.d_state.to(device),
        found.d_head.to(device),
        {name: value.to(device) for name, value in found.statistics.items()},
    )
    return {
        "size": size,
        "checks": [check("share of tensors that differ", differing(expected, back), 0)],
    }


def cuda_graph(size: Size, device: torch.device) -> Result:
    """Forward and gradient captured, then replayed on other numbers: those of a plain call."""
    if device.type != "cuda":
        raise Skipped("needs a GPU")
    inputs, other = (make_inputs(size, BF16, device, seed) for seed in (0, 1))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        gradients(ours, inputs, alpha=0.5)  # compiles, and makes cuBLAS's workspace
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(ours, inputs, alpha=0.5)
    pairs: list[tuple[Tensor, Tensor]] = list(zip(inputs[:4], other[:4], strict=True))
    pairs += [(inputs.terms[name], other.terms[name]) for name in inputs.terms]
    for mine, new in pairs:
        mine.copy_(new)
    graph.replay()
    expected = gradients(ours, other, alpha=0.5)
    torch.cuda.synchronize(device)
    differ = differing(captured, expected)
    return {"size": size, "checks": [check("share of tensors that differ", differ, 0)]}
