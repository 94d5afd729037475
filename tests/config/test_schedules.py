"""The schedules' keys: defaults, gates, and shards of the length gate."""

import pytest
from configurations import lab, value

from sodfast.config import CGTRConfig, EvidenceConfig, HardConfig, gate_names
from sodfast.errors import UsageError


def test_defaults_of_the_other_schedules() -> None:
    assert value(lab("schedule.kind=hard"), "schedule.every") == 50
    assert value(lab("schedule.kind=ema"), "schedule.rate") == 0.04
    assert lab("schedule.kind=evidence").schedule.model_dump() == {
        "kind": "evidence",
        "min_isolation": 30,
        "probe_every": 2,
        "probe_questions": 16,
        "probe_samples": 4,
        "probes": 10,
        "min_z": 2.9,
        "max_length_ratio": 1.15,
        "max_tail_growth": 1.25,
        "gates": ("isolation", "reward", "length", "tail"),
    }
    with pytest.raises(UsageError, match="a gate is named twice"):
        lab("schedule={kind: evidence, gates: [tail,tail]}")
    assert value(lab("schedule.kind=trust_region"), "schedule.rate") == 0.04


def test_a_number_of_shards_that_is_not_used_need_not_divide() -> None:
    assert lab("schedule.shards=5").schedule.length_unit == "sequence"


def test_gates_have_names_when_they_are_switched_off_too() -> None:
    assert gate_names(CGTRConfig(gates=())) == ("isolation", "reward", "length")
    assert gate_names(EvidenceConfig(gates=("tail",))) == ("isolation", "reward", "length", "tail")
    assert gate_names(HardConfig()) == ()


def test_shards_count_where_the_length_gate_sees_them() -> None:
    assert CGTRConfig(length_unit="shard", shards=8).length_shards == 8
    assert CGTRConfig(shards=8).length_shards is None
    assert lab("schedule.length_unit=shard", "schedule.shards=8").length_shards == 8
    assert lab("schedule.kind=hard").length_shards is None
