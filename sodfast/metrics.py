"""A step's statistics: rewards, lengths, entropy, and sums over its tokens.

Definitions follow arXiv 2606.03532 §3.2, §3.4 and App. A.6, F, G; where the paper leaves one
open, the reading is in the docstring. Undefined values are left out, never NaN.
"""

from collections.abc import Sequence
from math import fsum, sqrt

import torch
from sodfast_kernels import DistillationOutput
from torch import Tensor

from sodfast.objective import likelihood_ratio
from sodfast.parallel.ranks import Ranks
from sodfast.rollout.engine import Engine, Sample


def reward_metrics(rewards: Sequence[float], group_size: int, success: float) -> dict[str, float]:
    """`reward/mean`, and `reward/success_group_fraction`: the share of prompts with at least one
    rollout whose reward is ≥ `success`. `rewards` holds groups of `group_size`."""
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    return {
        "reward/mean": fsum(rewards) / len(rewards),
        "reward/success_group_fraction": sum(max(g) >= success for g in groups) / len(groups),
    }


def length_metrics(samples: Sequence[Sample], shards: int | None = None) -> dict[str, float]:
    """Response lengths in tokens, EOS included: mean, max, length-tail risk max/mean, and the
    share of rollouts that the cap ended.

    With `shards`, also the mean and max of the summed lengths of that many equal groups in
    rollout order, which is what a data-parallel job of as many ranks logs.
    """
    lengths = [len(sample.response) for sample in samples]
    mean = sum(lengths) / len(lengths)
    metrics: dict[str, float] = {
        "length/mean": mean,
        "length/max": max(lengths),
        "length/tail_ratio": max(lengths) / mean,
        "length/capped_fraction": sum(sample.capped for sample in samples) / len(samples),
    }
    if shards is not None:
        size = len(lengths) // shards
        sums = [sum(lengths[i : i + size]) for i in range(0, len(lengths), size)]
        metrics |= {"length/shard_mean": sum(sums) / shards, "length/shard_max": max(sums)}
    return metrics


def mean_entropy(samples: Sequence[Sample]) -> float:
    """Mean token entropy in nats of the sampling distribution (temperature applied, nucleus not)
    over every response token of the step, as measured when it was sampled."""
    tokens = sum(len(sample.response) for sample in samples)
    return fsum(float(sample.entropy.double().sum()) for sample in samples) / tokens


def pass_metrics(key: str, engine: Engine) -> dict[str, float]:
    """As `key` the tokens that a sequence got from a pass of the engine's last call, where the
    engine counts them."""
    tokens = engine.tokens_per_pass
    return {} if tokens is None else {key: tokens}


class RewardGain:
    """SNR: mean/std over a step's groups of (mean reward of the group now − its mean reward at
    the previous visit of the same question).

    The paper leaves the difference undefined; this is our reading. Reported where at least two
    of the step's questions were visited before and their differences vary (population std > 0).
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def observe(
        self, question_ids: Sequence[str], group_means: Sequence[float]
    ) -> dict[str, float]:
        gains = []
        for question, mean in zip(question_ids, group_means, strict=True):
            if question in self.last:
                gains.append(mean - self.last[question])
            self.last[question] = mean
        if len(gains) < 2:
            return {}
        mean_gain = fsum(gains) / len(gains)
        std = sqrt(fsum((gain - mean_gain) ** 2 for gain in gains) / len(gains))
        return {"reward/snr": mean_gain / std} if std > 0 else {}


class TokenTotals:
    """Sums over a step's tokens, kept on the device so that no micro-batch waits for the host."""

    def __init__(self, device: torch.device, clip_range: tuple[float, float]) -> None:
        self.clip_range = clip_range
        self.loss = torch.zeros((), device=device)
        self.divergence = torch.zeros((), dtype=torch.float64, device=device)
        self.ratio = torch.zeros((), dtype=torch.float64, device=device)
        self.clipped = torch.zeros((), dtype=torch.int64, device=device)
        # Until the first update, training and sampling differ in their numerics alone.
        self.sampled_by_these_weights = True
        self.sampler_ratios: list[Tensor] = []
        self.distilled_tokens = 0
        self.tokens = 0

    def add(
        self, output: DistillationOutput, samples: Sequence[Sample], distilled: Sequence[bool]
    ) -> None:
        assert output.student_logprob is not None
        old = torch.cat([sample.logprob for sample in samples]).to(self.ratio.device)
        self.divergence += output.divergence.sum(dtype=torch.float64)
        ratio = likelihood_ratio(output.student_logprob, old)
        low, high = self.clip_range
        self.ratio += ratio.sum(dtype=torch.float64)
        self.clipped += ((ratio < 1 - low) | (ratio > 1 + high)).sum()
        if self.sampled_by_these_weights:
            sampler = torch.cat([sample.behavior_logprob for sample in samples]).to(old.device)
            self.sampler_ratios.append(likelihood_ratio(output.student_logprob, sampler))
        for sample, m in zip(samples, distilled, strict=True):
            self.tokens += len(sample.response)
            self.distilled_tokens += len(sample.response) if m else 0

    def over(self, ranks: Ranks) -> "TokenTotals":
        """These sums over all ranks."""
        for tensor in (self.divergence, self.ratio, self.clipped):
            ranks.sum(tensor)
        own = self.tokens, self.distilled_tokens, [ratio_N.cpu() for ratio_N in self.sampler_ratios]
        tokens, distilled_tokens, sampler_ratios = zip(*ranks.gather(own), strict=True)
        self.tokens, self.distilled_tokens = sum(tokens), sum(distilled_tokens)
        self.sampler_ratios = [ratio_N for part in sampler_ratios for ratio_N in part]
        return self

    def metrics(self) -> dict[str, float]:
        """Means over the tokens that carried a gradient; left out where there were none."""
        metrics = {}
        if self.distilled_tokens:
            metrics["distill/divergence"] = float(self.divergence) / self.distilled_tokens
        if self.tokens:
            metrics["policy/ratio_mean"] = float(self.ratio) / self.tokens
            metrics["policy/clip_fraction"] = int(self.clipped) / self.tokens
        if self.sampler_ratios:
            ratio_N = torch.cat(self.sampler_ratios).double()
            metrics["policy/sampler_ratio_mean"] = float(ratio_N.mean())
            metrics["policy/sampler_ratio_min"] = float(ratio_N.min())
            metrics["policy/sampler_ratio_max"] = float(ratio_N.max())
        return metrics
