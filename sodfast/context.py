"""What the teacher is shown: which questions fit, who gets which hint, and the teacher's prompt.

The teacher sees the question and, as privileged context (arXiv 2601.20802), a solution, what the
task says about this very answer, or both. A solution is a successful attempt of a sibling rollout,
or the row's own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any, Literal

from torch import Tensor

from sodfast.config import Config, TeacherConfig
from sodfast.errors import UsageError
from sodfast.model.chat import opens_thinking
from sodfast.model.language_model import LanguageModel, to_ids
from sodfast.rng import Stream, generator
from sodfast.run.console import Reporter
from sodfast.tasks.base import Grade, Question, Task

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
# More characters than a token of any vocabulary has on average: a longer text need not be encoded
# to be known as too long.
_TOKEN_CHARACTERS = 1000
# Values of `teacher.context` under which a sibling's answer, or the row's own, can be the hint.
_SIBLINGS = ("demonstration", "demonstration_or_reference")
_ROWS = ("reference", "demonstration_or_reference")


@dataclass(frozen=True)
class Hint:
    """What the teacher is shown for one rollout.

    `kind` names the hint: a sibling's right answer, the row's own solution, or the task's words
    alone; "none" where `teacher.context=none` shows nothing but the question. `source` is the
    index, among the step's rollouts, of the one whose answer is shown, None for the other kinds.
    `prompt` is the teacher's whole prompt: token ids [P] int64 on the CPU.
    """

    kind: Literal["demonstration", "reference", "feedback", "none"]
    source: int | None
    prompt: Tensor


def choose_demonstrations(
    rewards: Sequence[float],
    group_size: int,
    success_reward: float,
    seed: int,
    step: int,
    demonstrate_self: bool = False,
) -> list[int | None]:
    """For each rollout the index of its demonstration, or None.

    A demonstration is a successful rollout of the same group, the rollout itself only with
    `demonstrate_self`, drawn uniformly by a stream keyed by (seed, step, rollout). `rewards` holds
    groups of `group_size`.
    """
    chosen: list[int | None] = []
    for index in range(len(rewards)):
        first = index - index % group_size
        candidates = [
            other
            for other in range(first, first + group_size)
            if (other != index or demonstrate_self) and rewards[other] >= success_reward
        ]
        if candidates:
            stream = generator(seed, Stream.DEMONSTRATION, step, index)
            chosen.append(candidates[int(stream.integers(len(candidates)))])
        else:
            chosen.append(None)
    return chosen


def reference_solution(question: Question) -> str | None:
    """The row's own solution as text: its field `solution`, or else its answer; None where it has
    neither. Lists and objects are written as JSON."""
    for value in (question.columns.get("solution"), question.answer):
        text = "" if value is None else _written(value)
        if text.strip():
            return text
    return None


def _written(value: Any) -> str:
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


class TeacherContext:
    """Renders the teacher's prompts from the templates of `TeacherConfig`."""

    def __init__(self, config: TeacherConfig, model: LanguageModel) -> None:
        self.config = config
        self.student = model
        self.model = model
        if config.chat_template_kwargs is not None:
            self.model = replace(model, chat_template_kwargs=config.chat_template_kwargs)

    def fits(self, question: Question) -> bool:
        """Whether the prompt leaves room for each part of a hint at all."""
        config = self.config
        parts = []
        if config.context not in ("feedback", "none"):
            parts.append((" ", ""))
        if config.context == "feedback" or config.feedback != "never":
            parts.append(("", " "))
        limit = config.max_prompt_tokens
        return all(len(self._encode(question, *part)) <= limit for part in parts)

    def demonstration(self, answer: str) -> str:
        """What of an answer can be shown: all but its thoughts."""
        opened = "</think>" in answer and self._opens_thinking
        return _without_thoughts("<think>" + answer if opened else answer)

    def hint(
        self, question: Question, grade: Grade, source: int | None, demonstration: str | None
    ) -> Hint | None:
        """The hint of a rollout with this grade; None where it has none (m_i = 0). `demonstration`
        is what is shown of the rollout `source`; None for both where it has none."""
        config = self.config
        solution = demonstration
        if solution is None and config.context in _ROWS:
            solution = _without_thoughts(reference_solution(question) or "") or None
        feedback = grade.feedback if grade.feedback and grade.feedback.strip() else None
        added = {"never": False, "without_solution": solution is None, "always": True}
        if config.context != "feedback" and not added[config.feedback]:
            feedback = None
        if solution is None and feedback is None:
            return None
        kind: Literal["demonstration", "reference", "feedback"] = "demonstration"
        if source is None:
            kind = "feedback" if solution is None else "reference"
        return Hint(kind, source, to_ids(self.render(question, solution, feedback)))

    def render(self, question: Question, solution: str | None, feedback: str | None) -> list[int]:
        """Token ids of the teacher's prompt, at most `max_prompt_tokens`: first the solution and
        then the feedback is cut at its end, never the closing request or the assistant's header.

        Raises `UsageError` where the prompt is too long without either.
        """
        parts = [_without_thoughts(solution or ""), feedback or ""]
        limit = self.config.max_prompt_tokens
        while len(ids := self._encode(question, *parts)) > limit:
            if not any(parts):
                raise UsageError(
                    f"teacher.max_prompt_tokens={limit} does not hold question {question.id}: "
                    "raise it"
                )
            cut = 0 if parts[0] else 1
            tokens = self.model.encode_text(parts[cut])
            keep = max(0, len(tokens) - (len(ids) - limit))
            shorter = self.model.decode(tokens[:keep]).rstrip()
            # Decoding can give back as many characters as before; cutting must make progress.
            parts[cut] = shorter if len(shorter) < len(parts[cut]) else parts[cut][:-1]
        return ids

    @cached_property
    def _opens_thinking(self) -> bool:
        return opens_thinking(self.student.tokenizer, self.student.chat_template_kwargs)

    def _encode(self, question: Question, solution: str, feedback: str) -> list[int]:
        config = self.config
        prompt = config.template.format(
            prompt=question.prompt,
            demonstration=config.demonstration_template.format(demonstration=solution)
            if solution
            else "",
            feedback=config.feedback_template.format(feedback=feedback) if feedback else "",
        )
        return self.model.encode(prompt, question.system, question.history)


def _without_thoughts(text: str) -> str:
    return _THINKING.sub("", text).strip()


def teacher_prompts(
    config: Config,
    context: TeacherContext,
    step: int,
    questions: Sequence[Question],
    texts: Sequence[str],
    grades: Sequence[Grade],
) -> list[Hint | None]:
    """The hint for each rollout of a step; None where there is nothing privileged to show
    (m_i = 0).

    `questions`, the decoded `texts` and their `grades` have one entry per rollout, groups of
    `rollout.samples_per_prompt` one after the other.
    """
    teacher = config.teacher
    if teacher.context == "none":
        return [Hint("none", None, to_ids(context.model.encode_question(q))) for q in questions]
    sources: list[int | None] = [None] * len(texts)
    shown: list[str] = []  # of each answer, where answers can be demonstrations
    if teacher.context in _SIBLINGS:
        shown = [context.demonstration(text) for text in texts]
        sources = choose_demonstrations(
            # An answer that is nothing but thoughts can teach nobody. One that is blank altogether
            # is right where any answer is, and counts: runs of 0.1.0 go on as they began.
            [
                -inf if text.strip() and not rest else grade.reward
                for grade, text, rest in zip(grades, texts, shown, strict=True)
            ],
            config.rollout.samples_per_prompt,
            teacher.success_reward,
            config.seed,
            step,
            teacher.demonstrate_self,
        )
    return [
        context.hint(question, grade, source, None if source is None else shown[source])
        for question, grade, source in zip(questions, grades, sources, strict=True)
    ]


@dataclass(frozen=True)
class Questions:
    """The questions whose prompts fit, how many of train and test together do not, the tokens of
    the longest prompt that does, and the questions of `eval.tasks`. `test` and `others` are cut to
    `eval.questions`."""

    train: list[Question]
    test: list[Question]
    dropped: int
    longest: int
    others: Mapping[str, Sequence[Question]] = field(default_factory=dict)


def _prompt_tokens(model: LanguageModel, key: str, question: Question, limit: int) -> int:
    """The tokens of a question's prompt, or some number above `limit` where that is plain."""
    if len(question.prompt) + len(question.system or "") > _TOKEN_CHARACTERS * limit:
        return limit + 1
    try:
        return len(model.encode_question(question))
    except UsageError as error:
        raise UsageError(f"{key}: question {question.id}: {error}") from error


def fitting_questions(
    config: Config,
    model: LanguageModel,
    task: Task,
    reporter: Reporter,
    others: Mapping[str, Task] | None = None,
) -> Questions:
    """Drop questions whose prompt exceeds the student's or the teacher's limit; `others` are those
    of `eval.tasks`, whose tests no teacher sees.

    Raises `UsageError` where none is left, where a prompt and its answer can exceed what the model
    was made for, and where `teacher.context` asks for solutions that no question to train on has.
    """
    context = TeacherContext(config.teacher, model)
    asked = {"task.train": task.train, "task.test": task.test}
    asked |= {f"eval.tasks.{name}": other.test for name, other in (others or {}).items()}
    kept: dict[str, list[Question]] = {}
    longest = 0
    for key, questions in asked.items():
        shown = context if key.startswith("task.") else None
        kept[key], length = _fitting(config, model, shown, key, questions)
        longest = max(longest, length)
        dropped = len(questions) - len(kept[key])
        if dropped:
            reporter.message(f"{key}: dropped {dropped} of {len(questions)} prompts as too long")
    if all(question.arrival > 1 for question in kept["task.train"]):
        raise UsageError("task.train: no question arrives by step 1: raise task.train")
    _require_solutions(config.teacher.context, kept["task.train"], reporter)
    positions = model.network.config.max_position_embeddings
    if longest + config.rollout.max_new_tokens > positions:
        raise UsageError(
            f"a prompt of {longest} tokens and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} exceed the model's {positions} positions: lower "
            "rollout.max_new_tokens or rollout.max_prompt_tokens"
        )
    dropped = sum(len(asked[key]) - len(kept[key]) for key in ("task.train", "task.test"))
    tests = {key: evenly_spaced(kept[key], config.eval.questions) for key in kept}
    return Questions(
        train=kept["task.train"],
        test=tests["task.test"],
        dropped=dropped,
        longest=longest,
        others={name: tests[f"eval.tasks.{name}"] for name in others or {}},
    )


def _fitting(
    config: Config,
    model: LanguageModel,
    context: TeacherContext | None,
    key: str,
    questions: Sequence[Question],
) -> tuple[list[Question], int]:
    """The questions that fit the student and, with `context`, the teacher; the longest's tokens."""
    limit, kept, longest = config.rollout.max_prompt_tokens, [], 0
    for question in questions:
        length = _prompt_tokens(model, key, question, limit)
        if length <= limit and (context is None or context.fits(question)):
            kept.append(question)
            longest = max(longest, length)
    if not kept:
        raise UsageError(
            f"{key}: all {len(questions)} prompts are longer than "
            f"rollout.max_prompt_tokens={limit} or leave no room for a hint in "
            f"teacher.max_prompt_tokens={config.teacher.max_prompt_tokens}: raise them"
        )
    return kept, longest


def evenly_spaced(questions: Sequence[Question], count: int | None) -> list[Question]:
    """`count` of the questions, evenly spaced, the same in every run; all where there are fewer,
    or for None."""
    if count is None or count >= len(questions):
        return list(questions)
    return [questions[index * len(questions) // count] for index in range(count)]


def _require_solutions(shown: str, questions: Sequence[Question], reporter: Reporter) -> None:
    """Say how many questions have no solution of their own where the teacher is shown them."""
    lacking = sum(reference_solution(question) is None for question in questions)
    if shown not in _ROWS or not lacking:
        return
    if lacking == len(questions):
        raise UsageError(
            f"teacher.context={shown}: no question of task.train has a field 'solution' or an "
            "answer: name the column in task.columns.solution, or set teacher.context=demonstration"
        )
    reporter.message(
        f"task.train: {lacking} of {len(questions)} questions have no solution to show the teacher"
    )
