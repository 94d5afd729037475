"""What a run's metrics lines add up to: the figures of summary.json, no torch.

Definitions follow arXiv 2606.03532 §3.4 and App. F and G. Undefined values are left out, never NaN.
"""

from collections.abc import Container, Mapping, Sequence
from math import fsum
from typing import Any

SPIKE_STEPS = 5  # steps on either side of a refresh that the spike ratio compares


def spike_ratios(lines: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Temporal-KL structure: for each refresh step t the mean `distill/divergence` of the steps
    t+1 … t+5 over that of t−4 … t (step t still used the old teacher).

    A ratio above 1 is the paper's corrective spike. A refresh is left out when another falls
    inside the ten steps, or when a step of them is missing or has no divergence.
    """
    divergence = {line["step"]: line.get("distill/divergence") for line in lines}
    refreshes = [line["step"] for line in lines if line.get("teacher/refreshed")]
    ratios = {}
    for step in refreshes:
        inside = range(step - SPIKE_STEPS + 1, step + SPIKE_STEPS + 1)
        if any(other in inside for other in refreshes if other != step):
            continue
        before = [divergence.get(s) for s in range(step - SPIKE_STEPS + 1, step + 1)]
        after = [divergence.get(s) for s in range(step + 1, step + SPIKE_STEPS + 1)]
        known = [value for value in before + after if value is not None]
        if len(known) == 2 * SPIKE_STEPS and fsum(known[:SPIKE_STEPS]) > 0:
            ratios[step] = fsum(known[SPIKE_STEPS:]) / fsum(known[:SPIKE_STEPS])
    return ratios


def best_step(
    lines: Sequence[Mapping[str, Any]], eval_samples: int, among: Container[int]
) -> int | None:
    """The step with the highest `eval/mean@k`, the first of equal ones, of the steps `among`; None
    where none was evaluated."""
    key = f"eval/mean@{eval_samples}"
    scores = [(line[key], -line["step"]) for line in lines if key in line and line["step"] in among]
    return -max(scores)[1] if scores else None


def summarize(lines: Sequence[Mapping[str, Any]], eval_samples: int) -> dict[str, Any]:
    """The figures of summary.json that follow from the metrics lines alone."""
    key = f"eval/mean@{eval_samples}"
    evaluated = [(line[key], -line["step"]) for line in lines if key in line]
    entropies = [line["policy/entropy"] for line in lines if "policy/entropy" in line]
    summary: dict[str, Any] = {"steps": lines[-1]["step"] if lines else 0}
    if evaluated:
        peak, negative_step = max(evaluated)
        summary |= {"final": evaluated[-1][0], "peak": peak, "peak_step": -negative_step}
    summary["refresh_steps"] = [line["step"] for line in lines if line.get("teacher/refreshed")]
    if entropies:
        summary["entropy_mean"] = fsum(entropies) / len(entropies)
        summary["entropy_final"] = entropies[-1]
    summary["spike_ratios"] = {str(step): ratio for step, ratio in spike_ratios(lines).items()}
    return summary
