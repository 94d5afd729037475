"""When a run counts as collapsed (runaway length, or a test score that is lost), and when there is
nothing that it could learn from."""

from collections.abc import Mapping
from typing import Any

from sodfast.config import CollapseConfig

SCORED = 0.05  # the best mean@k from which on there is a score that can be lost
SILENT_STEPS = 5  # steps in a row without a learning signal after which that is said


class CollapseDetector:
    """The first step with runaway length or a lost test score. Our reading of the paper's
    undefined thresholds, numbers that are keys of `collapse.*` by their name:

    * mean response length ≥ length_fraction × the cap for length_steps steps in a row, or
    * eval mean@k < max(eval_floor, eval_fraction × the best so far), provided that this best is
      at least 0.05: a run that has never scored has no score that it could have lost.
    """

    def __init__(self, config: CollapseConfig, max_new_tokens: int, eval_samples: int) -> None:
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.eval_key = f"eval/mean@{eval_samples}"
        self.long_steps = 0
        self.best_eval = 0.0
        self.step: int | None = None

    def observe(self, line: Mapping[str, Any]) -> dict[str, Any] | None:
        """See the next metrics line; the reason as event fields when the condition is first met."""
        reason = self._reason(line)
        if reason is None or self.step is not None:
            return None
        self.step = line["step"]
        return reason

    def _reason(self, line: Mapping[str, Any]) -> dict[str, Any] | None:
        config = self.config
        if "length/mean" in line:
            threshold = config.length_fraction * self.max_new_tokens
            self.long_steps = self.long_steps + 1 if line["length/mean"] >= threshold else 0
            if self.long_steps >= config.length_steps:
                value = line["length/mean"]
                return {"reason": "length", "value": value, "threshold": threshold}
        if self.eval_key in line:
            value = line[self.eval_key]
            best = self.best_eval
            # Rewards of the user's own may be negative, and 0 is no share of anything.
            share = config.eval_fraction * best
            threshold = max(config.eval_floor, share) if share > 0 else config.eval_floor
            self.best_eval = max(best, value)
            if value < threshold and (best >= SCORED or config.eval_floor < 0 < line["step"]):
                return {"reason": "eval", "value": value, "threshold": threshold}
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"long_steps": self.long_steps, "best_eval": self.best_eval, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.long_steps = state["long_steps"]
        self.best_eval = state["best_eval"]
        self.step = state["step"]


class SignalWatch:
    """Says once when step after step has had neither a gradient nor a divergence."""

    def __init__(self, steps: int) -> None:
        self._left: int | None = min(SILENT_STEPS, steps)
        self._rewards: list[float] = []

    def observe(self, line: Mapping[str, Any]) -> str | None:
        """See the next metrics line; what to change where there is nothing to learn from."""
        if self._left is None or "optim/grad_norm" not in line:
            return None
        if line["optim/grad_norm"] or line.get("distill/divergence"):
            self._left = None  # a run that has learned may well end with nothing left to learn
            return None
        self._left -= 1
        self._rewards.append(line["reward/mean"])
        if self._left:
            return None
        self._left = None
        return f"no learning signal so far, neither gradient nor divergence: {self._remedy()}"

    def _remedy(self) -> str:
        if not any(self._rewards):
            return (
                "no answer has had a reward, so there is nothing to demonstrate or to prefer; take "
                "easier questions or a stronger model, raise rollout.samples_per_prompt or "
                "rollout.max_new_tokens, or lower teacher.success_reward"
            )
        if all(reward == 1 for reward in self._rewards):
            return "every answer is right; take harder questions"
        return "see objective.distill_coef, objective.policy_coef and teacher.success_reward"
