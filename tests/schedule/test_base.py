"""What all schedules share: no state unless they have one, and the replay of recorded lines."""

from typing import Any

import pytest

from sodfast.config import CGTRConfig, EMAConfig, TrustRegionConfig
from sodfast.schedule import build_schedule, replay


@pytest.mark.parametrize("config", [EMAConfig(), TrustRegionConfig()])
def test_a_schedule_without_state_refuses_one(config: Any) -> None:
    with pytest.raises(ValueError, match="no state"):
        build_schedule(config).load_state_dict({"last_copy": 3})


def test_replay_without_the_shards_of_a_sharded_run_says_so() -> None:
    line = {"step": 1, "reward/mean": 0.5, "length/mean": 5.0, "length/max": 9}
    with pytest.raises(KeyError, match="shard"):
        replay(build_schedule(CGTRConfig(length_unit="shard")), [line])
    assert len(replay(build_schedule(CGTRConfig()), [line])) == 1
