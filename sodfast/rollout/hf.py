"""Student → samples by transformers' `generate`: for every architecture, and the others' reference.

`generate` runs greedily over scores in which a logits processor has left one token standing, the
one that the processor drew itself by the rule of all engines.

Shapes: B sequences of one call, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sodfast_kernels import sample_tokens
from torch import Tensor

from sodfast.errors import RunFailed
from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import own_attention
from sodfast.rollout.engine import Progress, Sample, SampleKey, Sampling, check_prompts, stop_length


class HFEngine:
    """transformers' `generate`, `batch_size` sequences at a time; others are tested against it."""

    name = "hf"
    tokens_per_pass = None

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size

    def require(self, tokens: int) -> None:
        """Any number of tokens can run: the cache grows with the answers."""

    def generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        key: SampleKey,
        progress: Progress = lambda done, total: None,
    ) -> list[Sample]:
        """See `Engine.generate`."""
        check_prompts(prompts, sampling)
        drawn: list[Sample] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            drawn += self._generate(prompts[part], samples[part], sampling, key)
            progress(len(drawn), len(prompts))
        return drawn

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        key: SampleKey,
    ) -> list[Sample]:
        from transformers import GenerationConfig, LogitsProcessorList

        model = self.model
        input_ids, mask = left_padded(prompts, model.pad_id)
        width = input_ids.shape[1]
        sampler = _Sampler(torch.tensor(samples, device=model.device), sampling, key)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(model.eos_ids),
            pad_token_id=model.pad_id,
        )
        with own_attention(model.network), _generating_as(model.network, greedy):
            tokens = model.network.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_processor=LogitsProcessorList([sampler]),
            )[:, width:].cpu()
        logprob, entropy = sampler.collected()
        if not torch.isfinite(entropy).all():
            raise RunFailed("the model's logits are not finite")
        ends = torch.isin(tokens, torch.tensor(model.eos_ids))
        finished = []
        for row, prompt in enumerate(prompts):
            stops = ends[row].nonzero()
            capped = len(stops) == 0
            length = tokens.shape[1] if capped else int(stops[0]) + 1
            stopped = stop_length(model, tokens[row, :length], sampling.stop)
            if stopped is not None:
                length, capped = stopped, False
            finished.append(
                Sample(
                    prompt=prompt,
                    response=tokens[row, :length].clone(),
                    logprob=logprob[row, :length].clone(),
                    entropy=entropy[row, :length].clone(),
                    capped=capped,
                )
            )
        return finished


def left_padded(prompts: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of a batch, each [B, longest] int64 on the CPU."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return input_ids, mask


@contextmanager
def _generating_as(network: Any, config: Any) -> Iterator[None]:
    """`generate` fills whatever its argument leaves open from the model's own settings, such as
    the repetition penalty in its generation_config.json; so they are all replaced meanwhile."""
    own, network.generation_config = network.generation_config, config
    try:
        yield
    finally:
        network.generation_config = own


class _Sampler:
    """A logits processor that draws each row's token by that row's own key."""

    def __init__(self, sample_B: Tensor, sampling: Sampling, key: SampleKey) -> None:
        self.sample_B, self.sampling, self.key = sample_B, sampling, key
        self.logprob: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        drawn = sample_tokens(
            scores_BV,
            seed=self.key.seed,
            step=self.key.step,
            sample=self.sample_B,
            position=torch.full_like(self.sample_B, len(self.logprob)),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
        )
        self.logprob.append(drawn.logprob)
        self.entropy.append(drawn.entropy)
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, drawn.token[:, None], 0.0)

    def collected(self) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, each [B, steps] fp32 on the CPU."""
        return torch.stack(self.logprob, 1).cpu(), torch.stack(self.entropy, 1).cpu()
