"""Part `8b_speculation`: the rollout of a step of the 8B preset with and without drafts.

64 answers of 1.5k tokens on average, three of them at the cap of 8192, as in `8b_steps`. The
weights are those of `bench_speculation.cyclic`: every product and the attention run as they do in
Qwen3-8B, and the next token continues a cycle with a known probability, so how many drafts hold is
known.
Real text holds more or fewer; the share of the passes, not the seconds, carries over to it.

With drafts the same prompts are asked twice, as in two epochs: the first time a draft comes from
the answers beside it and from the row itself, the second time also from the answers of the first.
`off` runs once, and with drafts the answers of the first time are compared with its.
"""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from suite_record import Case, Plan, Result

SOURCES = [
    Path(__file__).with_name("bench_speculation.py"),
    Path(__file__).with_name("forced_run.py"),
    *(Path(__file__).parents[1] / "sodfast").rglob("*.py"),
]
SETTINGS: dict[str, Any] = {"off": False, "3 drafts": 3, "7 drafts": 7, "15 drafts": 15}
CYCLE, HOLDS = 256, 0.9


class Rollouts:
    """The cases share the network."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.plain: list[torch.Tensor] = []  # the answers of `off`

    @cached_property
    def model(self) -> Any:
        from bench_rollout import Shape, build
        from bench_speculation import cyclic

        shape = Shape() if self.plan.full else Shape(128, 192, 2, 4, 2, 32, 96, 512)
        dtype = torch.bfloat16 if self.plan.full else torch.float32
        cycle = CYCLE if self.plan.full else 32
        return cyclic(build(shape, self.plan.device, dtype, 0.02), cycle, HOLDS)

    def rollout(self, name: str) -> Result:
        from forced_run import forced, forced_lengths
        from suite_timing import clock

        from sodfast.rollout import native
        from sodfast.rollout.engine import SampleKey, Sampling

        full = self.plan.full
        mean, cap, words = (1500, 8192, 250) if full else (20, 64, 8)
        lengths = forced_lengths(64, mean, cap, 3)
        first = [torch.arange(number, number + words) % 32 for number in range(16)]
        prompts = [prompt for prompt in first for _ in range(4)]
        engine = native.NativeEngine(self.model, 256, None, SETTINGS[name])
        sampling = Sampling(1.0, 1.0, cap)
        # Compiles and captures: as many rows with the same cap, so the same kernels, but short.
        short = [min(4 + number % 64, cap) for number in range(64)]
        with forced(short, self.plan.device):
            engine.generate(prompts, range(64), sampling, SampleKey(1, 1))
        rows = []
        for step in (2,) if name == "off" else (2, 3):
            with forced(lengths, self.plan.device):
                start = clock(self.plan.device)
                answers = engine.generate(prompts, range(64), sampling, SampleKey(1, step))
                seconds = clock(self.plan.device) - start
            responses = [answer.response for answer in answers]
            assert [len(response) for response in responses] == lengths
            row = {
                "name": name if step == 2 else f"{name}, again",
                "milliseconds": 1e3 * seconds,
                "tokens_per_pass": engine.tokens_per_pass,
                "tokens": sum(lengths),
            }
            if name == "off":
                self.plain = responses
            elif step == 2 and self.plain:  # not where a command went on after `off`
                # In bf16 a pass of several tokens rounds otherwise: near-ties may turn.
                same = sum(map(torch.equal, responses, self.plain))
                row["answers_as_off"] = same / len(responses)
            rows.append(row)
        return {"rows": rows}


def cases(plan: Plan) -> list[Case]:
    rollouts = Rollouts(plan)
    return [
        Case(name, 1.5 if name == "off" else 2.1, partial(rollouts.rollout, name))
        for name in SETTINGS
    ]
