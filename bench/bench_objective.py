"""The distillation objective, forward and backward, against four bare products and against peers.

    python bench/bench_objective.py     (or make bench; on a CPU; the last line is JSON)
    python bench/gpu_suite.py objective

On a GPU the shapes of Qwen3-8B (H 4096, V 151,936, bf16) for 1k to 16k rows; on a CPU 2,048 rows,
H 256, V 32,000 in fp32, which is slow enough to matter and small enough to wait for. All cases take
turns in each round; medians. A peer that is absent or fails has the reason in place of a time.

The floor is the four products that no implementation avoids: two projections, and the gradients of
hidden states and head, each as one product on random data.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sodfast_kernels import linear_distillation_loss
from suite_gradients import Size
from suite_peers import Sides, objective_peers
from suite_record import Case, Plan, Result, cpu_result
from suite_timing import Work, ceilings, product_ceiling, take_turns
from torch import Tensor

KINDS = {"KL": 0.0, "JSD": 0.5}
CPU_SIZE, TINY = Size(2048, 256, 32_000), Size(24, 16, 203)
# Eager PyTorch needs dozens of gigabytes at 8,192 rows; beyond it does not fit.
EAGER_ROWS = 8192


def cases(plan: Plan) -> list[Case]:
    """Those that targets are about come first."""
    rows = (8192, 4096, 1024, 16_384) if plan.full else (TINY.rows,)
    found = [Case("ceilings", 0.1, lambda: {"ceilings": ceilings(plan.device, plan.full)})]
    for count in rows:
        size = Size(count, 4096, 151_936) if plan.full else TINY
        minutes = 1.3 if count == EAGER_ROWS else 0.8
        for kind, alpha in KINDS.items():
            run = partial(measure_rows, size, alpha, plan)
            found.append(Case(f"{count} rows, {kind}", minutes, run))
    return found


def measure_rows(size: Size, alpha: float, plan: Plan) -> Result:
    """Rows with `times_the_floor`, and the rate at which four products in that time would be done
    as a share of the product that takes turns with them."""
    ceiling = product_ceiling(plan.device, plan.full)
    found = take_turns({"8192³": ceiling.work, **works(size, alpha, plan)}, plan.device)
    rate = ceiling.amount / found.pop("8192³")["milliseconds"]
    floor = found["four products"]["milliseconds"]
    flops = 4 * 2 * size.rows * size.hidden * size.vocabulary
    rows = []
    for name, row in found.items():
        if "milliseconds" in row:
            row["times_the_floor"] = row["milliseconds"] / floor
            row["share_of_product_rate"] = flops / row["milliseconds"] / rate
        rows.append({"name": name, "rows": size.rows, "alpha": alpha, **row})
    return {"size": size, "flops_per_second": rate * 1e3, "rows": rows}


def works(size: Size, alpha: float, plan: Plan) -> dict[str, Work]:
    device = plan.device
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    state = torch.randn(size.rows, size.hidden, device=device).to(dtype).requires_grad_()
    head = torch.randn(size.vocabulary, size.hidden, device=device).div_(size.hidden**0.5)
    head = head.to(dtype).requires_grad_()
    teacher = state.detach() + 0.02 * torch.randn_like(state)
    sides = Sides(state, head, teacher, head.detach())

    def clear() -> None:
        state.grad = head.grad = None

    def backward(loss: Callable[[], Tensor]) -> Work:
        return Work(lambda: loss().backward(), clear)

    def ours(head: Tensor, **given: Any) -> Work:
        given_sides = sides._replace(head=head)
        return backward(lambda: linear_distillation_loss(*given_sides, alpha=alpha, **given).loss)

    frozen = head.detach()
    # As in training, where the sampled tokens' log-probs are wanted; the JSD reads its rows once
    # less for knowing them.
    token = torch.randint(size.vocabulary, (size.rows,), device=device)
    found = {
        **products(sides),
        "ours": ours(head, target_ids=token),
        "ours, no sampled tokens": ours(head),
        "ours, top-20 + tail": ours(head, target_ids=token, top_k=20),
        "ours, top-100 + tail": ours(head, target_ids=token, top_k=100),
        "ours, frozen head": ours(frozen, target_ids=token),
    }
    if size.rows <= EAGER_ROWS:
        found["eager"] = backward(partial(eager_divergence, sides, alpha))
    if gpu and size.rows == EAGER_ROWS:  # to compile is slow: once for each α
        compiled = torch.compile(eager_divergence)
        found["torch.compile"] = backward(lambda: compiled(sides, alpha))
    if gpu:
        for peer in objective_peers(alpha):
            loss = partial(peer_loss, peer, sides, alpha)
            found[peer.name] = backward(loss)
    return found


def peer_loss(peer: Any, sides: Sides, alpha: float) -> Tensor:
    loss: Tensor = peer.loss(peer.call(sides, alpha)())
    return loss


def products(sides: Sides) -> dict[str, Work]:
    """The floors: all four products, and the three that a frozen head leaves."""
    state, head, teacher, teacher_head = (tensor.detach() for tensor in sides)
    d_logits = state.new_empty(len(state), len(head)).normal_()

    def three() -> None:
        state @ head.T
        teacher @ teacher_head.T
        d_logits @ head

    def four() -> None:
        three()
        d_logits.T @ state

    return {"four products": Work(four), "three products": Work(three)}


def eager_divergence(sides: Sides, alpha: float) -> Tensor:
    """The full logits in memory, log-softmax in fp32."""
    log_s = (sides.state @ sides.head.T).float().log_softmax(-1)
    log_q = (sides.teacher @ sides.teacher_head.T).float().log_softmax(-1)
    given = {"log_target": True, "reduction": "sum"}
    if alpha == 0:
        return F.kl_div(log_s, log_q, **given) / len(log_s)
    log_m = torch.logaddexp(log_s, log_q) - 0.6931471805599453
    both = F.kl_div(log_m, log_s, **given) + F.kl_div(log_m, log_q, **given)
    return 0.5 * both / len(log_s)


def measure(progress: Callable[[str], None]) -> dict[str, Any]:
    """The CPU bench, by PyTorch's path."""
    plan = Plan(torch.device("cpu"), full=False)
    return cpu_result(measure_rows(CPU_SIZE, 0.5, plan)["rows"], progress)


def test_objective(benchmark: Any) -> None:
    benchmark.group = "objective"
    benchmark.extra_info.update(
        benchmark.pedantic(measure, args=(lambda text: None,), rounds=1, iterations=1)
    )


if __name__ == "__main__":
    print(json.dumps(measure(lambda text: print(text, flush=True))))
