"""Loading, prompts and forward passes.

Suffixes: N response tokens, H hidden size, V vocabulary.
"""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from sodfast import lab
from sodfast.errors import UsageError
from sodfast.model import (
    LanguageModel,
    load_model,
    micro_batches,
    response_hidden,
    to_ids,
    wrap_model,
)
from sodfast.tasks import Question

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is false %}<quiet>{% endif %}"
    "{% endif %}"
)


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": len(lab.build_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def wrap(network: Any, **changes: Any) -> LanguageModel:
    tokenizer = lab.build_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return wrap_model(network, tokenizer, CPU, "the model")


# ---------------------------------------------------------------- forward passes


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_hidden_rows_equal_those_of_each_sequence_alone(
    architecture: str, model: LanguageModel
) -> None:
    model = model if architecture == "qwen3" else wrap(tiny_llama())
    rng = torch.Generator().manual_seed(0)
    sizes = [(7, 3), (1, 1), (12, 9), (2, 30), (30, 1)]
    pairs = [[torch.randint(1, 18, (n,), generator=rng) for n in size] for size in sizes]
    contexts, responses = (list(column) for column in zip(*pairs, strict=True))
    with torch.no_grad():
        hidden_NH = response_hidden(model.network, contexts, responses, model.pad_id)
        start = 0
        for context, response in pairs:
            ids = torch.cat([context, response])[None]
            output = model.network(ids, output_hidden_states=True)
            expected_NH = output.hidden_states[-1][0, len(context) - 1 : -1]
            rows_NH = hidden_NH[start : start + len(response)]
            torch.testing.assert_close(rows_NH, expected_NH, rtol=0, atol=1e-5)
            logits_NV = rows_NH @ model.head.T
            expected_NV = output.logits[0, len(context) - 1 : -1]
            torch.testing.assert_close(logits_NV, expected_NV, rtol=0, atol=1e-4)
            start += len(response)
    assert start == len(hidden_NH)


def test_the_padding_token_may_occur_in_a_prompt(model: LanguageModel) -> None:
    pair = to_ids([model.pad_id, 5, model.pad_id]), to_ids([model.pad_id, 6])
    other = to_ids([4] * 9), to_ids([8] * 9)
    with torch.no_grad():
        alone = response_hidden(model.network, [pair[0]], [pair[1]], model.pad_id)
        both = response_hidden(
            model.network, [other[0], pair[0]], [other[1], pair[1]], model.pad_id
        )
    torch.testing.assert_close(both[9:], alone, rtol=0, atol=1e-5)


@given(st.lists(st.integers(1, 60)), st.integers(1, 200))
def test_micro_batches_cover_each_index_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = list(micro_batches(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * width <= budget
    widths = [max(lengths[index] for index in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_micro_batches_are_as_large_as_the_budget_allows() -> None:
    assert list(micro_batches([2, 5, 2, 3, 9], 9)) == [[4], [1], [3, 0, 2]]


# ---------------------------------------------------------------- prompts


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

    chat = LanguageModel(model.network, Tokenizer(), model.eos_ids, model.pad_id)
    question = Question(prompt="P", answer="", system="S", id="1")
    assert chat.encode_question(question) == model.encode("1+1=")
    chat.encode("P", "")
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "P"}
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    assert rendered == [([system, user], options), ([user], options)]


def test_a_template_sees_that_thinking_is_off() -> None:
    model = wrap(tiny_llama(), chat_template=TEMPLATE)
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "1"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert text == "[user]1[assistant]<quiet>"
    assert model.encode("1") == model.tokenizer(text).input_ids


def test_a_template_without_system_messages_says_so() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('none here') }}{% endif %}1"
    model = wrap(tiny_llama(), chat_template=template)
    assert model.encode("2") == model.tokenizer("1").input_ids
    with pytest.raises(UsageError, match=r"system and user.*none here"):
        model.encode("2", "3")


def test_without_a_chat_template_the_text_stands_as_it_is(model: LanguageModel) -> None:
    assert model.decode(model.encode("17*8+6=")) == "17*8+6="
    assert model.encode("1+", "2") == model.tokenizer("2\n\n1+").input_ids


def test_special_tokens_are_not_decoded(model: LanguageModel) -> None:
    ids = [*model.encode("4="), model.pad_id, model.eos_ids[0]]
    assert model.decode(ids) == model.decode(to_ids(ids)) == "4="


# ---------------------------------------------------------------- loading


@pytest.fixture
def directory(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        load_model(str(path), CPU)
    message = str(error.value)
    assert "\n" not in message and f"model.path={path}" in message
    return message


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "safetensors"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_a_missing_file_is_named(directory: Path, missing: str, named: str) -> None:
    (directory / missing).unlink()
    assert named in refusal(directory)


def test_weights_that_would_be_unpickled_are_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(torch, "load", None)
    assert "unpickled" in refusal(directory)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_a_usage_error(directory: Path, name: str, damage: str) -> None:
    whole = (directory / name).read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "garbage": b"\xff{" * 50, "empty": b""}
    (directory / name).write_bytes(broken[damage])
    refusal(directory)


def test_weights_of_another_model_are_refused(directory: Path) -> None:
    """transformers would fill the gap with random numbers and a warning."""
    config = json.loads((directory / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config))
    assert "layers.2" in refusal(directory)


def test_weights_of_another_size_are_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    refusal(directory)


def test_a_path_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refusal(tmp_path / "nowhere")


def test_code_in_a_model_directory_never_runs(directory: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    code = f"open({str(witness)!r}, 'w')\nclass Config: ...\nclass Model: ...\nclass Tok: ...\n"
    (directory / "evil.py").write_text(code)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (directory / "config.json").write_text(json.dumps(config))
    load_model(str(directory), CPU)  # a known architecture: the library's own class

    for unknown in (config | {"model_type": "evil"}, {"auto_map": config["auto_map"]}):
        (directory / "config.json").write_text(json.dumps(unknown))
        refusal(directory)
    assert not witness.exists()


def test_fewer_embedding_rows_than_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="18 tokens, the model 17"):
        wrap(tiny_llama(vocab_size=17))


def test_more_embedding_rows_than_tokens_are_fine() -> None:
    assert wrap(tiny_llama(vocab_size=32)).head.shape[0] == 32


def test_a_model_without_an_eos_token_is_refused() -> None:
    with pytest.raises(UsageError, match="EOS"):
        wrap(tiny_llama(eos_token_id=None), eos_token=None)


def test_every_eos_token_of_the_generation_config_counts() -> None:
    network = tiny_llama()
    network.generation_config.eos_token_id = [1, 5]
    assert wrap(network).eos_ids == (1, 5)


def test_padding_falls_back_to_eos() -> None:
    assert wrap(tiny_llama(), pad_token=None).pad_id == 1


def test_a_head_with_a_bias_is_refused() -> None:
    network = tiny_llama()
    network.lm_head = torch.nn.Linear(32, 18)
    with pytest.raises(UsageError, match="bias"):
        wrap(network)


def test_a_logit_scale_is_refused() -> None:
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=18,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,
        logit_scale=0.5,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    with pytest.raises(UsageError, match="logit scale"):
        wrap(CohereForCausalLM(config))


def test_a_soft_cap_is_known_to_the_objective() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=18,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
        final_logit_softcapping=2.0,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    assert wrap(Gemma2ForCausalLM(config)).softcap == 2.0


def test_the_network_is_always_in_eval_mode() -> None:
    """Dropout would part teacher and student where their weights agree."""
    network = tiny_llama(attention_dropout=0.5).train()
    assert not wrap(network).network.training
