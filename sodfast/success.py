"""How prompts' success rates are spread: what `calibrate` draws its rewards from."""

from math import exp, lgamma
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sodfast.errors import UsageError

Array = NDArray[np.float64]


class Success(NamedTuple):
    """Success rates of prompts: Beta(a, b), or with b = ∞ the rate `a` for all of them."""

    a: float
    b: float

    @property
    def mean(self) -> float:
        return self.a if self.b == np.inf else self.a / (self.a + self.b)

    def text(self) -> str:
        if self.b == np.inf:
            return f"{self.mean:.3f} for every prompt"
        return f"Beta({self.a:.2f}, {self.b:.2f})"

    def to_json(self) -> dict[str, float | None]:
        return {"a": self.a, "b": None if self.b == np.inf else self.b}

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return np.full(shape, self.a) if self.b == np.inf else rng.beta(self.a, self.b, shape)


def parse_success(text: str) -> Success:
    """`0.4`, one rate for all prompts, or `2,3`, Beta(2, 3). Raises `UsageError`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    match values:
        case [rate] if 0 < rate < 1:
            return Success(rate, np.inf)
        case [a, b] if 0 < a < np.inf and 0 < b < np.inf:
            return Success(a, b)
    raise UsageError(f"--success={text}: give a rate such as 0.4, or a and b of a Beta such as 2,3")


def fit_success(mean: float, solved: float, samples: int) -> Success:
    """The Beta whose mean is `mean` and whose prompts have a success among `samples` rollouts with
    probability `solved`; one rate for all where prompts differ by no more than chance.

    E[(1−p)ⁿ] = B(a, b+n) / B(a, b) falls as a + b grows, towards (1−mean)ⁿ; found by bisection.
    Raises `UsageError` where every rollout, or none, succeeds.
    """
    if not 0 < mean < 1:
        raise UsageError(
            f"the rewards' mean is {mean:g}: there is nothing to simulate: give --success instead"
        )

    def unsolved(concentration: float) -> float:
        a, b = mean * concentration, (1 - mean) * concentration
        return exp(lgamma(b + samples) - lgamma(b) + lgamma(a + b) - lgamma(a + b + samples))

    low, high = 1e-3, 1e4
    if 1 - solved <= unsolved(high):
        return Success(mean, np.inf)
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if unsolved(middle) > 1 - solved else (low, middle)
    return Success(mean * low, (1 - mean) * low)
