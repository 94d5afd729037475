"""What a run's metrics lines add up to: the figures of summary.json, no torch.

Definitions follow arXiv 2606.03532 §3.4 and App. F and G. Undefined values are left out, never NaN.
"""

from collections.abc import Container, Mapping, Sequence
from math import fsum
from typing import Any

from sodfast.config import Config

SPIKE_STEPS = 5  # steps on either side of a refresh that the spike ratio compares
TAIL_STEPS = 10  # steps up to a fork that its length tail is a mean over
NEXT_STEPS = 30  # steps after a fork over which the effect of what it changed is looked for


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


def lasting_steps(config: Config, lines: Sequence[Mapping[str, Any]]) -> set[int]:
    """The steps whose checkpoints stay: those of checkpoint.at and, with checkpoint.best, the best
    of all evaluations, and of those that do not depend on where the run ends, which a continued run
    is left with."""
    named = set(config.checkpoint.at)
    if not config.checkpoint.best:
        return named
    steps = [line["step"] for line in lines]
    every = [step for step in steps if config.eval.due(step)]
    found = (best_step(lines, config.eval.samples, among) for among in (steps, every))
    return named | {step for step in found if step is not None}


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


def summarize_fork(lines: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """What a run that was forked after `step` had come to, and what followed.

    fork_age        steps since the source's teacher was last copied, 0 where it was at this step
    fork_drift      ‖θ − φ‖₂ of the source then: a refresh of the fork comes after it
    fork_tail       max / mean length of a step's rollouts, mean over the last `TAIL_STEPS` steps
    reward_next30   mean of `reward/mean` over the `NEXT_STEPS` steps after it
    length_next30   mean of `length/mean` over these
    """
    at = next((line for line in lines if line["step"] == step), {})
    copied = bool(at.get("teacher/refreshed"))  # the source itself, at this very step
    figures: dict[str, float] = {}
    for name in ("age", "drift"):
        if copied:
            figures[f"fork_{name}"] = 0
        elif f"teacher/{name}" in at:
            figures[f"fork_{name}"] = at[f"teacher/{name}"]
    for name, key, first, last in (
        ("fork_tail", "length/tail_ratio", step - TAIL_STEPS + 1, step),
        (f"reward_next{NEXT_STEPS}", "reward/mean", step + 1, step + NEXT_STEPS),
        (f"length_next{NEXT_STEPS}", "length/mean", step + 1, step + NEXT_STEPS),
    ):
        values = [line[key] for line in lines if first <= line["step"] <= last and key in line]
        if values:
            figures[name] = fsum(values) / len(values)
    return figures
