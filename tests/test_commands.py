"""Building the parts of a command: devices, what is refused before anything is written, and ends.

What the commands print and do as a user runs them stands in test_cli.py.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.cuda._utils import _get_device_index

from sodfast import commands
from sodfast.commands import (
    build_trainer,
    evaluate_model,
    export_model,
    limit_memory,
    make_current,
    pick_device,
    train_run,
)
from sodfast.config import load_config
from sodfast.errors import Interrupted, UsageError
from sodfast.parallel.ranks import Ranks
from sodfast.run.console import Reporter
from sodfast.run.directory import RunDirectory

# ---------------------------------------------------------------- devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`gpus(n)`: a machine with so many."""

    def give(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return give


@pytest.mark.parametrize(
    ("count", "name", "expected"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (1, "auto", "cuda:0"),
        (1, "cpu", "cpu"),
        (1, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_one_process_takes_the_device_that_it_names(
    gpus: Callable[[int], None], count: int, name: str, expected: str
) -> None:
    gpus(count)
    device = pick_device(name)
    assert device == torch.device(expected)
    # What limits the allocator takes none without an index.
    assert device.type == "cpu" or _get_device_index(device) == device.index


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1")])
def test_a_gpu_that_is_not_there_is_refused(
    gpus: Callable[[int], None], count: int, name: str
) -> None:
    gpus(count)
    with pytest.raises(UsageError, match=rf"device={name}: this machine has {count} GPUs"):
        pick_device(name)


def test_a_device_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pick_device("auto", Ranks(1, 2)) == torch.device("cuda:1")
    assert pick_device("cpu", Ranks(1, 2)) == torch.device("cpu")
    with pytest.raises(UsageError, match="set device=cuda"):
        pick_device("cuda:0", Ranks(1, 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="nproc-per-node"):
        pick_device("cuda", Ranks(1, 3))


def test_the_allocator_is_held_to_the_planned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=141 * 2**30)
    )
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: fractions.append((share, _get_device_index(device))),
    )
    limit_memory(torch.device("cpu"), 78)
    limit_memory(torch.device("cuda", 1), None)
    assert fractions == []
    limit_memory(torch.device("cuda", 1), 78)
    assert fractions == [(78 / 141, 1)]
    with pytest.raises(UsageError, match=r"memory_gib=150: this GPU has 141\.0 GiB"):
        limit_memory(torch.device("cuda", 1), 150)


def test_a_gpu_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: current.append(_get_device_index(device))
    )
    make_current(torch.device("cpu"))
    make_current(torch.device("cuda", 1))
    assert current == [1]


# ---------------------------------------------------------------- refused before any work


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither questions nor a model may be built."""
    monkeypatch.setattr(commands, "build_task", None)
    monkeypatch.setattr(commands, "build_model", None)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.engine=vllm", r"rollout\.engine=vllm runs in one process, not in 2"),
        ("model.lora={}", r"model\.lora runs in one process, not in 2"),
    ],
)
def test_what_runs_in_one_process_is_refused_on_several_ranks(
    tiny_run: list[str], tmp_path: Path, override: str, message: str
) -> None:
    config = load_config("lab", [*tiny_run, f"out={tmp_path / 'run'}", override])
    for rank in range(2):
        with pytest.raises(UsageError, match=message):
            build_trainer(config, None, Reporter(), Ranks(rank, 2))
    assert not list(tmp_path.iterdir())


def test_ligers_kernels_are_refused_without_a_gpu(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"model\.liger=true"):
        build(tmp_path / "run", "device=cpu", "model.liger=on")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_streamed_is_refused_before_the_run(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(network: Any) -> None:
        raise UsageError("set teacher.storage=device")

    monkeypatch.setattr("sodfast.commands.decoder_layers", refuse)
    with pytest.raises(UsageError, match=r"teacher\.storage=device"):
        build(tmp_path / "run", "teacher.storage=host")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_says_how_many_layers_keep_their_activations(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What auto comes to; a number that cannot be is refused before the run."""
    said: list[str] = []
    monkeypatch.setattr(Reporter, "message", lambda self, text: said.append(text))
    checkpointed = "model.gradient_checkpointing=true"
    auto = [checkpointed, "model.kept_layers=auto", "memory_gib=8"]
    build(tmp_path / "run", *auto, "device=cpu").run.close()
    assert any(re.match(r"model\.kept_layers: (\d+) of \1 layers keep", text) for text in said)
    with pytest.raises(UsageError, match=r"model\.kept_layers=99"):
        build(tmp_path / "other", checkpointed, "model.kept_layers=99")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("setting", ["", "pinned_max_round_threshold_mb:1"])
def test_the_allocator_is_told_what_it_knows(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Which versions of torch know the second setting, `pinned_setting` says."""

    def stop(*_: Any) -> None:
        raise UsageError("far enough")

    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(commands, "pinned_setting", lambda: setting)
    monkeypatch.setattr(commands, "pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(commands, "make_current", stop)  # which starts CUDA
    with pytest.raises(UsageError, match="far enough"):
        build(tmp_path / "run")
    expected = ["expandable_segments:True", *([setting] if setting else [])]
    assert os.environ["PYTORCH_ALLOC_CONF"].split(",") == expected


def test_a_trainer_that_cannot_be_built_leaves_the_directory_unlocked(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def fail(*arguments: Any) -> None:
        with pytest.raises(UsageError, match="another process"):
            RunDirectory.open(out)
        raise MemoryError

    monkeypatch.setattr(commands, "Trainer", fail)
    with pytest.raises(MemoryError):
        build(out)
    RunDirectory.open(out).close()


# ---------------------------------------------------------------- how a run ends


@pytest.mark.parametrize("status", ["done", "collapsed", "interrupted"])
def test_a_run_is_closed_and_printed_however_it_ends(
    status: str, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption is raised only after all of that."""
    calls: list[Any] = []
    reporter = SimpleNamespace(stop=lambda: calls.append("stop"))
    trainer = SimpleNamespace(
        train=lambda: calls.append("train") or status,
        summary=lambda status: {"status": status},
        lines=[],
        run=SimpleNamespace(path=Path("run"), close=lambda: calls.append("close")),
    )
    monkeypatch.setattr(commands, "build_reporter", lambda screen: reporter)
    monkeypatch.setattr(commands, "build_trainer", lambda *arguments: trainer)
    monkeypatch.setattr(commands, "print_run", lambda *arguments: calls.append(arguments[:3]))
    config = load_config("lab", tiny_run)
    if status == "interrupted":
        with pytest.raises(Interrupted):
            train_run(config, None)
    else:
        train_run(config, None)
    assert calls == ["train", "close", "stop", (Path("run"), {"status": status}, [])]


def test_a_failure_stops_the_display(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []
    monkeypatch.setattr(
        commands,
        "build_reporter",
        lambda screen: SimpleNamespace(stop=lambda: stopped.append(True)),
    )

    def fail(*arguments: Any) -> None:
        raise UsageError("no such thing")

    monkeypatch.setattr(commands, "build_trainer", fail)
    with pytest.raises(UsageError, match="no such thing"):
        train_run(load_config("lab", tiny_run), None)
    assert stopped == [True]


# ---------------------------------------------------------------- eval and export


@pytest.mark.usefixtures("no_work")
def test_a_run_without_a_checkpoint_is_neither_evaluated_nor_exported(
    tiny_run: list[str], tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    RunDirectory.create(run, load_config("lab", tiny_run), {}).close()
    with pytest.raises(UsageError, match="holds no checkpoint"):
        evaluate_model(str(run), [])
    with pytest.raises(UsageError, match="holds no checkpoint"):
        export_model(run, out)
    assert not out.exists()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("override", ["model.lora={}", "model.lora.rank=3"])
def test_adapters_are_a_property_of_the_run(finished: Path, override: str) -> None:
    with pytest.raises(UsageError, match=r"model\.lora is a property of the run"):
        evaluate_model(str(finished), [override])


def test_a_model_is_asked_under_the_limits_of_the_preset_of_its_task(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lab's questions under the lab's limits, and another task's under those of `base`."""
    presets: list[str | None] = []

    def stop(preset: str | None, overrides: list[str]) -> None:
        presets.append(preset)
        assert overrides[0] == f"model.path={tiny_model}"
        raise UsageError("enough")

    monkeypatch.setattr(commands, "load_config", stop)
    for overrides in ([], ["eval.samples=2"], ["task.name=multiple_choice", "task.train=a.jsonl"]):
        with pytest.raises(UsageError, match="enough"):
            evaluate_model(str(tiny_model), overrides)
    assert presets == ["lab", "lab", "base"]


def test_an_export_never_overwrites_and_names_what_it_cannot_write(
    finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists: choose another"):
        export_model(finished, tmp_path / "mine")
    with pytest.raises(UsageError, match="cannot be written"):
        export_model(finished, tmp_path / "mine" / "below a file")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("end", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "place", ["sodfast.commands.copy_files", "sodfast.files.sync", "os.rename"]
)
def test_an_export_that_ends_early_leaves_nothing_in_the_way(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    end: BaseException,
) -> None:
    out = tmp_path / "folder" / "out"

    def refuse(*arguments: Any, **keys: Any) -> None:
        raise end

    with monkeypatch.context() as patch, pytest.raises((UsageError, KeyboardInterrupt)):
        patch.setattr(place, refuse)
        export_model(finished, out)
    assert not list(tmp_path.rglob("*.*"))
    export_model(finished, out)
    student = finished / "checkpoints" / "step-2" / "student"
    names = {path.name for path in student.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"README.md"}


def test_what_a_killed_export_left_goes_with_the_next(finished: Path, tmp_path: Path) -> None:
    left = tmp_path / f"out.{'0' * 16}.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    export_model(finished, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_follows_no_link_and_copies_no_damage(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists: choose another"):
        export_model(finished, tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    weights = run / "checkpoints" / "step-2" / "student" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UsageError, match=r"student/model\.safetensors has been changed"):
        export_model(run, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


def test_an_export_takes_the_files_of_the_checkpoint_alone(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    student = run / "checkpoints" / "step-2" / "student"
    names = {path.name for path in student.iterdir()}
    (student / "everything").symlink_to("/")
    (student / "loop").symlink_to(".")
    export_model(run, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"README.md"}


# ---------------------------------------------------------------- the preset that is meant


def test_limits_of_the_wrong_preset_are_named(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(f"steps: 2\nout: {tmp_path / 'run'}\n")
    with pytest.raises(UsageError, match="begins with `base: lab`"):
        build_trainer(load_config(str(file), ["lab.batches=1"]), None, Reporter())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "' + "1+" * 40 + '\\nA: 1\\nB: 2", "answer": "A"}\n')
    (tmp_path / "other.jsonl").write_text(rows.read_text())
    task = ["task.name=multiple_choice", f"task.train={rows}", f"task.test={tmp_path}/other.jsonl"]
    config = load_config("lab", [f"model.path={tiny_model}", *task, f"out={tmp_path / 'run'}"])
    with pytest.raises(UsageError, match="begin with `sodfast train base`"):
        build_trainer(config, None, Reporter())
    assert not (tmp_path / "run").exists()
