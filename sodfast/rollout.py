"""Student → samples. The `hf` engine: transformers' `generate`, sampling done here.

`generate` runs greedily over scores in which a logits processor has left one token standing, the
one it drew itself. So every token is drawn from a stream of its own sequence, and its log-prob
and the entropy come with it at no extra forward pass.

Shapes: B sequences of one call, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sodfast.errors import RunFailed
from sodfast.model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """temperature > 0; 0 < top_p ≤ 1; at most max_new_tokens tokens, EOS included."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One rollout, on the CPU. `logprob` and `entropy` [L] fp32 are those of the untruncated
    softmax at the sampling temperature; `capped`: ended by the cap, not by an EOS token."""

    prompt: Tensor  # [P] int64
    response: Tensor  # [L] int64, L ≥ 1, with its EOS token
    logprob: Tensor
    entropy: Tensor
    capped: bool


def rollout(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    streams: Sequence[np.random.Generator],
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sample]:
    """One sample for each prompt, drawn from its stream; `progress(done, total)` sequences.

    Raises `ValueError` for an empty prompt, `RunFailed` when the model's logits are not finite.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens")
    samples: list[Sample] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        samples += _generate(model, prompts[part], streams[part], sampling)
        progress(len(samples), len(prompts))
    return samples


@torch.no_grad()
def _generate(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    streams: Sequence[np.random.Generator],
    sampling: Sampling,
) -> list[Sample]:
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), model.pad_id)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    sampler = _Sampler(streams, sampling)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(model.eos_ids),
        pad_token_id=model.pad_id,
    )
    with _generating_as(model.network, greedy):
        tokens = model.network.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([sampler]),
        )[:, width:].cpu()
    logprob, entropy = sampler.collected()
    if not torch.isfinite(entropy).all():
        raise RunFailed("the model's logits are not finite")
    ends = torch.isin(tokens, torch.tensor(model.eos_ids))
    samples = []
    for row, prompt in enumerate(prompts):
        stops = ends[row].nonzero()
        capped = len(stops) == 0
        length = tokens.shape[1] if capped else int(stops[0]) + 1
        samples.append(
            Sample(
                prompt=prompt,
                response=tokens[row, :length].clone(),
                logprob=logprob[row, :length].clone(),
                entropy=entropy[row, :length].clone(),
                capped=capped,
            )
        )
    return samples


@contextmanager
def _generating_as(network: Any, config: Any) -> Iterator[None]:
    """`generate` fills whatever its argument leaves open from the model's own settings, such as
    the repetition penalty in its generation_config.json; so those step aside as a whole."""
    own, network.generation_config = network.generation_config, config
    try:
        yield
    finally:
        network.generation_config = own


class _Sampler:
    """A logits processor that draws each row's token by inverting its cumulative distribution
    at one uniform number of that row's own stream."""

    def __init__(self, streams: Sequence[np.random.Generator], sampling: Sampling) -> None:
        self.sampling = sampling
        uniforms = [stream.random(sampling.max_new_tokens) for stream in streams]
        self.uniforms = torch.from_numpy(np.stack(uniforms, axis=1))  # [max_new_tokens, B]
        self.logprob: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        logprob_BV = torch.log_softmax(scores_BV.float() / self.sampling.temperature, dim=-1)
        probs_BV = logprob_BV.exp()
        uniform_B = self.uniforms[len(self.logprob)].to(probs_BV.device)
        token_B1 = draw(probs_BV, uniform_B, self.sampling.top_p)[:, None]
        self.logprob.append(logprob_BV.gather(1, token_B1).squeeze(1))
        self.entropy.append(torch.special.entr(probs_BV).sum(1))
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, token_B1, 0.0)

    def collected(self) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, each [B, steps] fp32 on the CPU."""
        return torch.stack(self.logprob, 1).cpu(), torch.stack(self.entropy, 1).cpu()


def draw(probs_BV: Tensor, uniform_B: Tensor, top_p: float) -> Tensor:
    """Token [B] int64 at quantile `uniform_B` (fp64, in [0, 1)) of the nucleus of each row.

    The nucleus is the smallest set of most probable tokens whose mass reaches `top_p`; the token
    that crosses the line belongs to it. Sums are fp64, since fp32 sums over a large vocabulary
    are off by more than the rarest tokens weigh.
    """
    if top_p < 1:
        sorted_BV, order_BV = probs_BV.double().sort(dim=-1, descending=True, stable=True)
        mass_BV = sorted_BV.cumsum(-1)
        sorted_BV = sorted_BV.where(mass_BV - sorted_BV < top_p, 0.0)
    else:
        sorted_BV, order_BV = probs_BV.double(), None
    cumulative_BV = sorted_BV.cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    index_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    # u·total may round up to the total: step back to the last token with mass. NaN rows find no
    # place at all; any index will do, the caller sees their entropy.
    last_B1 = torch.searchsorted(cumulative_BV, cumulative_BV[:, -1:].contiguous())
    index_B1 = torch.minimum(index_B1, last_B1).clamp_(max=probs_BV.shape[1] - 1)
    return (index_B1 if order_BV is None else order_BV.gather(1, index_B1)).squeeze(1)
