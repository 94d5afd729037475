"""A step's phases: seconds and peaks of a stand-in GPU, and what a lack of memory becomes."""

from types import SimpleNamespace

import pytest
import torch

from sodfast.errors import RunFailed
from sodfast.run import phases
from sodfast.run.phases import PhaseClock, oom_hint


class GPU:
    """Counts allocated bytes as torch.cuda does."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0

    def allocate(self, count: int) -> None:
        self.allocated += count
        self.peak = max(self.peak, self.allocated)

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.allocated

    def synchronize(self, device: torch.device) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    gpu = GPU()
    monkeypatch.setattr(phases, "torch", SimpleNamespace(**vars(torch) | {"cuda": gpu}))
    return gpu


def test_each_phase_has_its_own_peak(gpu: GPU) -> None:
    gpu.allocate(10)
    clock = PhaseClock(torch.device("cuda"))
    gpu.allocate(500)  # the step before: not this step's
    gpu.allocate(-500)
    clock.reset()
    with clock("rollout"):
        gpu.allocate(90)
        gpu.allocate(-90)
    gpu.allocate(200)  # between phases
    gpu.allocate(-200)
    with clock("teacher"):
        gpu.allocate(40)
    with clock("train"):
        gpu.allocate(5)
        gpu.allocate(-45)
    with clock("teacher"):  # a second time: the larger of both
        gpu.allocate(1)
    metrics = clock.metrics(tokens=7)
    assert {k: v for k, v in metrics.items() if k.startswith("memory/")} == {
        "memory/peak_rollout_bytes": 100,
        "memory/peak_teacher_bytes": 50,
        "memory/peak_train_bytes": 55,
        "memory/peak_bytes": 210,
    }
    assert metrics["time/step"] >= sum(metrics[f"time/{p}"] for p in ("rollout", "teacher"))


def test_a_cpu_has_the_processs_peak_only() -> None:
    clock = PhaseClock(torch.device("cpu"))
    with clock("train"):
        pass
    metrics = clock.metrics(tokens=7)
    assert [key for key in metrics if key.startswith("memory/")] == ["memory/peak_bytes"]
    assert metrics["memory/peak_bytes"] > 50 * 2**20


@pytest.mark.parametrize("phase", phases.REMEDIES)
def test_a_lack_of_memory_is_one_line_with_a_remedy(phase: str) -> None:
    with pytest.raises(RunFailed) as failed, oom_hint(phase):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 386.00 MiB. GPU 0 …")
    message = str(failed.value)
    assert message.startswith(f"out of GPU memory in phase {phase}: 386.00 MiB wanted")
    assert phases.REMEDIES[phase] in message and "\n" not in message


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shape$"), oom_hint("train"):
        raise RuntimeError("shape")
