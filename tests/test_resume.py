"""A run that was stopped, in whatever way, and resumed is the run that never stopped."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sodfast.errors import UsageError
from sodfast.files import read_lines, replace_text
from sodfast.run import checkpoint
from sodfast.trainer import Trainer

Train = Callable[..., Any]

# A copy before and after every place where a run is cut below, visits to the same question again,
# and evaluations that are not due where it is cut.
SCHEDULES = {
    "fixed": ["schedule.kind=fixed"],
    "hard": ["schedule.kind=hard", "schedule.every=3"],
    "ema": ["schedule.kind=ema", "schedule.rate=0.3"],
    "trust_region": ["schedule.kind=trust_region", "schedule.rate=0.3"],
    "cgtr": [
        "schedule.kind=cgtr",
        "schedule.min_isolation=2",
        "schedule.check_every=2",
        "schedule.reward_margin=0.0",
        "schedule.window=3",
        "schedule.gates=[isolation]",
    ],
    "cgtr-gates": [
        "schedule.kind=cgtr",
        "schedule.min_isolation=2",
        "schedule.check_every=1",
        "schedule.reward_margin=0.0",
        "schedule.window=2",
        "schedule.length_unit=shard",
        "schedule.shards=2",
    ],
}
SETTINGS = ["task.train=12", "eval.every=4", "optimizer.updates_per_step=2"]
STEPS = 9


@pytest.fixture(scope="session")
def undisturbed(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """The run of a schedule in one go, once per session."""
    done: dict[str, Any] = {}

    def run(kind: str) -> Any:
        if kind not in done:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            done[kind] = train(out, *SETTINGS, *SCHEDULES[kind], f"steps={STEPS}")
        return done[kind]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEDULES)
def test_stopping_twice_changes_nothing(
    train: Train, undisturbed: Train, tmp_path: Path, kind: str
) -> None:
    """After 4 steps, where an evaluation is due, and after 7, where it is not."""
    out = tmp_path / "run"
    train(out, *SETTINGS, *SCHEDULES[kind], "steps=4")
    shorter = train(out, "steps=7")
    assert "eval/mean@2" in shorter.lines[7]  # the last step is always evaluated
    assert shorter.summary["steps"] == 7
    resumed = train(out, f"steps={STEPS}")
    assert resumed == undisturbed(kind)
    if kind in ("hard", "cgtr"):
        assert any(step <= 4 for step in resumed.summary["refresh_steps"])
        assert any(step > 4 for step in resumed.summary["refresh_steps"])
    events = [e for e in read_lines(out / "events.jsonl") if e["event"] == "resume"]
    assert [event["step"] for event in events] == [4, 7]


@pytest.mark.slow
@pytest.mark.parametrize("state", ["8bit", "exact"])
def test_bf16_weights_resume_bit_for_bit(train: Train, tmp_path: Path, state: str) -> None:
    """Weights, teacher, moments and remainders, and the counts that key the rounding."""
    overrides = [*SETTINGS, *SCHEDULES["ema"], "model.dtype=bfloat16", f"optimizer.adamw={state}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(whole, *overrides, "steps=6")
    train(parts, *overrides, "steps=1")
    train(parts, "steps=4")
    assert train(parts, "steps=6") == expected
    ends = [checkpoint.load(out / "checkpoints" / "step-6") for out in (whole, parts)]
    for part in ("student", "teacher", "optimizer"):
        ours, theirs = (getattr(end, part) for end in ends)
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and tensor.equal(theirs[name])
    assert ends[0].state == ends[1].state


def test_resuming_a_finished_run_changes_nothing(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = train(out, *SETTINGS, "steps=3")
    assert train(out) == first
    assert train(out, "steps=3") == first


@pytest.mark.slow
def test_a_teacher_that_is_the_student_needs_no_file(
    train: Train, undisturbed: Train, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(out, *SETTINGS, *SCHEDULES["hard"], "steps=3")  # a refresh ends step 3
    assert not (out / "checkpoints" / "step-3" / "teacher.safetensors").exists()
    train(out, "steps=5")
    assert (out / "checkpoints" / "step-5" / "teacher.safetensors").exists()
    assert train(out, f"steps={STEPS}") == undisturbed("hard")


@pytest.mark.slow
def test_lines_after_the_checkpoint_are_written_again(
    train: Train, undisturbed: Train, tmp_path: Path
) -> None:
    """A killed process leaves lines, events and half a line beyond its last checkpoint."""
    out = tmp_path / "run"
    train(out, *SETTINGS, *SCHEDULES["cgtr"], "steps=6", "checkpoint.every=1", "checkpoint.keep=4")
    for step in (5, 6):
        (out / "checkpoints" / f"step-{step}").rename(tmp_path / f"{step}")
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "reward/me')
    with (out / "events.jsonl").open("a") as stream:
        stream.write('{"step": 7, "event": "refresh", "shock": 1.0, "age": 2}\n{"st')
    assert train(out, f"steps={STEPS}") == undisturbed("cgtr")


@pytest.mark.slow
def test_a_kill_while_a_finished_run_is_reopened_loses_no_evaluation(
    build: Callable[..., Trainer], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of the files that `--resume R steps=6` replaces: a plain `--resume R` then ends
    as it would have, or as the run that was never reopened."""
    finished = tmp_path / "finished"
    ends = {3: train(finished, *SETTINGS, "steps=3")}
    ends[6] = train(Path(shutil.copytree(finished, tmp_path / "whole")), "steps=6")
    replaced = 0
    while True:
        out = Path(shutil.copytree(finished, tmp_path / f"killed-{replaced}"))
        left = iter(range(replaced))

        def replace(file: Path, text: str, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace_text(file, text)

        try:
            with monkeypatch.context() as patch:
                patch.setattr("sodfast.run.directory.replace_text", replace)
                build(out, "steps=6").run.close()
            break
        except KeyboardInterrupt:
            resumed = train(out)
        assert resumed.lines[-1].keys() >= {"eval/mean@2", "reward/mean"}, replaced
        assert resumed == ends[resumed.summary["steps"]], replaced
        replaced += 1
    assert replaced == 3  # configuration, metrics, events


@pytest.mark.slow
def test_a_run_that_now_ends_at_its_checkpoint_gets_its_last_evaluation(
    train: Train, tmp_path: Path
) -> None:
    """Step 3 of a longer run is not evaluated; a resume whose `steps` ends there evaluates it, as
    in the run that had ended there, and going on forgets it again."""
    expected = {n: train(tmp_path / f"{n}", *SETTINGS, f"steps={n}") for n in (3, 5)}
    out = tmp_path / "run"
    train(out, *SETTINGS, "steps=5", "checkpoint.every=3")
    shutil.rmtree(out / "checkpoints" / "step-5")
    shorter = train(out, "steps=3")
    assert "eval/mean@2" in shorter.lines[-1] and shorter == expected[3]
    assert train(out) == shorter
    assert train(out, "steps=5") == expected[5]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    train: Train, undisturbed: Train, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(out, *SETTINGS, *SCHEDULES["ema"], "steps=4")
    newest = out / "checkpoints" / "step-4"
    (newest / "optimizer.safetensors").write_bytes(b"")
    kept = (out / "config.yaml").read_text(), (out / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match="step-4 is damaged"):
        train(out, f"steps={STEPS}")
    assert kept == ((out / "config.yaml").read_text(), (out / "metrics.jsonl").read_text())
    newest.rename(tmp_path / "damaged")
    assert train(out, f"steps={STEPS}") == undisturbed("ema")


# ---------------------------------------------------------------- signals, in this process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("place", "saved"), [("_score", 4), ("_accumulate_gradients", 4), ("_move_teacher", 5)]
)
def test_a_signal_never_tears_a_step_apart(
    build: Callable[..., Trainer],
    train: Train,
    undisturbed: Train,
    read_run: Train,
    tmp_path: Path,
    place: str,
    saved: int,
    number: int,
) -> None:
    """Before the first update of step 5 the signal drops the step, later the step is finished."""
    out = tmp_path / "run"
    trainer = build(out, *SETTINGS, *SCHEDULES["cgtr"], f"steps={STEPS}", "checkpoint.every=99")
    owner = trainer.student if place == "_accumulate_gradients" else trainer
    original = getattr(owner, place)

    def interrupted(*arguments: Any) -> Any:
        result = original(*arguments)
        if trainer.step == 4:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, place, interrupted)
    handler = signal.getsignal(number)
    assert trainer.train() == "interrupted"
    trainer.run.close()
    assert signal.getsignal(number) is handler
    assert max(checkpoint.steps(out / "checkpoints")) == saved
    assert read_run(out).summary["status"] == "interrupted"
    assert read_run(out).summary["steps"] == saved
    assert train(out) == undisturbed("cgtr")


@pytest.mark.slow
def test_a_signal_during_the_first_evaluation_leaves_a_run_to_resume(
    build: Callable[..., Trainer],
    train: Train,
    undisturbed: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = build(tmp_path / "run", *SETTINGS, *SCHEDULES["fixed"], f"steps={STEPS}")

    def interrupt(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not handled")

    with monkeypatch.context() as patch:
        patch.setattr("sodfast.evaluate.evaluate", interrupt)
        assert trainer.train() == "interrupted"
    trainer.run.close()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []
    assert train(tmp_path / "run") == undisturbed("fixed")


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="session")
def start(tiny_run: list[str]) -> Callable[..., "subprocess.Popen[str]"]:
    def start(out: Path, *overrides: str) -> "subprocess.Popen[str]":
        resume = (out / "config.yaml").exists()
        arguments = ["--resume", str(out)] if resume else [*tiny_run, f"out={out}", *overrides]
        return subprocess.Popen(
            [sys.executable, "-m", "sodfast", "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def read_until(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return
    raise AssertionError(seen)


@pytest.mark.exhaustive
def test_killed_again_and_again(
    start: Callable[..., "subprocess.Popen[str]"], train: Train, undisturbed: Train, tmp_path: Path
) -> None:
    """SIGKILL at a random moment, three times; the first may well come before any checkpoint."""
    out = tmp_path / "run"
    seed = time.time_ns()
    print("seed of the moments:", seed)  # pytest shows it when the test fails
    rng = random.Random(seed)
    overrides = [*SETTINGS, *SCHEDULES["cgtr-gates"], f"steps={STEPS}", "checkpoint.every=2"]
    for _ in range(3):
        process = start(out, *overrides)
        read_until(process, f"{out}: cgtr")
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.communicate()
        steps = [line["step"] for line in read_lines(out / "metrics.jsonl")]
        assert steps == list(range(len(steps)))
    resumed = train(out)
    expected = undisturbed("cgtr-gates")
    assert resumed.lines == expected.lines and resumed.events == expected.events
    assert resumed.summary == expected.summary


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_saves_and_says_130(
    start: Callable[..., "subprocess.Popen[str]"],
    train: Train,
    read_run: Train,
    undisturbed: Train,
    tmp_path: Path,
    number: int,
) -> None:
    out = tmp_path / "run"
    overrides = [*SETTINGS, *SCHEDULES["cgtr"], f"steps={STEPS}", "checkpoint.every=99"]
    process = start(out, *overrides)
    read_until(process, "step 1/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    stopped = read_run(out)
    assert stopped.summary["status"] == "interrupted"
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None and checkpoint.load(saved).step == stopped.lines[-1]["step"] >= 1
    assert train(out) == undisturbed("cgtr")


def tool(*arguments: str) -> str:
    """What a program of the tests prints, which must end with 0."""
    ended = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.exhaustive
def test_a_kill_at_a_point_of_any_command_is_as_if_it_had_not_been() -> None:
    """Some points before and after a rename, fsync or unlink of train, resume, fork, export, report
    and sweep; `make fuzz` tries them all."""
    assert tool("crash_points", "--every", "40").count(" 0 failed") == 6


@pytest.mark.exhaustive
def test_kills_at_random_moments_of_runs_of_every_kind_are_as_if_they_had_not_been() -> None:
    """A few; `make fuzz` tries hundreds. A failure prints the seed."""
    last = tool("random_kills", "--kills", "10").splitlines()[-1].split()
    assert last[0] == "all" and int(last[3]) >= 10 and last[-2:] == ["0", "failed"]
