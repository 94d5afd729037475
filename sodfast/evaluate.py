"""Evaluation: mean@k, best@k and maj@k on held-out questions, on a random stream of its own."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import comb, fsum

from sodfast.config import Config
from sodfast.metrics import pass_metrics
from sodfast.model.language_model import LanguageModel, to_ids
from sodfast.parallel.ranks import ALONE, Ranks
from sodfast.rewards import grade_answers
from sodfast.rng import Stream, draw_key
from sodfast.rollout.engine import Engine, Sample, SampleKey, Sampling
from sodfast.run.phases import oom_hint
from sodfast.tasks.base import Grade, Question, Task

# Called with the question, sample, text and grade of every answer.
Keep = Callable[[Sequence[Question], Sequence[Sample], Sequence[str], Sequence[Grade]], object]


def evaluate(
    model: LanguageModel,
    engine: Engine,
    task: Task,
    questions: Sequence[Question],
    config: Config,
    step: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
    keep: Keep = lambda questions, samples, texts, grades: None,
) -> dict[str, float]:
    """`eval.samples` answers per question at the evaluation's temperature and top-p; `keep` is
    called with all of them.

    Draws are keyed by (seed, sample), apart from training's, so evaluating more often cannot change
    training; without `eval.common_draws` also by the step. Each draw is distributed as the student
    says, whatever the key, so mean@k and best@k of one evaluation are unbiased estimates either
    way. With common draws the errors of two evaluations are correlated: the difference of students
    that are much alike has a smaller variance, the mean over many evaluations a larger one. On the
    lab, ten steps apart: bench/results/cpu/speculation.json, `difference`.

    Returns the `eval/*` keys, fractions in [0, 1].
    """
    count = config.eval.samples
    prompts = [to_ids(model.encode_question(question)) for question in questions]
    samples = engine.generate(
        [prompt for prompt in prompts for _ in range(count)],
        range(len(prompts) * count),
        Sampling.of(config, config.eval),
        SampleKey(draw_key(config.seed, Stream.EVAL), 0 if config.eval.common_draws else step),
        progress,
    )
    texts = [model.decode(sample.response) for sample in samples]
    asked = [question for question in questions for _ in range(count)]
    grades = grade_answers(config, task, asked, texts, ranks)
    keep(asked, samples, texts, grades)
    groups = [grades[start : start + count] for start in range(0, len(grades), count)]
    return evaluation_metrics(
        [[grade.reward for grade in group] for group in groups],
        None if task.extract is None else [[grade.answer for grade in group] for group in groups],
    )


@dataclass(frozen=True)
class Examination:
    """A test beside the run's own: the run's configuration with that task in place of its own, the
    task, and its questions."""

    config: Config
    task: Task
    questions: Sequence[Question]


def evaluate_others(
    model: LanguageModel,
    engine: Engine,
    examinations: Mapping[str, Examination],
    step: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """`evaluate` of each of `eval.tasks`, as the keys `eval/<name>/*`."""
    metrics: dict[str, float] = {}
    for name, exam in examinations.items():
        found = evaluate(
            model, engine, exam.task, exam.questions, exam.config, step, progress, ranks
        )
        metrics |= {f"eval/{name}/{key.removeprefix('eval/')}": v for key, v in found.items()}
    return metrics


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the student of a run: on the run's own test, and on those of `eval.tasks`.

    `keep(step, questions, samples, texts, grades)` is called with the answers to the run's own.
    """

    config: Config
    model: LanguageModel
    engine: Engine
    task: Task
    questions: Sequence[Question]
    others: Mapping[str, Examination]
    ranks: Ranks
    keep: Callable[..., object]
    progress: Callable[[int, int], None]

    def evaluate(self, step: int) -> dict[str, float]:
        """The `eval/*` keys after a step, and what they took.

        Raises `RunFailed` as the engine does, and where memory runs out.
        """
        start = time.perf_counter()
        model, engine, ranks, progress = self.model, self.engine, self.ranks, self.progress
        keep = partial(self.keep, step)
        with oom_hint("evaluate"):
            metrics = evaluate(
                model, engine, self.task, self.questions, self.config, step, progress, ranks, keep
            )
            metrics |= pass_metrics("rollout/eval_tokens_per_pass", engine)
            metrics |= evaluate_others(model, engine, self.others, step, progress, ranks)
        return {**metrics, "time/eval": time.perf_counter() - start}


def evaluation_metrics(
    rewards: Sequence[Sequence[float]], answers: Sequence[Sequence[str | None]] | None
) -> dict[str, float]:
    """Metrics of n samples per question; best@k and maj@k for every power of two k ≤ n. Without
    `answers`, of which a majority can be counted, there is no maj@k."""
    count = len(rewards[0])
    metrics = {f"eval/mean@{count}": _mean([_mean(group) for group in rewards])}
    powers = [2**i for i in range(count.bit_length()) if 2**i <= count]
    for k in powers:
        metrics[f"eval/best@{k}"] = _mean([best_at_k(group, k) for group in rewards])
    if answers is not None:
        for k in powers:
            metrics[f"eval/maj@{k}"] = _mean(
                [majority_at_k(r, a, k) for r, a in zip(rewards, answers, strict=True)]
            )
    return metrics


def best_at_k(rewards: Sequence[float], k: int) -> float:
    """Unbiased estimate, from n samples, of the expected best reward of k samples.

    Mean over all k-subsets of their maximum: Σ_i r_(i) C(i−1, k−1) / C(n, k) over the ascending
    order statistics. For rewards in {0, 1} it is 1 − C(n−c, k) / C(n, k), c the successes.
    """
    ordered = sorted(rewards)
    total = comb(len(ordered), k)
    return fsum(reward * (comb(i, k - 1) / total) for i, reward in enumerate(ordered))


def majority_at_k(rewards: Sequence[float], answers: Sequence[str | None], k: int) -> float:
    """Reward of the most frequent answer among k samples, averaged over the n // k disjoint
    blocks of k samples.

    Samples without an answer do not vote; no votes at all score 0. Tied answers share: their
    mean rewards are averaged, which is the expectation of a fair draw.
    """
    blocks = []
    for start in range(0, len(rewards) - k + 1, k):
        votes: dict[str, list[float]] = defaultdict(list)
        for reward, answer in zip(
            rewards[start : start + k], answers[start : start + k], strict=True
        ):
            if answer is not None:
                votes[answer].append(reward)
        most = max((len(group) for group in votes.values()), default=0)
        blocks.append(_mean([_mean(group) for group in votes.values() if len(group) == most]))
    return _mean(blocks)


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values) if values else 0.0
