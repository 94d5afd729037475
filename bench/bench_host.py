"""What a call of the kernels costs the host, apart from the arithmetic.

    python bench/bench_host.py [--against FOLDER]      (the last line is JSON)

Shapes are so small that a call is nearly all Python. On the torch path whole calls are timed,
forward and backward; on the Triton path nothing is launched: a launch returns at once, so what is
timed is everything before it (checks, buffers, packing of arguments), on the CPU, and the packing
that Triton does itself is not.

`--against` compares with another checkout's kernels: FOLDER is its source root (`.../kernels`).
Rounds of the two take turns in processes of their own, so that a busy machine is equally busy for
both. Microseconds are the least of all rounds, as other work on the machine can only add to them.

"Of 399 tensors" means as many small bf16 tensors as Qwen3-8B has parameters, on the Triton path.
AdamW meets new gradients at every step there, as after `zero_grad(set_to_none=True)`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple

ROUNDS = 7
CALLS = 200
TENSORS_8B = 399
KERNELS = Path(__file__).parents[1] / "kernels"


class Case(NamedTuple):
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None  # before each call, not timed


def small_cases() -> dict[str, Case]:
    import torch
    from sodfast_kernels import AdamW, ema_update_, linear_distillation_loss, sample_tokens
    from torch import nn

    rows, hidden, vocabulary = 4, 8, 32
    state = torch.randn(rows, hidden, requires_grad=True)
    head = torch.randn(vocabulary, hidden, requires_grad=True)
    teacher, teacher_head = torch.randn(rows, hidden), torch.randn(vocabulary, hidden)
    terms: dict[str, Any] = {
        "distill_weight": torch.full((rows,), 0.25),
        "target_ids": torch.arange(rows),
        "advantage": torch.ones(rows),
        "policy_weight": torch.full((rows,), 0.25),
        "old_logprob": torch.full((rows,), -3.0),
        "ratio_cap": 2.0,
    }
    params = [nn.Parameter(torch.randn(64)) for _ in range(8)]
    for param in params:
        param.grad = torch.randn(64)
    teacher_params = [param.detach().clone() for param in params]
    key: dict[str, Any] = {"sample": torch.arange(rows), "position": torch.arange(rows)}
    logits = torch.randn(rows, vocabulary)

    def loss(backend: str, top_k: int | None) -> Callable[[], object]:
        def call() -> None:
            state.grad = head.grad = None
            output = linear_distillation_loss(
                state, head, teacher, teacher_head, top_k=top_k, backend=backend, **terms
            )
            output.loss.backward()

        return call

    found: dict[str, Case] = {}
    for backend in ("torch", "triton"):
        optimizer = AdamW(params, 1e-3, state="fp32", backend=backend)
        found[f"loss, {backend}"] = Case(loss(backend, None))
        found[f"loss, top-k, {backend}"] = Case(loss(backend, 5))
        found[f"AdamW, {backend}"] = Case(optimizer.step)
        found[f"average, {backend}"] = Case(
            partial(ema_update_, teacher_params, params, 0.1, backend=backend)
        )
        found[f"sample, {backend}"] = Case(
            partial(sample_tokens, logits, seed=1, step=2, backend=backend, **key)
        )
    return found


def cases_of_399_tensors() -> dict[str, Case]:
    import torch
    from sodfast_kernels import AdamW, copy_teacher_, ema_update_
    from torch import Tensor, nn

    def tensors() -> list[Tensor]:
        return [torch.randn(64).bfloat16() for _ in range(TENSORS_8B)]

    teacher, params = tensors(), [nn.Parameter(value) for value in tensors()]
    gradients = cycle([tensors(), tensors()])

    def new_gradients() -> None:
        for param, gradient in zip(params, next(gradients), strict=True):
            param.grad = gradient

    new_gradients()
    steps = count()
    found = {
        "copy": Case(lambda: copy_teacher_(teacher, params, backend="triton")),
        "average": Case(
            lambda: ema_update_(teacher, params, 0.1, step=next(steps), backend="triton")
        ),
    }
    for state in ("8bit", "fp32", "exact"):
        optimizer = AdamW(params, 1e-3, state=state, backend="triton")
        found[f"AdamW {state}"] = Case(partial(optimizer.step, clip_norm=1.0), new_gradients)
    return {f"{name} of {TENSORS_8B} tensors": case for name, case in found.items()}


def measure() -> dict[str, float]:
    """Microseconds a call of each case, with the kernels that are first in sys.path."""
    os.environ["TRITON_INTERPRET"] = "1"  # lets the Triton path take CPU tensors
    import torch
    from triton.runtime import KernelInterface

    torch.set_num_threads(1)
    KernelInterface.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: None
    found = {}
    for name, case in (small_cases() | cases_of_399_tensors()).items():
        for _ in range(20):
            case.run()
        taken = []
        for _ in range(CALLS):
            case.prepare()
            start = time.perf_counter()
            case.run()
            taken.append(time.perf_counter() - start)
        found[name] = 1e6 * min(taken)
    return found


def in_turns(folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """The least of all rounds, for each of the checkouts."""
    found: dict[str, dict[str, float]] = {name: {} for name in folders}
    for turn in range(ROUNDS):
        for name, folder in sorted(folders.items(), reverse=bool(turn % 2)):
            done = subprocess.run(
                [sys.executable, "-P", __file__, "--round"],
                env=os.environ | {"PYTHONPATH": str(folder)},
                capture_output=True,
                text=True,
                check=True,
            )
            for case, microseconds in json.loads(done.stdout.splitlines()[-1]).items():
                best = found[name].get(case, microseconds)
                found[name][case] = min(best, microseconds)
    return found


def commit(folder: Path) -> str | None:
    """None for a copy that is no checkout."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--round", action="store_true", help="one round, of this process's kernels")
    arguments = parser.parse_args()
    if arguments.round:
        print(json.dumps(measure()))
        return
    import torch
    import triton

    folders = {"now": KERNELS}
    if arguments.against is not None:
        folders["before"] = arguments.against.resolve()
    found = in_turns(folders)
    for case in found["now"]:
        print(f"{case:28}", *(f"{name} {found[name][case]:8.1f} µs" for name in found))
    result = {
        "command": "python bench/bench_host.py" + (" --against FOLDER" * (len(folders) - 1)),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "python": sys.version.split()[0],
        "commits": {name: commit(folder) for name, folder in folders.items()},
        "microseconds": {
            case: {name: round(found[name][case], 1) for name in found} for case in found["now"]
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
