"""Everything the kernels and the rollouts have to show on a GPU, in one command.

    python bench/gpu_suite.py

No GPU has run it yet. Each part writes its JSON as it ends, so a time limit that cuts the command
loses the rest only; `python bench/bench_rollout.py` runs the last part, the longest, alone.

First the correctness that only a GPU can show (compiled kernels against the fp64 definition), then
the benches of objective, parameters, sampling and rollouts. Writes objective.json, parameters.json,
sampling.json, rollout.json and suite.json to $OUT (bench/results/<gpu>/ if unset), and suite.png if
matplotlib is installed. The last line is JSON: the targets, what was measured, and whether each is
met. Exit code 1 if one is missed.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_objective
import bench_parameters
import bench_rollout
import bench_sampling
from sodfast_kernels import linear_distillation_loss, reference, sample_tokens

# What each update of parameters should reach, as a share of the measured copy bandwidth.
PARAMETER_SHARES = {
    "copy": 0.9,
    "average": 0.8,
    "adamw fp32": 0.8,
    "adamw exact": 0.8,
    "adamw 8bit": 0.5,
}
# Sampling is bound by the noise: about 65 instructions a logit, whatever the logit's bytes.
SAMPLING_SHARES = {"bfloat16": 0.2, "float32": 0.4}
# Our case, the peer to beat, and how many times faster at least.
SAMPLING_PEERS = [
    ("ours", "softmax and multinomial", 2.0),
    ("ours, top-p", "sort, top-p", 5.0),
    ("ours", "flashinfer", 1.0),
    ("ours, top-p", "flashinfer, top-p", 1.0),
]


def worst_gradient_error() -> float:
    """Relative, of the compiled kernels in bf16 against the fp64 definition."""
    generator = torch.Generator("cuda").manual_seed(0)
    worst = 0.0
    for alpha in (0.0, 0.3, 0.5, 1.0):
        for top_k in (None, 20, 100, 1024):
            for softcap in (None, 30.0):
                state = torch.randn(77, 256, generator=generator, device="cuda").bfloat16()
                head = torch.randn(5003, 256, generator=generator, device="cuda").bfloat16() / 16
                teacher = state + 0.05 * torch.randn_like(state)
                ids = torch.arange(77, device="cuda")
                terms = {"alpha": alpha, "top_k": top_k, "softcap": softcap, "target_ids": ids}
                gradients = []
                for function, dtype in (
                    (linear_distillation_loss, torch.bfloat16),
                    (reference.linear_distillation_loss, torch.float64),
                ):
                    x, w = (t.to(dtype).detach().requires_grad_() for t in (state, head))
                    function(x, w, teacher.to(dtype), head.to(dtype), **terms).loss.backward()
                    gradients.append((x.grad.double(), w.grad.double()))
                for ours, exact in zip(*gradients, strict=True):
                    worst = max(worst, ((ours - exact).norm() / exact.norm()).item())
    return worst


def share_of_other_tokens() -> float:
    """Tokens that the compiled kernels draw otherwise than the definition: only near ties may."""
    rows, other, drawn = 128, 0, 0
    position = torch.zeros(rows, dtype=torch.int64, device="cuda")
    key = {"seed": 2**63 + 1, "step": 2, "sample": torch.arange(rows, device="cuda")}
    for dtype in (torch.bfloat16, torch.float32):
        for options in (
            {},
            {"temperature": 0},
            bench_sampling.NUCLEUS,
            {"top_k": 20, "top_p": 0.9},
        ):
            for _ in range(8):
                logits = bench_sampling.logits(rows, 151_936, dtype, torch.device("cuda"))
                position += 1
                ours, exact = (
                    sample_tokens(logits, **key, position=position, **options, backend=backend)
                    for backend in ("triton", "torch")
                )
                other += (ours.token != exact.token).sum().item()
                drawn += rows
    return other / drawn


def judge(
    objective: dict[str, Any],
    parameters: dict[str, Any],
    sampling: dict[str, Any],
    error: float,
    other_tokens: float,
) -> list[dict[str, Any]]:
    """The targets at 8,192 rows. `value` must not exceed `limit` where `at_most`, else reach it."""
    linear = {
        (row["alpha"], row["name"]): row
        for row in objective["cases"]
        if row["form"] == "linear" and row["rows"] == 8192 and "milliseconds" in row
    }
    targets = [
        ("gradient error, bf16", error, 6e-3, True),
        ("sampling: share of other tokens", other_tokens, 1e-3, True),
    ]
    for alpha, ratio in ((0.0, 1.4), (0.5, 1.7)):
        ours = linear[alpha, "ours"]
        targets += [
            (f"α={alpha}: times four products", ours["times_the_floor"], 1.20, True),
            (f"α={alpha}: peak bytes", ours["peak_bytes"] - returned_bytes(), 3.5e9, True),
        ]
        for name in ("ours, top-20 + tail", "ours, frozen head"):
            share = linear[alpha, name]["milliseconds"] / ours["milliseconds"]
            targets.append((f"α={alpha}: {name} over full", share, 1.0, True))
        for (other, name), row in linear.items():
            if other == alpha and name.startswith(("TRL", "Liger", "fla")):
                least = ratio if name.startswith("TRL") else 1.0
                faster = row["milliseconds"] / ours["milliseconds"]
                targets.append((f"α={alpha}: faster than {name}", faster, least, False))
    for row in objective["cases"]:
        if row["form"] == "logits":
            least = 0.65 if "JSD" in row["name"] else 0.80
            share = row["share_of_copy_bandwidth"]
            targets.append((f"logits, {row['name']}: share of a copy", share, least, False))
    shares = {row["name"]: row["share_of_copy_bandwidth"] for row in parameters["cases"]}
    targets += [
        (f"{name}: share of a copy", shares[name], least, False)
        for name, least in PARAMETER_SHARES.items()
    ]
    for dtype, least in SAMPLING_SHARES.items():
        rows = {
            row["name"]: row
            for row in sampling["cases"]
            if row["rows"] == 64 and row["dtype"] == dtype and "milliseconds" in row
        }
        share = rows["ours"]["share_of_copy_bandwidth"]
        targets.append((f"sampling, {dtype}: share of a copy", share, least, False))
        for ours, peer, least in SAMPLING_PEERS:
            if peer in rows:
                faster = rows[peer]["milliseconds"] / rows[ours]["milliseconds"]
                targets.append((f"{ours}, {dtype}: faster than {peer}", faster, least, False))
    return [
        {
            "target": name,
            "value": value,
            "limit": limit,
            "at_most": at_most,
            "met": value <= limit if at_most else value >= limit,
        }
        for name, value, limit, at_most in targets
    ]


def returned_bytes() -> int:
    """Gradients of hidden states and head at 8,192 rows of Qwen3-8B, bf16."""
    return 2 * 4096 * (8192 + 151_936)


def plot(objective: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, alpha in zip(axes, (0.0, 0.5), strict=True):
        series: dict[str, list[tuple[int, float]]] = {}
        for row in objective["cases"]:
            if row["form"] == "linear" and row["alpha"] == alpha and "milliseconds" in row:
                series.setdefault(row["name"], []).append((row["rows"], row["milliseconds"]))
        for name, points in series.items():
            axis.loglog(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=f"α = {alpha}", xlabel="rows")
    axes[0].set_ylabel("ms, forward + backward")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> int:
    if not torch.cuda.is_available():
        print("bench/gpu_suite.py needs a CUDA device; on a CPU run bench/bench_objective.py")
        return 2
    default = Path(__file__).parent / "results" / torch.cuda.get_device_name().replace(" ", "-")
    folder = Path(os.environ.get("OUT", default))
    folder.mkdir(parents=True, exist_ok=True)

    def progress(text: str) -> None:
        print(text, flush=True)

    error, other_tokens = worst_gradient_error(), share_of_other_tokens()
    objective = bench_objective.measure(progress)
    (folder / "objective.json").write_text(json.dumps(objective, indent=1))
    torch.cuda.empty_cache()
    parameters = bench_parameters.measure(progress)
    (folder / "parameters.json").write_text(json.dumps(parameters, indent=1))
    torch.cuda.empty_cache()
    sampling = bench_sampling.measure(progress)
    (folder / "sampling.json").write_text(json.dumps(sampling, indent=1))
    torch.cuda.empty_cache()
    rollout = bench_rollout.measure_gpu(progress)  # last: it caps the memory of the process
    (folder / "rollout.json").write_text(json.dumps(rollout, indent=1))
    targets = judge(objective, parameters, sampling, error, other_tokens) + rollout["targets"]
    (folder / "suite.json").write_text(json.dumps(targets, indent=1))
    if find_spec("matplotlib"):
        plot(objective, folder / "suite.png")
    for row in targets:
        progress(f"{'met   ' if row['met'] else 'MISSED'} {row['target']:55} {row['value']:.4g}")
    print(json.dumps({"device": objective["device"], "targets": targets}))
    return 0 if all(row["met"] for row in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
