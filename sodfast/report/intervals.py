"""The report's statistics: numpy and scipy under the names and conventions of this project.

Every function takes few values, one per seed, and answers None where the data allow no
statement: an error or an interval of a single seed does not exist. Intervals are 95 %.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95

Array = NDArray[np.float64]


class Interval(NamedTuple):
    low: float
    high: float


class Mean(NamedTuple):
    """Mean of `n` values and its standard error, the sample standard deviation (n − 1) / √n;
    None for a single value."""

    value: float
    error: float | None
    n: int


def mean_and_error(values: Sequence[float]) -> Mean | None:
    """The mean of the values; None where there are none."""
    if not values:
        return None
    error = float(stats.sem(values)) if len(values) > 1 else None
    return Mean(float(np.mean(values)), error, len(values))


def mean_of(values: Iterable[float]) -> float | None:
    found = mean_and_error([*values])
    return found and found.value


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion (JASA 22, 1927, 209), without continuity
    correction; it stays inside [0, 1] and keeps a width at 0 of n and n of n. Needs n ≥ 1."""
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


class Difference(NamedTuple):
    """Mean of the paired differences, its interval, and in how many pairs it was above zero."""

    mean: float
    interval: Interval | None
    n: int
    above: int


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], comparisons: int = 1
) -> Difference | None:
    """`values[i] − baseline[i]`, one pair per seed; None without pairs, no interval for one pair.

    The interval is Student's, mean ± t(n − 1) · s / √n, which takes the differences as normal. The
    bootstrap takes nothing as given and covers less than it says of the handful of seeds that a
    study has: its percentile interval, on normal differences, 76, 84 and 90 % of 3, 5 and 10 pairs.
    `comparisons`: of so many differences the intervals hold together (Bonferroni).
    """
    differences = np.subtract(values, baseline)
    if not differences.size:
        return None
    mean, interval = float(differences.mean()), None
    if differences.size > 1:
        chance = (1 - CONFIDENCE) / comparisons
        half = stats.t.ppf(1 - chance / 2, differences.size - 1) * stats.sem(differences)
        interval = Interval(float(mean - half), float(mean + half))
    return Difference(mean, interval, differences.size, int((differences > 0).sum()))


def difference_of(
    own: Mapping[Hashable, float], its: Mapping[Hashable, float], comparisons: int = 1
) -> Difference | None:
    """`paired_difference` over the replicates that both have."""
    both = [key for key in own if key in its]
    return paired_difference([own[key] for key in both], [its[key] for key in both], comparisons)


def from_the_highest(
    finals: Mapping[str, Mapping[Hashable, float]],
) -> tuple[str, list[tuple[str, Difference | None]]]:
    """Name → replicate → value: the name with the highest mean, and by how much it lies above each
    other, from the nearest one on, over the replicates that both have.

    Means are over the replicates that all have, if there are any. Which one is highest is read off
    the same values, so the intervals hold together with those of all other pairs of names.
    """
    shared = set.intersection(*(set(own) for own in finals.values()))
    means = {
        name: np.mean([value for key, value in own.items() if key in shared or not shared])
        for name, own in finals.items()
    }
    best, *others = sorted(finals, key=lambda name: means[name], reverse=True)
    pairs = comb(len(finals), 2)
    return best, [(other, difference_of(finals[best], finals[other], pairs)) for other in others]


class Band(NamedTuple):
    """Per point: mean over the rows that have a value there, the bounds of its interval (nan
    where fewer than two have one) and how many have one."""

    mean: Array
    low: Array
    high: Array
    n: NDArray[np.int64]


def band(values_RP: Array) -> Band:
    """Mean and Student's t interval of each column; rows are seeds, nan is no value.

    The interval is mean ± t(n − 1) · s / √n. It takes the seeds' values at a point as normal and
    is for each point alone, not for the curve as a whole.
    """
    n = np.isfinite(values_RP).sum(axis=0)
    mean = np.nansum(values_RP, axis=0) / np.where(n > 0, n, np.nan)
    squares = np.nansum((values_RP - mean) ** 2, axis=0)
    several = np.where(n > 1, n, np.nan)
    error = np.sqrt(squares / (several - 1) / several)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, several - 1) * error
    return Band(mean, mean - half, mean + half, n)


class Series(NamedTuple):
    """One run's values of one metric at the steps that carry it, ascending."""

    steps: Array
    values: Array

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> "Series":
        """From pairs (step, value), as float64."""
        return cls(*np.array(pairs, dtype=np.float64).reshape(-1, 2).T)


class Curve(NamedTuple):
    """A group's metric over steps, ready to be drawn.

    `band` is over the group's finished runs and ends where the first of them ends, so that no
    point of it rests on the survivors alone. `loose` are the parts outside of it: finished runs
    from there on, and unfinished runs whole.
    """

    x: Array
    band: Band
    loose: tuple[Series, ...]

    @property
    def parts(self) -> tuple[Series, ...]:
        """All that is drawn: the mean, then the loose parts."""
        return Series(self.x, self.band.mean), *self.loose

    @property
    def end(self) -> tuple[float, float] | None:
        """The last point of the first part that has one."""
        return next(((p.steps[-1], p.values[-1]) for p in self.parts if p.steps.size), None)


def bin_width(last_step: int, points: int) -> int:
    """Steps per point such that about `points` of them reach the last step."""
    return max(1, -(-last_step // points))


def group_curve(finished: Sequence[Series], unfinished: Sequence[Series], width: int) -> Curve:
    """Average each run over bins of `width` steps, then the finished runs in each bin.

    Bin i holds steps (i−1)·width + 1 … i·width and is drawn at their middle; step 0 is bin 0.
    """
    binned = [_bin(series, width) for series in finished if series.steps.size]
    loose = [_bin(series, width) for series in unfinished if series.steps.size]
    end = min((series.steps[-1] for series in binned), default=0)
    x = np.unique(np.concatenate([np.empty(0), *(series.steps for series in binned)]))
    x = x[x <= end]
    values = np.full((len(binned), len(x)), np.nan)
    for row, (steps, own) in enumerate(binned):
        values[row, np.searchsorted(x, steps[steps <= end])] = own[steps <= end]
        if steps[-1] > end:
            loose.append(Series(steps[steps >= end], own[steps >= end]))
    return Curve(x, band(values), tuple(loose))


def _bin(series: Series, width: int) -> Series:
    bins, where = np.unique(np.ceil(series.steps / width), return_inverse=True)
    means = np.bincount(where, series.values) / np.bincount(where)
    return Series(np.where(bins > 0, bins * width - (width - 1) / 2, 0.0), means)
