"""The distillation objective, forward and backward, against four bare products and against peers.

    python bench/bench_objective.py [rows ...]     (or make bench; the last line is JSON)

On a GPU the linear form at the shapes of Qwen3-8B (H 4096, V 151,936, bf16) for 1k to 16k rows, and
the logits form against the bandwidth of a copy. On a CPU 2,048 rows, H 256, V 32,000 in fp32, which
is slow enough to matter and small enough to wait for. All cases take turns in each round; medians.
Peers that are not installed, or do not run, are listed with the reason instead of a time. On a GPU
the result is also written to bench/results/<gpu>/objective.json.

The floor is the four products no implementation avoids: two projections and the gradients of hidden
states and head. Bytes of the logits form, an element of [N, V] in bf16: KL 10, JSD 14, top-k 12.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sodfast_kernels import distillation_loss, linear_distillation_loss
from torch import Tensor

ROUNDS = {"cuda": 5, "cpu": 3}
Case = Callable[[], object]


def seconds(case: Case, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        case()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    case()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(cases: dict[str, Case], device: torch.device) -> dict[str, dict[str, Any]]:
    """Medians and peak bytes above what was allocated before, or the reason there are none."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    found: dict[str, dict[str, Any]] = {name: {} for name in cases}
    for turn in range(ROUNDS[device.type] + 1):
        for name, case in cases.items():
            if "failed" in found[name]:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                taken = seconds(case, device)
            except Exception as reason:  # a peer's fault must not hide the others' times
                if name.startswith("ours"):
                    raise
                found[name]["failed"] = f"{type(reason).__name__}: {reason}"[:300]
                torch.cuda.empty_cache()
                continue
            if turn:  # the first turn compiles and allocates
                times[name].append(taken)
                if device.type == "cuda":
                    found[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    for name, taken in times.items():
        if taken:
            found[name]["milliseconds"] = 1e3 * median(taken)
    return found


def eager_divergence(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    log_s, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    kl = {"log_target": True, "reduction": "sum"}
    if alpha == 0:
        return F.kl_div(log_s, log_q, **kl) / len(student)
    if alpha == 1:
        return F.kl_div(log_q, log_s, **kl) / len(student)
    log_m = torch.logaddexp(log_s, log_q) - 0.6931471805599453
    return 0.5 * (F.kl_div(log_m, log_s, **kl) + F.kl_div(log_m, log_q, **kl)) / len(student)


def linear_cases(
    rows: int, hidden: int, vocabulary: int, alpha: float, device: torch.device
) -> dict[str, Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    state = torch.randn(rows, hidden, device=device, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, hidden, device=device, dtype=dtype).div_(hidden**0.5)
    head.requires_grad_()
    teacher = state.detach() + 0.02 * torch.randn_like(state)
    fixed = head.detach()
    d_logits = torch.zeros(rows, vocabulary, device=device, dtype=dtype)

    def four_products() -> None:
        state.detach() @ fixed.T
        teacher @ fixed.T
        d_logits @ fixed
        d_logits.T @ teacher

    def backward(loss: Callable[[], Tensor]) -> Case:
        def run() -> None:
            state.grad = head.grad = None
            loss().backward()

        return run

    def eager() -> Tensor:
        return eager_divergence(state @ head.T, teacher @ fixed.T, alpha)

    def ours(weight: Tensor, **given: Any) -> Case:
        return backward(
            lambda: (
                linear_distillation_loss(state, weight, teacher, fixed, alpha=alpha, **given).loss
            )
        )

    cases = {
        "four products": four_products,
        "ours": ours(head),
        "ours, top-20 + tail": ours(head, top_k=20),
        "ours, frozen head": ours(fixed),
        "eager": backward(eager),
    }
    if device.type == "cuda":
        cases["torch.compile"] = backward(torch.compile(eager))
        cases |= {name: backward(loss) for name, loss in peers(state, head, teacher, alpha).items()}
    return cases


def peers(state: Tensor, head: Tensor, teacher: Tensor, alpha: float) -> dict[str, Any]:
    fixed = head.detach()
    found: dict[str, Any] = {}
    if find_spec("trl"):

        def trl() -> Tensor:
            from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

            divergence, *_ = ChunkedDivergenceFunction.apply(
                state, head, None, teacher, fixed, None, alpha, 1.0
            )
            return divergence.mean()

        found["TRL chunked divergence"] = trl
    if find_spec("liger_kernel") and alpha == 0.5:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=0.5)
        chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
        labels = torch.zeros(len(state), dtype=torch.int64, device=state.device)
        found["Liger fused_linear_jsd"] = lambda: fused(state, head, teacher, fixed)
        found["Liger chunked_loss JSD"] = lambda: chunked(state, head, teacher, fixed, labels)
    if find_spec("fla") and alpha == 0:
        from fla.modules import FusedKLDivLoss

        kl = FusedKLDivLoss()
        found["fla fused KL"] = lambda: kl(state, teacher, head, fixed)
    return found


def logit_rows(rows: int, vocabulary: int, device: torch.device) -> list[dict[str, Any]]:
    """The logits form against a copy of the same tensors."""
    student = torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16)
    teacher = student + 0.02 * torch.randn_like(student)
    student.requires_grad_()
    target = torch.empty_like(teacher)

    def ours(**given: Any) -> Case:
        def run() -> None:
            student.grad = None
            distillation_loss(student, teacher, **given).loss.backward()

        return run

    bytes_per_element = {"ours, KL": 10, "ours, JSD": 14, "ours, JSD top-20": 12}
    found = take_turns(
        {
            "copy": lambda: target.copy_(teacher),
            "ours, KL": ours(alpha=0.0),
            "ours, JSD": ours(),
            "ours, JSD top-20": ours(top_k=20),
        },
        device,
    )
    copied = found.pop("copy")["milliseconds"]
    return [
        {
            "form": "logits",
            "name": name,
            "rows": rows,
            **row,
            "share_of_copy_bandwidth": bytes_per_element[name] / 4 * copied / row["milliseconds"],
        }
        for name, row in found.items()
    ]


def measure(progress: Callable[[str], None], rows: list[int] | None = None) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "cpu"
    hidden, vocabulary = (4096, 151_936) if gpu else (256, 32_000)
    table: list[dict[str, Any]] = []
    for count in rows or ([1024, 4096, 8192, 16384] if gpu else [2048]):
        for alpha in (0.0, 0.5) if gpu else (0.5,):
            found = take_turns(linear_cases(count, hidden, vocabulary, alpha, device), device)
            floor = found["four products"]["milliseconds"]
            for case, row in found.items():
                entry = {"form": "linear", "name": case, "rows": count, "alpha": alpha, **row}
                if "milliseconds" in row:
                    entry["times_the_floor"] = row["milliseconds"] / floor
                table.append(entry)
                progress(json.dumps(entry))
    if gpu:
        table += logit_rows(8192, vocabulary, device)
    result = {"device": name, "torch": torch.__version__, "cases": table}
    if gpu:
        folder = Path(__file__).parent / "results" / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "objective.json").write_text(json.dumps(result, indent=1))
    return result


@pytest.mark.benchmark(group="objective")
def test_objective(benchmark: Any) -> None:
    benchmark.extra_info.update(
        benchmark.pedantic(measure, args=(lambda text: None,), rounds=1, iterations=1)
    )


if __name__ == "__main__":
    counts = [int(argument) for argument in sys.argv[1:]]
    print(json.dumps(measure(lambda text: print(text, flush=True), counts)))
