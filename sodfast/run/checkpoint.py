"""Checkpoints: safetensors and JSON only, written aside and renamed, the last few kept.

    checkpoints/step-N/
        student/               a Hugging Face directory (weights, config, tokenizer); under LoRA
                               the adapter in peft's format, for the frozen base in `model.path`
        teacher.safetensors    the teacher's own weights; absent while it equals the student
        optimizer.safetensors  one tensor per parameter and moment: NAME.MOMENT
        state.json             step, schedule, collapse detector, reward memory, cursor,
                               fingerprint, a hash of the base; the size and SHA-256 of every
                               other file, and of these values themselves

A directory named step-N is complete: it gets its name only after everything in it is on disk.
What is read is compared with the sizes in state.json each time, and with the hashes where it is
loaded; whatever has changed since is refused. Release 0.1.0 wrote neither.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sodfast.errors import RunFailed, UsageError
from sodfast.files import read_object, sync, sync_entry
from sodfast.model.joined import apart
from sodfast.model.language_model import LanguageModel
from sodfast.model.lora import save_adapters

_STEP = re.compile(r"step-(0|[1-9]\d{0,17})")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=0)]


class _Statistics(_Part):
    step: Count
    reward_mean: float
    length_mean: float
    length_max: int


class _Gated(_Part):
    """The state of CGTR."""

    model_config = ConfigDict(extra="forbid")

    window: list[_Statistics]
    last_copy: Count
    reward_reference: float | None


class _Probed(_Statistics):
    questions: Count
    gain: float
    gain_squared: float
    candidate_length: float
    incumbent_length: float
    longest: float


class _Evidence(_Part):
    """The state of `schedule.Evidence`."""

    model_config = ConfigDict(extra="forbid")

    probes: list[_Probed]
    last_copy: Count
    opening: float | None


class _Followed(_Part):
    """The state of a schedule that took over from another one in a fork."""

    model_config = ConfigDict(extra="forbid")

    start: Count
    copied: Count


class _Own(_Part):
    """The state of a user's schedule."""

    model_config = ConfigDict(extra="forbid")

    last_copy: Count
    own: Any


class _Stateless(_Part):
    model_config = ConfigDict(extra="forbid")


class _Collapse(_Part):
    long_steps: Count
    best_eval: float
    step: Count | None


class _File(_Part):
    size: Count
    sha256: str


class _State(_Part):
    """What a resume reads of state.json."""

    step: Count
    fingerprint: str
    base: str | None = None
    schedule: _Gated | _Evidence | _Followed | _Own | _Stateless
    collapse: _Collapse
    reward_memory: dict[str, float]
    teacher_is_student: bool = True


class _Head(_Part):
    """What every command reads of state.json."""

    step: Count
    fingerprint: str
    files: dict[str, _File] | None = None
    task_files: dict[str, str] | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found. `teacher` is None where the teacher equals the student; `hashed`: whether
    the files had hashes to be compared with."""

    path: Path
    hashed: bool
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
    lasting: Container[int] = (),
) -> Path:
    """Write checkpoint `step` and delete all but the last `keep` and the `lasting` steps.

    `student`: the state dict of `model`'s network; `teacher`: its own parameters by name, None
    while it equals the student; `optimizer`: as `restore.optimizer_tensors` gives it.
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
            model.network.save_pretrained(aside / "student", state_dict=apart(student))
        else:
            save_adapters(model.network, aside / "student")
        model.tokenizer.save_pretrained(aside / "student")
        if teacher is not None:
            named = {name: tensor.detach().contiguous() for name, tensor in teacher.items()}
            save_file(named, aside / "teacher.safetensors")
        save_file(optimizer, aside / "optimizer.safetensors")
        write_state(aside, {"step": step, **state})
        sync(aside)
        os.rename(aside, final)
        sync_entry(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunFailed(f"checkpoint of step {step} could not be written: {error}") from error
    prune(directory, keep, lasting)
    return final


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write the JSON half of a checkpoint that nobody reads yet, with the sizes and hashes of its
    other files, which are read for that unless `state` has them from another checkpoint."""
    described = {**state, "files": state.get("files") or _describe(path)}
    text = json.dumps({**described, "sha256": _digest(described)})
    (path / "state.json").write_text(text, encoding="utf-8")


def prune(directory: Path, keep: int, lasting: Container[int] = ()) -> None:
    """Delete all checkpoints but the last `keep` and those of the steps `lasting`, and what a
    process that was killed has left.

    A checkpoint loses its name before its files. Raises `RunFailed` when the disk refuses.
    """
    try:
        for old in sorted(steps(directory))[:-keep]:
            if old in lasting:
                continue
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
    if not os.path.isdir(directory):
        return []
    matches = [_STEP.fullmatch(name) for name in os.listdir(directory)]
    return [int(match[1]) for match in matches if match]


def latest(directory: Path) -> Path | None:
    found = steps(directory)
    return directory / f"step-{max(found)}" if found else None


def load_state(path: Path) -> dict[str, Any]:
    """The JSON half of a checkpoint, whose other files are there and of their sizes.

    Raises `UsageError` for a damaged one.
    """
    try:
        state = read_object(path / "state.json")
        head = _Head.model_validate(state)
        if path.name != f"step-{head.step}":
            raise ValueError(f"state.json says step {head.step}")
        if head.files is not None or head.sha256 is not None:
            if state.pop("sha256", None) != _digest(state):
                raise ValueError("state.json has been changed")
            _require_sizes(path, head.files or {})
    except (UsageError, OSError, ValueError) as error:
        raise damaged(path, error) from error
    return state


def _require_sizes(path: Path, files: Mapping[str, _File]) -> None:
    """Raise `ValueError` for a file of another size, a name outside the checkpoint or weights that
    are not listed, `OSError` for a file that is missing."""
    for name, file in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name} does not lie in it")
        size = (path / name).stat().st_size
        if size != file.size:
            raise ValueError(f"{name} has {size} bytes, not {file.size}")
    weights = {file.relative_to(path).as_posix() for file in path.rglob("*.safetensors")}
    for name in sorted(weights - files.keys()):
        raise ValueError(f"{name} does not belong to it")


def file_names(path: Path, state: Mapping[str, Any], folder: str = "") -> list[str]:
    """The files of a checkpoint but state.json, by their names from `path`; those in `folder`, from
    there. They are what `state`, its JSON half, lists or, where release 0.1.0 wrote no list, all
    that is there; whatever else lies there, such as a link to a folder elsewhere, is none of it."""
    names = state.get("files")
    if names is None:
        found = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        names = [name for name in found if name != "state.json"]
    return sorted(name.removeprefix(folder) for name in names if name.startswith(folder))


def verify(path: Path, folder: str = "") -> dict[str, Any]:
    """`load_state` of a checkpoint whose files, or those in `folder`, also have their hashes.

    Raises `UsageError` for a damaged one. Reads the files, each in a thread: 15 s for 15 GB.
    """
    state = load_state(path)
    files = state.get("files") or {}
    names = [name for name in files if name.startswith(folder)]
    try:
        for name, found in zip(names, _hashes([path / name for name in names]), strict=True):
            if found != files[name]["sha256"]:
                raise ValueError(f"{name} has been changed")
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    return state


def load(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises `UsageError` for a damaged one."""
    state = verify(path)
    hashed = state.pop("files", None) is not None
    try:
        _State.model_validate(state)
        student: dict[str, Tensor] = {}
        for shard in sorted((path / "student").glob("*.safetensors")):
            student |= load_file(shard)
        # Without its file a teacher of its own would silently become the student.
        teacher = path / "teacher.safetensors"
        has_teacher = teacher.is_file() or not state.get("teacher_is_student", True)
        return Checkpoint(
            path=path,
            hashed=hashed,
            step=state["step"],
            student=student,
            teacher=load_file(teacher) if has_teacher else None,
            optimizer=load_file(path / "optimizer.safetensors"),
            state=state,
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> UsageError:
    """The error that names a checkpoint as damaged, and why."""
    reason = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"state.json: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return UsageError(f"checkpoint {path} is damaged ({reason}): delete it to use the one before")


def _describe(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `path`, by its name from there."""
    names = file_names(path, {})
    hashes = _hashes([path / name for name in names])
    return {
        name: {"size": (path / name).stat().st_size, "sha256": sha256}
        for name, sha256 in zip(names, hashes, strict=True)
    }


def _hashes(files: list[Path]) -> list[str]:
    def sha256(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256, files))


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
