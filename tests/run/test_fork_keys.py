"""What a fork is asked for, read from texts; test_fork.py has what comes of it."""

from pathlib import Path

import pytest

from sodfast.config import FixedConfig, load_config
from sodfast.errors import UsageError
from sodfast.run.fork_keys import fork_config, read_fork, read_stored, source_config


def test_step_and_refresh_are_told_from_the_keys() -> None:
    assert read_fork(["step=4", "seed=2"]) == (4, None, ["seed=2"])
    texts = ["steps=9", 'teacher.refresh="now"', "step=4", "teacher.context=none"]
    assert read_fork(texts) == (4, "now", ["steps=9", "teacher.context=none"])


def test_a_teacher_that_is_refreshed_or_not_stands_still_afterwards() -> None:
    original = load_config("lab", ["schedule.kind=hard", "steps=9", "out=somewhere"])
    plain = original.model_copy(update={"out": None})
    assert fork_config(original, 4, []) == plain
    still = plain.model_copy(update={"schedule": FixedConfig()})
    for refresh in ("now", "never"):
        assert fork_config(original, 4, [], refresh) == still  # type: ignore[arg-type]
    again = fork_config(original, 4, ["schedule.kind=hard", "schedule.every=7"], "now")
    assert again.schedule.every == 7  # type: ignore[union-attr]


@pytest.mark.parametrize("schedule", ["schedule.kind=hard", "schedule={kind: hard}"])
def test_never_refuses_a_schedule(schedule: str) -> None:
    with pytest.raises(UsageError, match="holds the teacher still"):
        fork_config(load_config("lab"), 4, [schedule], "never")


def test_student_and_task_are_the_sources() -> None:
    original = load_config("lab")
    for text in ("lab.seed=3", "task.test=3", "task.arrival={step: 9}", "model.dtype=bfloat16"):
        with pytest.raises(UsageError, match=f"no {text.partition('.')[0]}"):
            fork_config(original, 4, [text, "optimizer.adamw=auto"])
    noisy = fork_config(original, 4, ["task.label_noise={share: 0.5, first: 5, last: 9}"])
    assert noisy.task.label_noise is not None and noisy.task.label_noise.last == 9


def test_the_configuration_of_a_run_and_of_a_copy(tmp_path: Path) -> None:
    config = load_config("lab", ["seed=3"])
    (tmp_path / "copy.yaml").write_text(config.to_yaml())
    assert read_stored(tmp_path / "copy.yaml") == config
    with pytest.raises(UsageError, match="is not a run directory"):
        source_config(tmp_path)
