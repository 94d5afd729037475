"""When a run counts as collapsed: runaway length, or a test score that is lost."""

from collections.abc import Mapping
from typing import Any

from sodfast.config import CollapseConfig


class CollapseDetector:
    """The first step with runaway length or a lost test score. Our reading of the paper's
    undefined thresholds, every number a key of `collapse.*`:

    * mean response length ≥ length_fraction × the cap for length_steps steps in a row, or
    * eval mean@k < max(eval_floor, eval_fraction × the best so far), after at least one step,
      since an untrained student has no score that it could have lost.
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
            share = config.eval_fraction * self.best_eval
            # Rewards of the user's own may be negative, and 0 is no share of anything.
            threshold = max(config.eval_floor, share) if share > 0 else config.eval_floor
            self.best_eval = max(self.best_eval, value)
            if value < threshold and line["step"] > 0:
                return {"reason": "eval", "value": value, "threshold": threshold}
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"long_steps": self.long_steps, "best_eval": self.best_eval, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.long_steps = state["long_steps"]
        self.best_eval = state["best_eval"]
        self.step = state["step"]
