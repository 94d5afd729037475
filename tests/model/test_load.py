"""Loading, and which models are refused."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from sodfast.errors import UsageError
from sodfast.lab.model import build_tokenizer
from sodfast.model.language_model import LanguageModel, cast_weights
from sodfast.model.load import load_model, wrap_model

CPU = torch.device("cpu")


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": len(build_tokenizer()),
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
    tokenizer = build_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return wrap_model(network, tokenizer, CPU, "the model")


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


@pytest.mark.parametrize(
    "name",
    [
        "w.bin",
        "../w.safetensors",
        *slow("part/w.safetensors", "/w.safetensors", "..", "", 7, None),
    ],
)
@pytest.mark.parametrize("where", ["index", "config"])
def test_weights_are_named_files_of_the_directory_itself(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, name: Any
) -> None:
    """Nothing is opened under another name, whether it would be unpickled or lies elsewhere."""
    if where == "config":
        name = "adapter_model.bin" if name is None else name  # None: no file is named
        config = json.loads((directory / "config.json").read_text())
        config["transformers_weights"] = name
        (directory / "config.json").write_text(json.dumps(config))
    else:
        weights = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").rename(directory / "other.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", None)
    message = refusal(directory)
    assert repr(str(name)) in message and "only *.safetensors files" in message


def test_weights_in_several_files_are_read(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(weights)}
    for part in set(weight_map.values()):
        own = {name: weights[name] for name in weights if weight_map[name] == part}
        save_file(own, directory / part, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_model(str(directory), CPU).network.state_dict()
    assert all(tensor.equal(loaded[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("index", ["[]", "null", '{"weight_map": ["a.safetensors"]}', "{"])
def test_a_damaged_index_is_a_usage_error(directory: Path, index: str) -> None:
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    (directory / "model.safetensors.index.json").write_text(index)
    refusal(directory)


@pytest.mark.parametrize("damage", ["truncated", *slow("garbage", "empty")])
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


def change(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.mark.parametrize("contents", ["[]", "null", "3", "{}", '{"model_type": []}', "[" * 100_000])
def test_a_config_that_names_no_model_is_refused(directory: Path, contents: str) -> None:
    (directory / "config.json").write_text(contents)
    assert "config.json" in refusal(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # An encoder, and a decoder that cannot be had alone.
        *slow(("model_type", "t5"), ("model_type", "clip")),
        ("rope_parameters", {"rope_type": "nosuch", "rope_theta": 1e4}),
        ("hidden_act", "nosuch"),
        ("num_hidden_layers", 10**11),
        ("vocab_size", 10**9),
        *slow(
            ("rope_parameters", {"rope_type": "yarn"}),
            ("rope_parameters", 3),
            ("hidden_act", None),
            ("dtype", "nosuch"),
            ("dtype", []),
            ("num_attention_heads", 0),
            ("num_key_value_heads", -1),
            ("num_hidden_layers", 0),
            ("num_hidden_layers", 500),
            ("num_hidden_layers", "x"),
            ("num_labels", 10**9),
            ("vocab_size", 10**13),
            ("head_dim", 0),
            ("sliding_window", 0),
            ("sliding_window", -3),
            ("rms_norm_eps", "x"),
            ("layer_types", 3),
            ("quantization_config", 3),
            ("auto_map", 3),
            ("pad_token_id", 9999),
        ),
    ],
)
def test_a_config_that_makes_no_model_is_one_line(directory: Path, key: str, value: Any) -> None:
    change(directory / "config.json", **{key: value})
    assert "config.json" in refusal(directory)


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "[]"),
        ("special_tokens_map.json", "[]"),
        *slow(*(("tokenizer.json", text) for text in ("null", "{}", '{"version": "1.0"}'))),
        *slow(*(("tokenizer_config.json", text) for text in ("null", "3", "{", "\xff{"))),
        *slow(*(("generation_config.json", text) for text in ("null", "3", "{"))),
    ],
)
def test_a_file_of_the_wrong_shape_is_named(directory: Path, file: str, contents: str) -> None:
    (directory / file).write_text(contents)
    assert file in refusal(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("added_tokens", 3),
        ("model", {"type": "NoSuch"}),
        ("model", {"type": "WordLevel", "vocab": {"a": 10**9}, "unk_token": "a"}),
        ("model", {"type": "BPE", "vocab": {}, "merges": []}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": ""}),
        ("pre_tokenizer", 3),
    ],
)
def test_a_tokenizer_that_makes_no_tokens_of_the_model_is_one_line(
    directory: Path, key: str, value: Any
) -> None:
    change(directory / "tokenizer.json", **{key: value})
    assert "tokenizer" in refusal(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["{{ 1 / 0 }}", "{{", "{% if messages | length > 9 %}x{% endif %}"]
)
def test_a_chat_template_that_fails_is_refused_with_its_file(directory: Path, text: str) -> None:
    change(directory / "tokenizer_config.json", chat_template=text)
    assert "the chat template in tokenizer_config.json: " in refusal(directory)
    (directory / "chat_template.jinja").write_text(text)
    assert "chat_template.jinja: " in refusal(directory)


def test_kernels_that_a_config_names_are_not_fetched(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers runs the code of such a repository where the package `kernels` is installed."""
    asked: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.is_kernel", lambda name: asked.append(name))
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        change(directory / "config.json", **{key: "kernels-community/flash-attn3"})
    network = load_model(str(directory), CPU).network
    assert "/" not in str(network.config._attn_implementation)
    assert "/" not in str(network.config._experts_implementation)
    assert not any("/" in str(name) for name in asked)


def test_the_model_keeps_the_name_that_it_was_asked_by(directory: Path) -> None:
    """An adapter's adapter_config.json names its base by it."""
    network = load_model(f"{directory}/", CPU).network
    assert network.name_or_path == network.config.name_or_path == f"{directory}/"


def test_fewer_embedding_rows_than_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="18 tokens, the model 17"):
        wrap(tiny_llama(vocab_size=17))


def test_more_embedding_rows_than_tokens_are_fine() -> None:
    assert wrap(tiny_llama(vocab_size=32)).head.shape[0] == 32


def test_a_model_without_an_eos_token_is_refused() -> None:
    with pytest.raises(UsageError, match="EOS"):
        wrap(tiny_llama(eos_token_id=None), eos_token=None)


@pytest.mark.parametrize("eos", [-1, 18, [], [1, -1], "x", True, 1.5, {}, [None], [[1]]])
def test_an_eos_token_that_no_answer_can_end_with_is_refused(eos: Any) -> None:
    network = tiny_llama()
    network.generation_config.eos_token_id = eos
    with pytest.raises(UsageError, match=r"EOS token|eos_token_id .* none of the tokens 0 to 17"):
        wrap(network)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float) -> None:
    network = tiny_llama()
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(
        UsageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"
    ):
        wrap(network)


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


def test_a_model_that_transformers_cannot_pack_is_refused() -> None:
    config = BloomConfig(vocab_size=18, hidden_size=16, n_layer=1, n_head=2, eos_token_id=1)
    with pytest.raises(UsageError, match="BloomForCausalLM cannot be packed"):
        wrap(BloomForCausalLM(config))


def test_a_model_whose_layers_join_positions_by_themselves_is_refused() -> None:
    class Shift(torch.nn.Module):
        """What a convolution or a recurrent state does: it looks at the position before."""

        def forward(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(hidden_BSH, (0, 0, 1, 0))[:, :-1]

    network = tiny_llama()
    network.model.layers[1].mlp = Shift()
    with pytest.raises(UsageError, match="otherwise than apart"):
        wrap(network)


def test_layers_of_an_unknown_kind_are_refused() -> None:
    network = tiny_llama()
    network.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UsageError, match="cannot be packed"):
        wrap(network)


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


# ---------------------------------------------------------------- 16-bit weights


def test_weights_are_cast_as_they_are_loaded(tiny_model: Path, model: LanguageModel) -> None:
    """The lab casts its warm start, a directory is read as bf16: the same weights and ties."""
    loaded = load_model(str(tiny_model), model.device, torch.bfloat16).network
    cast_weights(model.network, torch.bfloat16)
    assert model.head is model.network.get_input_embeddings().weight
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(network, kind)()) for network in (model.network, loaded))
        assert ours.keys() == theirs.keys() and ours
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
