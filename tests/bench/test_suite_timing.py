"""What a row of times says: medians of turns, the host's part apart, memory without what stays."""

from types import SimpleNamespace
from typing import Any

import pytest
import suite_timing
import torch
from suite_timing import (
    Work,
    ceilings,
    copy_ceiling,
    gpu_turn,
    product_ceiling,
    summarise,
    take_turns,
)

CPU = torch.device("cpu")


def test_cases_take_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []

    def run(name: str) -> Work:
        return Work(lambda: order.append(name), lambda: order.append(f"clear {name}"))

    rows = take_turns({"a": run("a"), "b": run("b")}, CPU, rounds=2)
    assert order == ["clear a", "a", "clear b", "b"] * 3
    assert rows.keys() == {"a", "b"} and all(row["milliseconds"] >= 0 for row in rows.values())


def test_a_fault_is_the_result_of_its_case_alone() -> None:
    cleared = []

    def fail() -> None:
        raise RuntimeError("no such kernel")

    rows = take_turns({"bad": Work(fail, lambda: cleared.append(1)), "good": Work(list)}, CPU)
    assert rows["bad"] == {"failed": "RuntimeError: no such kernel"}
    assert rows["good"]["milliseconds"] >= 0
    assert len(cleared) == 2  # before it, and what it may have left


def test_a_case_that_fails_late_has_no_time() -> None:
    turns = iter(range(10))

    def run() -> None:
        if next(turns) == 2:
            raise RuntimeError("out of memory")

    assert take_turns({"late": Work(run)}, CPU, rounds=5)["late"].keys() == {"failed"}


def test_a_row_has_the_median_and_the_spread() -> None:
    turns = [{"seconds": s, "extra_bytes": b} for s, b in ((3.0, 5), (1.0, 7), (2.0, 6))]
    row = summarise(turns, [0.004, 0.001, 0.002])
    assert row["milliseconds"] == 2000 and row["spread"] == 1.0
    assert row["host_milliseconds"] == 2 and row["extra_bytes"] == 7
    assert "host_milliseconds" not in summarise(turns, [])


class Device:
    """What torch.cuda says of memory and time, for a call that holds 100 bytes, peaks at 700, and
    whose kernels run after a spin."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.gradients = 100  # of an earlier turn
        self.peak = 0

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace()
        event.record = lambda: self.log.append("record")
        event.synchronize = lambda: None
        event.elapsed_time = lambda other: 5.0
        return event

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.gradients

    def memory_allocated(self) -> int:
        return 1000 + self.gradients

    def max_memory_allocated(self) -> int:
        return 1000 + self.peak

    def _sleep(self, cycles: int) -> None:
        self.log.append(f"spin {cycles}")

    def clear(self) -> None:
        self.log.append("clear")
        self.gradients = 0

    def run(self) -> None:
        self.log.append("run")
        self.gradients, self.peak = 100, 700


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    for name in ("Event", "synchronize", "reset_peak_memory_stats", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", found.max_memory_allocated)
    monkeypatch.setattr(torch.cuda, "_sleep", found._sleep)
    return found


def test_the_gpu_spins_before_the_first_event_and_gradients_are_gone_before_a_peak_is_read(
    device: Device,
) -> None:
    turn = gpu_turn(Work(device.run, device.clear), spin=0.001)
    assert turn == {"seconds": 0.005, "held_bytes": 100, "extra_bytes": 600}
    assert device.log == ["clear", "synchronize", "spin 2500000", "record", "run", "record"]
    # The second turn finds the gradients of the first, and says the same.
    assert gpu_turn(Work(device.run, device.clear), spin=0.001) == turn


def test_the_spin_is_longer_than_the_host_needs(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = iter([9.0, 0.002, 0.004, 0.003, 9.0, 9.0, 9.0, 9.0])  # the first one compiles
    monkeypatch.setattr(suite_timing, "host_seconds", lambda work, device: next(hosts))
    row = take_turns({"a": Work(device.run)}, torch.device("cuda"), rounds=2)["a"]
    spins = [entry for entry in device.log if entry.startswith("spin")]
    assert spins == [f"spin {int((1.5 * 0.004 + 5e-4) * 2.5e9)}"] * 2
    assert row["milliseconds"] == 5 and row["host_milliseconds"] == pytest.approx(3)


def test_ceilings_are_amounts_over_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def turns(works: dict[str, Work], device: torch.device, rounds: int) -> Any:
        return {name: {"milliseconds": 2.0} for name in works}

    monkeypatch.setattr(suite_timing, "take_turns", turns)
    found = ceilings(CPU, full=False)
    assert found["copy_bytes_per_second"] == 2 * 16 * 2**20 / 2e-3  # read and written
    assert found["product_flops_per_second"] == 2 * 64**3 / 2e-3


def test_ceilings_are_of_random_data() -> None:
    """Zeros are faster to multiply."""
    product: Any = product_ceiling(CPU, full=False).work.run()
    assert product.dtype == torch.bfloat16 and 4 < product.float().std() < 16  # √64
    copied: Any = copy_ceiling(CPU, full=False).work.run()
    assert len(copied[:10_000].unique()) == 256
