"""The questions of a task that a run can ask: those whose prompts fit its limits."""

from dataclasses import dataclass

from sodfast.config import Config
from sodfast.console import Reporter
from sodfast.errors import UsageError
from sodfast.model import LanguageModel
from sodfast.tasks import Question, Task
from sodfast.teacher import TeacherContext


@dataclass(frozen=True)
class Questions:
    """The questions whose prompts fit, how many of train and test together do not, and the
    tokens of the longest prompt that does."""

    train: list[Question]
    test: list[Question]
    dropped: int
    longest: int


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
            length = len(model.encode_question(question))
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
