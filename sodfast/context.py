"""What the teacher is shown: which questions fit, who gets which hint, and the teacher's prompt.

The teacher sees the question and, as privileged context (arXiv 2601.20802), a successful attempt of
a sibling rollout.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sodfast.config import Config, TeacherConfig
from sodfast.errors import UsageError
from sodfast.model.load import LanguageModel, to_ids
from sodfast.rng import Stream, generator
from sodfast.run.console import Reporter
from sodfast.tasks.base import Grade, Question, Task

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
# More characters than a token of any vocabulary has on average: a longer text need not be encoded
# to be known as too long.
_TOKEN_CHARACTERS = 1000


@dataclass(frozen=True)
class Hint:
    """What the teacher is shown for one rollout.

    `kind` names the hint: a sibling's right answer, the row's own solution, or the environment's
    words alone; "none" where `teacher.context=none` shows nothing but the question. `source` is the
    index, among the step's rollouts, of the one whose answer is shown, None for the other kinds.
    `prompt` is the teacher's whole prompt: token ids [P] int64 on the CPU.
    """

    kind: Literal["demonstration", "reference", "feedback", "none"]
    source: int | None
    prompt: Tensor


def choose_demonstrations(
    rewards: Sequence[float], group_size: int, success_reward: float, seed: int, step: int
) -> list[int | None]:
    """For each rollout the index of its demonstration, or None.

    A demonstration is a successful rollout of the same group, not the rollout itself, drawn
    uniformly by a stream keyed by (seed, step, rollout). `rewards` holds groups of `group_size`.
    """
    chosen: list[int | None] = []
    for index in range(len(rewards)):
        first = index - index % group_size
        siblings = [
            other
            for other in range(first, first + group_size)
            if other != index and rewards[other] >= success_reward
        ]
        if siblings:
            stream = generator(seed, Stream.DEMONSTRATION, step, index)
            chosen.append(siblings[int(stream.integers(len(siblings)))])
        else:
            chosen.append(None)
    return chosen


class TeacherContext:
    """Renders the teacher's prompts from the templates of `TeacherConfig`."""

    def __init__(self, config: TeacherConfig, model: LanguageModel) -> None:
        self.config = config
        self.model = model

    def fits(self, question: Question) -> bool:
        """Whether the prompt leaves room for a demonstration at all."""
        if self.config.context == "none":
            return True
        return len(self._encode(question, " ", "")) <= self.config.max_prompt_tokens

    def render(
        self, question: Question, demonstration: str | None, feedback: str | None
    ) -> list[int]:
        """Token ids of the teacher's prompt, at most `max_prompt_tokens`: the demonstration is
        cut at its end, never the closing request or the assistant's header."""
        text = _THINKING.sub("", demonstration or "").strip()
        feedback = feedback or ""
        limit = self.config.max_prompt_tokens
        while len(ids := self._encode(question, text, feedback)) > limit:
            if not text:
                raise UsageError(
                    f"teacher.max_prompt_tokens={limit} does not hold question {question.id} and "
                    "its feedback: raise it, or set teacher.feedback=false"
                )
            tokens = self.model.encode_text(text)
            keep = max(0, len(tokens) - (len(ids) - limit))
            shorter = self.model.decode(tokens[:keep]).rstrip()
            # Decoding can give back as many characters as before; cutting must make progress.
            text = shorter if len(shorter) < len(text) else text[:-1]
        return ids

    def _encode(self, question: Question, demonstration: str, feedback: str) -> list[int]:
        config = self.config
        prompt = config.template.format(
            prompt=question.prompt,
            demonstration=config.demonstration_template.format(demonstration=demonstration)
            if demonstration
            else "",
            feedback=config.feedback_template.format(feedback=feedback) if feedback else "",
        )
        return self.model.encode(prompt, question.system, question.history)


def teacher_prompts(
    config: Config,
    context: TeacherContext,
    step: int,
    questions: Sequence[Question],
    prompts: Sequence[Tensor],
    texts: Sequence[str],
    grades: Sequence[Grade],
) -> list[Hint | None]:
    """The hint for each rollout of a step; None where there is nothing privileged to show
    (m_i = 0).

    `questions`, the student's `prompts`, the decoded `texts` and their `grades` have one entry per
    rollout, groups of `rollout.samples_per_prompt` one after the other.
    """
    if config.teacher.context == "none":
        return [Hint("none", None, prompt) for prompt in prompts]
    chosen = choose_demonstrations(
        [grade.reward for grade in grades],
        config.rollout.samples_per_prompt,
        config.teacher.success_reward,
        config.seed,
        step,
    )
    contexts: list[Hint | None] = []
    for question, grade, source in zip(questions, grades, chosen, strict=True):
        demonstration = None if source is None else texts[source]
        feedback = grade.feedback if config.teacher.feedback else None
        if demonstration is None and feedback is None:
            contexts.append(None)
        else:
            kind: Literal["demonstration", "feedback"]
            kind = "feedback" if demonstration is None else "demonstration"
            prompt = to_ids(context.render(question, demonstration, feedback))
            contexts.append(Hint(kind, source, prompt))
    return contexts


@dataclass(frozen=True)
class Questions:
    """The questions whose prompts fit, how many of train and test together do not, and the
    tokens of the longest prompt that does."""

    train: list[Question]
    test: list[Question]
    dropped: int
    longest: int


def _prompt_tokens(model: LanguageModel, key: str, question: Question, limit: int) -> int:
    """The tokens of a question's prompt, or some number above `limit` where that is plain."""
    if len(question.prompt) + len(question.system or "") > _TOKEN_CHARACTERS * limit:
        return limit + 1
    try:
        return len(model.encode_question(question))
    except UsageError as error:
        raise UsageError(f"{key}: question {question.id}: {error}") from error


def fitting_questions(
    config: Config, model: LanguageModel, task: Task, reporter: Reporter
) -> Questions:
    """Drop questions whose prompt exceeds the student's or the teacher's limit.

    Raises `UsageError` where none is left, or where a prompt and its answer can exceed what the
    model was made for.
    """
    limit = config.rollout.max_prompt_tokens
    longest = 0
    context = TeacherContext(config.teacher, model)
    kept: dict[str, list[Question]] = {}
    for key, questions in (("task.train", task.train), ("task.test", task.test)):
        kept[key] = []
        for question in questions:
            length = _prompt_tokens(model, key, question, limit)
            if length <= limit and context.fits(question):
                kept[key].append(question)
                longest = max(longest, length)
        if not kept[key]:
            raise UsageError(
                f"{key}: all {len(questions)} prompts are longer than "
                f"rollout.max_prompt_tokens={limit} or leave no room for a demonstration in "
                f"teacher.max_prompt_tokens={config.teacher.max_prompt_tokens}: raise them"
            )
        dropped = len(questions) - len(kept[key])
        if dropped:
            reporter.message(f"{key}: dropped {dropped} of {len(questions)} prompts as too long")
    positions = model.network.config.max_position_embeddings
    if longest + config.rollout.max_new_tokens > positions:
        raise UsageError(
            f"a prompt of {longest} tokens and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} exceed the model's {positions} positions: lower "
            "rollout.max_new_tokens or rollout.max_prompt_tokens"
        )
    total = len(task.train) + len(task.test)
    return Questions(
        train=kept["task.train"],
        test=kept["task.test"],
        dropped=total - len(kept["task.train"]) - len(kept["task.test"]),
        longest=longest,
    )
