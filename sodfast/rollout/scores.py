"""Sampled tokens' log-probs and entropies by the functions that training computes them with."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from sodfast_kernels import linear_distillation_loss
from torch import Tensor

from sodfast.errors import RunFailed
from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import micro_batches, response_hidden
from sodfast.rollout.engine import Sample


def recompute(
    model: LanguageModel, samples: Sequence[Sample], temperature: float, micro_batch_tokens: int
) -> list[Sample]:
    """The samples with training's own log-probs; those that they were drawn with stay beside them
    as `sampler_logprob`. Samples that have both already stay as they are."""
    found = list(samples)
    drawn = [index for index, sample in enumerate(samples) if sample.sampler_logprob is None]
    for batch in micro_batches([samples[index].length for index in drawn], micro_batch_tokens):
        part = [samples[drawn[position]] for position in batch]
        scores = student_scores(
            model, [s.prompt for s in part], [s.response for s in part], temperature
        )
        for position, sample, (logprob, _) in zip(batch, part, scores, strict=True):
            found[drawn[position]] = replace(
                sample, logprob=logprob, sampler_logprob=sample.logprob
            )
    return found


@torch.no_grad()
def student_scores(
    model: LanguageModel, prompts: Sequence[Tensor], responses: Sequence[Tensor], temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """Log-probs and entropies [L] fp32 on the CPU of each response, by the functions that training
    computes them with.

    Raises `RunFailed` where the logits are not finite.
    """
    hidden_NH = response_hidden(model.network, prompts, responses)
    nothing = hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32)
    output = linear_distillation_loss(
        hidden_NH,
        model.head,
        hidden_NH,  # the teacher's rows: never read where distill_weight is 0
        model.head,
        temperature=temperature,
        softcap=model.softcap,
        distill_weight=nothing,
        target_ids=torch.cat(list(responses)).to(model.device),
        advantage=nothing,
        policy_weight=torch.ones_like(nothing),
    )
    assert output.student_logprob is not None
    if not torch.isfinite(output.student_entropy).all():
        raise RunFailed("the model's logits are not finite")
    lengths = [len(response) for response in responses]
    logprobs = output.student_logprob.cpu().split(lengths)
    entropies = output.student_entropy.cpu().split(lengths)
    return [
        (logprob.clone(), entropy.clone())
        for logprob, entropy in zip(logprobs, entropies, strict=True)
    ]
