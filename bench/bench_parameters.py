"""Teacher copy, average and AdamW against the bandwidth of a plain copy, and against peers.

    python bench/bench_parameters.py      (or make bench; the last line is JSON)

On a GPU over the tensors of Qwen3-8B, as many layers as fit; on a CPU over 4 M parameters, which
shows only that nothing has become slow. All cases take turns in each round; medians are reported.
On a GPU the result is also written to bench/results/<gpu>/parameters.json.
"""

import json
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from sodfast_kernels import AdamW, copy_teacher_, ema_update_
from torch import Tensor, nn

ROUNDS = 7
MIB = 1 << 20


class Case(NamedTuple):
    name: str
    bytes_per_parameter: int
    run: Callable[[], object]


def qwen3_8b(layers: int) -> list[tuple[int, ...]]:
    hidden, inner, keys, vocabulary = 4096, 12288, 1024, 151936
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    layer += [(hidden,), (hidden,), (128,), (128,)]
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


def shapes_that_fit(device: torch.device, bytes_per_parameter: int) -> list[tuple[int, ...]]:
    if device.type == "cpu":
        return [(1024, 1024), (1024,)] * 4
    free, _ = torch.cuda.mem_get_info(device)
    for layers in range(36, 0, -1):
        shapes = qwen3_8b(layers)
        if count(shapes) * bytes_per_parameter < 0.8 * free:
            return shapes
    raise SystemExit(f"{free / 2**30:.0f} GiB are too few for one layer of Qwen3-8B")


def count(shapes: list[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def make(shapes: list[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    return [0.02 * torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]


def copy_and_average(shapes: list[tuple[int, ...]], device: torch.device) -> list[Case]:
    teacher, student = make(shapes, device), make(shapes, device)
    return [
        Case("copy", 6, lambda: copy_teacher_(teacher, student)),
        Case("torch._foreach_copy_ (no norm)", 4, lambda: torch._foreach_copy_(teacher, student)),
        Case("average", 6, lambda: ema_update_(teacher, student, 0.04, step=1)),
        Case(
            "torch._foreach_lerp_ (nearest, no norm)",
            6,
            lambda: torch._foreach_lerp_(teacher, student, 0.04),
        ),
    ]


def optimizers(shapes: list[tuple[int, ...]], device: torch.device) -> Iterator[list[Case]]:
    """One list for each optimizer, so that only one state exists at a time."""
    params = [nn.Parameter(value) for value in make(shapes, device)]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    # Weight and moments as in adamw.py, and the pass over the gradients for their norm.
    for state, traffic in (("8bit", 12), ("fp32", 24), ("exact", 28)):
        ours = AdamW(params, 1e-5, state=state)
        yield [Case(f"adamw {state}", traffic, lambda ours=ours: ours.step(clip_norm=1.0))]
    fused = torch.optim.AdamW(params, 1e-5, fused=True)
    yield [Case("torch.optim.AdamW fused (nearest, no norm)", 14, fused.step)]
    if find_spec("torchao") is not None:
        from torchao.optim import AdamW8bit

        peer = AdamW8bit(params, 1e-5, bf16_stochastic_round=True)
        yield [Case("torchao AdamW8bit (no norm)", 10, peer.step)]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def compare(
    cases: list[Case], parameters: int, device: torch.device, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Medians of the cases and of a plain copy, taking turns."""
    size = (16 if device.type == "cpu" else 2048) * MIB
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    everything = [Case("plain copy", 0, lambda: target.copy_(source)), *cases]
    times: dict[str, list[float]] = {case.name: [] for case in everything}
    for turn in range(ROUNDS + 1):
        for case in everything:
            taken = seconds(case.run, device)
            if turn:  # the first turn compiles and allocates
                times[case.name].append(taken)
    bandwidth = 2 * size / median(times["plain copy"])
    rows = []
    for case in cases:
        taken = median(times[case.name])
        rate = parameters * case.bytes_per_parameter / taken
        rows.append(
            {
                "name": case.name,
                "parameters": parameters,
                "milliseconds": 1e3 * taken,
                "gigabytes_per_second": rate / 1e9,
                "share_of_copy_bandwidth": rate / bandwidth,
            }
        )
        progress(f"{case.name:45} {1e3 * taken:9.2f} ms  {rate / bandwidth:6.1%} of a copy's rate")
    return rows


def measure(progress: Callable[[str], None]) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    shapes = shapes_that_fit(device, 4)
    rows = compare(copy_and_average(shapes, device), count(shapes), device, progress)
    # Weights and gradients 4, the largest state 10, torchao's temporaries.
    shapes = shapes_that_fit(device, 16)
    for cases in optimizers(shapes, device):
        rows += compare(cases, count(shapes), device, progress)
        cases.clear()
    result = {"device": name, "torch": torch.__version__, "cases": rows}
    if device.type == "cuda":
        folder = Path(__file__).parent / "results" / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "parameters.json").write_text(json.dumps(result, indent=1))
    return result


@pytest.mark.benchmark(group="parameters")
def test_parameters(benchmark: Any) -> None:
    benchmark.extra_info.update(
        benchmark.pedantic(measure, args=(lambda text: None,), rounds=1, iterations=1)
    )


if __name__ == "__main__":
    print(json.dumps(measure(lambda text: print(text, flush=True))))
