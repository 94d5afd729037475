"""Everything the kernels have to show on a GPU, in one command and less than ten minutes.

    python bench/gpu_suite.py

First the correctness that only a GPU can show (compiled kernels against the fp64 definition), then
the benches of objective and parameters. Writes objective.json, parameters.json and suite.json to
$OUT (bench/results/<gpu>/ if unset), and suite.png if matplotlib is installed. The last line is
JSON: the targets, what was measured, and whether each is met. Exit code 1 if one is missed.
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
from sodfast_kernels import linear_distillation_loss, reference

# What each update of parameters should reach, as a share of the measured copy bandwidth.
PARAMETER_SHARES = {
    "copy": 0.9,
    "average": 0.8,
    "adamw fp32": 0.8,
    "adamw exact": 0.8,
    "adamw 8bit": 0.5,
}


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


def judge(
    objective: dict[str, Any], parameters: dict[str, Any], error: float
) -> list[dict[str, Any]]:
    """The targets at 8,192 rows. `value` must not exceed `limit` where `at_most`, else reach it."""
    linear = {
        (row["alpha"], row["name"]): row
        for row in objective["cases"]
        if row["form"] == "linear" and row["rows"] == 8192 and "milliseconds" in row
    }
    targets = [("gradient error, bf16", error, 6e-3, True)]
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

    error = worst_gradient_error()
    objective = bench_objective.measure(progress)
    (folder / "objective.json").write_text(json.dumps(objective, indent=1))
    torch.cuda.empty_cache()
    parameters = bench_parameters.measure(progress)
    (folder / "parameters.json").write_text(json.dumps(parameters, indent=1))
    targets = judge(objective, parameters, error)
    (folder / "suite.json").write_text(json.dumps(targets, indent=1))
    if find_spec("matplotlib"):
        plot(objective, folder / "suite.png")
    for row in targets:
        progress(f"{'met   ' if row['met'] else 'MISSED'} {row['target']:55} {row['value']:.4g}")
    print(json.dumps({"device": objective["device"], "targets": targets}))
    return 0 if all(row["met"] for row in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
