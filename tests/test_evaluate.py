"""mean@k, best@k and maj@k against enumeration; the streams of an evaluation."""

from collections import Counter
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sodfast_kernels import sample_tokens

from sodfast import evaluate as evaluation
from sodfast.config import ArithmeticConfig, Config, EvalConfig
from sodfast.evaluate import (
    Evaluator,
    Examination,
    best_at_k,
    evaluation_metrics,
    majority_at_k,
)
from sodfast.parallel.ranks import ALONE
from sodfast.rng import Stream, draw_key
from sodfast.rollout.engine import Sample, SampleKey, Sampling
from sodfast.tasks.base import Question

REWARDS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0]), min_size=1, max_size=8)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@given(REWARDS, st.data())
def test_best_is_the_mean_over_all_subsets(rewards: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rewards)))
    best = [max(subset) for subset in combinations(rewards, k)]
    assert best_at_k(rewards, k) == pytest.approx(mean(best), abs=1e-12)


@given(REWARDS)
def test_best_of_one_and_best_of_all(rewards: list[float]) -> None:
    assert best_at_k(rewards, 1) == pytest.approx(mean(rewards))
    assert best_at_k(rewards, len(rewards)) == max(rewards)
    assert best_at_k(rewards[::-1], 1) == best_at_k(rewards, 1)


def test_best_of_many_samples_does_not_overflow() -> None:
    rewards = [1.0] + [0.0] * 1023
    assert best_at_k(rewards, 512) == pytest.approx(0.5)


def vote(answers: list[tuple[str | None, float]]) -> float:
    """Expected reward of a fair draw among the most frequent answers."""
    counts = Counter(answer for answer, _ in answers if answer is not None)
    if not counts:
        return 0.0
    top = [answer for answer, count in counts.items() if count == max(counts.values())]
    return mean([mean([r for a, r in answers if a == answer]) for answer in top])


@given(
    st.lists(
        st.tuples(st.sampled_from(["A", "B", "C", None]), st.sampled_from([0.0, 0.5, 1.0])),
        min_size=1,
        max_size=12,
    ),
    st.data(),
)
def test_majority_over_disjoint_runs(
    answers: list[tuple[str | None, float]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(answers)))
    runs = [answers[i * k : (i + 1) * k] for i in range(len(answers) // k)]
    result = majority_at_k([r for _, r in answers], [a for a, _ in answers], k)
    assert result == pytest.approx(mean([vote(run) for run in runs]))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("BBA?", 1.0),  # the majority is right
        ("AAB?", 0.0),  # the majority is wrong
        ("BA??", 0.5),  # a tie is a fair draw
        ("BAC?", 1 / 3),
        ("????", 0.0),  # nobody votes
        ("???B", 1.0),  # who gives no answer does not vote
        ("AABB", 0.5),
        ("AAABBBBC", 1.0),
    ],
)
def test_majority_by_hand(answers: str, expected: float) -> None:
    """The right answer is B; ? is a response without an answer."""
    votes = [None if letter == "?" else letter for letter in answers]
    rewards = [float(letter == "B") for letter in answers]
    assert majority_at_k(rewards, votes, len(answers)) == pytest.approx(expected)


def test_samples_beyond_the_last_whole_run_do_not_vote() -> None:
    assert majority_at_k([1.0, 1.0, 0.0], ["B", "B", "A"], 2) == 1.0


# ---------------------------------------------------------------- the metrics of a test set


@pytest.mark.parametrize(
    ("samples", "powers"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4]), (15, [1, 2, 4, 8]), (16, [1, 2, 4, 8, 16])],
)
def test_keys_and_their_ks(samples: int, powers: list[int]) -> None:
    metrics = evaluation_metrics([[1.0] * samples], [["B"] * samples])
    assert set(metrics) == {
        f"eval/mean@{samples}",
        *(f"eval/best@{k}" for k in powers),
        *(f"eval/maj@{k}" for k in powers),
    }
    assert set(metrics.values()) == {1.0}


def test_without_answers_to_count_there_is_no_majority() -> None:
    assert set(evaluation_metrics([[1.0, 0.0]], None)) == {
        "eval/mean@2",
        "eval/best@1",
        "eval/best@2",
    }


def test_metrics_are_means_over_questions() -> None:
    metrics = evaluation_metrics(
        [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]],
        [["B", "A", "A", None], ["B", "B", "B", "A"]],
    )
    assert metrics == pytest.approx(
        {
            "eval/mean@4": 0.5,
            "eval/best@1": 0.5,
            "eval/best@2": (0.5 + 1.0) / 2,
            "eval/best@4": 1.0,
            # One sample each: the reward, and 0 where there is no answer.
            "eval/maj@1": 0.5,
            # Pairs: (B, A) a tie, (A, –) wrong; (B, B) right, (B, A) a tie.
            "eval/maj@2": (0.25 + 0.75) / 2,
            "eval/maj@4": 0.5,
        }
    )


def test_evaluate_scores_every_sample_on_a_stream_of_its_own() -> None:
    """Two questions, three samples each: rollouts, scores and answers meet in the right order."""
    questions = [Question("one", "b", None, "1"), Question("two", "c", None, "2")]
    config = Config(
        seed=5,
        eval=EvalConfig(samples=3, temperature=0.7, top_p=0.9, top_k=5),
        task=ArithmeticConfig(stop=("!",)),
    )
    letters = {"one": "bbx", "two": "abc"}  # what the model says; x is no answer
    model: Any = SimpleNamespace(
        encode_question=lambda question: [len(question.prompt), ord(question.prompt[0])],
        decode=lambda ids: chr(ids[0]),
    )
    task: Any = SimpleNamespace(
        score=lambda question, text: float(text == question.answer),
        feedback=lambda question, text: None,
        extract=lambda text: None if text == "x" else text,
    )
    calls: list[SampleKey] = []

    class Engine:
        name = "fake"

        def require(self, tokens: int) -> None: ...

        def generate(
            self, prompts: Any, samples: Any, sampling: Sampling, draws: SampleKey, progress: Any
        ) -> list[Sample]:
            assert sampling == Sampling(0.7, 0.9, config.rollout.max_new_tokens, 5, ("!",))
            assert list(samples) == list(range(6))
            calls.append(draws)
            asked = [{ord(q.prompt[0]): q.prompt for q in questions}[int(p[1])] for p in prompts]
            said = [letters[prompt][index % 3] for index, prompt in enumerate(asked)]
            return [
                Sample(p, torch.tensor([ord(letter)]), torch.zeros(1), torch.zeros(1), False)
                for p, letter in zip(prompts, said, strict=True)
            ]

    metrics = evaluation.evaluate(model, Engine(), task, questions, config, step=4)
    assert metrics == pytest.approx(
        {
            "eval/mean@3": (2 / 3 + 1 / 3) / 2,
            "eval/best@1": (2 / 3 + 1 / 3) / 2,
            "eval/best@2": (1.0 + 2 / 3) / 2,
            "eval/maj@1": (2 / 3 + 1 / 3) / 2,
            "eval/maj@2": (1.0 + 0.0) / 2,
        }
    )
    evaluation.evaluate(model, Engine(), task, questions, config, step=5)
    fresh = config.model_copy(
        update={"eval": config.eval.model_copy(update={"common_draws": False})}
    )
    for step in (4, 5):
        evaluation.evaluate(model, Engine(), task, questions, fresh, step=step)
    assert calls == [SampleKey(draw_key(5, Stream.EVAL), step) for step in (0, 0, 4, 5)]
    assert draw_key(5, Stream.EVAL) != draw_key(5, Stream.ROLLOUT)


class Guesser:
    """Answers every prompt by one token, "b" with the probability that it is told to have."""

    name = "fake"

    def __init__(self, right: float) -> None:
        self.logits_V = torch.tensor([1 - right, right]).log()

    def require(self, tokens: int) -> None: ...

    def generate(
        self, prompts: Any, samples: Any, sampling: Sampling, key: SampleKey, progress: Any
    ) -> list[Sample]:
        sample = torch.tensor(list(samples))
        drawn = sample_tokens(
            self.logits_V.expand(len(sample), 2),
            seed=key.seed,
            step=key.step,
            sample=sample,
            position=torch.zeros_like(sample),
        )
        return [
            Sample(prompt, token[None], torch.zeros(1), torch.zeros(1), False)
            for prompt, token in zip(prompts, drawn.token, strict=True)
        ]


@pytest.mark.slow
def test_mean_at_k_is_unbiased_and_common_draws_make_differences_small() -> None:
    """1,000 seeds of 4 samples of 4 questions, of students that are right with 0.6 and 0.65. Both
    kinds of draws give each student's mean within 4 standard errors; the variance of a difference
    is p(1 − p) + q(1 − q) over 16 with fresh draws, and with common ones at most |p − q| over 16,
    where the draw prefers the same token for both."""
    questions = [Question(text, "b", None, "1") for text in "abcd"]
    model: Any = SimpleNamespace(
        encode_question=lambda question: [1], decode=lambda ids: "ab"[int(ids[0])]
    )
    task: Any = SimpleNamespace(
        score=lambda question, text: float(text == question.answer),
        feedback=lambda question, text: None,
        extract=None,
    )

    def scores(right: float, step: int, common: bool) -> Any:
        return np.array(
            [
                evaluation.evaluate(
                    model,
                    Guesser(right),
                    task,
                    questions,
                    Config(seed=seed, eval=EvalConfig(samples=4, common_draws=common)),
                    step,
                )["eval/mean@4"]
                for seed in range(1000)
            ]
        )

    variances = {}
    for common in (True, False):
        before, after = scores(0.6, 10, common), scores(0.65, 20, common)
        for found, right in ((before, 0.6), (after, 0.65)):
            error = (right * (1 - right) / 16 / 1000) ** 0.5
            assert abs(found.mean() - right) < 4 * error
        variances[common] = (after - before).var()
    fresh = (0.6 * 0.4 + 0.65 * 0.35) / 16
    assert variances[False] == pytest.approx(fresh, rel=0.2)
    assert variances[True] == pytest.approx((0.05 - 0.05**2) / 16, rel=0.3)


def test_a_runs_evaluation_is_its_own_test_and_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are kept, and passes counted, of its own alone."""
    engine: Any = SimpleNamespace(tokens_per_pass=0)
    kept: list[Any] = []

    def evaluate(*arguments: Any) -> dict[str, float]:
        engine.tokens_per_pass += 1
        task, questions, step, keep = *arguments[2:4], arguments[5], arguments[8:]
        for each in keep:
            each(questions, [], [], [])
        return {"eval/mean@1": 100 * step + task}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    config, model, task = Config(), SimpleNamespace(), 1
    others: Any = {"more": Examination(config, 2, ["other"])}  # type: ignore[arg-type]
    arguments: Any = (
        config,
        model,
        engine,
        task,
        ["own"],
        others,
        ALONE,
        lambda *of: kept.append(of),
        print,
    )
    metrics = Evaluator(*arguments).evaluate(3)
    assert metrics.pop("time/eval") >= 0
    assert metrics == {
        "eval/mean@1": 301,
        "eval/more/mean@1": 302,
        "rollout/eval_tokens_per_pass": 1,
    }
    assert kept == [(3, ["own"], [], [], [])]
    engine.tokens_per_pass = None
    monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: {"eval/mean@1": 0.0})
    assert "rollout/eval_tokens_per_pass" not in Evaluator(*arguments).evaluate(3)
