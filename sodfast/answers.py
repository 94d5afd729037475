"""What a run keeps of its answers: each token's text and numbers, and what the teacher was shown.

They become the lines of samples/ (run/samples.py). Nothing is computed a second time: log-probs and
entropies are the rollout's, divergences those that the updates' loss has computed.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sodfast.config import Config
from sodfast.context import Hint
from sodfast.model.language_model import LanguageModel
from sodfast.parallel.ranks import ALONE, Ranks
from sodfast.rollout.engine import Sample
from sodfast.run.samples import Answer, Rollout
from sodfast.tasks.base import Grade, Question

if TYPE_CHECKING:
    from sodfast.student import Rollouts

_BROKEN = "\ufffd"  # what bytes that are no whole character decode to
_LONGEST = 4  # bytes of a character in UTF-8


class AnswerLog:
    """Writes a run's answers to samples/. It remembers the text of every token it has met.

    `write(step, answers, evaluation)` is the run directory's. Rank 0 writes for all; the other
    ranks make the same calls.
    """

    def __init__(
        self,
        config: Config,
        model: LanguageModel,
        write: Callable[[int, Sequence[Answer], bool], object],
        ranks: Ranks = ALONE,
    ) -> None:
        self.every = config.log.samples_every
        self.model = model
        self.write = write
        self.ranks = ranks
        self._alone: dict[int, str] = {}

    @property
    def wanted(self) -> bool:
        """Whether any answer of the run is kept."""
        return self.every != 0

    def due(self, step: int, evaluated: bool) -> bool:
        """Whether the answers of a step are kept, its rollouts and those of the evaluation that may
        follow it; `evaluated`: whether one does."""
        if self.every is None:
            return evaluated
        return self.every > 0 and step % self.every == 0

    def keep_evaluation(
        self,
        step: int,
        questions: Sequence[Question],
        samples: Sequence[Sample],
        texts: Sequence[str],
        grades: Sequence[Grade],
    ) -> None:
        """Write the answers of an evaluation where they are due; the arguments have an entry for
        each. Raises `RunFailed` when the disk refuses."""
        with self.ranks.together():
            if self.ranks.main and self.due(step, evaluated=True):
                found = zip(questions, samples, texts, grades, strict=True)
                lines = [Answer(**self._line(step, *answer, None, None)) for answer in found]
                self.write(step, lines, True)

    def keep_rollouts(self, step: int, rollouts: "Rollouts") -> None:
        """Write the rollouts of a step. Their divergences on this rank are of those that it has
        trained on and that had a teacher's scores. Raises `RunFailed` when the disk refuses."""
        own = {row: _numbers(values) for row, values in rollouts.divergences.items()}
        parts = self.ranks.gather(own)
        distilled = {row: values for part in parts for row, values in part.items()}
        with self.ranks.together():
            if self.ranks.main:
                found = zip(
                    rollouts.asked,
                    rollouts.samples,
                    rollouts.texts,
                    rollouts.grades,
                    rollouts.contexts,
                    rollouts.advantages,
                    strict=True,
                )
                lines = [
                    Rollout(**self._line(step, *answer), divergence=distilled.get(row))
                    for row, answer in enumerate(found)
                ]
                self.write(step, lines, False)

    def _line(
        self,
        step: int,
        question: Question,
        sample: Sample,
        text: str,
        grade: Grade,
        hint: Hint | None,
        advantage: float | None,
    ) -> dict[str, Any]:
        tokens = sample.response.tolist()
        feedback = grade.feedback
        if feedback is not None:  # a user's own text, which may be no Unicode
            feedback = feedback.encode(errors="backslashreplace").decode()
        return {
            "step": step,
            "id": question.id,
            "prompt": self._given(sample.prompt),
            "response": text,
            "tokens": tokens,
            "text": self.token_texts(tokens, text),
            "reward": grade.reward,
            "feedback": feedback,
            "length": len(tokens),
            "capped": sample.capped,
            "hint": None if hint is None or hint.kind == "none" else hint.kind,
            "hint_source": None if hint is None else hint.source,
            "teacher_prompt": None if hint is None else self._given(hint.prompt),
            "advantage": advantage,
            "logprob": _numbers(sample.logprob),
            "entropy": _numbers(sample.entropy),
        }

    def _given(self, prompt: Tensor) -> str:
        return self.model.decode(prompt, special=True)

    def token_texts(self, tokens: Sequence[int], text: str) -> list[str]:
        """One string for each of `tokens`; joined they are `text`, which the tokens decode to.

        Where tokens spell parts of a character, or another text beside their neighbours than alone,
        each is decoded behind the tokens before it, and `text` is cut where these texts end. A
        character then stands with the token that completes it. Bytes that never become one are
        U+FFFD in `text`, and stand with the token by which that is certain.
        """
        alone = [self._decode_alone(token) for token in tokens]
        if "".join(alone) == text:
            return alone
        pieces, begin, read, end = [], 0, 0, 0
        before = ""  # what tokens[begin:read] decode to
        for stop in range(1, len(tokens) + 1):
            now = self.model.decode(tokens[begin:stop])
            if now.endswith(_BROKEN) and stop - read < _LONGEST and stop < len(tokens):
                pieces.append("")
                continue
            start, end = end, min(end + max(0, len(now) - len(before)), len(text))
            pieces.append(text[start:end])
            begin, read = read, stop
            before = self.model.decode(tokens[begin:read])
        pieces[-1] += text[end:]
        return pieces

    def _decode_alone(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self.model.decode([token])
        return self._alone[token]


def _numbers(values: Tensor) -> list[float]:
    """fp32 numbers by the shortest decimals that round to them."""
    return [float(str(value)) for value in values.cpu().numpy()]
