"""Which task a run trains on. `task.name` chooses the model, its other keys are below."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Subject = Literal["biology", "chemistry", "material", "physics"]


class _TaskConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    # A response ends with the token that completes one of these, as it does with an EOS token.
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class ArithmeticConfig(_TaskConfig):
    """The lab's generated task; `train` and `test` count its questions."""

    name: Literal["arithmetic"] = "arithmetic"
    train: int = Field(default=1024, ge=1)
    test: int = Field(default=64, ge=1)


class MultipleChoiceConfig(_TaskConfig):
    """`train` and `test` are JSONL files or hub ids; a hub id without `test` is split 9:1.

    A hub id must have the columns of SciKnowEval; `subject` selects its domain.
    """

    name: Literal["multiple_choice"] = "multiple_choice"
    train: str
    test: str | None = None
    subject: Subject = "chemistry"


class ToolUseConfig(_TaskConfig):
    """`train` and `test` are JSONL files or hub ids; a hub id without `test` is split 9:1."""

    name: Literal["tool_use"] = "tool_use"
    train: str
    test: str | None = None


TaskConfig = Annotated[
    ArithmeticConfig | MultipleChoiceConfig | ToolUseConfig, Field(discriminator="name")
]
