"""Counter-based random streams: a draw depends on its key, never on what was drawn before it.

A generator is keyed by (seed, stream, counters), so resuming needs no stored state, evaluating
more often cannot change training, and a sample's tokens do not depend on its batch.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """A stream for each use of random numbers. The comments name the counters of its draws."""

    PROMPTS = 0  # epoch
    ROLLOUT = 1  # step, sample
    EVAL = 2  # step (0 with eval.common_draws), sample
    DEMONSTRATION = 3  # step, sample
    UPDATES = 4  # step
    ROUNDING = 5  # update, element of the parameters
    ADAPTERS = 6  # none
    CALIBRATE = 7  # none
    PROBE = 8  # step, sample
    NOISE = 9  # step, whether it is of a probe


def generator(seed: int, stream: int, *counters: int) -> np.random.Generator:
    """A NumPy generator on Philox4x64 keyed by (seed, stream) at the given counters. A run's
    streams are those of `Stream`.

    At most three counters, each below 2**64; the fourth counter word counts the draws.
    """
    if len(counters) > 3:
        raise ValueError(f"at most 3 counters, got {len(counters)}")
    words = [0, *counters, *[0] * (3 - len(counters))]
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(words, dtype=np.uint64)))


def draw_key(seed: int, stream: Stream) -> int:
    """A 64-bit key for `sodfast_kernels.sample_tokens`; the keys of two seeds or of two streams
    are unrelated."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0])


class PromptOrder:
    """Which question is asked next: every epoch is a fresh permutation keyed by (seed, epoch)."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed = seed
        self.size = size

    def take(self, cursor: int, count: int) -> list[int]:
        """Indices at positions cursor .. cursor + count of the endless sequence of epochs."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, offset = divmod(cursor + len(indices), self.size)
            order = generator(self.seed, Stream.PROMPTS, epoch).permutation(self.size)
            indices += order[offset : offset + count - len(indices)].tolist()
        return indices
