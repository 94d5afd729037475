"""Checkpoints survive whatever the disk does, and hold everything bit for bit."""

import ast
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STATE, equal, save, tensors, update
from marks import slow
from safetensors import SafetensorError
from torch import Tensor

import sodfast
from sodfast.config import OptimizerConfig
from sodfast.errors import RunFailed, UsageError
from sodfast.model.language_model import LanguageModel
from sodfast.model.load import load_model
from sodfast.optimizer import build_optimizer
from sodfast.parallel.fsdp import Weights
from sodfast.run import checkpoint
from sodfast.run.restore import restore_optimizer, restore_student
from sodfast.trainer import Trainer


@pytest.fixture
def optimizer(model: LanguageModel) -> torch.optim.Optimizer:
    optimizer = build_optimizer(OptimizerConfig(lr=1e-2), Weights(model.network))
    update(model, optimizer, 0)
    return optimizer


def test_a_round_trip_is_exact(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tiny_model: Path, tmp_path: Path
) -> None:
    teacher = load_model(str(tiny_model), torch.device("cpu")).network
    path = save(tmp_path, 7, model, optimizer, teacher=tensors(teacher))
    stored = checkpoint.load(path)
    assert stored.step == 7
    assert stored.state == {"step": 7, "teacher_is_student": False, **STATE}
    assert stored.teacher is not None and equal(stored.teacher, tensors(teacher))

    other = load_model(str(tiny_model), torch.device("cpu"))
    other_optimizer = build_optimizer(OptimizerConfig(lr=1e-2), Weights(other.network))
    assert not equal(tensors(other.network), tensors(model.network))
    restore_student(other, stored.student)
    restore_optimizer(other.network, other_optimizer, stored.optimizer)
    assert equal(tensors(other.network), tensors(model.network))
    mine, theirs = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert all(equal(mine[index], theirs[index]) for index in mine) and len(mine) == len(theirs)

    # The next update is the proof: it reads every moment and step count.
    update(model, optimizer, 1)
    update(other, other_optimizer, 1)
    assert equal(tensors(other.network), tensors(model.network))


def test_the_student_is_a_hugging_face_directory(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    path = save(tmp_path, 1, model, optimizer)
    again = load_model(str(path / "student"), torch.device("cpu"))
    assert equal(tensors(again.network), tensors(model.network))
    assert again.encode("17*8+6=") == model.encode("17*8+6=")
    assert not (path / "teacher.safetensors").exists()
    assert checkpoint.load(path).teacher is None


def test_an_untouched_optimizer_can_be_stored(model: LanguageModel, tmp_path: Path) -> None:
    fresh = build_optimizer(OptimizerConfig(), Weights(model.network))
    stored = checkpoint.load(save(tmp_path, 0, model, fresh))
    restore_optimizer(model.network, fresh, stored.optimizer)
    assert fresh.state_dict()["state"] == {}


def test_a_kill_while_old_ones_are_deleted_leaves_none_in_part(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)
    unlink, left = os.unlink, iter(range(2))

    def killed(*arguments: Any, **options: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", killed)
        save(tmp_path, 3, model, optimizer, keep=1)
    for step in checkpoint.steps(tmp_path):
        checkpoint.load(tmp_path / f"step-{step}")
    assert next(left, None) is None  # it was killed in the middle
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_deletes_what_was_left(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    train(tmp_path / "run", "steps=2", "checkpoint.every=1", "checkpoint.keep=1")
    checkpoints = tmp_path / "run" / "checkpoints"
    for left in ("step-1", ".step-0.tmp"):
        shutil.copytree(checkpoints / "step-2", checkpoints / left)
    train(tmp_path / "run")
    assert [path.name for path in checkpoints.iterdir()] == ["step-2"]


def test_the_last_few_are_kept(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, model, optimizer, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-11"  # not the last by name, step-9
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_a_finished_checkpoint_is_not_written_again(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    path = save(tmp_path, 3, model, optimizer)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    update(model, optimizer, 5)
    save(tmp_path, 3, model, optimizer)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_unfinished_work_is_neither_seen_nor_in_the_way(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    """A process killed while saving leaves a half-written directory aside."""
    left = tmp_path / ".step-4.tmp" / "student"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert checkpoint.steps(tmp_path) == []
    path = save(tmp_path, 4, model, optimizer)
    assert equal(checkpoint.load(path).optimizer, checkpoint.load(path).optimizer)
    assert len(list((path / "student").glob("*.safetensors"))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-4"]


# ---------------------------------------------------------------- a disk that refuses


def no_space(*arguments: Any, **options: Any) -> Any:
    raise OSError(28, "No space left on device")


def safetensors_no_space(*arguments: Any, **options: Any) -> Any:
    raise SafetensorError("Error while serializing: IoError: No space left on device")


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("sodfast.run.checkpoint.save_file", safetensors_no_space),
        ("os.rename", no_space),
        *slow(
            ("transformers.modeling_utils.safe_save_file", safetensors_no_space),
            ("transformers.PreTrainedTokenizerFast.save_pretrained", no_space),
            ("pathlib.Path.write_text", no_space),
            ("pathlib.Path.mkdir", no_space),
            ("os.fsync", no_space),
        ),
    ],
)
def test_a_refusing_disk_leaves_the_checkpoint_before(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    fault: Callable[..., Any],
) -> None:
    save(tmp_path, 1, model, optimizer, keep=1)
    before = checkpoint.load(tmp_path / "step-1")
    update(model, optimizer, 1)
    with monkeypatch.context() as broken:
        broken.setattr(target, fault)
        with pytest.raises(RunFailed, match=r"step 2 could not be written.*No space"):
            save(tmp_path, 2, model, optimizer, teacher=tensors(model.network), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert equal(checkpoint.load(tmp_path / "step-1").student, before.student)
    # Once there is space again the same step can be saved.
    save(tmp_path, 2, model, optimizer, keep=1)
    assert equal(
        checkpoint.load(tmp_path / "step-2").optimizer, optimizer_tensors(model, optimizer)
    )


def optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = [name for name, _ in model.network.named_parameters()]
    return {
        f"{names[index]}.{key}": value
        for index, moments in optimizer.state_dict()["state"].items()
        for key, value in moments.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("limit", [300_000, *slow(300, 20_000)])
def test_a_full_disk_while_training(
    build: Callable[..., Trainer], read_run: Callable[..., Any], tmp_path: Path, limit: int
) -> None:
    """No file may grow beyond `limit` bytes: the configuration's, the weights' or the optimizer's
    file of the second checkpoint fails. The first survives, and resuming works."""
    trainer = build(tmp_path / "run", "steps=3", "checkpoint.every=2", "eval.every=2")
    step = trainer._train_step
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited_step(number: int, *arguments: Any) -> None:
        if number == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        step(number, *arguments)

    trainer._train_step = limited_step  # type: ignore[method-assign]
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own choice
    try:
        with pytest.raises(RunFailed, match=r"^step 2: .* could not be written: .*File too large"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        trainer.run.close()

    out = trainer.run.path
    assert os.listdir(out / "checkpoints") == ["step-0"]
    if limit > 10_000:
        assert read_run(out).summary["status"] == "failed"
    resumed = build(out)
    assert resumed.train() == "done"
    resumed.run.close()
    assert [line["step"] for line in read_run(out).lines] == [0, 1, 2, 3]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["missing", "garbage", *slow("empty", "truncated")])
@pytest.mark.parametrize(
    "name",
    ["state.json", "optimizer.safetensors", "teacher.safetensors", "student/model.safetensors"],
)
def test_a_damaged_checkpoint_is_named(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path, name: str, damage: str
) -> None:
    path = save(tmp_path, 1, model, optimizer, teacher=tensors(model.network))
    file = path / name
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:-10], "garbage": b"\xff{" * 99}.get(damage, b""))
    if damage == "missing":
        file.unlink()
    with pytest.raises(UsageError) as error:
        restore_student(model, checkpoint.load(path).student)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"step": "x", "fingerprint": "f"}', "null"])
def test_a_state_that_is_none_is_named(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path, text: str
) -> None:
    path = save(tmp_path, 1, model, optimizer)
    (path / "state.json").write_text(text)
    with pytest.raises(UsageError, match="is damaged"):
        checkpoint.load_state(path)


def edit(path: Path, sealed: bool = False, **values: Any) -> None:
    """Change values of state.json; `sealed`: as if it had been written so, else as 0.1.0 did,
    without hashes."""
    state = json.loads((path / "state.json").read_text())
    files = {"files": checkpoint._describe(path)} if sealed else {}
    kept = {k: v for k, v in state.items() if k not in ("files", "sha256")} | values | files
    seal = {"sha256": checkpoint._digest(kept)} if sealed else {}
    (path / "state.json").write_text(json.dumps({**kept, **seal}))


@pytest.mark.parametrize("name", ["../elsewhere", "student/../../elsewhere", "/elsewhere"])
def test_a_file_outside_of_the_checkpoint_is_none_of_its(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path, name: str
) -> None:
    """A fork and an export copy the files that are listed to where they are listed."""
    path = save(tmp_path, 1, model, optimizer)
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    state["files"][name] = {"size": 0, "sha256": ""}
    state["sha256"] = checkpoint._digest(state)
    (path / "state.json").write_text(json.dumps(state))
    assert f"{name} does not lie in it" in damage(path)


def damage(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        checkpoint.load(path)
    message = str(error.value)
    assert f"checkpoint {path} is damaged" in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": {"window": [], "last_copy": 0}},
        {"collapse": {}},
        {"reward_memory": {"a": "b"}},
        {"step": 2},  # it is in step-1
        *slow(
            {"schedule": None},
            {"schedule": {"window": [{"step": 1}], "last_copy": 0, "reward_reference": None}},
            {"schedule": {"window": 3, "last_copy": 0, "reward_reference": None}},
            {"collapse": {"long_steps": "x", "best_eval": 0.1, "step": None}},
            {"collapse": {"long_steps": 0, "best_eval": float("nan"), "step": None}},
            {"reward_memory": []},
            {"teacher_is_student": 3},
            {"base": 3},
            {"fingerprint": None},
            {"step": -1},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("sealed", [True, *slow(False)])
def test_parts_of_the_state_are_checked(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    tmp_path: Path,
    values: dict[str, Any],
    sealed: bool,
) -> None:
    """Also where nothing but the value itself tells that it is wrong."""
    path = save(tmp_path, 1, model, optimizer)
    edit(path, sealed, **values)
    assert next(iter(values)) in damage(path) or values["step"]


@pytest.mark.parametrize("key", ["schedule", "collapse", "reward_memory", "fingerprint", "step"])
def test_a_part_that_is_missing_is_named(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path, key: str
) -> None:
    path = save(tmp_path, 1, model, optimizer)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(
        json.dumps({k: v for k, v in state.items() if k not in (key, "files", "sha256")})
    )
    assert key in damage(path)


def test_what_has_changed_since_is_refused(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    """A bit, a file of another step, weights that do not belong there, a value, a seal."""
    whole = save(tmp_path / "whole", 1, model, optimizer, teacher=tensors(model.network))
    update(model, optimizer, 1)
    other = save(tmp_path / "other", 2, model, optimizer, teacher=tensors(model.network))
    number = iter(range(99))

    def copy() -> Path:
        return Path(shutil.copytree(whole, tmp_path / str(next(number)) / "step-1"))

    names = [file.relative_to(whole) for file in whole.rglob("*") if file.is_file()]
    assert len(names) > 5
    for name in names:
        path = copy()
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)
        damage(path)
    for part in ("student/model.safetensors", "teacher.safetensors", "optimizer.safetensors"):
        path = copy()
        shutil.copy(other / part, path / part)
        assert f"{part} has been changed" in damage(path)
    path = copy()
    shutil.copy(other / "teacher.safetensors", path / "student" / "more.safetensors")
    assert "student/more.safetensors does not belong to it" in damage(path)
    path = copy()
    state = json.loads((path / "state.json").read_text())
    for changed in (
        {**state, "reward_memory": {"a": 0.25}},
        {k: v for k, v in state.items() if k != "sha256"},
        {k: v for k, v in state.items() if k != "files"},
    ):
        (path / "state.json").write_text(json.dumps(changed))
        assert "state.json has been changed" in damage(path)


def test_a_changed_file_of_the_student_alone_is_found(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    path = save(tmp_path, 1, model, optimizer)
    for name, folder, found in (
        ("optimizer.safetensors", "student/", False),
        ("student/model.safetensors", "student/", True),
    ):
        data = bytearray((path / name).read_bytes())
        data[-1] ^= 1
        (path / name).write_bytes(data)
        if found:
            with pytest.raises(UsageError, match=r"student/model\.safetensors has been changed"):
                checkpoint.verify(path, folder)
        else:
            assert checkpoint.verify(path, folder)["step"] == 1


def test_a_checkpoint_without_hashes_is_read(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    path = save(tmp_path, 1, model, optimizer)
    assert checkpoint.load(path).hashed
    edit(path)
    stored = checkpoint.load(path)
    assert not stored.hashed and equal(stored.student, checkpoint.load(path).student)


@pytest.mark.parametrize("name", ["step-01", "step-" + "9" * 5000, "step-x", "step--1"])
def test_a_name_that_no_checkpoint_gets_is_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name[:200]).mkdir()
    assert checkpoint.latest(tmp_path) is None


# ---------------------------------------------------------------- nothing is unpickled


def test_nothing_in_the_package_unpickles() -> None:
    for file in Path(sodfast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            for name in names:
                assert name.split(".")[0] not in {"pickle", "dill", "joblib", "shelve"}, file
                assert name not in {"torch.load", "numpy.load", "np.load"}, file


@pytest.mark.slow
def test_a_run_is_resumed_without_unpickling(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "run", "steps=2")

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("unpickled")

    for target in (pickle, torch):
        monkeypatch.setattr(target, "load", refuse)
    for name in ("loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert train(tmp_path / "run", "steps=3").summary["status"] == "done"
