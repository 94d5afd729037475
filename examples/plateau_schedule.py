"""A schedule of one's own: the teacher follows when the student's reward has stopped rising.

    sodfast train schedule.kind=python schedule.source=examples/plateau_schedule.py:OnPlateau \
        schedule.options.patience=5
"""

from typing import Any

from sodfast.schedule import Decision, StepStatistics


class OnPlateau:
    """Copies the student after `patience` steps without a new best mean reward."""

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.best = 0.0
        self.waited = 0

    def observe(self, statistics: StepStatistics) -> Decision:
        reward = statistics.metrics["reward/mean"]
        self.waited = 0 if reward > self.best else self.waited + 1
        self.best = max(self.best, reward)
        if self.waited < self.patience:
            return Decision("keep", metrics={"schedule/waited": self.waited})
        self.waited = 0
        return Decision("copy", metrics={"schedule/waited": self.patience})

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
