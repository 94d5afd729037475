"""Student → samples: what an engine is and what it returns.

Every engine draws with `sodfast_kernels.sample_tokens`, keyed by (seed, step, sample, position),
so a sample is a function of the weights, its prompt and its key, whatever shares its batch and
whichever engine made it (up to rounding of the logits).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sodfast.config import Config, EvalConfig, RolloutConfig
from sodfast.model.language_model import LanguageModel

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
        """What `section`, of training or of evaluation, says; both share cap and stop strings."""
        return cls(
            section.temperature,
            section.top_p,
            config.rollout.max_new_tokens,
            section.top_k,
            config.task.stop,
        )


@dataclass(frozen=True)
class SampleKey:
    """The part of the key that all samples of a call share: 64 bits of seed, 32 of step."""

    seed: int
    step: int


@dataclass(frozen=True)
class Sample:
    """One rollout, on the CPU. `logprob` and `entropy` [L] fp32 are those of the student's
    untruncated softmax at the sampling temperature (at 1 when greedy); `capped`: ended by the cap,
    not by an EOS token or a stop string. `sampler_logprob` [L] fp32: what an engine with numerics
    of its own drew with; None: it drew with `logprob`."""

    prompt: Tensor  # [P] int64
    response: Tensor  # [L] int64, L ≥ 1, with its EOS token
    logprob: Tensor
    entropy: Tensor
    capped: bool
    sampler_logprob: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)

    @property
    def behavior_logprob(self) -> Tensor:
        """Log-probs [L] under the policy that drew the response (the behaviour policy)."""
        return self.logprob if self.sampler_logprob is None else self.sampler_logprob


class Engine(Protocol):
    """Something that answers prompts with the student's current weights."""

    name: str

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens that a sequence got from a pass in the mean of the last call, on this rank; None
        where that is not counted."""

    def require(self, tokens: int) -> None:
        """Raise `UsageError` unless a sequence of so many tokens, prompt and answer, can run."""

    def generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        key: SampleKey,
        progress: Progress = lambda done, total: None,
    ) -> list[Sample]:
        """One sample for each prompt, in order; `samples` are their numbers in the key. Equal
        prompts next to each other may share their prefill.

        Raises `ValueError` for an empty prompt, `RunFailed` when logits are not finite.
        """


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
