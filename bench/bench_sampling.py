"""One token a row from logits, against PyTorch and flashinfer.

    python bench/bench_sampling.py     (or make bench; the last line is JSON)

On a GPU batches of 64 and 128 rows of Qwen3's 151,936 logits, in bf16 and fp32. Each case is a CUDA
graph of CALLS calls, each on logits of its own, so that they come from memory and not from the L2
cache; the floor is reading them once, as fast as a copy reads. On a CPU the lab's decode step, 64
rows of 18 logits. All cases take turns in each round; medians. Peers that do not run are listed
with the reason. On a GPU the result is also written to bench/results/<gpu>/sampling.json.
"""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from sodfast_kernels import gumbel_noise, sample_tokens
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from bench_objective import Case, take_turns

CALLS = {"cuda": 20, "cpu": 200}
NUCLEUS = {"temperature": 0.6, "top_p": 0.95}


def logits(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A bulk, and 20 tokens a row far above it, as a language model has."""
    bulk = 2.5 * torch.randn(rows, vocabulary, device=device)
    likely = torch.randint(vocabulary, (rows, min(20, vocabulary)), device=device)
    return bulk.scatter(1, likely, 10 + 3 * torch.randn(likely.shape, device=device)).to(dtype)


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


def calls(rows: int) -> dict[str, Callable[[Tensor], object]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        noise = gumbel_noise(**key, vocabulary=18)
        found["ours, noise ahead"] = lambda z: sample_tokens(z, **key, noise=noise)
        found["ours, top-p, noise ahead"] = lambda z: sample_tokens(
            z, **key, **NUCLEUS, noise=noise
        )
    elif find_spec("flashinfer"):
        from flashinfer.sampling import sampling_from_probs, top_p_sampling_from_probs

        found["flashinfer"] = lambda z: sampling_from_probs(z.float().softmax(-1))
        found["flashinfer, top-p"] = lambda z: top_p_sampling_from_probs(
            (z.float() / 0.6).softmax(-1), 0.95
        )
    return found


def repeat(call: Callable[[Tensor], object], inputs: list[Tensor]) -> Case:
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


def measure(progress: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds a call; on a GPU also bandwidth as a share of a copy's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "cpu"
    count = CALLS[device.type]
    table: list[dict[str, Any]] = []
    for rows in (64, 128) if gpu else (64,):
        for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.float32,):
            vocabulary = 151_936 if gpu else 18
            inputs = [logits(rows, vocabulary, dtype, device) for _ in range(count if gpu else 1)]
            inputs *= count // len(inputs)
            cases = {name: repeat(call, inputs) for name, call in calls(rows).items()}
            if gpu:
                target = torch.empty_like(inputs[0])
                cases["copy"] = repeat(target.copy_, inputs)
            found = take_turns(cases, device)
            for case, row in found.items():
                entry = {"name": case, "rows": rows, "dtype": str(dtype)[6:], **row}
                if "milliseconds" in row:
                    entry["milliseconds"] /= count
                    if gpu:  # a copy moves twice what is read here
                        copied = found["copy"]["milliseconds"]
                        entry["share_of_copy_bandwidth"] = copied / 2 / row["milliseconds"]
                table.append(entry)
                progress(json.dumps(entry))
    result = {"device": name, "torch": torch.__version__, "cases": table}
    if gpu:
        folder = Path(__file__).parent / "results" / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sampling.json").write_text(json.dumps(result, indent=1))
    return result


@pytest.mark.benchmark(group="sampling")
def test_sampling(benchmark: Any) -> None:
    benchmark.extra_info.update(
        benchmark.pedantic(measure, args=(lambda text: None,), rounds=1, iterations=1)
    )


if __name__ == "__main__":
    print(json.dumps(measure(lambda text: print(text, flush=True))))
