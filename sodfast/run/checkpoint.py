"""Checkpoints: safetensors and JSON only, written aside and renamed, the last few kept.

    checkpoints/step-N/
        student/               a Hugging Face directory (weights, config, tokenizer); under LoRA
                               the adapter in peft's format, for the frozen base in `model.path`
        teacher.safetensors    the teacher's own weights; absent while it equals the student
        optimizer.safetensors  one tensor per parameter and moment: NAME.MOMENT
        state.json             step, schedule, collapse detector, reward memory, cursor,
                               fingerprint, a hash of the base

A directory named step-N is complete: it gets its name only after everything in it is on disk.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sodfast.errors import RunFailed, UsageError
from sodfast.model.load import LanguageModel, trained_parameters
from sodfast.model.lora import peft_name, save_adapters

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found. `teacher` is None where the teacher equals the student."""

    step: int
    student: dict[str, Tensor]
    teacher: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(
    directory: Path,
    step: int,
    model: LanguageModel,
    student: dict[str, Tensor],
    teacher: dict[str, Tensor] | None,
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write checkpoint `step` and delete all but the last `keep`.

    `student`: the state dict of `model`'s network; `teacher`: its own parameters by name, None
    while it equals the student; `optimizer`: as `optimizer_tensors` gives it.
    Raises `RunFailed` when the disk refuses; earlier checkpoints are untouched then.
    """
    final = directory / f"step-{step}"
    if final.exists():
        return final
    aside = directory / f".step-{step}.tmp"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if model.base is None:
            model.network.save_pretrained(aside / "student", state_dict=student)
        else:
            save_adapters(model.network, aside / "student")
        model.tokenizer.save_pretrained(aside / "student")
        if teacher is not None:
            named = {name: tensor.detach().contiguous() for name, tensor in teacher.items()}
            save_file(named, aside / "teacher.safetensors")
        save_file(optimizer, aside / "optimizer.safetensors")
        write_state(aside, {"step": step, **state})
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        os.rename(aside, final)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunFailed(f"checkpoint of step {step} could not be written: {error}") from error
    prune(directory, keep)
    return final


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write the JSON half of a checkpoint that nobody reads yet."""
    (path / "state.json").write_text(json.dumps(state))


def prune(directory: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep`, and what a process that was killed has left.

    A checkpoint loses its name before its files. Raises `RunFailed` when the disk refuses.
    """
    try:
        for old in sorted(steps(directory))[:-keep]:
            aside = directory / f".step-{old}.tmp"
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(directory / f"step-{old}", aside)
        for aside in directory.glob(".step-*.tmp"):
            shutil.rmtree(aside)
    except OSError as error:
        raise RunFailed(f"{directory}: old checkpoints could not be deleted: {error}") from error


def steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    if not directory.is_dir():
        return []
    matches = [_STEP.fullmatch(path.name) for path in directory.iterdir()]
    return [int(match[1]) for match in matches if match]


def latest(directory: Path) -> Path | None:
    found = steps(directory)
    return directory / f"step-{max(found)}" if found else None


def load_state(path: Path) -> dict[str, Any]:
    """The JSON half of a checkpoint. Raises `UsageError` for a damaged one."""
    try:
        state = json.loads((path / "state.json").read_text())
        return {**state, "step": int(state["step"]), "fingerprint": str(state["fingerprint"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def load(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises `UsageError` for a damaged one."""
    state = load_state(path)
    try:
        student: dict[str, Tensor] = {}
        for shard in sorted((path / "student").glob("*.safetensors")):
            student |= load_file(shard)
        # Without its file a teacher of its own would silently become the student.
        teacher = path / "teacher.safetensors"
        has_teacher = teacher.is_file() or not state.get("teacher_is_student", True)
        return Checkpoint(
            step=state["step"],
            student=student,
            teacher=load_file(teacher) if has_teacher else None,
            optimizer=load_file(path / "optimizer.safetensors"),
            state=state,
        )
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"checkpoint {path} is damaged ({error}): delete it to use the one before")


def restore_student(
    model: LanguageModel, tensors: dict[str, Tensor], base: str | None = None
) -> None:
    """Copy stored weights in; what is frozen or tied to another may be absent, nothing else.

    `base`: the `model.base` that adapters were stored with. Raises `UsageError` where the model's
    is another one.
    """
    if base != model.base:
        raise UsageError(
            "the checkpoint's adapters belong to other base weights than the present ones: let "
            "model.path and model.dtype give what the run began with"
        )
    trained = trained_parameters(model.network)
    own = {peft_name(name): name for name in trained}
    missing, unexpected = model.network.load_state_dict(
        {own.get(name, name): tensor for name, tensor in tensors.items()}, strict=False
    )
    tied = set(getattr(model.network, "all_tied_weights_keys", {}) or {})
    frozen = {name for name, _ in model.network.named_parameters()} - trained.keys()
    if unexpected or set(missing) - tied - frozen:
        raise UsageError(
            f"the checkpoint's student is another model: missing {missing}, extra {unexpected}"
        )


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by NAME.MOMENT."""
    names = list(trained_parameters(network))
    return {
        f"{names[index]}.{key}": value.contiguous()
        for index, moments in optimizer.state_dict()["state"].items()
        for key, value in moments.items()
    }


def restore_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    indices = {name: index for index, name in enumerate(trained_parameters(network))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(".")
        state.setdefault(indices[name], {})[moment] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
