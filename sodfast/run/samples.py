"""The answers of a run on disk: what a line of samples/ holds, and who reads and deletes it.

samples/step-N.jsonl   a line for each rollout of step N (`Rollout`)
samples/eval-N.jsonl   a line for each answer of the evaluation after step N (`Answer`)
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sodfast.errors import UsageError

_FILE = re.compile(r"(step|eval)-(0|[1-9]\d{0,17})\.jsonl(\.[0-9a-f]{16}\.tmp)?")


class Answer(BaseModel):
    """One answer. L is the number of its tokens, EOS included; texts of prompts are what the model
    was given, special tokens and all."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    step: int
    id: str  # of the question
    prompt: str
    response: str  # without special tokens
    tokens: Annotated[list[int], Field(min_length=1)]  # [L]
    # [L], joined the response. A character that several tokens spell stands with the last of them;
    # a special token has no text.
    text: list[str]
    reward: float
    feedback: str | None  # the environment's words
    length: int  # L
    capped: bool  # ended by rollout.max_new_tokens
    # What the teacher was shown beside the question; null: nothing, as in every evaluation.
    hint: Literal["demonstration", "reference", "feedback"] | None
    hint_source: int | None  # the demonstration's line in the file, from 0
    teacher_prompt: str | None  # null where m_i = 0
    advantage: float | None  # null in an evaluation
    # [L] fp32, nats: of the student's untruncated softmax, as measured when it sampled.
    logprob: list[float]
    entropy: list[float]

    @model_validator(mode="after")
    def _fit(self) -> "Answer":
        if any(len(self.tokens) != n for n in self.lengths()):
            raise ValueError("lists of different lengths")
        if "".join(self.text) != self.response:
            raise ValueError("its text does not join to its response")
        return self

    def lengths(self) -> list[int]:
        """What must all be L."""
        return [self.length, len(self.text), len(self.logprob), len(self.entropy)]


class Rollout(Answer):
    """One rollout of training."""

    # [L] fp32: D_t of the objective, as the update computed it that trained on this rollout; null
    # where nothing was distilled.
    divergence: list[float] | None

    def lengths(self) -> list[int]:
        return [*super().lengths(), *([] if self.divergence is None else [len(self.divergence)])]


def sample_file(run: Path, step: int, evaluation: bool = False) -> Path:
    return run / "samples" / f"{'eval' if evaluation else 'step'}-{step}.jsonl"


def sampled_steps(run: Path, evaluation: bool = False) -> list[int]:
    """The steps whose answers there are, ascending."""
    kind = "eval" if evaluation else "step"
    found = [match for match in _files(run) if match[1] == kind and match[3] is None]
    return sorted(int(match[2]) for match in found)


def remove_later(run: Path, rollouts: int, evaluations: int) -> None:
    """Delete the rollouts of steps after `rollouts`, the answers of evaluations after
    `evaluations`, and what a process that was killed has left of a file."""
    for match in _files(run):
        last = rollouts if match[1] == "step" else evaluations
        if match[3] is not None or int(match[2]) > last:
            (run / "samples" / match[0]).unlink()


def _files(run: Path) -> list[re.Match[str]]:
    if not (run / "samples").is_dir():
        return []
    return [found for name in os.listdir(run / "samples") if (found := _FILE.fullmatch(name))]


def read_samples(run: Path, step: int, evaluation: bool = False) -> list[dict[str, Any]]:
    """The lines of samples/step-N.jsonl or, of an evaluation, of samples/eval-N.jsonl: fields as in
    `Rollout` and `Answer`.

    Raises `UsageError`, one line, where there are none of that step, or for a damaged line.
    """
    return list(iterate_samples(run, step, evaluation))


def iterate_samples(run: Path, step: int, evaluation: bool = False) -> Iterator[dict[str, Any]]:
    """`read_samples` line by line, for whoever does not need all of a large file."""
    file = sample_file(run, step, evaluation)
    if not file.is_file():
        steps = sampled_steps(run, evaluation)
        if step in steps:
            raise UsageError(f"{file} is no regular file: replace it by one")
        known = f"only of {', '.join(map(str, steps))}" if steps else "nor of any other"
        raise UsageError(
            f"{run} has no answers of {'the evaluation after ' if evaluation else ''}step {step}, "
            f"{known}; log.samples_every says which steps are kept"
        )
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield _parse(line, step, evaluation, f"{file}:{number}")
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error


def _parse(line: bytes, step: int, evaluation: bool, place: str) -> dict[str, Any]:
    try:
        answer = (Answer if evaluation else Rollout).model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise UsageError(f"{place}: {where + ': ' if where else ''}{message}") from error
    if answer.step != step:
        raise UsageError(f"{place}: an answer of step {answer.step}")
    return answer.model_dump()


def to_text(answers: Sequence[Answer]) -> str:
    """The lines of a file."""
    return "".join(answer.model_dump_json() + "\n" for answer in answers)


def shown_hint(row: Mapping[str, Any]) -> str:
    """What the teacher's prompt has beside the student's, "" where that is nothing."""
    prompt, teacher_prompt = row["prompt"], row["teacher_prompt"] or ""
    rest = teacher_prompt[_common(prompt, teacher_prompt) :]
    return rest[: len(rest) - _common(prompt[::-1], rest[::-1])].strip()


def _common(left: str, right: str) -> int:
    """How many letters both begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))
