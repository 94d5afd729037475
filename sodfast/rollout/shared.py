"""Student → samples on several ranks: each runs its share, all get every sample."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from sodfast.parallel.ranks import Ranks
from sodfast.rollout.engine import Engine, Sample, SampleKey, Sampling


class SharedEngine:
    """An engine of which every rank runs its share of the prompts; all get all samples.

    The samples are those of one rank: a draw is keyed by its sample, not by who makes it.
    `whole_weights` makes the weights readable for the inner engine.
    """

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        whole_weights: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.name = engine.name
        self.engine = engine
        self.ranks = ranks
        self.whole_weights = whole_weights

    @property
    def tokens_per_pass(self) -> float | None:
        """See `Engine.tokens_per_pass`."""
        return self.engine.tokens_per_pass

    def require(self, tokens: int) -> None:
        """See `Engine.require`."""
        self.engine.require(tokens)

    def generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        key: SampleKey,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Sample]:
        """See `Engine.generate`. `progress` counts this rank's share."""
        own = self.ranks.share(prompts), self.ranks.share(samples)
        drawn: list[Sample] = []
        with self.whole_weights(), self.ranks.together():
            if own[0]:
                drawn = self.engine.generate(*own, sampling, key, progress)
        parts = self.ranks.gather([_compact(sample) for sample in drawn])
        return [sample for part in parts for sample in part]


def _compact(sample: Sample) -> Sample:
    """The sample in memory of its own: a view would be sent with the whole tensor behind it."""
    values = {field.name: getattr(sample, field.name) for field in fields(sample)}
    own: dict[str, Any] = {k: v.clone() for k, v in values.items() if isinstance(v, Tensor)}
    return replace(sample, **own)
