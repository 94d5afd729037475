"""The lab's step, second by second: `python bench/bench_step.py`, or `make bench`.

Every second of a step is booked on one of: generation, the student's and the teacher's forward,
the fused objective with the backward pass it starts, and everything else. The last line is JSON.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from sodfast import student as student_module
from sodfast.commands import build_trainer
from sodfast.config import load_config
from sodfast.run.console import Reporter
from sodfast.run.environment import environment

WARM_UP, STEPS = 3, 15


class Ledger:
    """Seconds by account. A nested account's time is taken out of the one around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.since = 0.0

    @contextmanager
    def account(self, name: str) -> Iterator[None]:
        self._book()
        self.stack.append(name)
        try:
            yield
        finally:
            self._book()
            self.stack.pop()

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if "generation" in self.stack:  # the forwards of generation are generation
                return function(*args, **kwargs)
            with self.account(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def _book(self) -> None:
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        self.since = now


def measure(directory: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Median seconds per account over `STEPS` steps of the lab's default run."""
    config = load_config(
        None,
        [
            f"out={directory / 'run'}",
            f"steps={WARM_UP + STEPS}",
            "eval.every=1000",
            "eval.samples=1",
            "task.test=1",
            "checkpoint.every=1000",
        ],
    )
    progress("building the lab (cached after the first time)")
    run = build_trainer(config, None, Reporter())
    ledger = Ledger()
    ledger.wrap(run.engine, "generate", "generation")
    ledger.wrap(run.model.network.base_model, "forward", "forward")
    ledger.wrap(torch.Tensor, "backward", "backward")
    ledger.wrap(student_module, "micro_batch_loss", "objective")
    steps: list[dict[str, float]] = []
    finish = run._finish

    def book_step(*arguments: Any) -> None:
        ledger._book()
        steps.append(dict(ledger.seconds))
        ledger.seconds.clear()
        finish(*arguments)
        ledger._book()
        ledger.seconds.clear()

    run._finish = book_step  # type: ignore[method-assign]
    with ledger.account("other"):
        run.train()
    run.run.close()
    accounts = sorted({name for step in steps for name in step})
    seconds = {name: median(step.get(name, 0.0) for step in steps[WARM_UP:]) for name in accounts}
    total = median(sum(step.values()) for step in steps[WARM_UP:])
    return {
        "seconds": seconds,
        "step": total,
        "outside_model_fraction": seconds["other"] / total,
        "steps": STEPS,
        "environment": environment(torch.get_num_threads(), "cpu"),
    }


@pytest.mark.benchmark(group="step")
def test_step(benchmark: Any, tmp_path: Path) -> None:
    result = benchmark.pedantic(measure, args=(tmp_path, lambda text: None), rounds=1)
    benchmark.extra_info.update(result)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch), print)))
