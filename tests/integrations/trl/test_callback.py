"""TRL's teacher under every schedule: moved when the schedule says so, resumed exactly, and refused
with words that help where it cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sodfast.errors import RunFailed, UsageError
from sodfast.files import read_lines
from sodfast.integrations.trl import TeacherScheduleCallback
from sodfast.integrations.trl.callback import MixedTeacher
from sodfast.run.records import read_events, read_metrics
from sodfast.schedule import build_schedule, replay

pytest.importorskip("trl", reason="TRL is absent: pip install 'sodfast[trl]'")
from transformers import TrainerCallback
from trl_trainers import build_trainer, run, same, weights

pytestmark = pytest.mark.slow

GATES = {"min_isolation": 4, "check_every": 2, "window": 2, "reward_margin": 0.01}
SCHEDULES: dict[str, dict[str, Any]] = {
    "fixed": {"kind": "fixed"},
    "hard": {"kind": "hard", "every": 3},
    "ema": {"kind": "ema", "rate": 0.3},
    "trust_region": {"kind": "trust_region", "rate": 0.3},
    "cgtr": {"kind": "cgtr", **GATES},
    "python": {
        "kind": "python",
        "source": "examples/plateau_schedule.py:OnPlateau",
        "options": {"patience": 3},
    },
}
MOVES = {"hard": 6, "ema": 20, "cgtr": 3, "python": 3}


class Watch(TrainerCallback):  # type: ignore[misc]
    """Both models before and after the schedule's turn; added before and after the callback."""

    def __init__(self) -> None:
        self.teachers: list[dict[str, Tensor]] = []
        self.students: list[dict[str, Tensor]] = []

    def of(self, trainer: Any) -> "Watch":
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.teachers.append(weights(initial(self.trainer)))
        self.students.append(weights(self.trainer.model))


def initial(trainer: Any) -> torch.nn.Module:
    teacher = trainer.teacher_model
    return teacher.initial if isinstance(teacher, MixedTeacher) else teacher


def scheduled(kind: str, model: Path, out: Path, schedule: dict[str, Any], **changed: Any) -> Any:
    trainer = build_trainer(kind, model, out, **changed)
    trainer.add_callback(TeacherScheduleCallback(schedule))
    return trainer


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_teacher_moves_exactly_when_a_replay_of_the_metrics_says_so(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = scheduled("sdpo", tiny_model, tmp_path, SCHEDULES[name], max_steps=20)
    start = weights(trainer.model)
    watch = Watch().of(trainer)
    run(trainer)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    decisions = replay(build_schedule(SCHEDULES[name]), lines)
    before = start
    for decision, teacher, student in zip(decisions, watch.teachers, watch.students, strict=True):
        if decision.action == "keep":
            assert same(teacher, before)
        elif decision.action == "copy":
            assert same(teacher, student) and not same(teacher, before)
        else:
            for key, value in teacher.items():
                expected = torch.lerp(before[key], student[key], decision.rate)
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        before = teacher
    moved = [line["step"] for line, d in zip(lines, decisions, strict=True) if d.action != "keep"]
    assert len(moved) == MOVES.get(name, 0)
    refreshes = [e for e in read_events(tmp_path) if e["event"] == "refresh"]
    copied = [line["step"] for line in lines if line.get("teacher/refreshed")]
    assert copied == [event["step"] for event in refreshes]
    assert copied == ([] if name == "ema" else moved)
    for event in refreshes:
        assert event["shock"] == lines[event["step"] - 1]["teacher/drift"] > 0


def test_gates_rewards_and_lengths_are_the_trainers_own(tiny_model: Path, tmp_path: Path) -> None:
    schedule = {"kind": "cgtr", **GATES}
    trainer = run(scheduled("sdpo", tiny_model, tmp_path, schedule, max_steps=8))
    logged = [line for line in trainer.state.log_history if "loss" in line]
    for line, entry in zip(read_metrics(tmp_path), logged, strict=True):
        assert line["reward/mean"] == entry["self_distillation/reward_mean"]
        assert line["length/mean"] == entry["completions/mean_length"]
        assert line["length/max"] == entry["completions/max_length"]
        shared = {key for key in line if key.startswith(("teacher/", "gate/"))}
        assert {"teacher/age", "teacher/drift", "teacher/refreshed"} <= shared
        assert {key: line[key] for key in shared} == {key: entry[key] for key in shared}
    gates = [event for event in read_events(tmp_path) if event["event"] == "gate"]
    assert [event["step"] for event in gates] == [2, 4, 6, 8]
    assert gates[0]["gates"]["isolation"] == {
        "value": 2,
        "threshold": 4,
        "pass": False,
        "active": True,
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("sdpo", name) for name in SCHEDULES), ("sdft", "hard"), ("sdft", "trust_region")],
)
def test_a_resume_in_the_middle_equals_the_run_that_never_stopped(
    kind: str, name: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Into another directory, and with a checkpoint that lies between two checks."""
    given = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    first = run(scheduled(kind, tiny_model, whole, SCHEDULES[name], **given))
    second = scheduled(kind, tiny_model, rest, SCHEDULES[name], **given)
    run(second, resume_from_checkpoint=str(whole / "checkpoint-5"))
    assert same(weights(first.model), weights(second.model))
    assert same(weights(initial(first)), weights(initial(second)))
    assert read_metrics(rest) == read_metrics(whole)[5:]
    assert read_events(rest) == [event for event in read_events(whole) if event["step"] > 5]


def test_a_resume_in_the_same_directory_drops_what_came_after(
    tiny_model: Path, tmp_path: Path
) -> None:
    given = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    schedule = SCHEDULES["hard"]
    run(scheduled("sdpo", tiny_model, tmp_path, schedule, **given))
    files = [tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"]
    before = [file.read_text() for file in files]
    second = scheduled("sdpo", tiny_model, tmp_path, schedule, **given)
    run(second, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [file.read_text() for file in files] == before
    run(scheduled("sdpo", tiny_model, tmp_path, schedule, **{**given, "max_steps": 1}))
    assert len(read_metrics(tmp_path)) == 1


def test_a_checkpoint_within_a_batch_of_answers_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A batch serves four steps, and TRL would draw another one at once."""
    given = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "steps_per_generation": 8}
    first = run(scheduled("sdpo", tiny_model, tmp_path, SCHEDULES["hard"], **given))
    for step in (2, 6):
        second = scheduled("sdpo", tiny_model, tmp_path / "rest", SCHEDULES["hard"], **given)
        with pytest.raises(UsageError, match=r"within a batch of answers.*steps_per_generation"):
            run(second, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    second = scheduled("sdpo", tiny_model, tmp_path / "rest", SCHEDULES["hard"], **given)
    run(second, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(weights(first.model), weights(second.model))


def test_trl_alone_loses_its_teacher(tiny_model: Path, tmp_path: Path) -> None:
    """What the callback mends: TRL's own average begins anew at the initial weights."""
    given = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    first = run(build_trainer("sdpo", tiny_model, tmp_path / "whole", **given))
    second = build_trainer("sdpo", tiny_model, tmp_path / "rest", **given)
    run(second, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert not same(weights(first.teacher_model), weights(second.teacher_model))
    assert not same(weights(first.model), weights(second.model))


def test_a_small_average_survives_bf16(tiny_model: Path, tmp_path: Path) -> None:
    """TRL's average rounds to nearest, so at this rate and learning rate most of it is lost."""
    given = {
        "max_steps": 6,
        "model_init_kwargs": {"dtype": torch.bfloat16},
        "teacher_update_rate": 0.02,
        "learning_rate": 1e-3,
    }
    ours = scheduled("sdpo", tiny_model, tmp_path / "a", {"kind": "ema", "rate": 0.02}, **given)
    start = weights(ours.model)
    run(ours)
    theirs = run(build_trainer("sdpo", tiny_model, tmp_path / "b", **given))

    def moved(trainer: Any) -> float:
        """The share of the weights that the student moved and the teacher, too."""
        found = [
            ((t != start[key])[s != start[key]]).float().mean()
            for (key, t), s in zip(
                weights(trainer.teacher_model).items(),
                weights(trainer.model).values(),
                strict=True,
            )
        ]
        return float(torch.stack(found).nanmean())

    assert moved(theirs) < 0.7 * moved(ours)


def test_trust_region_mixes_the_logits_of_both_models(tiny_model: Path, tmp_path: Path) -> None:
    schedule = {"kind": "trust_region", "rate": 0.25}
    trainer = run(scheduled("sdpo", tiny_model, tmp_path, schedule, max_steps=3))
    teacher = trainer.teacher_model
    ids = torch.arange(5).unsqueeze(0)
    logits = [model(input_ids=ids).logits for model in (teacher.initial, trainer.model)]
    torch.testing.assert_close(teacher(input_ids=ids).logits, torch.lerp(*logits, 0.25))
    assert not torch.equal(*logits)


def test_steps_that_share_a_batch_of_answers_see_the_same_rewards(
    tiny_model: Path, tmp_path: Path
) -> None:
    changed = {"steps_per_generation": 4, "max_steps": 4}
    run(scheduled("sdpo", tiny_model, tmp_path, SCHEDULES["hard"], **changed))
    lines = read_metrics(tmp_path)
    rewards = [line["reward/mean"] for line in lines]
    assert rewards[0] == rewards[1] != rewards[2] == rewards[3]


def test_a_step_of_several_batches_sees_their_mean(tiny_model: Path, tmp_path: Path) -> None:
    changed = {"steps_per_generation": 1, "max_steps": 2}
    trainer = run(scheduled("sdpo", tiny_model, tmp_path, SCHEDULES["hard"], **changed))
    logged = [line for line in trainer.state.log_history if "loss" in line]
    for line, entry in zip(read_metrics(tmp_path), logged, strict=True):
        assert line["length/mean"] == pytest.approx(entry["completions/mean_length"])
        assert line["length/max"] >= entry["completions/max_length"]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"kind": "evidence"}, "probes"),
        ({"kind": "cgtr", "length_unit": "shard"}, "length_unit=sequence"),
        ({"kind": "hard", "evry": 3}, "evry"),
        ({"kind": "hard", "every": 0}, "schedule.every"),
        ({"kind": "python", "source": "nowhere.py:Nothing"}, "nowhere.py"),
    ],
)
def test_a_schedule_that_cannot_be_had_is_refused_at_once(
    schedule: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        TeacherScheduleCallback(schedule)


def test_sdft_scores_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """So a gate on rewards is refused, and without it the others work."""
    with pytest.raises(UsageError, match="gates to"):
        run(scheduled("sdft", tiny_model, tmp_path, {"kind": "cgtr"}, max_steps=2))
    gates = {"kind": "cgtr", **GATES, "gates": ["isolation", "length"], "max_tail_ratio": 9.0}
    trainer = run(scheduled("sdft", tiny_model, tmp_path, gates, max_steps=8))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if line["teacher/refreshed"]] == [4, 8]
    assert {line["reward/mean"] for line in lines} == {0.0}
    assert same(weights(trainer.teacher_model), weights(trainer.model))


def test_a_trainer_without_a_teacher_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    live = scheduled("sdpo", tiny_model, tmp_path, {"kind": "cgtr"}, teacher_model_kind="live")
    with pytest.raises(UsageError, match="teacher_model_kind='ema'"):
        run(live)
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    plain = Trainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=[{"input_ids": [3], "labels": [3]}],
        callbacks=[TeacherScheduleCallback({"kind": "cgtr"})],
    )
    with pytest.raises(UsageError, match="SDPOTrainer"):
        run(plain)


def test_an_adapter_as_the_teacher_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"),
    )
    trainer = build_trainer("sdpo", tiny_model, tmp_path)
    trainer.teacher_model = trainer.model = model
    trainer.add_callback(TeacherScheduleCallback({"kind": "cgtr"}))
    with pytest.raises(UsageError, match="adapter"):
        run(trainer)


def test_lengths_that_the_trainer_does_not_log_are_asked_for(
    tiny_model: Path, tmp_path: Path
) -> None:
    trainer = scheduled("sdpo", tiny_model, tmp_path, {"kind": "cgtr"}, max_steps=1)
    trainer._record_completion_metrics = lambda *_: None
    with pytest.raises(UsageError, match="completions/mean_length"):
        run(trainer)


def test_a_checkpoint_without_a_whole_teacher_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    given = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run(build_trainer("sdpo", tiny_model, tmp_path / "plain", **given))
    schedule = {"kind": "hard", "every": 2}
    trainer = scheduled("sdpo", tiny_model, tmp_path / "out", schedule, **given)
    with pytest.raises(UsageError, match="saved without a TeacherScheduleCallback"):
        run(trainer, resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))
    run(scheduled("sdpo", tiny_model, tmp_path / "own", schedule, **given))
    checkpoint = tmp_path / "own" / "checkpoint-1"
    other = scheduled("sdpo", tiny_model, tmp_path / "out", {"kind": "ema"}, **given)
    with pytest.raises(UsageError, match='"kind": "hard"'):
        run(other, resume_from_checkpoint=str(checkpoint))
    data = (checkpoint / "teacher.safetensors").read_bytes()
    (checkpoint / "teacher.safetensors").write_bytes(data[:1000])
    trainer = scheduled("sdpo", tiny_model, tmp_path / "out", schedule, **given)
    with pytest.raises(UsageError, match="no whole teacher"):
        run(trainer, resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    "saving", [{"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "epoch"}], ids=str
)
def test_a_process_that_ends_within_a_save_leaves_no_other_runs_teacher(
    saving: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run overwrites the student of the first one's checkpoint, and no more."""
    given = {"max_steps": 2, **saving}
    run(scheduled("sdpo", tiny_model, tmp_path, SCHEDULES["hard"], **given))
    second = scheduled("sdpo", tiny_model, tmp_path, SCHEDULES["hard"], **given)

    def end(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TeacherScheduleCallback, "on_save", end)
        run(second)
    third = scheduled("sdpo", tiny_model, tmp_path, SCHEDULES["hard"], **given)
    checkpoint = min(tmp_path.glob("checkpoint-*"))
    assert (checkpoint / "teacher.safetensors").exists()  # the first run's
    with pytest.raises(UsageError, match="no whole teacher"):
        run(third, resume_from_checkpoint=str(checkpoint))


def test_weights_that_are_not_finite_end_the_run(tiny_model: Path, tmp_path: Path) -> None:
    trainer = scheduled("sdpo", tiny_model, tmp_path, {"kind": "hard"}, max_steps=3)

    class Break(TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(torch.nan)

    trainer.add_callback(Break())
    with pytest.raises(RunFailed, match="learning_rate"):
        run(trainer)
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_outside_of_training_it_says_so() -> None:
    with pytest.raises(UsageError, match=r"trainer\.train"):
        TeacherScheduleCallback({"kind": "hard"}).on_train_begin(None, None, None)


def test_a_checkpoint_is_safetensors_and_json(tiny_model: Path, tmp_path: Path) -> None:
    given = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run(scheduled("sdpo", tiny_model, tmp_path, SCHEDULES["cgtr"], **given))
    checkpoint = tmp_path / "checkpoint-1"
    stored = json.loads((checkpoint / "teacher_schedule.json").read_text())
    assert stored["config"]["kind"] == "cgtr" and len(stored["state"]["window"]) == 1
    assert (checkpoint / "teacher.safetensors").stat().st_size > 1000
