"""Distributions of success rates: read, and fitted to their moments."""

import math

import pytest

from sodfast.errors import UsageError
from sodfast.success import fit_success, parse_success


@pytest.mark.parametrize(("a", "b"), [(2, 3), (0.4, 0.6), (9, 1)])
def test_the_fit_finds_the_beta_of_its_moments(a: float, b: float) -> None:
    unsolved = math.prod((b + i) / (a + b + i) for i in range(4))
    assert fit_success(a / (a + b), 1 - unsolved, 4) == pytest.approx((a, b), rel=1e-6)


def test_prompts_that_differ_by_chance_alone_have_one_rate() -> None:
    assert fit_success(0.4, 1 - 0.6**4, 4) == (0.4, math.inf)
    assert fit_success(0.4, 1.0, 4).b == math.inf


@pytest.mark.parametrize("text", ["", "1", "0", "-1,2", "nan", "1,2,3", "a", "inf,1", "0,1"])
def test_a_success_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--success"):
        parse_success(text)
