"""Part `8b_teacher`: seconds to score a step's responses with a teacher in host memory and with one
on the device, and the share of the transfer that hides behind computing.

The sequences are random tokens of the lengths of a step, and no step is taken.
"""

from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from forced_run import EIGHT_B, REHEARSAL
from suite_record import Case, Plan, Result, check
from suite_timing import clock

SOURCES = [
    Path(__file__).with_name("forced_run.py"),
    *(Path(__file__).parents[1] / "sodfast").rglob("*.py"),
]
HIDDEN_SHARE = 0.90


class Scoring:
    """What the cases share: the student and the sequences, made when first asked for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.setting = EIGHT_B if plan.full else REHEARSAL

    @cached_property
    def config(self) -> Any:
        return self.setting.config(self.plan.device)

    @cached_property
    def model(self) -> Any:
        from sodfast.commands import build_model

        return build_model(self.config, self.plan.device)

    @cached_property
    def sequences(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Contexts and responses: a context is the prompt and a sibling's response."""
        generator = torch.Generator().manual_seed(5)
        lengths, words = self.setting.lengths(self.config), self.setting.prompt_words
        high = min(256, len(self.model.head))
        return tuple(  # type: ignore[return-value]
            [torch.randint(high, (count,), generator=generator) for count in counts]
            for counts in ([words + n for n in [*lengths[1:], lengths[0]]], lengths)
        )

    def seconds(self, storage: str, tokens: int) -> float:
        """The median of three passes over all sequences, after one that warms up."""
        from sodfast.teacher import Teacher

        contexts, responses = self.sequences
        config = self.config
        teacher = Teacher(self.model.network, config.schedule, config.seed, storage)  # type: ignore[arg-type]
        teacher.prepare_update()
        times = []
        for _ in range(4):
            begin = clock(self.plan.device)
            teacher.score(contexts, responses, tokens)
            times.append(clock(self.plan.device) - begin)
        return median(times[1:])

    @cached_property
    def transfer(self) -> tuple[int, float]:
        """Bytes and seconds of one pass of the layers from the host to the device."""
        from sodfast.parallel.offload import HostCopy

        device = self.plan.device
        blocks = [b for b in HostCopy(self.model.network).blocks if b.layer is not None]
        staged = torch.empty_like(blocks[0].memory, device=device)
        times = []
        for _ in range(3):
            begin = clock(device)
            for block in blocks:
                staged.copy_(block.memory, non_blocking=True)
            times.append(clock(device) - begin)
        return sum(block.memory.nbytes for block in blocks), median(times)

    def in_its_budget(self) -> Result:
        return self.compare(self.config.scoring_tokens)

    def in_micro_batches(self) -> Result:
        return self.compare(self.config.optimizer.micro_batch_tokens)

    def compare(self, tokens: int) -> Result:
        from sodfast.model.packing import micro_batches

        contexts, responses = self.sequences
        lengths = [len(c) + len(r) for c, r in zip(contexts, responses, strict=True)]
        passes = len(list(micro_batches(lengths, tokens)))
        size, once = self.transfer
        host, device = (self.seconds(storage, tokens) for storage in ("host", "device"))
        share = 1 - max(0.0, host - device) / (passes * once)
        name = "share of the transfer hidden"
        return {
            "checks": [check(name, share, HIDDEN_SHARE, False)] if self.plan.full else [],
            "rows": [
                {"name": "streamed from the host", "milliseconds": 1e3 * host},
                {"name": "on the device", "milliseconds": 1e3 * device},
                {"name": "transfers alone", "milliseconds": 1e3 * passes * once},
            ],
            "passes": passes,
            "bytes_a_pass": size,
            "hidden_share": share,
        }


def cases(plan: Plan) -> list[Case]:
    scoring = Scoring(plan)
    return [
        Case("the preset's scoring budget", 3.0, scoring.in_its_budget),
        Case("training's micro-batches", 3.0, scoring.in_micro_batches),
    ]
