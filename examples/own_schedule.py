"""A schedule of your own: the teacher follows once the student has learned what it had to say.

    python examples/own_schedule.py steps=60

Arguments are overrides of the configuration. `sodfast train` takes the same class:

    sodfast train schedule.kind=python schedule.source=examples/own_schedule.py:OnAgreement
"""

import sys

import sodfast
from sodfast.schedule import Decision, build_schedule, replay


class OnAgreement:
    """Copies the student when the divergence of student and teacher has fallen to `share` of the
    highest that it was since the last copy."""

    def __init__(self, share=0.5):
        self.share = share
        self.highest = 0.0

    def observe(self, statistics):
        divergence = statistics.metrics.get("distill/divergence")
        if divergence is None:  # no answer of this step had a hint
            return Decision("keep")
        self.highest = max(self.highest, divergence)
        left = divergence / self.highest if self.highest else 1.0
        if left > self.share:
            return Decision("keep", metrics={"schedule/left": left})
        self.highest = 0.0
        return Decision("copy", metrics={"schedule/left": left})

    def state_dict(self):
        return {"highest": self.highest}

    def load_state_dict(self, state):
        self.highest = state["highest"]


def main(overrides):
    kind = ["schedule.kind=python", f"schedule.source={__file__}:OnAgreement"]
    run = sodfast.train("lab", [*kind, "steps=40", *overrides])
    copies = [event["step"] for event in run.events if event["event"] == "refresh"]
    print(f"{run.path}: the teacher was replaced after the steps {copies}")

    # A schedule needs no model: it decides the same on the lines that the run has left.
    decisions = replay(build_schedule(run.config.schedule), run.metrics)
    repeated = [step for step, made in enumerate(decisions, 1) if made.action == "copy"]
    print(f"replayed on metrics.jsonl: {repeated}")


if __name__ == "__main__":
    main(sys.argv[1:])
