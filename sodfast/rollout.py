"""Student → samples: what an engine is, and the `hf` engine, transformers' `generate`.

Every engine draws with `sodfast_kernels.sample_tokens`, keyed by (seed, step, sample, position),
so a sample is a function of the weights, its prompt and its key, whatever shares its batch and
whichever engine made it (up to rounding of the logits). `generate` runs greedily over scores in
which a logits processor has left one token standing, the one it drew itself.

Shapes: B sequences of one call, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sodfast_kernels import sample_tokens
from torch import Tensor

from sodfast.config import Config, EvalConfig, RolloutConfig
from sodfast.errors import RunFailed, UsageError
from sodfast.model import LanguageModel
from sodfast.packing import own_attention

Progress = Callable[[int, int], None]  # sequences done, of how many


@dataclass(frozen=True)
class Sampling:
    """temperature ≥ 0 (0: greedy); 0 < top_p ≤ 1; top_k ≥ 1 or None; at most max_new_tokens
    tokens, EOS included; a response also ends with the token that completes one of `stop`."""

    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Config, section: RolloutConfig | EvalConfig) -> "Sampling":
        """As `section`, of training or of evaluation, says; cap and stop strings are shared."""
        return cls(
            section.temperature,
            section.top_p,
            config.rollout.max_new_tokens,
            section.top_k,
            config.task.stop,
        )


@dataclass(frozen=True)
class Draws:
    """The part of the key that all samples of a call share: 64 bits of seed, 32 of step."""

    seed: int
    step: int


@dataclass(frozen=True)
class Sample:
    """One rollout, on the CPU. `logprob` and `entropy` [L] fp32 are those of the untruncated
    softmax at the sampling temperature (at 1 when greedy); `capped`: ended by the cap, not by an
    EOS token or a stop string."""

    prompt: Tensor  # [P] int64
    response: Tensor  # [L] int64, L ≥ 1, with its EOS token
    logprob: Tensor
    entropy: Tensor
    capped: bool

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class ForeignSample(Sample):
    """A sample of an engine with numerics of its own: `logprob` and `entropy` are the student's,
    `sampler_logprob` [L] fp32 is what the engine drew with."""

    sampler_logprob: Tensor


def sampler_logprob(sample: Sample) -> Tensor:
    """Log-probs [L] of a response by the engine that sampled it."""
    return sample.sampler_logprob if isinstance(sample, ForeignSample) else sample.logprob


class Engine(Protocol):
    """Something that answers prompts with the student's current weights."""

    name: str

    def require(self, tokens: int) -> None:
        """Raise `UsageError` unless a sequence of so many tokens, prompt and answer, can run."""

    def generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        progress: Progress = lambda done, total: None,
    ) -> list[Sample]:
        """One sample for each prompt, in order; `samples` are their numbers in the key. Equal
        prompts next to each other may share their prefill.

        Raises `ValueError` for an empty prompt, `RunFailed` when logits are not finite.
        """


def build_engine(
    config: RolloutConfig, model: LanguageModel, message: Callable[[str], None]
) -> Engine:
    """The configured engine; `auto` is `native` where it knows the architecture, else `hf`, and
    `message` hears why.

    Raises `UsageError` when the engine that was asked for by name cannot run this model.
    """
    from sodfast.decoder import unsupported
    from sodfast.native import NativeEngine

    if config.engine == "vllm":
        from sodfast.vllm_engine import VLLMEngine

        return VLLMEngine(model, config)
    reason = None if config.engine == "hf" else unsupported(model.network)
    if config.engine == "native" and reason is not None:
        raise UsageError(f"rollout.engine=native cannot run this model: {reason}; use auto or hf")
    if config.engine == "hf" or reason is not None:
        if reason is not None:
            message(f"rollout.engine: hf (slower), since native cannot run this model: {reason}")
        return HFEngine(model, config.batch_size)
    return NativeEngine(model, config.batch_size, config.cache_gib)


class HFEngine:
    """transformers' `generate`, `batch_size` sequences at a time: the oracle of the others."""

    name = "hf"

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size

    def require(self, tokens: int) -> None:
        """Nothing is bounded ahead: the cache grows with the answers."""

    def generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        progress: Progress = lambda done, total: None,
    ) -> list[Sample]:
        """See `Engine.generate`."""
        check_prompts(prompts, sampling)
        drawn: list[Sample] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            drawn += self._generate(prompts[part], samples[part], sampling, draws)
            progress(len(drawn), len(prompts))
        return drawn

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        draws: Draws,
    ) -> list[Sample]:
        from transformers import GenerationConfig, LogitsProcessorList

        model = self.model
        input_ids, mask = left_padded(prompts, model.pad_id)
        width = input_ids.shape[1]
        sampler = _Sampler(torch.tensor(samples, device=model.device), sampling, draws)
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
    the repetition penalty in its generation_config.json; so those step aside as a whole."""
    own, network.generation_config = network.generation_config, config
    try:
        yield
    finally:
        network.generation_config = own


class _Sampler:
    """A logits processor that draws each row's token by that row's own key."""

    def __init__(self, sample_B: Tensor, sampling: Sampling, draws: Draws) -> None:
        self.sample_B, self.sampling, self.draws = sample_B, sampling, draws
        self.logprob: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        drawn = sample_tokens(
            scores_BV,
            seed=self.draws.seed,
            step=self.draws.step,
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


def check_prompts(prompts: Sequence[Tensor], sampling: Sampling) -> None:
    """Raise `ValueError` for what no engine can answer."""
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}")


def stop_length(
    model: LanguageModel, response: Tensor, stop: Sequence[str], searched: int = 0
) -> int | None:
    """The least number of tokens of `response` whose text holds one of the `stop` strings, given
    that the first `searched` tokens hold none; None where there is no such number."""
    if not stop:
        return None
    # A token may be as little as one byte of text.
    reach = max(len(text.encode()) for text in stop) + 8
    for length in range(searched + 1, len(response) + 1):
        text = model.decode(response[max(0, length - reach) : length])
        if any(ending in text for ending in stop):
            return length
    return None
