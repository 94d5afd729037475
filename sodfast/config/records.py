"""What is kept of a run, and when it counts as collapsed."""

from typing import Literal

from sodfast.config.types import Fraction, Interval, Positive, Section


class CheckpointConfig(Section):
    # 0: no checkpoint, also not at the end or when interrupted; a resumed run then starts over.
    every: Interval = 25
    keep: Positive = 2
    # Also save, and never delete, the checkpoint of the evaluation with the highest mean@k so far.
    best: bool = False


class CollapseConfig(Section):
    """When a run counts as collapsed; the paper leaves it undefined, these are our readings."""

    stop: bool = False
    length_fraction: Fraction = 0.9  # mean length / cap that counts as runaway ...
    length_steps: Positive = 5  # ... when it lasts this many steps in a row
    eval_floor: float = 0.01  # test mean@k below this, or below ...
    eval_fraction: Fraction = 0.1  # ... this share of the best so far


class LogConfig(Section):
    """What is written beside metrics.jsonl, which always is: sinks, and answers in samples/."""

    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = "sodfast"
    # Every how many steps all answers go to samples/; null: where the run is evaluated; 0: never.
    # Those of an evaluation are kept unless it is 0.
    samples_every: Interval | None = None
