"""The student's updates: which rollouts are in them, their gradients, and what stops one."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sodfast.errors import RunFailed
from sodfast.rollout.engine import Sample
from sodfast.run import checkpoint
from sodfast.trainer import Trainer

Train = Callable[..., Any]
Build = Callable[..., Trainer]


def test_every_rollout_is_in_one_update_with_its_whole_group(build: Build, tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", "teacher.context=none", "optimizer.updates_per_step=2")
    trainer.run.close()
    rollouts = trainer._rollout(1)
    size = len(rollouts.samples) // len(rollouts.questions)
    plans = [[one.rows for one in trainer.student.plan(step, rollouts)] for step in range(1, 9)]
    assert trainer.student.plan(1, rollouts) == trainer.student.plan(1, rollouts)
    assert any(plan != plans[0] for plan in plans)  # keyed by the step
    for plan in plans:
        assert sorted(row for rows in plan for row in rows) == list(range(len(rollouts.samples)))
        groups = [{row // size for row in rows} for rows in plan]
        assert not groups[0] & groups[1] and len(groups[0]) == len(groups[1])
    weights = [one.weights for one in trainer.student.plan(1, rollouts)]
    advantages = [advantage for part in weights for _, _, advantage in part]
    assert sorted(advantages) == pytest.approx(sorted(rollouts.advantages))


def gradient(build: Build, out: Path, rollouts: Any, *overrides: str) -> torch.Tensor:
    """The first step's gradient on given rollouts."""
    trainer = build(out, *overrides)
    trainer.run.close()
    accumulate, grads = trainer.student._accumulate_gradients, []

    def stop(*arguments: Any) -> torch.Tensor:
        loss = accumulate(*arguments)
        found = [p.grad for p in trainer.model.network.parameters()]
        assert all(grad.dtype == trainer.model.head.dtype for grad in found)
        grads.append(torch.cat([grad.double().flatten() for grad in found]))
        return loss

    trainer.student._accumulate_gradients = stop  # type: ignore[method-assign]
    updates = trainer.student.plan(1, rollouts)
    scores = trainer._score(rollouts, updates)
    trainer.student.update(1, rollouts, updates, scores, trainer.teacher.prepare_update)
    return grads[0]


@pytest.mark.slow
def test_bf16_gradients_point_where_fp32_ones_do(build: Build, tmp_path: Path) -> None:
    """However a step is cut: each of the 16 sums over micro-batches rounds at 2⁻⁹."""
    trainer = build(tmp_path / "rollouts")
    trainer.run.close()
    rollouts = trainer._rollout(1)
    exact = gradient(build, tmp_path / "fp32", rollouts)
    bf16 = ("model.dtype=bfloat16",)
    whole = gradient(build, tmp_path / "bf16", rollouts, *bf16)
    cut = gradient(build, tmp_path / "cut", rollouts, *bf16, "optimizer.micro_batch_tokens=1")
    for ours, oracle, bound in ((whole, exact, 0.99), (cut, exact, 0.99), (cut, whole, 0.999)):
        cosine = torch.cosine_similarity(ours, oracle, dim=0)
        assert cosine > bound
        assert ours.norm() == pytest.approx(float(oracle.norm()), rel=0.03)


def test_recomputed_old_log_probs_are_those_of_training(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose numerics are off by a quarter nat: as π_old it is the ratio of every token;
    recomputed, the ratio is 1 and the difference weighs as the sampler's."""
    lines = {}
    for kind in ("engine", "recompute"):
        keys = (f"objective.old_logprob={kind}", "steps=1", "eval.every=0")
        trainer = build(tmp_path / kind, *keys)
        generate = trainer.engine.generate

        def off(*arguments: Any, generate: Any = generate, **keywords: Any) -> list[Sample]:
            return [replace(s, logprob=s.logprob - 0.25) for s in generate(*arguments, **keywords)]

        monkeypatch.setattr(trainer.engine, "generate", off)
        trainer.train()
        trainer.run.close()
        lines[kind] = trainer.lines[1]
    ratio = math.exp(0.25)
    assert lines["engine"]["policy/ratio_mean"] == pytest.approx(ratio, rel=1e-4)
    assert {k: v for k, v in lines["engine"].items() if "sampler" in k} == {
        k: pytest.approx(v) for k, v in lines["recompute"].items() if "sampler" in k
    }
    assert lines["recompute"]["policy/ratio_mean"] == pytest.approx(1, rel=1e-5)
    assert lines["recompute"]["policy/sampler_ratio_max"] == pytest.approx(ratio, rel=1e-4)


@pytest.mark.slow
def test_a_nan_in_a_later_update_of_a_step_keeps_the_checkpoint_before(
    build: Build, train: Train, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    trainer = build(out, "optimizer.updates_per_step=2", "steps=5", "checkpoint.every=2")
    accumulate, calls = trainer.student._accumulate_gradients, []

    def poisoned(*arguments: Any) -> torch.Tensor:
        calls.append(trainer.step)
        return accumulate(*arguments) * (torch.nan if calls.count(2) == 2 else 1)

    trainer.student._accumulate_gradients = poisoned  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match=r"^step 3: .*nan"):
        trainer.train()
    trainer.run.close()
    assert sorted(checkpoint.steps(out / "checkpoints")) == [0, 2]
    assert train(out).summary["status"] == "done"
