"""Presets of published baselines as whole runs: their losses, recomputed in fp64 from the answers
that the runs have kept, and what they leave out."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import value
from marks import slow
from torch import Tensor, nn

from sodfast.commands import build_trainer
from sodfast.config import load_config
from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import own_attention
from sodfast.run.console import Reporter
from sodfast.run.samples import read_samples
from sodfast.teacher import TeacherScores
from sodfast.trainer import Trainer


@pytest.fixture
def start(tiny_run: list[str], tmp_path: Path) -> Callable[..., Trainer]:
    """`start(preset, name)`: a trainer of the preset on the tiny model, in the folder `name`."""

    def start(preset: str, name: str = "run") -> Trainer:
        keys = ["steps=2", "log.samples_every=1", "eval.every=0", f"out={tmp_path / name}"]
        # In groups of two, some wrong answers have no right sibling.
        small = [*tiny_run, "rollout.prompts_per_step=8", "rollout.samples_per_prompt=2"]
        return build_trainer(load_config(preset, [*small, *keys]), None, Reporter())

    return start


def log_probs(model: LanguageModel, network: nn.Module, prompt: str, ids: Sequence[int]) -> Tensor:
    """[L, V] fp64, before each of the tokens `ids` of an answer."""
    before = model.encode_text(prompt)
    with own_attention(network):
        logits: Tensor = network(torch.tensor([[*before, *ids]])).logits[0]
    return logits[len(before) - 1 : -1].log_softmax(-1)


def jensen_shannon(log_s: Tensor, log_q: Tensor) -> Tensor:
    """½ KL(s ‖ m) + ½ KL(q ‖ m) with m = ½ (s + q), of each token."""
    s, q = log_s.exp(), log_q.exp()
    log_m = ((s + q) / 2).log()
    return ((s * (log_s - log_m) + q * (log_q - log_m)) / 2).sum(-1)


def published_loss(
    model: LanguageModel,
    student: nn.Module,
    teacher: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    cap: float | None,
) -> Tensor:
    """1/B Σ_i m_i 1/|y_i| Σ_t min(π/π_old, cap) JSD_t: the whole loss of arXiv 2601.20802, and
    without a cap that of on-policy self-distillation."""
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        if row["hint"] is None:
            continue
        tokens = torch.tensor(row["tokens"])
        log_s = log_probs(model, student, row["prompt"], row["tokens"])
        with torch.no_grad():
            log_q = log_probs(model, teacher, row["teacher_prompt"], row["tokens"])
        ratio = torch.ones(len(tokens), dtype=torch.float64)
        if cap is not None:
            now = log_s.detach().gather(1, tokens[:, None])[:, 0]
            ratio = (now - torch.tensor(row["logprob"])).exp().clamp(max=cap)
        loss = loss + (ratio * jensen_shannon(log_s, log_q)).mean() / len(rows)
    return loss


def double(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).double()


@pytest.mark.parametrize(
    ("preset", "rate", "cap", "shown"),
    [
        ("sdpo", 0.05, 2.0, {"demonstration", "feedback"}),
        *slow(("opsd", 0.0, None, {"reference"})),
    ],
)
def test_a_step_of_a_baseline_is_its_published_objective_in_fp64(
    start: Callable[..., Trainer], preset: str, rate: float, cap: float | None, shown: set[str]
) -> None:
    """Loss and gradient of two steps; in the second the teacher is no longer the student: the
    moving average of the two, or still the first."""
    trainer = start(preset)
    teacher = double(trainer.model.network)
    hints: set[str | None] = set()
    try:
        for step in (1, 2):
            student = double(trainer.model.network)
            trainer.train(until=step)
            rows = read_samples(trainer.run.path, step)
            hints |= {row["hint"] for row in rows}
            loss = published_loss(trainer.model, student, teacher, rows, cap)
            loss.backward()
            norm = math.sqrt(
                sum(
                    float(p.grad.square().sum()) for p in student.parameters() if p.grad is not None
                )
            )
            line = trainer.lines[step]
            assert line["optim/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
            assert line["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)
            with torch.no_grad():
                moved = double(trainer.model.network).parameters()
                for own, other in zip(teacher.parameters(), moved, strict=True):
                    own.lerp_(other, rate)
    finally:
        trainer.leave()
        trainer.run.close()
    assert hints - {None} == shown


@pytest.mark.slow
def test_a_run_of_grpo_has_exactly_no_distillation_gradient(
    start: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of nothing but NaN changes no bit of two steps, and none of them is scored."""
    plain = start("grpo", "plain")
    plain.train()
    plain.run.close()
    score, asked = plain.teacher.__class__.score, []

    def broken(self: Any, prompts: Sequence[Tensor | None], *arguments: Any) -> TeacherScores:
        asked.extend(prompts)
        scores = score(self, prompts, *arguments)
        hidden = [None if rows is None else rows * math.nan for rows in scores.hidden]
        return replace(scores, hidden=hidden, head=torch.full_like(scores.head, math.nan))

    monkeypatch.setattr("sodfast.teacher.Teacher.score", broken)
    other = start("grpo", "broken")
    other.train()
    other.run.close()
    assert asked and set(asked) == {None}
    assert [line["optim/grad_norm"] > 0 for line in plain.lines[1:]] == [True, True]
    for line, poisoned in zip(plain.lines, other.lines, strict=True):
        assert not any(key.startswith("distill/div") for key in line)
        for key in line.keys() | poisoned.keys():
            if not key.startswith(("time/", "memory/", "rollout/")):
                assert line[key] == poisoned[key], key
    for name, weights in plain.model.network.state_dict().items():
        assert torch.equal(weights, other.model.network.state_dict()[name])


PUBLISHED: dict[str, dict[str, Any]] = {
    # lasgroup/SDPO: the distillation loss in place of the policy's.
    "sdpo": {
        "rollout.prompts_per_step": 32,
        "rollout.samples_per_prompt": 8,
        "objective.policy_coef": 0.0,
        "objective.distill_coef": 1.0,
        "objective.top_k": 100,
        "objective.add_tail": True,
        "objective.alpha": 0.5,
        "objective.ratio_cap": 2.0,
        "teacher.context": "demonstration",
        "teacher.feedback": "without_solution",
        "schedule.kind": "ema",
        "schedule.rate": 0.05,
    },
    "grpo": {
        "objective.distill_coef": 0.0,
        "objective.policy_coef": 1.0,
        "objective.normalize_advantage": True,
        "objective.clip_range": (0.2, 0.28),
        "teacher.context": "none",
        "schedule.kind": "fixed",
    },
    "opsd": {
        "objective.policy_coef": 0.0,
        "objective.distill_coef": 1.0,
        "objective.ratio_cap": None,
        "objective.top_k": None,
        "teacher.context": "reference",
        "schedule.kind": "fixed",
    },
}


@pytest.mark.parametrize("scale", ["", "_qwen3_8b"])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_keys_of_a_baseline(preset: str, scale: str) -> None:
    config = load_config(f"{preset}{scale}", [])
    assert {key: value(config, key) for key in PUBLISHED[preset]} == PUBLISHED[preset]
    assert config.optimizer.updates_per_step == 1 or preset != "sdpo"
