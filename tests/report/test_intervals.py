"""The report's numbers against hand-computed cases and the textbook formulas."""

from math import pi, sqrt, tan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sodfast.report.intervals import (
    Interval,
    Mean,
    Series,
    band,
    bin_width,
    from_the_highest,
    group_curve,
    mean_and_error,
    paired_difference,
    wilson_interval,
)

nan = np.nan
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)


def test_mean_and_error_by_hand() -> None:
    # deviations −1.5, −0.5, 0.5, 1.5: variance 5/3, standard error √(5/12)
    found = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert found is not None and found.error is not None
    assert (found.value, found.n) == (2.5, 4)
    assert found.error == pytest.approx(sqrt(5 / 12))


def test_one_value_has_no_error_and_none_no_mean() -> None:
    assert mean_and_error([0.7]) == Mean(0.7, None, 1)
    assert mean_and_error([]) is None


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_of_the_literature(successes: int, n: int, low: float, high: float) -> None:
    found = wilson_interval(successes, n)
    assert (found.low, found.high) == (
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_solves_its_equation(case: tuple[int, int]) -> None:
    """Its ends are where |k/n − p| = z √(p(1 − p)/n); it is the mirror image of n − k's."""
    successes, n = case
    found, mirrored = wilson_interval(successes, n), wilson_interval(n - successes, n)
    z = 1.959963984540054
    for end in (found.low, found.high):
        distance = abs(successes / n - end)
        assert distance == pytest.approx(z * sqrt(max(end * (1 - end), 0) / n), abs=1e-7)
    assert 0 <= found.low < found.high <= 1
    assert mirrored.low == pytest.approx(1 - found.high)


def test_paired_difference_by_hand() -> None:
    """0.3 and −0.1: standard error 0.2, and t(1) = tan(0.475 π) = 12.706."""
    found = paired_difference([0.8, 0.5], [0.5, 0.6])
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    half = 0.2 * tan(0.475 * pi)
    assert found.interval == Interval(pytest.approx(0.1 - half), pytest.approx(0.1 + half))
    assert (found.n, found.above) == (2, 1)
    ten = paired_difference([0.8, 0.5], [0.5, 0.6], comparisons=10)  # each at 99.5 %
    assert ten is not None and ten.interval is not None
    assert ten.interval.high == pytest.approx(0.1 + 0.2 * tan(0.4975 * pi))


def test_pairing_removes_what_the_seeds_share() -> None:
    """Seeds a world apart, differences alike: the interval is that of the differences."""
    baseline = [0.0, 100.0, -50.0, 7.0, 1000.0]
    found = paired_difference([x + 1 for x in baseline], baseline)
    assert found is not None
    assert found.mean == pytest.approx(1.0)
    assert found.interval == Interval(pytest.approx(1.0), pytest.approx(1.0))
    assert found.above == 5


def test_the_interval_of_many_pairs_is_the_normal_one() -> None:
    differences = np.random.default_rng(1).normal(0.3, 2.0, 400)
    found = paired_difference(list(differences), [0.0] * 400)
    assert found is not None and found.interval is not None
    half = 1.96 * differences.std(ddof=1) / 20
    assert found.interval.low == pytest.approx(found.mean - half, abs=0.002)
    assert found.interval.high == pytest.approx(found.mean + half, abs=0.002)


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_the_interval_covers_what_it_says(pairs: int) -> None:
    """2,000 studies: at 95 % the share that covers has a standard error of 0.5 %."""
    generator, covered = np.random.default_rng(pairs), 0
    for differences in generator.normal(0.3, 0.1, (2_000, pairs)):
        found = paired_difference([*differences], [0.0] * pairs)
        assert found is not None and found.interval is not None
        covered += found.interval.low <= 0.3 <= found.interval.high
    assert covered / 2_000 == pytest.approx(0.95, abs=0.02)


@given(VALUES)
def test_the_interval_lies_around_the_mean_and_moves_with_the_values(values: list[float]) -> None:
    zero = [0.0] * len(values)
    found = paired_difference(values, zero)
    moved = paired_difference([value + 1 for value in values], zero)
    assert found and moved and found.interval and moved.interval
    middle = (found.interval.low + found.interval.high) / 2
    assert middle == pytest.approx(found.mean, rel=1e-6, abs=1e-6)
    assert moved.interval.low == pytest.approx(found.interval.low + 1, rel=1e-6, abs=1e-6)


def test_the_highest_is_compared_with_each_other_over_what_both_have() -> None:
    """Three names, so three pairs of names: each interval at 1 − 0.05 / 3. A run that only one of
    them has says nothing of which is highest."""
    finals = {
        "low": {0: 0.1, 1: 0.2, 2: 0.2},
        "best": {0: 0.5, 1: 0.6, 2: 0.4},
        "near": {0: 0.4, 1: 0.6, 2: 0.4, 3: 9.0},
    }
    best, others = from_the_highest(finals)
    assert best == "best" and [name for name, _ in others] == ["near", "low"]
    expected = paired_difference([0.5, 0.6, 0.4], [0.1, 0.2, 0.2], comparisons=3)
    assert dict(others)["low"] == expected
    near = dict(others)["near"]
    assert near is not None and (near.n, near.mean) == (3, pytest.approx(0.1 / 3))


def test_equal_schedules_are_seldom_told_apart() -> None:
    """Of 500 tables of seven that do not differ, whose highest is chosen from the same values, at
    most one in twenty says that it lies above any other (standard error 1 %)."""
    generator, wrong = np.random.default_rng(0), 0
    for table in generator.normal(0.8, 0.02, (500, 7, 5)):
        _, others = from_the_highest({str(i): dict(enumerate(row)) for i, row in enumerate(table)})
        wrong += any(found and found.interval and found.interval.low > 0 for _, found in others)
    assert wrong / 500 <= 0.07


def test_one_pair_has_no_interval_and_none_no_difference() -> None:
    found = paired_difference([0.75], [0.5])
    assert found is not None
    assert (found.mean, found.interval, found.n) == (0.25, None, 1)
    assert paired_difference([], []) is None


def test_unequal_pairs_are_refused() -> None:
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])


def test_band_by_hand() -> None:
    """Three seeds: t(2) = 4.3027 at 95 %; [1, 2, 3] has s = 1, so ± 4.3027/√3. A missing value
    leaves its column with fewer seeds; one seed has no interval, none no mean."""
    found = band(np.array([[1.0, 5.0, 4.0, nan], [2.0, 5.0, nan, nan], [3.0, 5.0, nan, nan]]))
    assert found.n.tolist() == [3, 3, 1, 0]
    assert found.mean.tolist()[:3] == [2.0, 5.0, 4.0]
    assert found.low[0] == pytest.approx(2 - 4.302652730 / sqrt(3))
    assert found.high[0] == pytest.approx(2 + 4.302652730 / sqrt(3))
    assert found.low[1] == found.high[1] == 5.0
    assert np.isnan([found.mean[3], found.low[2], found.high[2], found.low[3]]).all()


def test_band_of_two_seeds_is_the_t_interval_of_one_degree() -> None:
    found = band(np.array([[0.0], [2.0]]))
    assert found.high[0] == pytest.approx(1 + 12.7062047362)


def series(*pairs: tuple[float, float]) -> Series:
    steps, values = np.array(pairs).T
    return Series(steps, values)


def test_a_curve_ends_with_its_first_run_and_the_others_go_on_alone() -> None:
    """A mean over survivors would rise when the worst run stops."""
    short = series((1, 0.0), (2, 0.0))
    long = series((1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0))
    found = group_curve([short, long], [], width=1)
    assert found.x.tolist() == [1, 2]
    assert found.band.mean.tolist() == [0.5, 0.5]
    assert [part.steps.tolist() for part in found.loose] == [[2, 3, 4]]


def test_an_unfinished_run_is_drawn_but_not_averaged() -> None:
    found = group_curve([series((1, 1.0), (2, 3.0))], [series((1, 9.0))], width=1)
    assert found.band.mean.tolist() == [1.0, 3.0]
    assert [part.values.tolist() for part in found.loose] == [[9.0]]


def test_bins_are_means_of_steps_drawn_at_their_middle() -> None:
    found = group_curve([series(*((step, step) for step in range(8)))], [], width=3)
    # step 0 alone; 1, 2, 3; 4, 5, 6; and 7, the only step of bin 3 (7, 8, 9)
    assert found.x.tolist() == [0, 2, 5, 8]
    assert found.band.mean.tolist() == [0, 2, 5, 7]


def test_steps_that_only_some_runs_carry_keep_their_place() -> None:
    found = group_curve([series((1, 1.0), (3, 3.0)), series((2, 2.0), (3, 5.0))], [], width=1)
    assert found.x.tolist() == [1, 2, 3]
    assert found.band.mean.tolist() == [1.0, 2.0, 4.0]
    assert found.band.n.tolist() == [1, 1, 2]


def test_a_group_without_finished_runs_has_no_mean() -> None:
    found = group_curve([], [series((1, 9.0))], width=1)
    assert found.x.size == 0 and len(found.loose) == 1


def test_a_curve_ends_where_its_mean_does_or_else_its_first_loose_part() -> None:
    short, long = series((1, 0.0), (2, 0.5)), series((1, 1.0), (2, 1.5), (3, 9.0))
    found = group_curve([short, long], [], width=1)
    assert found.end == (2, 1.0) and [part.steps.tolist() for part in found.parts[1:]] == [[2, 3]]
    assert group_curve([], [long], width=1).end == (3, 9.0)
    assert group_curve([Series.of([])], [], width=1).end is None


@given(st.integers(0, 20_000), st.integers(1, 400))
def test_bins_reach_the_last_step_in_about_as_many_points(last: int, points: int) -> None:
    width = bin_width(last, points)
    assert width >= 1
    assert (width - 1) * points < max(last, 1) <= max(width * points, 1)
