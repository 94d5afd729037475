"""The phases of a step: their seconds, their peaks of memory, and what helps where it runs out.

Phases never overlap in memory. What outlives each:

    rollout   token ids and log-probs, on the CPU; the cache of keys and values is gone
    probe     nothing
    teacher   last hidden states of the responses, and the teacher's head
    train     weights and optimizer state; gradients end with the update
    evaluate  nothing
"""

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sodfast.errors import RunFailed

# What to lower in each phase, the first remedy first.
REMEDIES = {
    "rollout": "lower rollout.cache_gib, or rollout.batch_size where rollout.engine=hf",
    "probe": "lower rollout.cache_gib, or rollout.batch_size where rollout.engine=hf",
    "teacher": (
        "lower teacher.micro_batch_tokens (optimizer.micro_batch_tokens where it is null), or set "
        "teacher.storage=host"
    ),
    "train": (
        "lower optimizer.micro_batch_tokens or model.kept_layers, set "
        "model.gradient_checkpointing=true or teacher.storage=host, or lower "
        "rollout.prompts_per_step"
    ),
    "refresh": "set teacher.storage=host, or optimizer.adamw=8bit",
    "evaluate": "lower rollout.cache_gib, or rollout.batch_size where rollout.engine=hf",
}


class PhaseClock:
    """Seconds of each phase of a step and, on a GPU, the peak of allocated bytes within it.

    `time/step` and `memory/peak_bytes` cover all since `reset`, within phases or not. On a CPU the
    latter is the largest resident size of the process so far, so that phases have no peaks there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.highest = 0
        self._peak()
        self.began = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.highest = max(self.highest, self._peak())
        start = self._now()
        with oom_hint(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - start
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._peak())

    def metrics(self, tokens: int) -> dict[str, float]:
        """`tokens`: the step's response tokens."""
        step = self._now() - self.began
        self.highest = max(self.highest, self._peak(), *self.peaks.values())
        metrics: dict[str, float] = {
            **{f"time/{phase}": seconds for phase, seconds in self.seconds.items()},
            "time/step": step,
            "time/tokens_per_second": tokens / step,
        }
        if self.on_gpu:
            peaks = {f"memory/peak_{phase}_bytes": peak for phase, peak in self.peaks.items()}
            return {**metrics, **peaks, "memory/peak_bytes": self.highest}
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {**metrics, "memory/peak_bytes": resident}

    def _peak(self) -> int:
        """The most bytes allocated on the GPU since the last call."""
        if not self.on_gpu:
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def oom_hint(phase: str) -> Iterator[None]:
    """Turns a GPU's lack of memory into a `RunFailed` that says in which phase it was, how many
    bytes were asked for, in use and available, and which key to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        raise RunFailed(
            f"out of GPU memory in phase {phase}: {wanted[1] if wanted else 'more'} wanted"
            f"{_usage()}: {REMEDIES[phase]} (`sodfast plan` says what fits)"
        ) from error


def _usage() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    held = [torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total, free]
    return " beside {:.2f} GiB in use ({:.2f} reserved, the GPU has {:.2f}, {:.2f} free)".format(
        *(count / 2**30 for count in held)
    )
