"""What is kept of a run, and when it counts as collapsed."""

from typing import Literal

from sodfast.config.types import Fraction, Interval, Positive, Section


class CheckpointConfig(Section):
    every: Interval = 25
    """Steps from one checkpoint to the next; 0: none but those of `at`, also not at the end or when
    interrupted; a resumed run without one starts over."""
    keep: Positive = 2
    """The newest so many checkpoints are kept."""
    at: tuple[Interval, ...] = ()
    """The checkpoints of these steps are saved, too, and not deleted: they can be forked."""
    best: bool = False
    """Whether the checkpoint of the evaluation with the highest mean@k so far is saved, too, and
    not deleted."""


class CollapseConfig(Section):
    stop: bool = False
    """Whether a run ends where it has collapsed."""
    length_fraction: Fraction = 0.9
    """Answers whose mean length is at least this share of `rollout.max_new_tokens` count as
    runaway."""
    length_steps: Positive = 5
    """Steps in a row with runaway answers after which a run counts as collapsed."""
    eval_floor: float = 0.01
    """A test mean@k below this counts as collapsed where the run had 0.05 before; below 0, for
    rewards of your own that are negative, wherever it stands after the start."""
    eval_fraction: Fraction = 0.1
    """A test mean@k below this share of the best so far counts as collapsed."""


class LogConfig(Section):
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go as well."""
    project: str = "sodfast"
    """The project's name at wandb and trackio."""
    samples_every: Interval | None = None
    """Steps from one record of all answers in samples/ to the next, of the rollouts and of an
    evaluation at that step, about 50 bytes a token; null: every step that is evaluated; 0: none."""
