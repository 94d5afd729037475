"""The comparison of checkouts, of this one with itself."""

from pathlib import Path

import pytest
from compare_rollout import CASES, compare

ROOT = str(Path(__file__).parents[2])


@pytest.mark.exhaustive
def test_a_checkout_answers_like_itself() -> None:
    found = compare({"here": ROOT, "again": ROOT}, rounds=1)
    assert found["same_bits"]
    for case in CASES:
        here, again = (found["cases"][case][name] for name in ("here", "again"))
        assert here["ratio"] == here["median_ratio"] == 1.0
        assert here["user_seconds"] > 0 and 0.2 < again["ratio"] < 5
