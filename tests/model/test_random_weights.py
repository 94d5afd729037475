"""Random weights of a shipped shape: reproducible, trainable, and asked in bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow

from sodfast.commands import build_trainer, evaluate_model
from sodfast.config import load_config
from sodfast.errors import UsageError
from sodfast.model.random_weights import byte_tokenizer, random_model, shape, shipped_shapes
from sodfast.run.console import Reporter

TINY = "sodfast/tiny"
CPU = torch.device("cpu")


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return dict(random_model(TINY, CPU, dtype, seed).network.state_dict())


def test_weights_are_a_function_of_the_seed_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = weights(3), weights(3), weights(4)
    assert torch.get_rng_state().equal(before)
    assert all(one[name].equal(same[name]) for name in one)
    matrices = [name for name, weight in one.items() if weight.dim() == 2]
    assert matrices and not any(one[name].equal(other[name]) for name in matrices)
    assert {weight.dtype for weight in weights(3, torch.bfloat16).values()} == {torch.bfloat16}


def test_the_network_has_the_shape_that_was_named() -> None:
    model = random_model(TINY, CPU, torch.float32, 0)
    found, asked = model.network.config.to_dict(), shape(TINY)
    asked.pop("rope_theta")  # transformers keeps it in a group of its own
    assert {key: found[key] for key in asked} == asked
    assert (model.eos_ids, model.pad_id) == ((256,), 256)


def test_an_unknown_name_lists_those_known() -> None:
    with pytest.raises(UsageError) as error:
        random_model("Qwen/Qwen9", CPU, torch.float32, 0)
    assert "model.random=Qwen/Qwen9" in str(error.value) and "\n" not in str(error.value)
    assert all(name in str(error.value) for name in shipped_shapes())


@pytest.mark.parametrize("text", ["12*34+5=?", "What is  H₂O?\n\tA: wåter 💧", ""])
def test_a_token_is_a_byte(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and len(tokenizer) == 256
    assert all(0 <= token < 256 for token in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 256, 300], skip_special_tokens=True) == text


@pytest.mark.parametrize("dtype", ["float32", *slow("bfloat16")])
def test_a_run_trains_random_weights(
    dtype: str, tmp_path: Path, read_run: Callable[[Path], Any]
) -> None:
    """Two steps on rows that need a whole alphabet, resumable and evaluable from its checkpoint."""
    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    for file in files:
        asked = [{"prompt": f"Größte Zahl ({i})?\nA: 1\nB: 2", "answer": "B"} for i in range(4)]
        file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    out = tmp_path / "run"
    overrides = [
        f"model.random={TINY}", f"model.dtype={dtype}", "device=cpu", f"out={out}", "steps=2",
        "task.name=multiple_choice", f"task.train={files[0]}", f"task.test={files[1]}",
        "eval.samples=1", "collapse.eval_floor=0", "teacher.success_reward=0",
        "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_new_tokens=8",
    ]  # fmt: skip
    trainer = build_trainer(load_config("base", overrides), None, Reporter())
    start = {name: w.clone() for name, w in trainer.model.network.state_dict().items()}
    try:
        assert trainer.train() == "done"
    finally:
        trainer.run.close()
    found = read_run(out)
    assert [line["step"] for line in found.lines] == [0, 1, 2]
    for line in found.lines[1:]:
        assert line["length/mean"] <= 8
        assert line["optim/grad_norm"] > 0 and line["distill/divergence"] > 0
    moved = trainer.model.network.state_dict()
    assert start.keys() == moved.keys()
    assert any(not start[name].equal(moved[name]) for name in start)
    assert evaluate_model(str(out), [])["step"] == 2
