"""What is refused before training begins, and what is said."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from sodfast.errors import UsageError
from sodfast.integrations.trl import TeacherScheduleCallback, known, use_fused_loss


def install(monkeypatch: pytest.MonkeyPatch, release: str | None) -> None:
    def version(name: str) -> str:
        if release is None:
            raise PackageNotFoundError(name)
        return release

    monkeypatch.setattr(known, "version", version)


@pytest.mark.parametrize("release", ["1.16.0", "1.16.3"])
def test_known_releases_are_taken(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    install(monkeypatch, release)
    known.require_trl()


@pytest.mark.parametrize("release", ["1.15.2", "1.17.0", "1.160.0", "2.0.0.dev1"])
def test_another_release_is_refused_with_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    install(monkeypatch, release)
    for call in (lambda: TeacherScheduleCallback({"kind": "cgtr"}), lambda: use_fused_loss(None)):
        with pytest.raises(UsageError, match=rf"TRL {release} is installed.*1\.16\.\*"):
            call()


def test_without_trl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with pytest.raises(UsageError, match=r"pip install 'sodfast\[trl\]'"):
        TeacherScheduleCallback({"kind": "cgtr"})


class Stand:
    """In place of a trainer of TRL's."""

    is_deepspeed_enabled = is_fsdp_enabled = False

    def __init__(self, **changed: Any) -> None:
        names = known._NAMES + known._NAMES_OF_SDPO
        vars(self).update({name: None for name in names}, **changed)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[Stand]:
    install(monkeypatch, "1.16.0")
    module = SimpleNamespace(SDPOTrainer=Stand, SDFTTrainer=Stand)
    monkeypatch.setattr(known, "import_module", lambda name: module)
    return Stand


def test_a_trainer_of_another_kind_is_refused(stand_in: type[Stand]) -> None:
    known.require_trainer(stand_in())
    with pytest.raises(UsageError, match="SimpleNamespace has no teacher"):
        known.require_trainer(SimpleNamespace())


@pytest.mark.parametrize(
    "name", ["_forward_logits", "_step", "callback_handler", "model_kwarg_keys"]
)
def test_a_name_that_has_moved_is_named(stand_in: type[Stand], name: str) -> None:
    trainer = stand_in()
    delattr(trainer, name)
    with pytest.raises(UsageError, match=rf"TRL 1\.16\.0 has no {name}"):
        known.require_trainer(trainer)


def test_only_sdpo_needs_a_policy_loss(
    stand_in: type[Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    class SDFT(Stand):
        pass

    module = SimpleNamespace(SDPOTrainer=type("SDPO", (Stand,), {}), SDFTTrainer=SDFT)
    monkeypatch.setattr(known, "import_module", lambda name: module)
    trainers = [module.SDPOTrainer(), SDFT()]
    for trainer in trainers:
        del trainer._compute_policy_loss
    known.require_trainer(trainers[1])
    with pytest.raises(UsageError, match="has no _compute_policy_loss"):
        known.require_trainer(trainers[0])


@pytest.mark.parametrize("name", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_weights_are_refused(stand_in: type[Stand], name: str) -> None:
    with pytest.raises(UsageError, match="shards its weights"):
        known.require_trainer(stand_in(**{name: True}))


def test_a_teacher_must_have_weights_of_its_own() -> None:
    model, teacher = object(), object()
    args = SimpleNamespace(teacher_model_kind="live")
    trainer = SimpleNamespace(model=model, teacher_model=teacher, args=args)
    assert known.own_teacher(trainer) is teacher
    trainer.teacher_model = model
    with pytest.raises(UsageError, match="set teacher_model_kind='ema'"):
        known.own_teacher(trainer)
    args.teacher_model_kind = "ema"
    with pytest.raises(UsageError, match="adapter of a PEFT model"):
        known.own_teacher(trainer)
