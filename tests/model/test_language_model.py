"""A language model: its prompts as tokens, and layers that run again in the backward pass."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, gradients, hidden_of, packed, random_pairs
from transformers import AutoModelForCausalLM

from sodfast.errors import UsageError
from sodfast.lab.model import build_tokenizer
from sodfast.model.language_model import LanguageModel, decoder_layers, recompute_layers, to_ids
from sodfast.tasks.base import Question

SIZES = [(7, 3), (1, 1), (12, 9), (2, 8), (2, 8), (5, 5), (1, 20), (20, 1)]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is false %}<quiet>{% endif %}"
    "{% endif %}"
)


# ---------------------------------------------------------------- prompts


def templated(model: LanguageModel, template: str) -> LanguageModel:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return replace(model, tokenizer=tokenizer)


def test_a_chat_template_is_used_with_thinking_off(model: LanguageModel) -> None:
    rendered: list[tuple[list[dict[str, str]], dict[str, Any]]] = []

    class Tokenizer:
        chat_template = TEMPLATE

        def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
            rendered.append((messages, options))
            return "1+1="

        def __call__(self, text: str, **options: Any) -> Any:
            assert options == {"add_special_tokens": False}  # the template has them already
            return model.tokenizer(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(model.tokenizer, name)

    chat = LanguageModel(model.network, Tokenizer(), model.eos_ids, model.pad_id)
    question = Question(prompt="P", answer="", system="S", id="1")
    assert chat.encode_question(question) == model.encode("1+1=")
    chat.encode("P", "")
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "P"}
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    # "x" stands for any text: which special tokens are the template's own is read off it.
    asked = [(shown, given) for shown, given in rendered if shown[-1]["content"] != "x"]
    assert asked == [([system, user], options), ([user], options)]


def test_a_template_sees_that_thinking_is_off(model: LanguageModel) -> None:
    model = templated(model, TEMPLATE)
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "1"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert text == "[user]1[assistant]<quiet>"
    assert model.encode("1") == model.tokenizer(text).input_ids


def test_a_template_without_system_messages_says_so(model: LanguageModel) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('none here') }}{% endif %}1"
    model = templated(model, template)
    assert model.encode("2") == model.tokenizer("1").input_ids
    with pytest.raises(UsageError, match=r"system and user.*none here"):
        model.encode("2", "3")


def test_without_a_chat_template_the_text_stands_as_it_is(model: LanguageModel) -> None:
    assert model.decode(model.encode("17*8+6=")) == "17*8+6="
    assert model.encode("1+", "2") == model.tokenizer("2\n\n1+").input_ids


def test_special_tokens_are_not_decoded(model: LanguageModel) -> None:
    ids = [*model.encode("4="), model.pad_id, model.eos_ids[0]]
    assert model.decode(ids) == model.decode(to_ids(ids)) == "4="


# ---------------------------------------------------------------- recomputed layers


def count_runs(network: Any) -> Callable[[], int]:
    """How often a layer's MLP has begun to run."""
    runs = []
    for layer in decoder_layers(network):
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    return lambda: len(runs)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_recomputing_changes_no_bit(name: str, kept: int) -> None:
    network, pairs = packed(build(name)), random_pairs(SIZES)
    thrifty = copy.deepcopy(network)
    recompute_layers(thrifty, kept)
    hidden_NH, same_NH = hidden_of(network, pairs), hidden_of(thrifty, pairs)
    assert same_NH.equal(hidden_NH)
    found, expected = gradients(thrifty, same_NH), gradients(network, hidden_NH)
    assert all(found[path].equal(expected[path]) for path in expected)


def test_layers_run_again_in_the_backward_pass_only() -> None:
    network, pairs = packed(build("llama")), random_pairs(SIZES)
    recompute_layers(network)
    runs = count_runs(network)
    with torch.no_grad():
        hidden_of(network, pairs)
    assert runs() == 3
    hidden_NH = hidden_of(network, pairs)
    assert runs() == 6
    hidden_NH.sum().backward()
    assert runs() == 9


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_the_last_layers_can_keep_their_activations(kept: int) -> None:
    """Each of those runs once for all; the others give the same gradients at a second run."""
    network, pairs = packed(build("llama")), random_pairs(SIZES)
    full, mixed = copy.deepcopy(network), copy.deepcopy(network)
    recompute_layers(full)
    recompute_layers(mixed, kept)
    runs: list[int] = []
    for number, layer in enumerate(decoder_layers(mixed)):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: runs.append(n))
    found, expected = (gradients(n, hidden_of(n, pairs)) for n in (mixed, full))
    assert all(found[path].equal(expected[path]) for path in expected)
    assert runs == [0, 1, 2, *reversed(range(3 - kept))]


def test_no_more_layers_can_keep_their_activations_than_there_are() -> None:
    with pytest.raises(UsageError, match=r"model\.kept_layers=4: the model has 3 decoder layers"):
        recompute_layers(build("llama"), 4)


def test_a_recomputing_model_is_saved_as_any_other(tmp_path: Path) -> None:
    network = build("llama")
    recompute_layers(network)
    network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    assert loaded(ids).logits.allclose(network(ids).logits, atol=1e-6)
