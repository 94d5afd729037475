"""What a configuration says about its schedule."""

import pytest

from sodfast.config import EMAConfig, HardConfig, PythonScheduleConfig, TrustRegionConfig
from sodfast.schedule import average_rate, student_share


def test_only_an_average_has_a_rate() -> None:
    assert average_rate(EMAConfig(rate=0.1)) == 0.1
    assert average_rate(TrustRegionConfig(rate=0.1)) == average_rate(HardConfig()) == 0
    assert average_rate(PythonScheduleConfig(source="own.py:Own")) == 0.5


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_only_trust_region_mixes_the_student_in(rate: float) -> None:
    assert student_share(TrustRegionConfig(rate=rate)) == rate
    assert student_share(EMAConfig(rate=rate)) is student_share(HardConfig()) is None
