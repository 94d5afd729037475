"""What the teacher scores, where it lives, and how it moves.

Suffixes: N response tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import SCHEDULES
from marks import slow
from torch import Tensor

from sodfast.commands import build_trainer
from sodfast.config import (
    CGTRConfig,
    EMAConfig,
    FixedConfig,
    HardConfig,
    ScheduleConfig,
    TrustRegionConfig,
    load_config,
)
from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import own_attention
from sodfast.run.console import Reporter
from sodfast.schedule import Decision
from sodfast.teacher import DRIFT_EVERY, Teacher

KEEP, COPY = Decision("keep"), Decision("copy")
CONTEXTS = [torch.tensor([3, 9, 4, 14]), None, torch.tensor([7])]
RESPONSES = [torch.tensor([5, 6, 1]), torch.tensor([5]), torch.tensor([8, 1])]
Storage = Literal["device", "host"]


def weights(network: Any) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in network.parameters()])


def move(network: Any, seed: int, size: float = 0.01) -> None:
    """What an optimizer update does, for a teacher's purposes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def logits(teacher: Teacher) -> list[Tensor | None]:
    scores = teacher.score(CONTEXTS, RESPONSES, 100)
    return [None if rows is None else rows @ scores.head.T for rows in scores.hidden]


def direct_logits(network: Any) -> list[Tensor | None]:
    """The same by plain forward passes, one sequence at a time."""
    found: list[Tensor | None] = []
    for context, response in zip(CONTEXTS, RESPONSES, strict=True):
        if context is None:
            found.append(None)
            continue
        with torch.no_grad(), own_attention(network):
            output = network(torch.cat([context, response])[None]).logits
        found.append(output[0, len(context) - 1 : -1])
    return found


def assert_close(left: list[Tensor | None], right: list[Tensor | None]) -> None:
    for a, b in zip(left, right, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- where it lives


@pytest.fixture(params=["device", "host"])
def storage(request: pytest.FixtureRequest) -> Storage:
    return request.param  # type: ignore[no-any-return]


def test_the_teacher_is_the_student_until_the_first_update(
    model: LanguageModel, storage: Storage
) -> None:
    student = model.network
    teacher = Teacher(student, CGTRConfig(), 0, storage)
    assert teacher.weights is None and teacher.network is student
    assert_close(logits(teacher), direct_logits(student))
    start = weights(student)

    teacher.prepare_update()
    move(student, 1)
    assert teacher.network is not student
    assert weights(teacher.network).equal(start)
    assert not any(p.requires_grad for p in teacher.network.parameters())

    shock = teacher.apply(COPY, 1)
    assert float(shock) == pytest.approx(float((weights(student) - start).norm()), rel=1e-5)
    assert teacher.weights is None and teacher.network is student
    assert_close(logits(teacher), direct_logits(student))

    refreshed = weights(student)
    teacher.prepare_update()
    move(student, 2)
    assert weights(teacher.network).equal(refreshed)


def test_the_teacher_does_not_move_between_copies(model: LanguageModel, storage: Storage) -> None:
    teacher, start = Teacher(model.network, FixedConfig(), 0, storage), weights(model.network)
    scores = logits(teacher)
    for step in range(DRIFT_EVERY, 4 * DRIFT_EVERY, DRIFT_EVERY):
        teacher.prepare_update()
        move(model.network, step)
        drift = teacher.apply(KEEP, step)
        distance = float((weights(model.network) - start).norm())
        assert float(drift) == pytest.approx(distance, rel=1e-5)
    assert weights(teacher.network).equal(start)
    assert_close(logits(teacher), scores)


def test_on_the_host_the_drift_has_no_stream_of_its_own_in_most_steps(
    model: LanguageModel, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured wherever the teacher moves, and in every fifth step."""
    teacher = Teacher(model.network, EMAConfig(rate=0.5), 0, storage)
    teacher.prepare_update()
    move(model.network, 1)
    rest = [step for step in range(1, 2 * DRIFT_EVERY) if step != DRIFT_EVERY]
    with monkeypatch.context() as patched:
        if storage == "host":
            patched.setattr(teacher.store, "update_", None)
        assert [teacher.apply(KEEP, step) is None for step in rest] == [storage == "host"] * 8
    distance = float((weights(model.network) - weights(teacher.network)).norm())
    assert float(teacher.apply(KEEP, DRIFT_EVERY)) == pytest.approx(distance, rel=1e-5)
    assert float(teacher.apply(Decision("average", rate=0.5), 1)) == pytest.approx(distance)
    assert float(teacher.apply(COPY, 2)) == pytest.approx(distance / 2, rel=1e-4)


def test_a_later_update_of_the_same_step_does_not_touch_the_teacher(
    model: LanguageModel, storage: Storage
) -> None:
    teacher = Teacher(model.network, HardConfig(), 0, storage)
    teacher.prepare_update()
    start = weights(teacher.network)
    for number in range(3):
        teacher.prepare_update()
        move(model.network, number)
    assert weights(teacher.network).equal(start)


@pytest.mark.parametrize("rate", [0.04, *slow(0.5, 1.0)])
def test_ema_follows_its_recursion(model: LanguageModel, storage: Storage, rate: float) -> None:
    teacher = Teacher(model.network, EMAConfig(rate=rate), 0, storage)
    average = weights(model.network)
    for step in range(1, 21):
        teacher.prepare_update()
        move(model.network, step)
        student = weights(model.network)
        drift = teacher.apply(Decision("average", rate=rate), step)
        assert float(drift) == pytest.approx(float((student - average).norm()), rel=1e-5)
        average = (1 - rate) * average + rate * student
        torch.testing.assert_close(weights(teacher.network), average, rtol=1e-5, atol=1e-6)


def test_trust_region_mixes_the_logits(model: LanguageModel, storage: Storage) -> None:
    teacher = Teacher(model.network, TrustRegionConfig(rate=0.3), 0, storage)
    initial = direct_logits(model.network)
    assert_close(logits(teacher), initial)
    for step in range(1, 4):
        teacher.prepare_update()
        move(model.network, step, 0.1)
        teacher.apply(KEEP, step)
    live = direct_logits(model.network)
    mixture = [
        None if z0 is None or z is None else 0.7 * z0 + 0.3 * z
        for z0, z in zip(initial, live, strict=True)
    ]
    assert_close(logits(teacher), mixture)
    assert not torch.allclose(mixture[0], initial[0], atol=1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [CGTRConfig(), TrustRegionConfig(rate=0.3)])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_head_is_that_of_before_the_first_update(
    model: LanguageModel, storage: Storage, schedule: ScheduleConfig, steps_before: int
) -> None:
    teacher = Teacher(model.network, schedule, 0, storage)
    for step in range(steps_before):
        teacher.prepare_update()
        move(model.network, step)
        teacher.apply(KEEP, step)
    scores = teacher.score(CONTEXTS, RESPONSES, 100)
    before = scores.head.clone()
    teacher.prepare_update()
    move(model.network, 9)
    assert scores.head.equal(before)
    assert not scores.head.requires_grad
    assert not any(rows.requires_grad for rows in scores.hidden if rows is not None)


def test_rollouts_without_a_context_are_not_scored(
    model: LanguageModel, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = Teacher(model.network, FixedConfig(), 0, storage).score(CONTEXTS, RESPONSES, 1)
    shapes = [None if rows is None else tuple(rows.shape) for rows in scores.hidden]
    assert shapes == [(3, 48), None, (2, 48)]
    monkeypatch.setattr("sodfast.teacher.response_hidden", None)
    scores = Teacher(model.network, FixedConfig(), 0, storage).score([None] * 3, RESPONSES, 1)
    assert scores.hidden == [None, None, None]


def test_in_the_students_place_and_back(model: LanguageModel, storage: Storage) -> None:
    teacher = Teacher(model.network, FixedConfig(), 0, storage)
    before = weights(model.network)
    with teacher.in_students_place():  # the same weights
        assert weights(model.network).equal(before)
    teacher.prepare_update()
    move(model.network, 1)
    moved, places = weights(model.network), [p.data_ptr() for p in model.network.parameters()]

    def fail() -> None:
        with teacher.in_students_place():
            assert weights(model.network).equal(before)
            assert weights(teacher.network).equal(moved)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert weights(model.network).equal(moved) and weights(teacher.network).equal(before)
    assert [p.data_ptr() for p in model.network.parameters()] == places


def test_apply_before_an_update_is_a_mistake(model: LanguageModel, storage: Storage) -> None:
    with pytest.raises(RuntimeError, match="prepare_update"):
        Teacher(model.network, FixedConfig(), 0, storage).apply(KEEP, 1)


def test_stored_weights_are_the_teacher_again(model: LanguageModel, storage: Storage) -> None:
    teacher = Teacher(model.network, CGTRConfig(), 0, storage)
    teacher.prepare_update()
    stored = {name: p.clone() for name, p in teacher.network.named_parameters()}
    start = weights(teacher.network)
    move(model.network, 1)
    other = Teacher(model.network, CGTRConfig(), 0, storage)
    other.load_weights(stored)
    assert weights(other.network).equal(start)
    assert not weights(model.network).equal(start)
    other.load_weights(None)
    assert other.network is model.network
    with pytest.raises(ValueError, match="other parameters"):
        other.load_weights({"unknown": torch.zeros(1)})


# ---------------------------------------------------------------- host and device

KINDS = SCHEDULES | {"hard": ["schedule.kind=hard", "schedule.every=7"]}
RUN = ["steps=30", "eval.every=30", "eval.samples=1", "optimizer.updates_per_step=2"]


def without_unmeasured_drifts(device: Any) -> Any:
    """The run as it must be with the teacher in host memory."""
    moved = {event["step"] for event in device.events if event["event"] == "refresh"}
    averages = device.summary["schedule"] == "ema"
    lines = [
        line
        if averages or line["step"] in moved or line["step"] % DRIFT_EVERY == 0
        else {key: value for key, value in line.items() if key != "teacher/drift"}
        for line in device.lines
    ]
    return replace(device, lines=lines)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_with_the_teacher_on_the_host(
    train: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    """Every number of every line, under every schedule, but for drifts that are not measured."""
    device, host = (
        train(tmp_path / s, *KINDS[kind], *RUN, f"teacher.storage={s}") for s in ("device", "host")
    )
    assert len(host.lines) == 31 and host == without_unmeasured_drifts(device)
    moving = ("teacher/drift" in line for line in host.lines[1:])
    assert all(moving) == (kind == "ema")
    if kind in ("hard", "cgtr", "evidence"):
        assert len(host.summary["refresh_steps"]) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "ema", "trust_region"])
def test_a_run_resumes_with_its_teacher_on_the_host(
    train: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    overrides = [*KINDS[kind], "teacher.storage=host"]
    undisturbed = train(tmp_path / "undisturbed", *overrides, "steps=9")
    train(tmp_path / "run", *overrides, "steps=5")
    train(tmp_path / "run", "steps=7")
    assert train(tmp_path / "run", "steps=9") == undisturbed


@pytest.mark.slow
def test_the_lab_is_the_same_with_the_teacher_on_the_host(
    read_run: Callable[[Path], Any], tmp_path: Path
) -> None:
    runs = []
    for storage in ("device", "host"):
        overrides = [f"out={tmp_path / storage}", f"teacher.storage={storage}", "steps=12"]
        overrides += ["schedule.kind=hard", "schedule.every=4", "eval.every=12", "eval.samples=1"]
        trainer = build_trainer(load_config("lab", overrides), None, Reporter())
        try:
            trainer.train()
        finally:
            trainer.run.close()
        runs.append(read_run(tmp_path / storage))
    device, host = runs
    assert host == without_unmeasured_drifts(device)
    assert host.summary["refresh_steps"] == [4, 8, 12]
    measured = [line["step"] for line in host.lines if "teacher/drift" in line]
    assert measured == [4, 5, 8, 10, 12]
