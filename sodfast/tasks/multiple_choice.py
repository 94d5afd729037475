"""Multiple-choice questions in the manner of SciKnowEval (arXiv 2406.09098)."""

import re

from sodfast.config import MultipleChoiceConfig
from sodfast.errors import UsageError
from sodfast.tasks.base import Question
from sodfast.tasks.rows import Row, load_questions

SYSTEM = """\
You answer multiple-choice questions in science. Exactly one option is right.
Write your answer in two parts:
<reasoning>
how you arrive at the answer
</reasoning>
<answer>
the letter of the option, and nothing else
</answer>"""
REQUEST = "Work it out step by step, then answer with the letter of the right option."

_OPTION = re.compile(r"^([A-Z]):", re.MULTILINE)
_LETTER = re.compile(r"[A-Z]")


class MultipleChoiceTask:
    """Rows whose prompt lists options as "A: …" lines; `answer` is the right letter.

    The response's answer is the text after the last `<answer>` up to the next `</answer>`, or the
    whole response where the tag never opens, stripped. It must be the letter itself, so "a",
    "(B)" and "B: 18" score 0 (reward of arXiv 2601.20802). Under `task.scorer=reference`, which is
    the paper's public implementation, a response without the opening tag is also cut at its first
    `</answer>`: "B</answer>" is right there and wrong under `strict`.

    Raises:
        UsageError: as `load_questions`, and for an answer that is not among the prompt's options.
    """

    name = "multiple_choice"

    def __init__(self, config: MultipleChoiceConfig) -> None:
        def keep(row: Row) -> bool:
            return bool(
                row["domain"].lower() == config.subject
                and row["details"]["level"] == "L3"
                and row["type"].startswith("mcq")
            )

        self.train, self.test = load_questions(
            config, _check, keep=keep, convert=lambda row: _from_sciknoweval(row, config.request)
        )

        self._strict = config.scorer == "strict"

    def score(self, question: Question, response: str) -> float:
        return float(self._final_text(response) == question.answer)

    def feedback(self, question: Question, response: str) -> str | None:
        """Return a hint on the format; a well-formed answer gets none, right or wrong."""
        if self.extract(response) is not None:
            return None
        if "<answer>" not in response:
            return "The response has no <answer> tag with the letter of an option."
        return "The last <answer> tag holds something else than the letter of an option."

    def extract(self, response: str) -> str | None:
        text = self._final_text(response)
        return text if _LETTER.fullmatch(text) else None

    def _final_text(self, response: str) -> str:
        _, tag, rest = response.rpartition("<answer>")
        if not tag and self._strict:
            return response.strip()
        return rest.partition("</answer>")[0].strip()


def _check(question: Question) -> None:
    options = _OPTION.findall(question.prompt)
    if not options:
        raise UsageError("field 'prompt' lists no options, give each its own line as 'A: text'")
    if question.answer not in options:
        raise UsageError(
            f"field 'answer' must be one of the prompt's options {', '.join(options)}, "
            f"not {str(question.answer)[:40]!r}"
        )


def _from_sciknoweval(row: Row, request: str | None) -> Row | None:
    """Bring a row of hicai-zju/SciKnowEval into our layout, None if its options are incomplete.

    The task's own request stands below the options unless `task.request` brings another.
    """
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    if len(labels) != len(texts):
        return None
    options = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
    prompt = f"{row['question']}\n\n{options}" + (f"\n\n{REQUEST}" if request is None else "")
    return {"prompt": prompt, "answer": row["answerKey"], "system": SYSTEM}
