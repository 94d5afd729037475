"""Where a model is read from: which files are fetched, and that none leads elsewhere."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from safetensors.torch import load_file

from sodfast.errors import UsageError
from sodfast.model import directory as module
from sodfast.model.directory import find_model, read_config, refusing, stored_sizes
from sodfast.model.load import load_model

CPU = torch.device("cpu")


@pytest.fixture
def directory(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def asked(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What a hub that has `org/model` alone is asked for."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options))
        if name != "org/model":
            raise FileNotFoundError("no such\nrepository")
        return str(directory)

    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    "path",
    ["nosuch", "../org", *slow("./nosuch", "/no/such", "no/such/model", "-org/model", "o" * 5000)],
)
def test_what_is_no_id_never_reaches_the_hub(
    path: str, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no such directory, and not a hub id of the form"):
        find_model(path)
    assert asked == []


def test_a_directory_is_read_where_it_is(directory: Path, asked: list[Any]) -> None:
    assert find_model(str(directory)) == directory
    assert asked == []


def test_an_id_is_asked_for_once_and_without_code(asked: list[Any], directory: Path) -> None:
    assert find_model("org/model") == directory
    ((name, options),) = asked
    assert name == "org/model"
    assert not any("py" in pattern or "bin" in pattern for pattern in options["allow_patterns"])
    assert "*/*" in options["ignore_patterns"]


def test_an_id_that_the_hub_does_not_give_is_one_line(asked: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"org/other: no such directory.*no such repository") as e:
        find_model("org/other")
    assert "\n" not in str(e.value) and len(asked) == 1


def test_an_id_without_a_network_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="the hub does not give it"):
        find_model("no-such-org/no-such-model")


def test_a_pipe_among_the_models_files_is_refused(directory: Path) -> None:
    """It would wait for a writer for ever."""
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    with pytest.raises(UsageError, match=r"model\.safetensors is a pipe"):
        find_model(str(directory))


def test_an_adapter_beside_the_model_is_refused(directory: Path) -> None:
    """With peft installed transformers would add it, or read the base that it names."""
    adapter = {"base_model_name_or_path": "evil/model", "peft_type": "LORA"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UsageError, match=r"adapter_config\.json\): merge it"):
        load_model(str(directory), CPU)


@pytest.mark.parametrize("missing", ["metadata", "weight_map"])
@pytest.mark.parametrize("value", ["absent", *slow(None, [])])
def test_an_index_must_be_whole(directory: Path, missing: str, value: Any) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    index: dict[str, Any] = {
        "metadata": {},
        "weight_map": dict.fromkeys(weights, "part.safetensors"),
    }
    index[missing] = value
    if value == "absent":
        del index[missing]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=f"{missing} in model.safetensors.index.json"):
        load_model(str(directory), CPU)


@pytest.mark.parametrize("name", ["../outside/tokenizer.4.0.0.json", "/tokenizer.4.0.json", 3])
def test_a_tokenizer_elsewhere_is_not_followed(directory: Path, tmp_path: Path, name: Any) -> None:
    """transformers prefers a tokenizer of its own version, by whatever path it is listed."""
    (tmp_path / "outside").mkdir()
    shutil.copy(directory / "tokenizer.json", tmp_path / "outside" / "tokenizer.4.0.0.json")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["fast_tokenizer_files"] = [name, "tokenizer.json"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"fast_tokenizer_files in tokenizer_config\.json"):
        load_model(str(directory), CPU)


def test_counts_and_windows_of_a_config_are_bounded_in_its_parts_too(tmp_path: Path) -> None:
    for contents in ({"num_hidden_layers": 513}, {"text_config": {"num_labels": 10**7}}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **contents}))
        with pytest.raises(UsageError, match="more than"):
            read_config(tmp_path, "the model")
    for contents in ({"sliding_window": 0}, {"text_config": {"sliding_window": -3}}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **contents}))
        with pytest.raises(UsageError, match="no token could see itself"):
            read_config(tmp_path, "the model")
    fine = {
        "model_type": "llama",
        "sliding_window": None,
        "num_hidden_layers": 126,
        "n_positions": 10**6,
        "rope_theta": 1e9,
    }
    (tmp_path / "config.json").write_text(json.dumps(fine))
    assert read_config(tmp_path, "the model") == fine


def test_sizes_are_read_off_the_headers(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    sizes = stored_sizes(directory, "the model")
    assert sizes == {name: tensor.numel() for name, tensor in weights.items()}


def test_a_library_that_fails_is_one_line_with_its_reason() -> None:
    line = r"^It failed \(KeyError: 'a b'\): mend it$"
    with pytest.raises(UsageError, match=line) as error, refusing("It failed", "mend it"):
        raise KeyError("a b")
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("kind", [UsageError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_file_passes(kind: type[BaseException]) -> None:
    with pytest.raises(kind, match="itself"), refusing("It failed", "mend it"):
        raise kind("itself")
