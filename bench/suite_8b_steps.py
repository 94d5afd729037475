"""Part `8b_steps`: full steps of the 8B preset, one a case, beside `sodfast plan` and the hardware.

A step has 16 × 4 responses from the native engine, forced to lengths of 1.5k tokens on average,
three of them at the cap of 8192. Before the first one of a process a short step is run, which
compiles, captures and gives the teacher weights of its own; steps are then alike, so a part that is
gone on with after an end needs no step before its own.

Model FLOP utilisation (MFU) is the training phase's: the products that the model needs, over the
rate of a bf16 product of 8192³ random numbers measured in the same process; beside it over the
nominal 989 TFLOP/s of an H100 or H200 SXM.
"""

import tempfile
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from forced_run import EIGHT_B, REHEARSAL, forced, lengths_of, start, training_flops
from suite_record import Case, Plan, Result, check
from suite_timing import ceilings

SOURCES = [
    Path(__file__).with_name("forced_run.py"),
    *(Path(__file__).parents[1] / "sodfast").rglob("*.py"),
]
NOMINAL_FLOPS = 989e12  # a second, bf16 without sparsity
UTILISATION = 0.45  # of the measured rate, at least
STEP_SECONDS = 75.0  # on an H200 that is capped at 78 GiB, at most
OFF_PLAN = 0.05  # a peak's distance from the plan's, as a share of it, at most
STEPS = (2, 3, 4)  # the short one is the first


class Run:
    """What the steps share: a trainer, made when first asked for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.setting = EIGHT_B if plan.full else REHEARSAL
        self.folder = tempfile.TemporaryDirectory()
        self.seen: list[Any] = []  # the last step's rollouts

    @cached_property
    def rate(self) -> float:
        return ceilings(self.plan.device, self.plan.full)["product_flops_per_second"]

    @cached_property
    def trainer(self) -> Any:
        trainer = start(self.setting, self.plan.device, Path(self.folder.name))
        original = trainer._rollout

        def watched(step: int) -> Any:
            self.seen[:] = [original(step)]
            return self.seen[0]

        trainer._rollout = watched  # type: ignore[method-assign]
        rollout = trainer.config.rollout
        count = rollout.prompts_per_step * rollout.samples_per_prompt
        short = [4 + number % 64 for number in range(count)]
        self.take(trainer, 1, [min(length, rollout.max_new_tokens) for length in short])
        return trainer

    def take(self, trainer: Any, step: int, lengths: list[int]) -> dict[str, Any]:
        """The metrics line of one step."""
        from sodfast.run.interrupt import Interruption
        from sodfast.run.loggers import Logger

        with forced(lengths, self.plan.device):
            trainer._train_step(step, Interruption(), Logger(trainer.config, trainer.run.path))
        line: dict[str, Any] = trainer.lines[-1]
        return line

    def step(self, number: int) -> Result:
        from sodfast.memory.estimate import Estimate

        rate, trainer = self.rate, self.trainer  # the rate before there is much in memory
        line = self.take(trainer, number, self.setting.lengths(trainer.config))
        (rollouts,) = self.seen
        planned = Estimate(trainer.config, lengths_of(rollouts)).peaks
        rows = [
            {
                "name": phase,
                "milliseconds": 1e3 * line[f"time/{phase}"],
                "peak_bytes": line.get(f"memory/peak_{phase}_bytes"),
                "planned_bytes": planned[phase],
            }
            for phase in ("rollout", "teacher", "train")
        ]
        achieved = training_flops(trainer.model.network, rollouts) / line["time/train"]
        utilisation = {
            "name": "model FLOP utilisation of training",
            "flops_per_second": achieved,
            "measured_flops_per_second": rate,
            "share_of_measured": achieved / rate,
            "nominal_flops_per_second": NOMINAL_FLOPS,
            "share_of_nominal": achieved / NOMINAL_FLOPS,
        }
        checks = []
        if self.plan.full:
            share = utilisation["share_of_measured"]
            checks = [
                check("seconds", line["time/step"], STEP_SECONDS),
                check("training: share of the measured matrix rate", share, UTILISATION, False),
                *(
                    check(
                        f"{row['name']}: peak off the plan",
                        abs(row["peak_bytes"] / row["planned_bytes"] - 1),
                        OFF_PLAN,
                    )
                    for row in rows
                ),
            ]
        lengths = [len(sample.response) for sample in rollouts.samples]
        return {
            "checks": checks,
            "rows": [*rows, utilisation],
            "responses": len(lengths),
            "response_tokens": sum(lengths),
            "longest": max(lengths),
            "kept_layers": trainer.config.model.kept_layers,
            "line": line,
        }


def cases(plan: Plan) -> list[Case]:
    run = Run(plan)
    return [Case(f"step {number}", 2.5, partial(run.step, number)) for number in STEPS]
