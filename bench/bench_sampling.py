"""One token a row from logits, against PyTorch and flashinfer.

    python bench/bench_sampling.py     (or make bench; on a CPU; the last line is JSON)
    python bench/gpu_suite.py sampling

On a GPU batches of 64 and 128 rows of Qwen3's 151,936 logits, in bf16 and fp32. Each case is a CUDA
graph of CALLS calls, each on logits of its own, so that they come from memory and not from the L2
cache; the floor is reading them once, as fast as a copy reads. On a CPU the lab's decode step, 64
rows of 18 logits. All cases take turns in each round; medians.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sodfast_kernels import gumbel_noise, sample_tokens
from suite_peers import flashinfer, flashinfer_top_p
from suite_record import Case, Plan, Result, cpu_result
from suite_state import likely_logits
from suite_timing import Run, Work, ceilings, take_turns
from torch import Tensor

CALLS = {"cuda": 20, "cpu": 200}
NUCLEUS = {"temperature": 0.6, "top_p": 0.95}
LAB_VOCABULARY = 18


def multinomial(probs_BV: Tensor) -> Tensor:
    """torch.multinomial of one token, without its check of the input, which waits for the GPU."""
    return (probs_BV / torch.empty_like(probs_BV).exponential_()).argmax(-1, keepdim=True)


def plain(logits_BV: Tensor) -> Tensor:
    """No log-prob, no entropy, and a draw that depends on the batch."""
    return multinomial(logits_BV.float().softmax(-1))


def sort_top_p(logits_BV: Tensor) -> Tensor:
    values, order = (logits_BV.float() / 0.6).sort(dim=-1, descending=True)
    probs = values.softmax(-1)
    probs = probs.where(probs.cumsum(-1) - probs < 0.95, 0.0)
    return order.gather(1, multinomial(probs))


def calls(rows: int, device: torch.device) -> dict[str, Callable[[Tensor], object]]:
    position = torch.zeros(rows, dtype=torch.int64, device=device)
    key = {"seed": 1, "step": 2, "sample": torch.arange(rows, device=device), "position": position}
    found: dict[str, Callable[[Tensor], object]] = {
        "ours": lambda z: sample_tokens(z, **key),
        "ours, top-p": lambda z: sample_tokens(z, **key, **NUCLEUS),
        "ours, top-k and top-p": lambda z: sample_tokens(z, **key, **NUCLEUS, top_k=20),
        "ours, greedy": lambda z: sample_tokens(z, **key, temperature=0),
        "softmax and multinomial": plain,
        "sort, top-p": sort_top_p,
    }
    if device.type == "cpu":
        noise = gumbel_noise(**key, vocabulary=LAB_VOCABULARY)
        found["ours, noise ahead"] = lambda z: sample_tokens(z, **key, noise=noise)
        found["ours, top-p, noise ahead"] = lambda z: sample_tokens(
            z, **key, **NUCLEUS, noise=noise
        )
    else:
        found["flashinfer: sampling"] = lambda z: flashinfer(z)()
        found["flashinfer: top-p"] = lambda z: flashinfer_top_p(z)()
    return found


def repeat(call: Callable[[Tensor], object], inputs: list[Tensor]) -> Run:
    """The call on each input; on a GPU captured when first run, then replayed."""

    def run() -> None:
        for z in inputs:
            call(z)

    if inputs[0].device.type != "cuda":
        return run
    captured: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not captured:
            run()  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            captured.append(graph)
        captured[0].replay()

    return replay


def cases(plan: Plan) -> list[Case]:
    found = [Case("ceilings", 0.1, lambda: {"ceilings": ceilings(plan.device, plan.full)})]
    for rows in (64, 128) if plan.full else (8,):
        for dtype in (torch.bfloat16, torch.float32):
            run = partial(measure_rows, rows, dtype, plan)
            found.append(Case(f"{rows} rows, {str(dtype)[6:]}", 0.7, run))
    return found


def measure_rows(rows: int, dtype: torch.dtype, plan: Plan) -> Result:
    """Milliseconds a call; on a GPU also bandwidth as a share of a copy's."""
    device = plan.device
    gpu = device.type == "cuda"
    vocabulary = 151_936 if gpu else LAB_VOCABULARY
    count = CALLS[device.type]
    different = [likely_logits(rows, vocabulary, dtype, device) for _ in range(count if gpu else 1)]
    source = torch.stack(different)
    inputs = [*source] * (count // len(source))
    works = {name: Work(repeat(call, inputs)) for name, call in calls(rows, device).items()}
    target = torch.empty_like(source)  # as large, so that it does not stay in the cache either
    works["copy"] = Work(lambda: target.copy_(source))
    found = take_turns(works, device)
    copied = found.pop("copy")["milliseconds"] / count
    table = []
    for name, row in found.items():
        row |= {"name": name, "rows": rows, "dtype": str(dtype)[6:]}
        if "milliseconds" in row:
            row["milliseconds"] /= count
            if gpu:  # a copy moves twice what is read here
                row["share_of_copy_bandwidth"] = copied / 2 / row["milliseconds"]
        table.append(row)
    return {"rows": table}


def measure(progress: Callable[[str], None]) -> dict[str, Any]:
    """The CPU bench: the lab's decode step."""
    plan = Plan(torch.device("cpu"), full=False)
    return cpu_result(measure_rows(64, torch.float32, plan)["rows"], progress)


def test_sampling(benchmark: Any) -> None:
    benchmark.group = "sampling"
    benchmark.extra_info.update(
        benchmark.pedantic(measure, args=(lambda text: None,), rounds=1, iterations=1)
    )


if __name__ == "__main__":
    print(json.dumps(measure(lambda text: print(text, flush=True))))
