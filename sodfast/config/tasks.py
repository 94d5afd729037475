"""What is asked: the tasks, their rows and how they are examined."""

import os
from typing import Annotated, Any, Literal, Union

from pydantic import Field, field_validator

from sodfast.config.types import (
    AboveZero,
    Interval,
    PathText,
    Positive,
    Section,
    SourceText,
    TopP,
    WarmOrGreedy,
)

# How responses are read: strict as the tasks' pages say, reference as lasgroup/SDPO does, so that
# scores compare.
Scorer = Literal["strict", "reference"]
Subject = Literal["biology", "chemistry", "material", "physics"]


class _TaskConfig(Section):
    # Strings that end a response, with the token that completes one, as an EOS token does.
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class ArithmeticConfig(_TaskConfig):
    """The lab's generated task; `train` and `test` count its questions."""

    name: Literal["arithmetic"] = "arithmetic"
    train: Positive = 1024
    test: Positive = 64


class SplitConfig(Section):
    """Names of the splits of a data set that are trained and tested on."""

    train: str = "train"
    test: str = "test"


class RowsConfig(_TaskConfig):
    """Questions from rows. `train` and `test` are JSONL files, folders or hub ids (`org/name` or
    `org/name:subset`); the last two need the package `datasets`, and without `test` they are split
    9:1."""

    train: PathText | None
    test: PathText | None = None
    # The split that `train` is read from (`test` then reads "test"), or one for each.
    split: str | SplitConfig | None = None
    columns: dict[str, str] = Field(
        default_factory=dict
    )  # our names → the columns that hold them, {prompt: question}
    system: str | None = None  # the system message of every row; null: its own, "": none
    request: str | None = None  # stands below every prompt; null: the task's own, "": none


def _absolute(source: str | None) -> str | None:
    """A path on disk in full, so that a run can be resumed from any folder; a hub id as it is."""
    on_disk = source is not None and (source.endswith(".jsonl") or os.path.exists(source))
    return os.path.abspath(source) if source and on_disk else source


class _PlacedRowsConfig(RowsConfig):
    """Rows whose paths are kept in full. Those of 0.1.0's tasks are kept as they were given."""

    _in_full = field_validator("train", "test")(_absolute)


class MultipleChoiceConfig(RowsConfig):
    """A hub id must have the columns of SciKnowEval, unless `columns` says which it has; `subject`
    selects its domain. Folders and files have the fields `prompt` and `answer`."""

    name: Literal["multiple_choice"] = "multiple_choice"
    train: PathText
    scorer: Scorer = "strict"
    subject: Subject = "chemistry"


class ToolUseConfig(RowsConfig):
    name: Literal["tool_use"] = "tool_use"
    train: PathText
    scorer: Scorer = "strict"


class PythonConfig(_PlacedRowsConfig):
    """The user's own task: `source` is FILE.py:NAME or module:NAME. A class is built from `options`
    and brings its questions; a function scores the rows of `train` and `test`."""

    name: Literal["python"] = "python"
    source: SourceText
    train: PathText | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    timeout: AboveZero = 60.0  # seconds for a call


class MathConfig(_PlacedRowsConfig):
    """Rows whose `answer` is a number or LaTeX, compared by the package math-verify."""

    name: Literal["math"] = "math"
    train: PathText
    timeout: AboveZero = 10.0  # seconds for an answer


class SandboxConfig(Section):
    """What a model's programs are kept to (SECURITY.md)."""

    # namespaces: they see and reach nothing; rlimits: where the kernel allows no namespaces, they
    # are bounded in time, memory and output alone.
    isolation: Literal["namespaces", "rlimits"] = "namespaces"
    memory_mib: Positive = 512  # of each process, and of all together
    processes: Positive = 16  # at once, threads included


class CodeConfig(_PlacedRowsConfig):
    """Rows whose `tests` the model's program must pass, run in a sandbox."""

    name: Literal["code"] = "code"
    train: PathText
    timeout: AboveZero = 10.0  # seconds for all tests of an answer
    options: SandboxConfig = SandboxConfig()


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
    every: Interval = 10  # 0: no evaluation, neither of the untrained student nor at the end
    samples: Positive = 16
    temperature: WarmOrGreedy = 0.6
    top_p: TopP = 0.95
    top_k: Positive | None = None
    questions: Positive | None = None  # of each test, evenly spaced; null: all
    # Other tasks whose tests are asked beside the run's own; metrics eval/<name>/mean@k.
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")], TaskConfig] = Field(
        default_factory=dict
    )
    # The same random numbers in every evaluation, so that two of them differ where the student
    # does; false: fresh ones at each step.
    common_draws: bool = True
