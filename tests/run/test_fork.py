"""A fork goes on from a checkpoint as its source did, but for what it was asked to change."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from safetensors.torch import save_file

from sodfast.commands import train_fork
from sodfast.errors import UsageError
from sodfast.files import read_lines
from sodfast.report.page import write_report
from sodfast.report.replay import replay_run
from sodfast.run import checkpoint
from sodfast.run.fork import prepare_fork
from sodfast.run.fork_keys import fork_config, read_fork, source_config

KEPT = ["steps=8", "checkpoint.every=2", "checkpoint.keep=9", "eval.every=2"]
GATED = [
    "schedule.kind=cgtr",
    "schedule.min_isolation=2",
    "schedule.check_every=2",
    "schedule.window=2",
    "schedule.gates=[isolation]",
]
KINDS = {
    "fixed": ["schedule.kind=fixed"],
    "hard": ["schedule.kind=hard", "schedule.every=3"],
    "ema": ["schedule.kind=ema", "schedule.rate=0.3"],
    "trust_region": ["schedule.kind=trust_region", "schedule.rate=0.3"],
    "cgtr": GATED,
}


@pytest.fixture(scope="session")
def source_of(
    train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Runs of 8 steps with every second checkpoint kept. To look at, not to touch."""
    made: dict[str, Path] = {}

    def source_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("fork") / kind
            train(made[kind], *KEPT, *KINDS[kind])
        return made[kind]

    return source_of


def fork(source: Path, out: Path, *overrides: str) -> Path:
    train_fork(source, [f"out={out}", *overrides])
    return out


def forget_hashes(path: Path) -> None:
    """Make a checkpoint one of release 0.1.0."""
    state = json.loads((path / "state.json").read_text())
    del state["files"], state["sha256"]
    (path / "state.json").write_text(json.dumps(state))


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics lines without what differs from one execution to the next."""
    lines = read_lines(run / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines
    ]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    stored = checkpoint.load(run / "checkpoints" / f"step-{step}")
    parts = {"student": stored.student, "teacher": stored.teacher or stored.student}
    return {
        f"{part}.{name}": tensor
        for part, named in [*parts.items(), ("optimizer", stored.optimizer)]
        for name, tensor in named.items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def files(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cgtr", "fixed", "hard", "ema", "trust_region"])
def test_with_nothing_changed_it_repeats_its_source(
    source_of: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    source = source_of(kind)
    before = files(source)
    for step in (0, 4):
        out = fork(source, tmp_path / str(step), f"step={step}")
        assert numbers(out) == numbers(source)
        assert same(tensors(out, 8), tensors(source, 8))
        own = ("resume", "fork", "checkpoint")
        events, theirs = (
            [e for e in read_lines(run / "events.jsonl") if e["event"] not in own]
            for run in (out, source)
        )
        assert events == theirs
    assert files(source) == before


@pytest.mark.slow
def test_a_refresh_now_differs_in_the_teacher_alone(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = source_of("hard")
    arms = {
        refresh: fork(source, tmp_path / refresh, "step=4", f"teacher.refresh={refresh}")
        for refresh in ("never", "now")
    }
    stored = {name: tensors(arm, 4) for name, arm in arms.items()}
    for name, tensor in stored["now"].items():
        if name.startswith("teacher."):
            student = name.replace("teacher.", "student.", 1)
            assert tensor.equal(stored["now"][student])
        else:
            assert tensor.equal(stored["never"][name])
    assert not same(stored["now"], stored["never"])
    now, never = (numbers(arms[name]) for name in ("now", "never"))
    assert now[:5] == never[:5] == numbers(source)[:5]
    # The rollouts of the next step are the same; what the teacher says of them is not.
    for key in ("reward/mean", "length/mean", "policy/entropy"):
        assert now[5][key] == never[5][key]
    assert now[5]["distill/divergence"] != never[5]["distill/divergence"]
    assert [line["teacher/age"] for line in now[5:]] == [1, 2, 3, 4]
    assert not any(line["teacher/refreshed"] for line in [*now[5:], *never[5:]])
    (refresh,) = [
        event
        for event in read_lines(arms["now"] / "events.jsonl")
        if event["event"] == "refresh" and event["step"] == 4
    ][-1:]
    assert refresh["shock"] == numbers(source)[4]["teacher/drift"]


@pytest.mark.slow
def test_arms_do_not_depend_on_those_before_them(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """In one process and in any order, forks of forks among them."""
    source = source_of("hard")
    arms = {
        "slower": ["schedule.kind=fixed", "optimizer.lr=1e-5"],
        "cgtr": GATED,
        "seed": ["seed=9"],
    }
    for order in (list(arms), list(reversed(arms))):
        for name in order:
            fork(source, tmp_path / "".join(order) / name, "step=4", *arms[name])
    first, second = sorted(path.name for path in tmp_path.iterdir())
    results = {}
    for name in arms:
        one, other = tmp_path / first / name, tmp_path / second / name
        assert numbers(one) == numbers(other) and same(tensors(one, 8), tensors(other, 8))
        results[name] = json.dumps(numbers(one)[5:])
    assert len({*results.values(), json.dumps(numbers(source)[5:])}) == 4
    again = fork(tmp_path / first / "cgtr", tmp_path / "again", "step=8", "steps=9")
    assert (
        numbers(again)[:8] == numbers(tmp_path / first / "cgtr")[:8] and len(numbers(again)) == 10
    )


@pytest.mark.slow
def test_an_arm_is_that_of_a_process_of_its_own(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """After other arms of this process, whatever these have left in it."""
    source, arm = source_of("hard"), ["step=4", "teacher.refresh=now", "seed=9"]
    fork(source, tmp_path / "before", "step=4", "teacher.refresh=never", "optimizer.lr=1e-2")
    here = fork(source, tmp_path / "here", *arm)
    there = tmp_path / "there"
    command = [sys.executable, "-m", "sodfast", "fork", str(source), *arm, f"out={there}"]
    # Sums are split by thread.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | threads)
    assert numbers(there) == numbers(here) and same(tensors(there, 8), tensors(here, 8))


@pytest.mark.slow
def test_a_fork_of_a_fork_repeats_it_too(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = source_of("hard")
    first = fork(source, tmp_path / "first", "step=2", "seed=9")
    second = fork(first, tmp_path / "second", "step=6")
    assert numbers(second) == numbers(first) != numbers(source)
    assert same(tensors(second, 8), tensors(first, 8))
    back = fork(first, tmp_path / "back", "step=2", "seed=0")
    assert numbers(back) == numbers(source) and same(tensors(back, 8), tensors(source, 8))


@pytest.mark.slow
def test_a_fork_is_resumed_like_any_run(
    source_of: Callable[[str], Path], train: Callable[..., Any], tmp_path: Path
) -> None:
    source = source_of("cgtr")
    whole = fork(source, tmp_path / "whole", "step=4", "teacher.refresh=now")
    cut = fork(source, tmp_path / "cut", "step=4", "teacher.refresh=now", "steps=6")
    train(cut, "steps=8")
    assert numbers(cut) == numbers(whole) and same(tensors(cut, 8), tensors(whole, 8))


@pytest.mark.slow
def test_an_own_schedule_may_follow_a_refresh_now(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    out = fork(
        source_of("fixed"),
        tmp_path / "out",
        *["step=4", "teacher.refresh=now", "schedule.kind=hard", "schedule.every=7"],
    )
    assert [line["teacher/age"] for line in numbers(out)[5:]] == [1, 2, 3, 1]


@pytest.mark.slow
def test_a_fork_is_reported_and_replayed_from_its_fork_on(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    out = fork(source_of("hard"), tmp_path / "out", "step=4", *GATED)
    result = replay_run(out, [])
    assert result.first == 5 and len(result.decisions) == 4
    assert result.first_difference is None and result.refreshes == [6, 8]
    assert replay_run(out, ["schedule.kind=trust_region"]).first_difference == 5
    assert write_report(out).is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=9"], "say where to fork"),
        (["step=five"], "say where to fork"),
        (["step=true"], "say where to fork"),
        (["step=3"], r"only of \[0, 2, 4, 6, 8\]"),
        (["step=4", "steps=3"], "lies before"),
        (["step=4", "teacher.refresh=soon"], "choose now or never"),
        (["step=4", "teacher.refresh=never", "schedule.kind=hard"], "leave schedule.kind=hard out"),
        (["step=4", "lab.seed=3"], "no lab"),
        (["step=4", "schedule.length_unit=shard", "schedule.shards=2"], "length/shard_mean"),
        (["step=4", "schedule.knid=hard"], "unknown key"),
    ],
)
def test_what_cannot_be_forked_is_said_and_nothing_is_made(
    source_of: Callable[[str], Path], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fork(source_of("cgtr"), tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_source_that_is_no_run_of_this_version(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="not a run directory"):
        fork(tmp_path, tmp_path / "out", "step=4")
    source = tmp_path / "source"
    shutil.copytree(source_of("fixed"), source)
    with (source / "config.yaml").open("a") as file:
        file.write("schedule_of_tomorrow: 3\n")
    with pytest.raises(UsageError, match="unknown key schedule_of_tomorrow"):
        fork(source, tmp_path / "out", "step=4")


@pytest.mark.parametrize("hashed", [True, *slow(False)])
def test_a_damaged_checkpoint_is_not_forked_and_nothing_is_left(
    source_of: Callable[[str], Path], tmp_path: Path, hashed: bool
) -> None:
    """Without hashes, as in release 0.1.0, damage is found when the fork is loaded."""
    source = tmp_path / "source"
    shutil.copytree(source_of("fixed"), source)
    path = source / "checkpoints" / "step-4"
    if hashed:
        data = bytearray((path / "optimizer.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "optimizer.safetensors").write_bytes(data)
    else:
        forget_hashes(path)
        save_file({}, path / "optimizer.safetensors")
    message = f"checkpoint {path} is damaged .*changed" if hashed else "was not made: .* has no"
    with pytest.raises(UsageError, match=message):
        fork(source, tmp_path / "out", "step=4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hashed", [True, *slow(False)])
def test_only_the_files_of_a_checkpoint_are_taken(
    source_of: Callable[[str], Path], tmp_path: Path, hashed: bool
) -> None:
    """Whatever else lies there is left alone: links to nothing, to elsewhere, and in a circle."""
    source = tmp_path / "source"
    shutil.copytree(source_of("fixed"), source)
    path = source / "checkpoints" / "step-4"
    if not hashed:
        forget_hashes(path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").touch()
    for name, target in {"gone": "gone", "loop": ".", "there": tmp_path / "elsewhere"}.items():
        (path / "student" / name).symlink_to(target)
    os.mkfifo(path / "student" / "pipe")
    weights = path / "student" / "model.safetensors"
    shutil.move(weights, path.parent / "weights")
    weights.symlink_to("../../weights")  # what belongs to it may be a link
    out = fork(source, tmp_path / "out", "step=4", "checkpoint.keep=9", "schedule.kind=hard")
    copy = out / "checkpoints" / "step-4"
    expected = source_of("fixed") / "checkpoints" / "step-4"
    files = {file.relative_to(expected) for file in expected.rglob("*")}
    assert {file.relative_to(copy) for file in copy.rglob("*")} == files
    assert not any(file.is_symlink() for file in copy.rglob("*"))
    model = copy / "student" / "model.safetensors"
    assert model.read_bytes() == (path.parent / "weights").read_bytes()


def test_a_file_that_may_not_be_shared_is_copied(
    source_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux allows no hard link to another user's file that one may only read."""

    def forbidden(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", forbidden)
    out = fork(source_of("fixed"), tmp_path / "out", "step=4", "checkpoint.keep=9")
    name = "checkpoints/step-4/optimizer.safetensors"
    assert (out / name).read_bytes() == (source_of("fixed") / name).read_bytes()
    assert (out / name).stat().st_nlink == 1


def test_a_model_that_has_gone_is_missed_before_anything_is_made(
    tmp_path: Path, source_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: object) -> None:
        raise UsageError("it has gone")

    monkeypatch.setattr("sodfast.commands.build_model", gone)
    with pytest.raises(UsageError, match="it has gone"):
        fork(source_of("fixed"), tmp_path / "out", "step=4")
    assert not (tmp_path / "out").exists()


def test_an_edited_source_and_missing_lines(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(source_of("fixed"), source)
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    (source / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    step, refresh, others = read_fork(["step=4"])
    others.append(f"out={tmp_path / 'out'}")
    config = fork_config(source_config(source), step, others, refresh)
    with pytest.raises(UsageError, match="lacks lines"):
        prepare_fork(source, step, config, refresh)
    text = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(re.sub(r"(?m)^seed: \d+", "seed: 77", text))
    with pytest.raises(UsageError, match="not what its checkpoints were made with"):
        prepare_fork(source, step, config, refresh)
    assert not (tmp_path / "out").exists()
