"""Part `correctness`, of what may surround a call of the linear form: a shared or frozen head, one
that FSDP has gathered, equal models, NaN, two streams, another device, a CUDA graph.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from sodfast_kernels import DistillationOutput, linear_distillation_loss
from suite_gradients import (
    FLOORS,
    UPSTREAM,
    Found,
    Inputs,
    Size,
    defined,
    differing,
    gradients,
    judged,
    make_inputs,
    relative_error,
    statistics_of,
)
from suite_record import Case, Result, Skipped, check, worst
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

BF16 = torch.bfloat16

ours = partial(linear_distillation_loss, backend="triton")


def cases(small: Size, medium: Size, device: torch.device) -> list[Case]:
    return [
        Case("shared head", 0.1, partial(shared_head, medium, device)),
        Case("frozen head", 0.1, partial(frozen_head, medium, device)),
        Case("a loss for each row", 0.1, partial(loss_of_rows, medium, device)),
        Case("head gathered by FSDP", 0.2, partial(fsdp_head, medium, device)),
        Case("equal models", 0.1, partial(equal_models, medium, device)),
        Case("NaN comes out", 0.1, partial(nan_comes_out, small, device)),
        Case("two streams", 0.1, partial(two_streams, medium, device)),
        Case("another device", 0.1, partial(another_device, small, device)),
        Case("CUDA graph", 0.1, partial(cuda_graph, medium, device)),
    ]


def shared_head(size: Size, device: torch.device) -> Result:
    """One tensor is the head of both sides: the gradient is the student's side's alone."""
    inputs = make_inputs(size, BF16, device)
    inputs = inputs._replace(teacher_head=inputs.head)
    found = gradients(own_head_as_teachers, inputs, alpha=0.5)
    return {"size": size, "checks": judged(inputs, found, BF16, alpha=0.5)}


def own_head_as_teachers(
    state: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, **terms: Any
) -> DistillationOutput:
    return ours(state, head, teacher, head, **terms)


def frozen_head(size: Size, device: torch.device) -> Result:
    """A head without gradient has other slabs, and the hidden states the same gradient."""
    inputs = make_inputs(size, BF16, device)
    state = inputs.state.detach().requires_grad_()
    loss = ours(state, *inputs[1:4], alpha=0.5, **inputs.terms).loss
    (d_state,) = torch.autograd.grad(loss, (state,), torch.full_like(loss, UPSTREAM))
    exact, plain = (
        defined(inputs, dtype, alpha=0.5).d_state for dtype in (torch.float64, torch.float32)
    )
    limit = 2 * relative_error(plain.to(BF16), exact) + FLOORS[BF16]
    checks = [check("d_state: error", relative_error(d_state, exact), limit)]
    return {"size": size, "checks": checks}


def loss_of_rows(size: Size, device: torch.device) -> Result:
    """reduction="none", whose backward pass computes everything a second time."""
    inputs = make_inputs(size, BF16, device)
    found = gradients(summed_rows, inputs, alpha=0.5)
    return {"size": size, "checks": judged(inputs, found, BF16, alpha=0.5)}


def summed_rows(*sides: Tensor, **terms: Any) -> DistillationOutput:
    output = ours(*sides, **terms, reduction="none")
    return output._replace(loss=output.loss.sum())


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
