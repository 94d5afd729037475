"""What is asked: the tasks, their rows and how they are examined."""

import os
from typing import Annotated, Any, Literal, Union

from pydantic import Field, field_validator, model_validator

from sodfast.config.types import (
    MOST,
    AboveZero,
    Fraction,
    Interval,
    PathText,
    Positive,
    Section,
    SourceText,
    TopP,
    WarmOrGreedy,
)

Scorer = Literal["strict", "reference"]
Subject = Literal["biology", "chemistry", "material", "physics"]


class NoiseConfig(Section):
    """Rewards that say the opposite (`sodfast.rewards.with_noise`)."""

    share: Fraction
    """Share of the rewards r of training that are 1 − r instead, each by chance."""
    first: Positive = 1
    """The first step with such rewards."""
    last: Positive = MOST
    """The last step with such rewards."""

    @model_validator(mode="after")
    def _ordered(self) -> "NoiseConfig":
        if self.first > self.last:
            raise ValueError(f"task.label_noise: first={self.first} comes after last={self.last}")
        return self


class ArrivalConfig(Section):
    """Questions that training does not ask before a step."""

    step: Positive
    """The first step that may ask them."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the left factors, the largest ones, whose questions they are."""


class _TaskConfig(Section):
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer, with the token that completes one, as the model's end token
    does."""
    label_noise: NoiseConfig | None = None
    """Rewards in [0, 1] that are wrong on purpose, but for evaluations; `{share: 0.3, first: 96,
    last: 100}` makes a drift that passes."""


class ArithmeticConfig(_TaskConfig):
    name: Literal["arithmetic"] = "arithmetic"
    """The lab's generated task: a product of two factors, and a sum."""
    train: Positive = 1024
    """Questions to train on."""
    test: Positive = 64
    """Questions of the test."""
    arrival: ArrivalConfig | None = None
    """A later phase of the task: the products of the largest left factors, from a step on; null:
    all from the start."""


class SplitConfig(Section):
    train: str = "train"
    """Name of the split that is trained on."""
    test: str = "test"
    """Name of the split that is tested on."""


class RowsConfig(_TaskConfig):
    """Questions from rows."""

    train: PathText | None
    """Rows to train on: a JSONL file, or with the package `datasets` a folder or a hub id
    (`org/name` or `org/name:subset`)."""
    test: PathText | None = None
    """Rows of the test, as `train`; null: a tenth of the folder or hub id that `train` names."""
    split: str | SplitConfig | None = None
    """The split that `train` is read from, or the two that `train` and `test` are; null: `train`
    and `test`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the fields of a row → names of the columns that hold them, such as `{prompt:
    question}`."""
    system: str | None = None
    """The system message of every row; null: the row's own; empty: none."""
    request: str | None = None
    """A text below every prompt; null: the task's own; empty: none."""


def _absolute(source: str | None) -> str | None:
    """A path on disk in full, so that a run can be resumed from any folder; a hub id as it is."""
    on_disk = source is not None and (source.endswith(".jsonl") or os.path.exists(source))
    return os.path.abspath(source) if source and on_disk else source


class _PlacedRowsConfig(RowsConfig):
    """Rows whose paths are kept in full. Those of 0.1.0's tasks are kept as they were given."""

    _in_full = field_validator("train", "test")(_absolute)


class MultipleChoiceConfig(RowsConfig):
    name: Literal["multiple_choice"] = "multiple_choice"
    """Questions with options, answered by a letter between `<answer>` tags."""
    train: PathText
    """Rows with `prompt` and `answer`, the letter: a JSONL file, a folder, or a hub id, which must
    have the columns of SciKnowEval unless `columns` says which it has."""
    scorer: Scorer = "strict"
    """How answers are read: strictly, or as lasgroup/SDPO does, so that scores compare."""
    subject: Subject = "chemistry"
    """Which domain of SciKnowEval, where it comes from the hub."""


class ToolUseConfig(RowsConfig):
    name: Literal["tool_use"] = "tool_use"
    """Questions answered by calls of tools."""
    train: PathText
    """Rows with `prompt` and `answer`, a list of calls: a JSONL file, a folder or a hub id."""
    scorer: Scorer = "strict"
    """How answers are read: strictly, or as lasgroup/SDPO does, so that scores compare."""


class PythonConfig(_PlacedRowsConfig):
    name: Literal["python"] = "python"
    """The user's own task, in Python."""
    source: SourceText
    """`FILE.py:NAME` or `module.submodule:NAME` of a function that scores the rows of `train` and
    `test`, or of a class that brings its questions."""
    train: PathText | None = None
    """Rows that a function scores: a JSONL file, a folder or a hub id; null for a class."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keywords that a class is built from."""
    timeout: AboveZero = 60.0
    """Seconds for a call of the user's code."""


class MathConfig(_PlacedRowsConfig):
    name: Literal["math"] = "math"
    """Questions whose answer is a number or an expression, compared by the package math-verify."""
    train: PathText
    """Rows with `prompt` and `answer`, a number or LaTeX: a JSONL file, a folder or a hub id."""
    timeout: AboveZero = 10.0
    """Seconds to compare an answer, after which it is wrong."""


class SandboxConfig(Section):
    """What a model's programs are kept to (SECURITY.md)."""

    isolation: Literal["namespaces", "rlimits"] = "namespaces"
    """What keeps the programs apart: namespaces, in which they see and reach nothing, or, where the
    kernel allows none, bounds of time, memory and output alone."""
    memory_mib: Positive = 512
    """MiB of each process of a program, and of all of them together."""
    processes: Positive = 16
    """Processes of a program at once, threads included."""


class CodeConfig(_PlacedRowsConfig):
    name: Literal["code"] = "code"
    """Questions answered by a program, which is run in a sandbox."""
    train: PathText
    """Rows with `prompt`, `tests` and perhaps `entry_point`: a JSONL file, a folder or a hub id."""
    timeout: AboveZero = 10.0
    """Seconds for all tests of an answer."""
    options: SandboxConfig = SandboxConfig()
    """What a model's programs are kept to."""


TaskConfig = Annotated[
    Union[  # noqa: UP007
        ArithmeticConfig,
        MultipleChoiceConfig,
        ToolUseConfig,
        MathConfig,
        CodeConfig,
        PythonConfig,
    ],
    Field(discriminator="name"),
]


class EvalConfig(Section):
    every: Interval = 10
    """Steps from one evaluation to the next, beside those of the untrained student and at the end;
    0: none at all."""
    samples: Positive = 16
    """Answers to each question of the test: the k of mean@k, best@k and maj@k."""
    temperature: WarmOrGreedy = 0.6
    """What logits are divided by before sampling; 0: greedy."""
    top_p: TopP = 0.95
    """Sample from the likeliest tokens that together have this probability; 1: from all."""
    top_k: Positive | None = None
    """Sample from this many likeliest tokens; null: from all."""
    questions: Positive | None = None
    """Questions of each test that are asked, evenly spaced; null: all."""
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")], TaskConfig] = Field(
        default_factory=dict
    )
    """Other tasks, by names of your own, whose tests are asked beside the run's; their metrics are
    `eval/NAME/mean@k`."""
    common_draws: bool = True
    """Whether all evaluations draw the same random numbers, so that two of them differ where the
    student does; false: fresh ones at each step."""

    def due(self, step: int) -> bool:
        """Whether a step is evaluated no matter where the run ends."""
        return self.every > 0 and step % self.every == 0

    def due_at_the_end(self, step: int) -> bool:
        """Whether a step is evaluated only because the run ends there.

        The last step of a run is evaluated unless eval.every=0. Where it is not due otherwise, that
        closing evaluation belongs to this end of the run alone: the checkpoint holds the state from
        before it, and a run that is continued drops it.
        """
        return self.every > 0 and not self.due(step)
