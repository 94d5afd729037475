"""What a configuration says about its schedule."""

import pytest

from sodfast.config import EMAConfig, HardConfig, PythonScheduleConfig, TrustRegionConfig
from sodfast.errors import UsageError
from sodfast.schedule import CGTR, Hard, average_rate, build_schedule, student_share


def test_a_mapping_has_the_keys_of_the_configuration() -> None:
    """What it does not name has its default, and what is wrong is said by its name."""
    hard = build_schedule({"kind": "hard", "every": 7})
    assert isinstance(hard, Hard) and hard.every == 7
    gated = build_schedule({"gates": ["isolation"]})
    assert isinstance(gated, CGTR) and gated.config.gates == ("isolation",)
    assert gated.config.window == 5
    for wrong in ({"kind": "hard", "evry": 7}, {"kind": "hard", "every": 0}, {"kind": "soft"}):
        with pytest.raises(UsageError, match="schedule"):
            build_schedule(wrong)


def test_only_an_average_has_a_rate() -> None:
    assert average_rate(EMAConfig(rate=0.1)) == 0.1
    assert average_rate(TrustRegionConfig(rate=0.1)) == average_rate(HardConfig()) == 0
    assert average_rate(PythonScheduleConfig(source="own.py:Own")) == 0.5


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_only_trust_region_mixes_the_student_in(rate: float) -> None:
    assert student_share(TrustRegionConfig(rate=rate)) == rate
    assert student_share(EMAConfig(rate=rate)) is student_share(HardConfig()) is None
