"""The hf engine: samples are a function of prompt, weights and stream, and nothing else.

Suffixes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from sodfast import lab
from sodfast.errors import RunFailed
from sodfast.model import LanguageModel, load_model, to_ids, wrap_model
from sodfast.rollout import Sample, Sampling, draw, rollout
from sodfast.streams import Stream, generator

PROMPTS = ["17*8+6=", "2*2+1=", "9*9", "11*7+3=", "+", "5*5+5=10*2+"]


@pytest.fixture(params=["qwen3", "llama"])
def any_model(request: pytest.FixtureRequest, tiny_model: Path) -> LanguageModel:
    """The tiny Qwen3, and a random Llama: untied head, grouped keys, long and wild samples."""
    if request.param == "qwen3":
        return load_model(str(tiny_model), torch.device("cpu"))
    tokenizer = lab.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(1)
    return wrap_model(LlamaForCausalLM(config), tokenizer, torch.device("cpu"), "llama")


def sample(
    model: LanguageModel,
    prompts: Sequence[str] = PROMPTS,
    order: Sequence[int] | None = None,
    batch_size: int = 100,
    **sampling: Any,
) -> list[Sample]:
    """Samples of the prompts, drawn in `order`, returned in the prompts' own order."""
    order = range(len(prompts)) if order is None else order
    wanted = Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20, **sampling})
    samples = rollout(
        model,
        [to_ids(model.encode(prompts[index])) for index in order],
        [generator(3, Stream.ROLLOUT, 1, index) for index in order],
        wanted,
        batch_size,
    )
    return [samples[list(order).index(index)] for index in range(len(order))]


def same_tokens(left: Sequence[Sample], right: Sequence[Sample]) -> bool:
    return all(
        a.response.equal(b.response) and a.capped == b.capped
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_sample_does_not_depend_on_its_batch(any_model: LanguageModel, top_p: float) -> None:
    together = sample(any_model, top_p=top_p)
    assert len({tuple(s.response.tolist()) for s in together}) > 3
    assert same_tokens(sample(any_model, top_p=top_p, batch_size=1), together)
    assert same_tokens(sample(any_model, top_p=top_p, batch_size=4), together)
    assert same_tokens(sample(any_model, top_p=top_p, order=[4, 0, 5, 2, 1, 3]), together)
    assert same_tokens(sample(any_model, PROMPTS[:1], top_p=top_p), together[:1])


def test_a_longer_cap_only_lengthens_capped_samples(any_model: LanguageModel) -> None:
    short, long = sample(any_model, max_new_tokens=6), sample(any_model, max_new_tokens=20)
    for a, b in zip(short, long, strict=True):
        assert b.response[: len(a.response)].equal(a.response)
        assert a.capped or a.response.equal(b.response)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_logprob_and_entropy_are_those_of_a_teacher_forced_forward(
    any_model: LanguageModel, temperature: float
) -> None:
    for drawn in sample(any_model, temperature=temperature, top_p=0.9):
        ids = torch.cat([drawn.prompt, drawn.response])
        with torch.no_grad():
            logits_BV = any_model.network(ids[None]).logits[0, len(drawn.prompt) - 1 : -1]
        logprob_BV = torch.log_softmax(logits_BV.double() / temperature, -1)
        expected = logprob_BV.gather(1, drawn.response[:, None])[:, 0]
        entropy = -(logprob_BV.exp() * logprob_BV).sum(-1)
        torch.testing.assert_close(drawn.logprob.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(drawn.entropy.double(), entropy, rtol=0, atol=1e-5)


def test_a_response_ends_with_its_eos_or_is_capped(any_model: LanguageModel) -> None:
    eos = any_model.eos_ids[0]
    samples = sample(any_model, PROMPTS * 8, max_new_tokens=9)
    for drawn in samples:
        assert eos not in drawn.response[:-1]
        assert drawn.capped == (drawn.response[-1] != eos)
        assert len(drawn.response) == 9 or not drawn.capped
        assert len(drawn.logprob) == len(drawn.entropy) == len(drawn.response)
    assert {drawn.capped for drawn in samples} == {True, False}


def test_eos_as_the_last_allowed_token_is_not_capped(model: LanguageModel) -> None:
    drawn = next(s for s in sample(model, PROMPTS * 4) if not s.capped)
    length = len(drawn.response)
    again = sample(model, PROMPTS * 4, max_new_tokens=length)
    matching = [s for s in again if s.response.equal(drawn.response)]
    assert matching and not any(s.capped for s in matching)


def test_one_new_token(any_model: LanguageModel) -> None:
    samples = sample(any_model, PROMPTS * 4, max_new_tokens=1)
    assert all(len(drawn.response) == 1 for drawn in samples)
    assert any(drawn.capped for drawn in samples)


def test_any_of_several_eos_tokens_ends_a_response(model: LanguageModel) -> None:
    plus = model.tokenizer.convert_tokens_to_ids("+")
    model = LanguageModel(model.network, model.tokenizer, (model.eos_ids[0], plus), model.pad_id)
    samples = sample(model, PROMPTS[:2])
    assert [int(drawn.response[-1]) for drawn in samples] == [plus, plus]
    assert not any(drawn.capped for drawn in samples)


def test_progress_counts_sequences(model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    rollout(
        model,
        [to_ids([5])] * 5,
        [generator(0, Stream.ROLLOUT, 1, index) for index in range(5)],
        Sampling(1.0, 1.0, 2),
        2,
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_the_run(model: LanguageModel, value: float) -> None:
    with torch.no_grad():
        model.network.base_model.norm.weight[3] = value
    with pytest.raises(RunFailed, match="not finite"):
        sample(model)


def test_an_empty_prompt_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        rollout(model, [to_ids([])], [generator(0, Stream.ROLLOUT)], Sampling(1, 1, 1), 1)


def test_the_models_own_generation_settings_change_nothing(any_model: LanguageModel) -> None:
    """What a model's generation_config.json asks of other programs is not this sampler's wish."""
    expected = sample(any_model)
    own = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=1,
        top_p=0.2,
        min_p=0.5,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        suppress_tokens=[3, 4, 5],
        bad_words_ids=[[6]],
        num_beams=2,
        num_return_sequences=2,
        max_time=1e-9,
        eos_token_id=7,
        pad_token_id=8,
    )
    any_model.network.generation_config = own
    samples = sample(any_model)
    assert same_tokens(samples, expected)
    for a, b in zip(samples, expected, strict=True):
        assert a.logprob.equal(b.logprob)
    assert any_model.network.generation_config is own


# ---------------------------------------------------------------- draw


def uniforms(count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random(count))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (0.6, 0.9)])
def test_draws_follow_the_softmax(temperature: float, top_p: float) -> None:
    count = 100_000
    logits_V = torch.randn(30, generator=torch.Generator().manual_seed(5)).double()
    probs_V = torch.softmax(logits_V / temperature, 0)
    drawn = draw(probs_V.expand(count, -1), uniforms(count), top_p)

    expected: dict[int, float] = {}
    for token in sorted(range(30), key=lambda token: -float(probs_V[token])):
        if sum(expected.values()) < top_p:
            expected[token] = float(probs_V[token])
    observed = torch.bincount(drawn, minlength=30)
    assert set(observed.nonzero()[:, 0].tolist()) <= expected.keys()
    total = sum(expected.values())
    chi2 = sum(
        (int(observed[token]) - count * mass / total) ** 2 / (count * mass / total)
        for token, mass in expected.items()
    )
    freedom = len(expected) - 1
    assert freedom > 3
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_each_token_holds_its_interval_of_the_cumulative_sum() -> None:
    probs = torch.tensor([[0.125, 0.0, 0.375, 0.5, 0.0]])
    below = 1 - 2**-53
    at = {0.0: 0, 0.125 * below: 0, 0.125: 2, 0.5 * below: 2, 0.5: 3, 0.75: 3, below: 3}
    drawn = draw(probs.expand(len(at), -1), torch.tensor(list(at), dtype=torch.float64), 1.0)
    assert drawn.tolist() == list(at.values())


@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.5])
def test_a_token_without_probability_is_never_drawn(top_p: float) -> None:
    rng = np.random.default_rng(1)
    probs_BV = torch.from_numpy(rng.dirichlet(np.full(50, 0.1), 2000)).float()
    probs_BV[:, [0, 7, 49]] = 0.0
    for uniform in (0.0, 0.5, 1 - 2**-53):
        drawn = draw(probs_BV, torch.full((2000,), uniform, dtype=torch.float64), top_p)
        assert (probs_BV.gather(1, drawn[:, None]) > 0).all()


def test_a_nucleus_of_one_token() -> None:
    probs_BV = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]])
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert draw(probs_BV, torch.full((2,), uniform).double(), 0.5).tolist() == [1, 0]
        assert draw(probs_BV, torch.full((2,), uniform).double(), 1e-9).tolist() == [1, 0]


def test_the_token_that_crosses_the_line_belongs_to_the_nucleus() -> None:
    probs_BV = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    for top_p, size in ((0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4)):
        grid = torch.linspace(0, 1 - 2**-53, 1000, dtype=torch.float64)
        drawn = draw(probs_BV.expand(1000, -1), grid, top_p)
        assert sorted(set(drawn.tolist())) == list(range(size))


def test_draws_rise_with_the_uniform_number() -> None:
    """Inversion: a larger uniform number never gives an earlier token."""
    probs_BV = torch.softmax(torch.randn(1, 1000), -1)
    drawn = draw(probs_BV.expand(500, -1), torch.linspace(0, 0.999, 500).double(), 1.0).tolist()
    assert all(a <= b for a, b in pairwise(drawn))
