"""The directory that a model is read from: where it is, and what its files may say.

Whoever wrote a model may be a stranger. Of a model on the hub only tables of numbers and text are
fetched; nothing that runs, nothing that would have to be unpickled, and no file outside of the
directory is opened, whatever a file in it says.
"""

import json
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
    if not folder.exists():
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


def read_object(file: Path, place: str) -> dict[str, Any]:
    """A JSON object. Raises `UsageError`, which begins with `place`, for anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{place} is not JSON ({reason}): give the file that was saved") from error
    if not isinstance(value, dict):
        raise UsageError(f"{place} is not a JSON object: give the file that was saved")
    return value


@contextmanager
def refusing(place: str, change: str) -> Iterator[None]:
    """Turn whatever a library raises over a file that it reads into one line: `UsageError`.

    The libraries check what they read in passing or not at all. So a damaged file shows as any
    exception of Python's, and as a bare `Exception` where `tokenizers` raises it.
    """
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(f"{place} cannot be used ({reason}): {change}") from error


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
    _require_own_weights(folder, name)


def _require_own_weights(folder: Path, name: str) -> None:
    """Refuse a model whose weights lie in other files than its own `*.safetensors`, before any of
    them is opened: transformers follows the names that config.json and the index of a model in
    several files give, and unpickles what is not called `*.safetensors`."""
    single = read_object(folder / "config.json", f"{name}: config.json").get("transformers_weights")
    names = [] if single is None else [single]
    if (folder / INDEX).is_file():
        index = read_object(folder / INDEX, f"{name}: {INDEX}")
        for key in ("metadata", "weight_map"):
            if not isinstance(index.get(key), dict):
                raise UsageError(f"{name}: {key} in {INDEX} is not a JSON object: mend the index")
        names += index["weight_map"].values()
    for file in names:
        plain = isinstance(file, str) and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
            raise UsageError(
                f"{name} names {str(file)[:100]!r} as a file of weights: only *.safetensors files "
                "beside config.json are read"
            )


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
