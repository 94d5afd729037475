"""Every engine: a sample is a function of the weights, its prompt and its key, nothing else.

Suffixes: B rows, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from rollouts import PROMPTS, same_tokens, sample
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from sodfast.config import load_config
from sodfast.errors import RunFailed
from sodfast.lab.model import build_tokenizer
from sodfast.model.language_model import LanguageModel, to_ids
from sodfast.model.load import load_model, wrap_model
from sodfast.model.packing import own_attention
from sodfast.rollout.engine import Engine, SampleKey, Sampling, stop_length
from sodfast.rollout.hf import HFEngine
from sodfast.rollout.native import NativeEngine


@pytest.fixture(params=["llama", *slow("qwen3")])
def any_model(request: pytest.FixtureRequest, tiny_model: Path) -> LanguageModel:
    """The tiny Qwen3, and a random Llama: untied head, grouped keys, long and wild samples."""
    if request.param == "qwen3":
        return load_model(str(tiny_model), torch.device("cpu"))
    tokenizer = build_tokenizer()
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


@pytest.fixture(params=["hf", "native"])
def engine_name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, model: LanguageModel, batch_size: int = 100) -> Engine:
    return {"hf": HFEngine, "native": NativeEngine}[name](model, batch_size)


@pytest.mark.parametrize(
    "truncation",
    [{"top_k": 4, "temperature": 0.6}, *slow({}, {"top_p": 0.9})],
)
def test_a_sample_does_not_depend_on_its_batch(
    engine_name: str, any_model: LanguageModel, truncation: dict[str, Any]
) -> None:
    engine = build(engine_name, any_model)
    together = sample(engine, **truncation)
    assert len({tuple(s.response.tolist()) for s in together}) > 3
    for size in (1, 4):
        assert same_tokens(sample(build(engine_name, any_model, size), **truncation), together)
    assert same_tokens(sample(engine, order=[4, 0, 5, 2, 1, 3], **truncation), together)
    assert same_tokens(sample(engine, PROMPTS[:1], **truncation), together[:1])


def test_steps_draw_differently_and_a_step_draws_the_same_again(
    engine_name: str, any_model: LanguageModel
) -> None:
    engine = build(engine_name, any_model)
    assert same_tokens(sample(engine, step=2), sample(engine, step=2))
    assert not same_tokens(sample(engine, step=1), sample(engine, step=2))


def test_a_longer_cap_only_lengthens_capped_samples(
    engine_name: str, any_model: LanguageModel
) -> None:
    engine = build(engine_name, any_model)
    short, long = sample(engine, max_new_tokens=6), sample(engine, max_new_tokens=20)
    for a, b in zip(short, long, strict=True):
        assert b.response[: len(a.response)].equal(a.response)
        assert a.capped or a.response.equal(b.response)


@pytest.mark.parametrize("temperature", [0.6, 0.0, *slow(1.0)])
def test_logprob_and_entropy_are_those_of_a_teacher_forced_forward(
    engine_name: str, any_model: LanguageModel, temperature: float
) -> None:
    engine = build(engine_name, any_model)
    for drawn in sample(engine, temperature=temperature, top_p=0.9):
        ids = torch.cat([drawn.prompt, drawn.response])
        with torch.no_grad(), own_attention(any_model.network):
            logits_BV = any_model.network(ids[None]).logits[0, len(drawn.prompt) - 1 : -1]
        if temperature == 0:
            assert drawn.response.equal(logits_BV.argmax(-1))
        logprob_BV = torch.log_softmax(logits_BV.double() / (temperature or 1.0), -1)
        expected = logprob_BV.gather(1, drawn.response[:, None])[:, 0]
        entropy = -(logprob_BV.exp() * logprob_BV).sum(-1)
        torch.testing.assert_close(drawn.logprob.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(drawn.entropy.double(), entropy, rtol=0, atol=1e-5)


def test_a_response_ends_with_its_eos_or_is_capped(
    engine_name: str, any_model: LanguageModel
) -> None:
    eos = any_model.eos_ids[0]
    samples = sample(build(engine_name, any_model), PROMPTS * 8, max_new_tokens=9)
    for drawn in samples:
        assert eos not in drawn.response[:-1]
        assert drawn.capped == (drawn.response[-1] != eos)
        assert len(drawn.response) == 9 or not drawn.capped
        assert len(drawn.logprob) == len(drawn.entropy) == len(drawn.response)
    assert {drawn.capped for drawn in samples} == {True, False}


def test_eos_as_the_last_allowed_token_is_not_capped(
    engine_name: str, model: LanguageModel
) -> None:
    engine = build(engine_name, model)
    drawn = next(s for s in sample(engine, PROMPTS * 4) if not s.capped)
    again = sample(engine, PROMPTS * 4, max_new_tokens=len(drawn.response))
    matching = [s for s in again if s.response.equal(drawn.response)]
    assert matching and not any(s.capped for s in matching)


def test_one_new_token(engine_name: str, any_model: LanguageModel) -> None:
    samples = sample(build(engine_name, any_model), PROMPTS * 4, max_new_tokens=1)
    assert all(len(drawn.response) == 1 for drawn in samples)
    assert any(drawn.capped for drawn in samples)


def test_any_of_several_eos_tokens_ends_a_response(engine_name: str, model: LanguageModel) -> None:
    plus = model.tokenizer.convert_tokens_to_ids("+")
    model = LanguageModel(model.network, model.tokenizer, (model.eos_ids[0], plus), model.pad_id)
    samples = sample(build(engine_name, model), PROMPTS[:2])
    assert [int(drawn.response[-1]) for drawn in samples] == [plus, plus]
    assert not any(drawn.capped for drawn in samples)


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(
    engine_name: str, model: LanguageModel
) -> None:
    engine = build(engine_name, model)
    free = sample(engine, PROMPTS * 16)
    stopped = sample(engine, PROMPTS * 16, stop=("6+", "3"))
    ended = 0
    for a, b in zip(free, stopped, strict=True):
        text = model.decode(a.response)
        ends = [text.index(stop) + len(stop) for stop in ("6+", "3") if stop in text]
        if not ends:
            assert b.response.equal(a.response) and a.capped == b.capped
        else:  # a token is a character
            assert b.response.equal(a.response[: min(ends)]) and not b.capped
            assert len(b.logprob) == len(b.entropy) == min(ends)
            ended += min(ends) < len(a.response)
    assert 3 < ended < len(free)


def test_a_stop_string_is_found_where_tokens_share_it(model: LanguageModel) -> None:
    ids = to_ids(model.encode("12+34=46"))
    assert stop_length(model, ids, ("2+3",)) == 4
    assert stop_length(model, ids, ("46", "12+")) == 3
    assert stop_length(model, ids, ("2+3",), searched=3) == 4
    assert stop_length(model, ids, ("7",)) is None
    assert stop_length(model, ids, ()) is None


def test_training_and_evaluation_each_sample_as_their_section_says() -> None:
    """Only the cap and the stop strings are one for both."""
    config = load_config(
        "lab",
        [
            "rollout.temperature=0.9",
            "rollout.top_p=0.8",
            "rollout.top_k=7",
            "rollout.max_new_tokens=33",
            "eval.temperature=0.0",
            "eval.top_p=0.7",
            "task.stop=[x,yz]",
        ],
    )
    assert Sampling.of(config, config.rollout) == Sampling(0.9, 0.8, 33, 7, ("x", "yz"))
    assert Sampling.of(config, config.eval) == Sampling(0.0, 0.7, 33, None, ("x", "yz"))


def test_progress_ends_with_all_sequences(engine_name: str, model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    build(engine_name, model, 2).generate(
        [to_ids([5])] * 5,
        range(5),
        Sampling(1.0, 1.0, 2),
        SampleKey(0, 1),
        lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (5, 5) and len(seen) >= 3
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_the_run(
    engine_name: str, model: LanguageModel, value: float
) -> None:
    with torch.no_grad():
        model.network.base_model.norm.weight[3] = value
    with pytest.raises(RunFailed, match="not finite"):
        sample(build(engine_name, model))


@pytest.mark.parametrize(
    ("prompts", "cap", "message"), [([[]], 1, "no tokens"), ([[5]], 0, "max_new_tokens")]
)
def test_what_cannot_be_answered_is_refused(
    engine_name: str, model: LanguageModel, prompts: list[list[int]], cap: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(engine_name, model).generate(
            [to_ids(prompt) for prompt in prompts], [0], Sampling(1, 1, cap), SampleKey(0, 1)
        )


def test_the_models_own_generation_settings_change_nothing(
    engine_name: str, any_model: LanguageModel
) -> None:
    """What a model's generation_config.json asks of other programs is not this sampler's wish."""
    engine = build(engine_name, any_model)
    expected = sample(engine)
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
    samples = sample(engine)
    assert same_tokens(samples, expected)
    for a, b in zip(samples, expected, strict=True):
        assert a.logprob.equal(b.logprob)
    assert any_model.network.generation_config is own


def test_tokens_that_the_tokenizer_does_not_know_are_drawn_and_read_as_nothing(
    engine_name: str,
) -> None:
    """Qwen3's head has more rows than its tokenizer has tokens. They are as likely as the head
    says; the objective knows them as any other token."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = wrap_model(LlamaForCausalLM(config), tokenizer, torch.device("cpu"), "wide")
    samples = sample(build(engine_name, model))
    drawn = torch.cat([s.response for s in samples])
    assert (drawn >= len(tokenizer)).any()
    known = [int(token) for token in samples[0].response if token < len(tokenizer)]
    assert model.decode(samples[0].response) == model.decode(known)
