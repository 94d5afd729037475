"""A run directory: one writer, nothing overwritten, and a resume that leaves no trace."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sodfast.config import Config, load_config
from sodfast.errors import UsageError
from sodfast.files import read_lines, replace_text
from sodfast.run.directory import (
    RunDirectory,
    check_out,
    default_out,
    fingerprint,
    stored_config,
)
from sodfast.tasks.files import file_hashes


def lab(*overrides: str) -> Config:
    return load_config(None, list(overrides))


@pytest.fixture
def run(tmp_path: Path) -> Any:
    directory = RunDirectory.create(tmp_path / "run", lab(), {"device": "cpu"})
    yield directory
    directory.close()


def files(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(UsageError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- creating


def test_create_writes_what_a_resume_needs(run: RunDirectory) -> None:
    assert load_config(str(run.path / "config.yaml"), []) == lab()
    assert json.loads((run.path / "environment.json").read_text()) == {"device": "cpu"}
    assert not list(run.path.glob("*.tmp"))


def test_check_out_accepts_what_can_become_a_directory(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (empty, tmp_path / "new", tmp_path / "a" / "b" / "c", Path("no-such-folder/run")):
        check_out(path)
    assert files(tmp_path) == {} and sorted(tmp_path.iterdir()) == [empty]


@pytest.mark.parametrize("name", [".lock", "checkpoints", "events.jsonl"])
def test_check_out_refuses_links_in_a_begun_fork(tmp_path: Path, name: str) -> None:
    """Before a model is built for what cannot be written."""
    (tmp_path / ".forking").touch()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refusal(check_out, tmp_path)


def test_check_out_refuses_a_place_among_checkpoints(run: RunDirectory) -> None:
    """Whatever lies there would be taken for a damaged checkpoint."""
    for name in ("checkpoints/step-9", "checkpoints/step-2/student/new"):
        assert "lies among the checkpoints of a run" in refusal(check_out, run.path / name)
    check_out(run.path / "forks" / "new")


def test_check_out_refuses_what_exists(tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    before = files(tmp_path)
    for path, message in (
        (used, "not empty"),
        (file, "is a file"),
        (file / "run", "not a writable directory"),
        (file / "deep" / "run", "not a writable directory"),
        (dangling, "is a file"),
        (dangling / "run", "not a writable directory"),
    ):
        assert message in refusal(check_out, path)
        refusal(RunDirectory.create, path, lab(), {})
    assert files(tmp_path) == before
    assert f"--resume {used}" in refusal(check_out, used)


@pytest.mark.parametrize("name", [".forking", "environment.json", "metrics.jsonl", "events.jsonl"])
def test_a_folder_in_the_place_of_a_file_keeps_a_begun_fork(tmp_path: Path, name: str) -> None:
    """Nothing of it is deleted for a run that cannot begin there."""
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    for file in {".forking", "environment.json", "metrics.jsonl", "events.jsonl"} - {name}:
        (tmp_path / file).write_text("kept")
    (tmp_path / name).mkdir()
    before = {path: path.is_dir() or path.read_text() for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="exists and is not empty"):
        RunDirectory.create(tmp_path, Config(), {})
    assert before == {path: path.is_dir() or path.read_text() for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("written", [0, 1])
def test_a_run_that_ended_before_its_configuration_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, end: BaseException
) -> None:
    """Its directory holds a lock, perhaps the environment, and what a kill has left aside: `out=`
    takes it, and --resume, which cannot, names `out=`."""
    path, left = tmp_path / "run", iter(range(written))

    def refusing(file: Path, text: str) -> None:
        if next(left, None) is None:
            file.with_name(f"{file.name}.{'0' * 16}.tmp").write_text(text[:9])
            raise end
        replace_text(file, text)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UsageError)):
        patch.setattr("sodfast.run.directory.replace_text", refusing)
        RunDirectory.create(path, lab(), {})
    assert len(files(path)) == written + 2
    for resume in (RunDirectory.open, lambda path: stored_config(path, [])):
        assert f"sodfast train out={path}" in refusal(resume, path)
    RunDirectory.create(path, lab(), {}).close()
    assert sorted(files(path)) == sorted(["config.yaml", ".lock", "environment.json"])
    assert load_config(str(path / "config.yaml"), []) == lab()
    assert "--resume" in refusal(check_out, path)


def test_a_fork_that_ended_before_its_configuration_is_begun_anew(tmp_path: Path) -> None:
    """Nothing of it stays, and without the mark that a fork leaves nothing is taken for its own."""
    path = tmp_path / "run"

    def begin(run: RunDirectory) -> None:
        run.append(run.metrics, {"step": 0})
        (run.checkpoints / "step-0").mkdir(parents=True)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            RunDirectory.create(path, lab(), {}, begin)
    assert read_lines(path / "metrics.jsonl") == [{"step": 0}]
    (path / "mine.txt").touch()
    assert "exists and is not empty" in refusal(check_out, path)
    (path / "mine.txt").rename(tmp_path / "mine.txt")
    (path / ".forking").rename(tmp_path / ".forking")
    assert "exists and is not empty" in refusal(check_out, path)
    (tmp_path / ".forking").rename(path / ".forking")
    RunDirectory.create(path, lab(), {}).close()
    assert {file.name for file in path.iterdir()} == {".lock", "environment.json", "config.yaml"}


def test_a_fork_that_ended_after_its_configuration_is_a_run(run: RunDirectory) -> None:
    run.append(run.metrics, {"step": 0})
    run.close()
    (run.path / ".forking").touch()
    assert "--resume" in refusal(check_out, run.path)
    RunDirectory.open(run.path).close()
    assert not (run.path / ".forking").exists() and read_lines(run.metrics) == [{"step": 0}]


@pytest.mark.parametrize("path", ["/proc/self/run", "/proc/sodfast/run", "runs/" + "a" * 300])
def test_an_unwritable_place(path: str) -> None:
    assert refusal(RunDirectory.create, Path(path), lab(), {}).startswith(f"out={path} cannot be ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "not a writable directory" in refusal(check_out, tmp_path / "run")


def test_default_directories_name_schedule_and_seed() -> None:
    name = default_out(lab("schedule.kind=ema", "seed=3"))
    assert name.startswith("runs/") and name.endswith("-ema-seed3")


# ---------------------------------------------------------------- the lock

HOLD = """
import sys, time
from pathlib import Path
from sodfast.run.directory import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_closes(run: RunDirectory) -> None:
    assert "another process" in refusal(RunDirectory.open, run.path)
    run.close()
    RunDirectory.open(run.path).close()


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(run: RunDirectory) -> None:
    run.close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        assert "another process" in refusal(RunDirectory.open, run.path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        RunDirectory.open(run.path).close()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_only_a_run_directory_opens(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert "not a run directory" in refusal(RunDirectory.open, path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- lines


def fill(run: RunDirectory, steps: int, evaluated: tuple[int, ...] = (0,)) -> None:
    for step in range(steps + 1):
        line: dict[str, Any] = {"step": step}
        if step:
            line["reward/mean"] = step / 7
        if step in evaluated:
            line |= {"eval/mean@4": 0.5, "eval/best@1": 0.5}
        run.append(run.metrics, line)
        if step:
            run.append(run.events, {"step": step, "event": "gate", "gates": {}, "refresh": False})
        if step % 5 == 0:
            run.append(run.events, {"step": step, "event": "checkpoint"})


def test_lines_survive_to_the_last_bit(run: RunDirectory) -> None:
    fill(run, 3)
    run.sync()
    assert [line.get("reward/mean") for line in read_lines(run.metrics)] == [
        None,
        *(step / 7 for step in (1, 2, 3)),
    ]


def test_an_undefined_value_is_never_written(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append(run.metrics, {"step": 1, "reward/snr": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_summary({"final": float("inf")})
    assert read_lines(run.metrics) == []
    assert not (run.path / "summary.json").exists()


def test_rewind_drops_what_came_after_the_checkpoint(run: RunDirectory) -> None:
    fill(run, 8, evaluated=(0, 5))
    run.append(run.events, {"step": 8, "event": "collapse", "reason": "length"})
    metrics, events = run.metrics.read_text().splitlines(), run.events.read_text().splitlines()
    kept = run.rewind(5, lab(), without_evaluation=False)
    assert run.metrics.read_text().splitlines() == metrics[:6]
    assert run.events.read_text().splitlines() == events[:7]
    assert kept == read_lines(run.metrics)
    assert "eval/mean@4" in kept[5]
    again = run.metrics.read_bytes(), run.events.read_bytes()
    run.rewind(5, lab(), without_evaluation=False)
    assert (run.metrics.read_bytes(), run.events.read_bytes()) == again


def test_rewind_strips_the_evaluation_that_only_a_last_step_gets(run: RunDirectory) -> None:
    fill(run, 7, evaluated=(0, 5, 7))
    run.append(run.events, {"step": 5, "event": "collapse", "reason": "eval"})
    run.append(run.events, {"step": 7, "event": "collapse", "reason": "eval"})
    run.append(run.events, {"step": 7, "event": "collapse", "reason": "length"})
    kept = run.rewind(7, lab(), without_evaluation=True)
    assert kept[7] == {"step": 7, "reward/mean": 1.0}
    assert "eval/mean@4" in kept[5] and "eval/mean@4" in kept[0]
    collapses = [event for event in read_lines(run.events) if event["event"] == "collapse"]
    assert [(event["step"], event["reason"]) for event in collapses] == [(5, "eval"), (7, "length")]


def test_rewind_to_the_start(run: RunDirectory) -> None:
    fill(run, 3)
    assert run.rewind(0, lab(), without_evaluation=False) == [
        {"step": 0, "eval/mean@4": 0.5, "eval/best@1": 0.5}
    ]
    assert read_lines(run.events) == [{"step": 0, "event": "checkpoint"}]


def test_a_line_cut_short_after_the_checkpoint_does_no_harm(run: RunDirectory) -> None:
    fill(run, 5)
    with run.metrics.open("a") as stream:
        stream.write('{"step": 6, "reward/me')
    run.rewind(5, lab(), without_evaluation=False)
    run.append(run.metrics, {"step": 6})
    assert [line["step"] for line in read_lines(run.metrics)] == list(range(7))


def test_lines_before_the_checkpoint_must_all_be_there(run: RunDirectory) -> None:
    fill(run, 5)
    texts = run.metrics.read_text().splitlines()
    for broken in (texts[:5], texts[1:], [*texts[:5], texts[5][:9]], []):
        run.metrics.write_text("\n".join(broken))
        assert "restore the file" in refusal(run.rewind, 5, lab("steps=7"), False)
    run.metrics.write_text("\n".join([*texts[:2], "{", *texts[3:]]))
    assert refusal(run.rewind, 5, lab("steps=7"), False).startswith(f"{run.metrics}:3: not JSON")
    run.metrics.unlink()
    assert "has 0 lines" in refusal(run.rewind, 5, lab("steps=7"), False)
    assert load_config(str(run.path / "config.yaml"), []) == lab()  # nothing was written


@pytest.mark.parametrize("swapped", [(1, 2), (0, 5)])
def test_lines_in_another_order_are_refused(run: RunDirectory, swapped: tuple[int, int]) -> None:
    fill(run, 5)
    texts = run.metrics.read_text().splitlines()
    first, second = swapped
    texts[first], texts[second] = texts[second], texts[first]
    run.metrics.write_text("\n".join(texts) + "\n")
    assert "follows step" in refusal(run.rewind, 5, lab("steps=7"), False)
    assert load_config(str(run.path / "config.yaml"), []) == lab()  # nothing was written


@pytest.mark.parametrize("text", ["[1]", "null", "3", '{"step": "x"}', '{"step": 2, "x": "y"}'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_lines_that_are_none_are_refused(run: RunDirectory, name: str, text: str) -> None:
    fill(run, 5)
    texts = (run.path / name).read_text().splitlines()
    (run.path / name).write_text("\n".join([*texts[:2], text, *texts[3:]]) + "\n")
    assert refusal(run.rewind, 5, lab("steps=7"), False).startswith(f"{run.path / name}:3: ")


def test_a_lock_that_is_a_directory_is_named(run: RunDirectory) -> None:
    run.close()
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()
    assert refusal(RunDirectory.open, run.path).startswith(f"{run.path / '.lock'} cannot be opened")


@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "events.jsonl", "checkpoints", "tensorboard"]
)
def test_a_link_in_a_run_directory_is_not_followed(
    run: RunDirectory, tmp_path: Path, name: str
) -> None:
    run.close()
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a symbolic link" in refusal(RunDirectory.open, run.path)
    assert not (tmp_path / "elsewhere").exists()


# ---------------------------------------------------------------- resuming


def store(run: RunDirectory, step: int, config: Config) -> Path:
    directory = run.checkpoints / f"step-{step}"
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(
        json.dumps({"step": step, "fingerprint": fingerprint(config)})
    )
    return directory


def test_a_run_of_a_release_without_common_draws_goes_on_without_them(run: RunDirectory) -> None:
    stored = yaml.safe_load((run.path / "config.yaml").read_text())
    assert stored["eval"].pop("common_draws") is True
    (run.path / "config.yaml").write_text(yaml.safe_dump(stored))
    assert stored_config(run.path, []) == lab("eval.common_draws=false", f"out={run.path}")


@pytest.mark.parametrize(
    "value", ["x", 3, None, [], [1], "${eval}", {"common_draws": "x"}, {"common_draws": None}]
)
def test_what_stands_in_the_place_of_common_draws_is_refused(
    run: RunDirectory, value: object
) -> None:
    """Nothing that a fault has left there is taken for a key that an earlier release lacked."""
    stored = yaml.safe_load((run.path / "config.yaml").read_text())
    (run.path / "config.yaml").write_text(yaml.safe_dump({**stored, "eval": value}))
    with pytest.raises(UsageError, match="eval"):
        stored_config(run.path, [])


def test_a_stored_configuration_may_only_change_its_steps(run: RunDirectory) -> None:
    store(run, 20, lab())
    assert stored_config(run.path, []) == lab(f"out={run.path}")
    assert stored_config(run.path, ["steps=400"]) == lab("steps=400", f"out={run.path}")
    assert stored_config(run.path, ["steps=20"]).steps == 20
    for override in ("seed=1", "stepss=1", "log.sinks=[wandb]", "out=elsewhere", "steps"):
        assert "only steps=N" in refusal(stored_config, run.path, [override])
    assert refusal(stored_config, run.path, ["steps=19"]) == (
        "steps=19 lies before the checkpoint's 20"
    )
    assert refusal(stored_config, run.path, ["steps=many"]).startswith("steps: ")


def test_the_newest_checkpoint_counts(run: RunDirectory) -> None:
    for step in (5, 100, 20):
        store(run, step, lab())
    (run.checkpoints / ".step-120.tmp").mkdir()
    (run.checkpoints / "step-old").mkdir()
    assert "checkpoint's 100" in refusal(stored_config, run.path, ["steps=99"])


def test_a_run_without_a_checkpoint_starts_over(run: RunDirectory) -> None:
    assert stored_config(run.path, ["steps=1"]).steps == 1


def test_another_configuration_is_refused(run: RunDirectory) -> None:
    store(run, 20, lab("optimizer.lr=1e-3"))
    assert "not the configuration" in refusal(stored_config, run.path, [])


def rows_run(tmp_path: Path) -> tuple[RunDirectory, Config, Path]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    (tmp_path / "test.jsonl").write_text("{}\n")
    (tmp_path / "own.py").write_text("def reward(): ...\n")
    config = lab(
        "task.name=python",
        f"task.source={tmp_path / 'own.py'}:reward",
        f"task.train={rows}",
        f"task.test={tmp_path / 'test.jsonl'}",
    )
    return RunDirectory.create(tmp_path / "rows-run", config, {}), config, rows


def test_files_of_the_task_must_be_as_they_were(tmp_path: Path) -> None:
    run, config, rows = rows_run(tmp_path)
    state = store(run, 20, config) / "state.json"
    files = {"task_files": file_hashes(config.task)}
    state.write_text(json.dumps(json.loads(state.read_text()) | files))
    assert stored_config(run.path, []).task == config.task
    for file in (rows, tmp_path / "own.py"):
        text = file.read_text()
        file.write_text(text + "\n")
        assert refusal(stored_config, run.path, []) == (
            f"{file} is not as it was when the run began: restore it, or start a new run"
        )
        file.write_text(text)
    rows.unlink()
    assert str(rows) in refusal(stored_config, run.path, [])
    run.close()


def test_a_checkpoint_without_hashes_is_accepted_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, config, _ = rows_run(tmp_path)
    store(run, 20, config)
    assert stored_config(run.path, []).task == config.task
    assert [record.message for record in caplog.records] == [
        f"{run.path} has no hashes of the task's files: taken to be the same"
    ]
    run.close()


def test_a_moved_directory_is_its_own_out(run: RunDirectory, tmp_path: Path) -> None:
    store(run, 20, lab())
    moved = run.path.rename(tmp_path / "moved")
    assert stored_config(moved, []).out == str(moved)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"step": 20}', '{"step": "x"}', None])
def test_a_damaged_checkpoint_is_named(run: RunDirectory, content: str | None) -> None:
    directory = store(run, 20, lab())
    if content is None:
        (directory / "state.json").unlink()
    else:
        (directory / "state.json").write_text(content)
    message = refusal(stored_config, run.path, [])
    assert str(directory) in message and "delete it" in message


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert str(path) in refusal(stored_config, path, [])


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("out=elsewhere", True),
        ("steps=999", True),
        ("log.sinks=[wandb]", True),
        ("log.project=x", True),
        ("log.samples_every=1", True),
        ("checkpoint.every=1", True),
        ("checkpoint.keep=9", True),
        ("seed=1", False),
        ("optimizer.lr=1e-3", False),
        ("schedule.window=4", False),
        ("schedule.kind=fixed", False),
        ("checkpoint.every=0", True),
        ("model.attention=flash", True),
        ("model.random=sodfast/tiny", False),
        ("teacher.micro_batch_tokens=9", False),
        ("eval.every=3", False),
        ("collapse.stop=true", False),
        ("task.train=100", False),
        ("task.label_noise={share: 0.3}", False),
        ("task.arrival={step: 9}", False),
        ("checkpoint.at=[3]", True),
        ("lab.seed=1", False),
        ("lab.stubborn=0.5", False),
        ("optimizer.lr_burst={first: 1, last: 2, factor: 8}", False),
        ("teacher.feedback=true", False),
        ("teacher.feedback=never", True),
        ("teacher.demonstrate_self=true", False),
        ("teacher.context=reference", False),
        ("teacher.chat_template_kwargs={a: 1}", False),
        ("model.chat_template_kwargs={a: 1}", False),
    ],
)
def test_fingerprint(override: str, same: bool) -> None:
    assert (fingerprint(lab(override)) == fingerprint(lab())) == same


def test_feedback_has_the_fingerprint_that_0_1_0_gave_it() -> None:
    old = "eval.common_draws=false"
    assert fingerprint(lab("teacher.feedback=true", old)) == "cac6a788a0c998c0"
    assert fingerprint(lab(old)) == "ec608b379d604fcc"
    assert fingerprint(lab("teacher.feedback=without_solution")) != fingerprint(lab())


def test_layers_may_keep_their_activations_in_a_resumed_run() -> None:
    thrifty = "model.gradient_checkpointing=true"
    assert fingerprint(lab(thrifty)) == fingerprint(lab(thrifty, "model.kept_layers=1"))


def test_keys_that_came_later_stay_outside_the_fingerprint_at_their_old_meaning() -> None:
    task = ("task.name=tool_use", "task.train=a/b", "model.path=m")
    values = json.loads(lab(*task).model_dump_json())["task"]
    assert {"split", "columns", "system", "request", "scorer"} <= values.keys()
    # The hash that 0.1.0 gives this configuration.
    task = (*task, "eval.common_draws=false")
    assert fingerprint(lab(*task)) == "919ffccc6b9d543c"
    assert fingerprint(lab(*task, "eval.common_draws=true")) != fingerprint(lab(*task))
    for override in ("task.split=dev", "task.columns.prompt=q", "task.system=s", "task.request=r"):
        assert fingerprint(lab(*task, override)) != fingerprint(lab(*task)), override
    assert fingerprint(lab(*task, "task.scorer=reference")) != fingerprint(lab(*task))
