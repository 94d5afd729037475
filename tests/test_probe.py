"""The candidate and the incumbent answer; nothing else of the run notices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sodfast.config import EvidenceConfig
from sodfast.probe import _asked, longest_mean, probe
from sodfast.rollout.engine import Sample
from sodfast.tasks.base import Question
from sodfast.trainer import Trainer

Build = Callable[..., Trainer]
PROBED = [
    "schedule.kind=evidence",
    "schedule.probe_questions=3",
    "schedule.probe_samples=2",
    "schedule.probes=2",
]


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


@pytest.fixture
def trainer(build: Build, tmp_path: Path) -> Any:
    trainer = build(tmp_path / "run", *PROBED)
    yield trainer
    trainer.run.close()


def measure(trainer: Trainer, contexts: list[Tensor | None], step: int = 2) -> dict[str, float]:
    questions = trainer.data.train[: len(contexts) // 2]
    return probe(
        trainer.config,
        trainer.model,
        trainer.engine,
        trainer.task,
        trainer.teacher,
        questions,
        contexts,
        step,
        trainer.ranks,
        lambda done, total: None,
    )


def contexts_of(trainer: Trainer, count: int) -> list[Tensor | None]:
    """The plain prompts, twice each."""
    prompts = [torch.tensor(trainer.model.encode_question(q)) for q in trainer.data.train[:count]]
    return [prompt for prompt in prompts for _ in range(2)]


def spoil(network: Any) -> None:
    """Weights that end every answer at once: its length is 1, and it is wrong."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()


def test_the_teacher_answers_with_its_own_weights(trainer: Trainer) -> None:
    """Whichever of the two is spoilt does worse, and equal weights give equal answers."""
    contexts = contexts_of(trainer, 3)
    assert measure(trainer, contexts)["probe/questions"] == 0  # the teacher is the student
    trainer.teacher.prepare_update()
    equal = measure(trainer, contexts)
    assert equal["probe/questions"] == 3 and equal["probe/tokens"] > 12
    assert equal["probe/gain"] == equal["probe/gain_squared"] == 0
    assert equal["probe/candidate_length"] == equal["probe/incumbent_length"]
    spoil(trainer.teacher.network)
    found = measure(trainer, contexts)
    assert found["probe/candidate_reward"] == equal["probe/candidate_reward"] > 0
    assert found["probe/candidate_length"] == equal["probe/candidate_length"]
    assert found["probe/incumbent_reward"] == 0
    assert found["probe/gain"] == pytest.approx(found["probe/candidate_reward"])
    assert found["probe/gain_squared"] > 0
    spoil(trainer.model.network)
    assert measure(trainer, contexts)["probe/candidate_reward"] == 0
    assert not any(measure(trainer, [None] * 6).values())


def test_which_questions_are_asked_and_in_which_contexts() -> None:
    schedule = EvidenceConfig(probe_questions=2, probe_samples=3)
    questions = [Question(id=str(i), prompt=str(i), answer="") for i in range(4)]
    contexts = [None, None, ids(1), None, ids(2), ids(3), ids(4), ids(5)]
    asked, prompts = _asked(schedule, questions, contexts)
    assert [question.id for question in asked] == ["1"] * 3 + ["2"] * 3
    assert [int(prompt) for prompt in prompts] == [1, 1, 1, 2, 3, 2]


def test_the_longest_of_a_step() -> None:
    def samples(*lengths: int) -> list[Sample]:
        empty = torch.empty(0)
        return [Sample(ids(1), torch.zeros(n), empty, empty, False) for n in lengths]

    assert longest_mean(samples(3, 9, 4)) == 9  # at least one
    assert longest_mean(samples(*range(1, 41))) == 39.5  # two of forty
    assert longest_mean(samples(*range(1, 42))) == 40  # three of forty-one


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "teacher.storage=device",
        "teacher.storage=host",
        "model.dtype=bfloat16",
        "model.lora.rank=2",
        "teacher.context=none",
    ],
)
def test_a_probe_changes_nothing_else(
    train: Callable[..., Any], tmp_path: Path, override: str
) -> None:
    """Where no check passes, a run is that of a fixed teacher bit for bit, beside what the probes
    measured: weights are what they were, and draws have keys of their own."""
    # The two soon differ, and every question has a context.
    overrides = [override, "optimizer.lr=2e-2", "optimizer.warmup_steps=1"]
    overrides += ["teacher.success_reward=0"]
    fixed = train(tmp_path / "fixed", "schedule.kind=fixed", *overrides, "steps=6")
    run = train(tmp_path / "probed", *PROBED, "schedule.min_z=99", *overrides, "steps=6")
    own = ("probe/", "gate/")
    lines = [{k: v for k, v in line.items() if not k.startswith(own)} for line in run.lines]
    assert lines == fixed.lines
    probed = [line for line in run.lines if "probe/gain" in line]
    assert [line["step"] for line in probed] == [2, 4, 6]
    assert all(line["probe/questions"] and line["probe/tokens"] for line in probed)
    keys = ("probe/candidate_length", "probe/incumbent_length")
    assert {len({line[key] for key in keys}) for line in probed} == {2}, (
        "both gave the same answers"
    )
