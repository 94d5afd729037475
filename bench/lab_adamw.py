"""Does a run follow fp32 with bf16 weights? `python bench/lab_adamw.py OUT [KEY=VALUE...] > F`

The lab's run, the same seeds for each variant DTYPE-STATE (`model.dtype`, `optimizer.adamw`), each
a `sodfast train` process in OUT/DTYPE-STATE-SEED; what is finished is kept, what was cut short is
resumed. The last line is JSON:

    variants   final mean@16 of each seed, their mean and its standard error, the mean curve, and
               `moved`, ‖θ_30 − θ_0‖₂ of each seed (no teacher is refreshed before step 30)
    gaps       variant − the first variant, seed by seed: mean and standard error of the final
               mean@16, and of the mean over all evaluations after the first (less noisy)
    runs       what collect_runs.py collects

A run that follows fp32 has a gap of a few standard errors at most. `--figure FILE.svg` draws the
curves with their bands over seeds.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import fsum, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from collect_runs import collect

from sodfast.files import read_lines
from sodfast.report.canvas import standalone
from sodfast.report.intervals import Series, group_curve
from sodfast.report.plots import curve_figure

VARIANTS = ("float32-torch", "bfloat16-8bit", "bfloat16-exact", "bfloat16-plain")


def main() -> None:
    parser = argparse.ArgumentParser(description="bf16 weights against fp32 on the lab")
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="DTYPE-STATE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--figure", type=Path, metavar="FILE.svg")
    options = parser.parse_intermixed_args()
    seeds = range(options.seeds)
    paths = {v: [options.out / f"{v}-{seed}" for seed in seeds] for v in options.variants}
    with ThreadPoolExecutor(options.jobs) as pool:
        # Seed by seed, so that what a cut leaves can be compared.
        todo = [(v, seed) for seed in seeds for v in options.variants]
        list(pool.map(lambda item: train(paths[item[0]][item[1]], *item, options.overrides), todo))
    if options.figure is not None:
        options.figure.write_text(draw(paths))
    print(json.dumps(compare(paths)))


def train(path: Path, variant: str, seed: int, overrides: Sequence[str]) -> None:
    summary = path / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["status"] in ("done", "collapsed"):
        return
    dtype, state = variant.split("-")
    keys = [f"model.dtype={dtype}", f"optimizer.adamw={state}", f"seed={seed}", f"out={path}"]
    resumes = (path / "config.yaml").exists()
    arguments = ["--resume", str(path)] if resumes else [*keys, *overrides]
    command = [sys.executable, "-m", "sodfast", "train", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)


def compare(paths: dict[str, list[Path]]) -> dict[str, Any]:
    """See the module; `paths`: variant → its runs, the same seeds in the same order."""
    variants: dict[str, Any] = {}
    finals: dict[str, list[float]] = {}
    means: dict[str, list[float]] = {}
    for variant, runs in paths.items():
        lines = [read_lines(run / "metrics.jsonl") for run in runs]
        curves = [
            {line["step"]: line["eval/mean@16"] for line in run if "eval/mean@16" in line}
            for run in lines
        ]
        finals[variant] = [curve[max(curve)] for curve in curves]
        means[variant] = [fsum(curve[s] for s in curve if s) / (len(curve) - 1) for curve in curves]
        variants[variant] = {
            "final": finals[variant],
            **estimate(finals[variant]),
            "curve": {s: fsum(curve[s] for curve in curves) / len(curves) for s in curves[0]},
            "moved": [run[min(30, len(run) - 1)]["teacher/drift"] for run in lines],
        }
    reference, *others = paths
    gaps = {
        variant: {
            name: estimate([a - b for a, b in zip(of[variant], of[reference], strict=True)])
            for name, of in (("final", finals), ("all evaluations", means))
        }
        for variant in others
    }
    runs = [collect(run) for group in paths.values() for run in group]
    return {"variants": variants, "gaps": gaps, "runs": runs}


def draw(paths: dict[str, list[Path]]) -> str:
    """mean@16 of each variant over the steps, with 95 % bands over its seeds, as SVG."""
    curves, steps = {}, 0
    for variant, runs in paths.items():
        series = []
        for run in runs:
            lines = [line for line in read_lines(run / "metrics.jsonl") if "eval/mean@16" in line]
            points = ([line[key] for line in lines] for key in ("step", "eval/mean@16"))
            series.append(Series(*map(np.array, points)))
            steps = max(steps, lines[-1]["step"])
        curves[variant] = group_curve(series, [], 1)
    svg = curve_figure("lab_bf16", "mean@16 on the test questions", curves, steps)
    return standalone(svg)


def estimate(values: Sequence[float]) -> dict[str, float]:
    mean = fsum(values) / len(values)
    variance = fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return {"mean": mean, "stderr": sqrt(variance / len(values))}


if __name__ == "__main__":
    main()
