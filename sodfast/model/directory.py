"""The directory that a model is read from: where it is, and what its files may say.

Whoever wrote a model may be a stranger. Of a model on the hub only tables of numbers and text are
fetched; nothing that runs, nothing that would have to be unpickled, and no file outside of the
directory is opened, whatever a file in it says.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from sodfast.errors import UsageError

INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MOST_LAYERS, _MOST_PARTS = 2**9, 2**20
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
# Folders, and the weights of some models once more in another layout.
_NOT_FETCHED = ["*/*", "consolidated*.safetensors"]


def find_model(path: str) -> Path:
    """The directory of the model `path`, a directory or an id `org/name` of the hub, whose files
    are fetched unless they have been before; the network is touched for an id alone.

    Raises `UsageError` where there is none, or where its files are not what `load_model` reads.
    """
    folder = Path(path)
    if not os.path.exists(path):  # which also says so of a name that is too long
        if not _HUB_ID.fullmatch(path):
            raise UsageError(
                f"model.path={path}: no such directory, and not a hub id of the form org/name"
            )
        try:
            folder = Path(
                snapshot_download(path, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED)
            )
        except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"model.path={path}: no such directory, and the hub does not give it ({reason})"
            ) from error
    _require_files(folder, f"model.path={path}")
    return folder


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The contents of config.json. Raises `UsageError`, which begins with `name`, where it names no
    model, counts more layers or other parts than any model has (transformers makes lists of such
    lengths before it checks anything), or gives attention a window of no token, which every
    attention understands otherwise."""
    contents = _read_json(folder / "config.json", name)
    if not isinstance(contents, dict) or not isinstance(contents.get("model_type"), str):
        raise UsageError(f"{name}: its config.json names no model_type: give a Hugging Face model")
    for part in (contents, *(value for value in contents.values() if isinstance(value, dict))):
        for key, value in part.items():
            limit = _MOST_LAYERS if "layer" in key else _MOST_PARTS
            counts = key.startswith(("num_", "n_")) and isinstance(value, int)
            if counts and value > limit:
                raise UsageError(
                    f"{name}: config.json says {key}={str(value)[:40]}, and no model is known of "
                    f"more than {limit}: give the config.json that belongs to the weights"
                )
            if key == "sliding_window" and isinstance(value, int) and value < 1:
                raise UsageError(
                    f"{name}: config.json says sliding_window={value}, and no token could see "
                    "itself: give the number of tokens, or null where attention sees them all"
                )
    return contents


def name_no_code(config: Any) -> None:
    """Take back a configuration's choice of kernels: it may be a repository of the hub
    (https://huggingface.co/docs/kernels), whose code transformers would run."""
    config._attn_implementation = config._experts_implementation = None


def _read_json(file: Path, name: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{name}: its {file.name} cannot be read ({reason}): give the file that was saved"
        ) from error


def _read_object(file: Path, name: str) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    value = _read_json(file, name) if file.is_file() else {}
    if not isinstance(value, dict):
        raise UsageError(
            f"{name}: its {file.name} is not a JSON object: give the file that was saved"
        )
    return value


@contextmanager
def refusing(failure: str, change: str) -> Iterator[None]:
    """Turn whatever a library raises over a file that it reads into one line, a `UsageError` that
    says what failed, why, and what to change.

    The libraries check what they read in passing or not at all. So a damaged file shows as any
    exception of Python's, and as a bare `Exception` where `tokenizers` raises it.
    """
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(f"{failure} ({reason}): {change}") from error


def _require_files(folder: Path, name: str) -> None:
    """Raise `UsageError`, which begins with `name`, where a file is missing that a model needs, or
    where one of them leads elsewhere."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{name} holds no config.json: give a Hugging Face model")
    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"{name} holds no .safetensors file (other formats would be unpickled): "
            "save the model with safe_serialization=True"
        )
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise UsageError(f"{name} holds no tokenizer: save the tokenizer there too")
    if (folder / "adapter_config.json").exists():
        # With peft installed transformers would add its weights, or read another base instead.
        raise UsageError(
            f"{name} holds an adapter beside the model (adapter_config.json): merge it into the "
            "weights and save those, or take it away"
        )
    _require_own_files(folder, name)


def _require_own_files(folder: Path, name: str) -> None:
    """Refuse a model whose files send the reader elsewhere, before any such file is opened.

    transformers follows the names of weights that config.json gives, and the index of a model in
    several files, and unpickles what is not called `*.safetensors`; it follows the names of
    tokenizers that tokenizer_config.json gives.
    """
    for path in folder.iterdir():
        if path.is_fifo():
            raise UsageError(f"{name}: {path.name} is a pipe: give the file that was saved")
    single = read_config(folder, name).get("transformers_weights")
    names = [] if single is None else [single]
    if (folder / INDEX).is_file():
        index = _read_object(folder / INDEX, name)
        for key in ("metadata", "weight_map"):
            if not isinstance(index.get(key), dict):
                raise UsageError(f"{name}: {key} in {INDEX} is not a JSON object: mend the index")
        names += index["weight_map"].values()
    for file in names:
        if not _is_plain(file) or not file.endswith(".safetensors"):
            raise UsageError(
                f"{name} names {str(file)[:100]!r} as a file of weights: only *.safetensors files "
                "beside config.json are read"
            )
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        others = _read_object(folder / file, name).get("fast_tokenizer_files") or []
        if not isinstance(others, list) or any(not _is_plain(other) for other in others):
            raise UsageError(
                f"{name}: fast_tokenizer_files in {file} names {str(others)[:100]}: only files "
                "beside config.json are read"
            )


def _is_plain(file: Any) -> bool:
    """Whether this is the name of a file, without a folder."""
    return isinstance(file, str) and Path(file).name == file


def stored_sizes(folder: Path, name: str) -> dict[str, int]:
    """The number of elements of each tensor in the model's weights, by the tensor's name, from the
    headers of the files alone. Raises `UsageError` for a damaged file."""
    sizes: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (the file is no mapping)
                    shape = tensors.get_slice(key).get_shape()
                    sizes[key] = 1
                    for length in shape:
                        sizes[key] *= length
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{name}: {file.name} is damaged ({error}): give the file that was saved"
            ) from error
    return sizes
