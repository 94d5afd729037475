"""What a run carries from step to step: one snapshot, saved once, and put back into another run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SCHEDULES

from sodfast.errors import UsageError
from sodfast.run import checkpoint
from sodfast.run.restore import optimizer_tensors
from sodfast.trainer import Trainer

Build = Callable[..., Trainer]


def test_a_run_that_is_restored_has_every_part(build: Build, tmp_path: Path) -> None:
    """Into a run that has come as far on other random numbers, so that nothing is equal before."""
    one = build(tmp_path / "one", *SCHEDULES["cgtr"], "steps=3", "checkpoint.every=99")
    two = build(tmp_path / "two", *SCHEDULES["cgtr"], "steps=2", "seed=1", "checkpoint.every=99")
    for trainer in (one, two):
        assert trainer.train() == "done"
        trainer.run.close()
    path = checkpoint.latest(tmp_path / "one" / "checkpoints")
    assert path is not None
    assert two.state.restore(path).step == two.state.step == 3
    same = two.state.values | {"fingerprint": one.state.values["fingerprint"]}
    same["streams"] = {"seed": 0, "step": 3}
    assert same == one.state.values
    pairs = [
        (one.student.weights.state_dict(), two.student.weights.state_dict()),
        (one.teacher.own(), two.teacher.own()),
        tuple(optimizer_tensors(t.model.network, t.student.optimizer) for t in (one, two)),
    ]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys() and len(ours) > 3
        assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_step_is_saved_once_as_it_was_taken(build: Build, tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", "steps=1")
    trainer.state.take(0)
    trainer.gain.last["later"] = 1.0
    assert trainer.state.save(lasting=()) and not trainer.state.save(lasting=())
    stored = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-0")
    assert stored.state["reward_memory"] == {} and stored.teacher is None
    trainer.run.close()


def test_the_state_of_another_schedule_is_refused(build: Build, tmp_path: Path) -> None:
    one = build(tmp_path / "one", *SCHEDULES["cgtr"])
    two = build(tmp_path / "two", *SCHEDULES["fixed"])
    one.state.save(lasting=())
    with pytest.raises(UsageError, match="its schedule is not Fixed"):
        two.state.restore(tmp_path / "one" / "checkpoints" / "step-0")
    for trainer in (one, two):
        trainer.run.close()
