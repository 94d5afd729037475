"""The 8B bench at a tiny shape on the CPU: what it runs there is what it will run on a GPU."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

OVERRIDES = (
    "memory_gib=4",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "rollout.max_prompt_tokens=16",
    "rollout.max_new_tokens=24",
    "teacher.max_prompt_tokens=64",
    "optimizer.micro_batch_tokens=80",
)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    import bench_8b

    return bench_8b


@pytest.fixture(autouse=True)
def own_batch(monkeypatch: pytest.MonkeyPatch, bench: Any) -> None:
    """The bench gives the engine another batch for good; not so for the other tests."""
    monkeypatch.setattr(bench.native, "Batch", bench.native.Batch)


@pytest.mark.slow
def test_steps_of_the_preset_have_the_lengths_that_are_asked_for(bench: Any) -> None:
    from bench_rollout import TINY_SHAPE

    case = bench.Case("qwen3_8b_80gb", OVERRIDES, TINY_SHAPE, torch.bfloat16, 8, 9, 1)
    found = bench.take_steps(case, torch.device("cpu"), 2, lambda text: None)
    assert found["responses"] == 16 and found["longest"] == 24
    assert found["response_tokens"] == pytest.approx(16 * 9, abs=8)
    assert found["phases"].keys() == {"rollout", "teacher", "train"}
    for row in found["phases"].values():
        assert row["seconds"] > 0 and row["planned_bytes"] > 0
    first, second = found["lines"]
    assert first["distill/reprompt_fraction"] == second["distill/reprompt_fraction"] == 1
    assert first["reward/mean"] == 0.5
    assert first["distill/divergence"] > 0
    assert first["optim/grad_norm"] > 0


def test_lengths_have_their_mean_and_their_longest(bench: Any) -> None:
    lengths = bench.forced_lengths(64, 1500, 8192, 3)
    assert len(lengths) == 64 and lengths.count(8192) >= 3
    assert sum(lengths) / 64 == pytest.approx(1500, rel=0.01)
    assert 1 <= min(lengths) < 200


def test_any_answer_is_shown_to_the_teacher_at_its_own_length(bench: Any) -> None:
    tokenizer = bench.word_tokenizer(50)
    assert tokenizer("w7 w49 w2").input_ids == [7, 49, 2]
    assert tokenizer(tokenizer.decode([3, 30, 48])).input_ids == [3, 30, 48]


def test_flops_are_those_of_the_products(bench: Any) -> None:
    """By hand for one sequence of 3 tokens, of which 2 are the response, in a toy shape."""
    from types import SimpleNamespace

    from bench_rollout import Shape

    shape = Shape(hidden=5, inner=7, layers=2, heads=2, kv_heads=1, head_dim=3, vocabulary=11)
    sample = SimpleNamespace(prompt=torch.zeros(2), response=torch.zeros(2))
    body = 5 * 6 + 2 * (5 * 3) + 6 * 5 + 3 * 5 * 7  # q, k and v, output, gated MLP
    attention = 2 * (3 * 3 / 2 * 6) * 2  # scores and values over half a square
    expected = 3 * 2 * (2 * body * 3 + attention) + (3 + 1) * 2 * 5 * 11 * 2
    assert bench.training_flops(shape, SimpleNamespace(samples=[sample])) == expected


def test_the_objective_agrees_with_its_definition(bench: Any) -> None:
    from bench_rollout import TINY_SHAPE

    found = bench.agreement(TINY_SHAPE, torch.device("cpu"), torch.bfloat16, rows=64)
    assert found["rows"] == 64
    assert found["loss_error"] < 0.01 and found["entropy_error"] < 0.01
    assert found["hidden_cosine"] > 0.999 and found["head_cosine"] > 0.999
