"""One step on real chemistry questions, from a model directory to a checkpoint.

`SODFAST_REAL_DATA` names a folder with sciknoweval/chemistry/{train,test}.jsonl.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sodfast.cli import main
from sodfast.files import read_lines
from sodfast.model.load import load_model

FOLDER = os.environ.get("SODFAST_REAL_DATA")
pytestmark = pytest.mark.skipif(not FOLDER, reason="SODFAST_REAL_DATA names no folder")

CHAT = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def rows(name: str, count: int) -> list[dict[str, Any]]:
    path = Path(str(FOLDER)) / "sciknoweval" / "chemistry" / f"{name}.jsonl"
    with path.open() as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 8 training and 2 test rows."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 8), ("test", 2)):
        lines = [json.dumps(row) + "\n" for row in rows(name, count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, as the models that it stands for have."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([row["prompt"] for row in rows("train", 200)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT
    )


def tiny_network(architecture: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 10,  # padded, as large models' embeddings are
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**settings, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False))


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_one_step_on_chemistry(
    architecture: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_network(architecture, tokenizer).save_pretrained(tmp_path / "model")
    # A random model is never right. Call most of its answers right, so that there are
    # demonstrations for a teacher to see.
    monkeypatch.setattr(
        "sodfast.tasks.multiple_choice.MultipleChoiceTask.score",
        lambda self, question, response: float(len(response) % 3 > 0),
    )
    arguments = [
        "base",
        f"model.path={tmp_path / 'model'}",
        "task.name=multiple_choice",
        f"task.train={data / 'train.jsonl'}",
        f"task.test={data / 'test.jsonl'}",
        f"out={tmp_path / 'run'}",
        "steps=1",
        "device=cpu",
        "rollout.prompts_per_step=8",
        "rollout.samples_per_prompt=2",
        "rollout.max_new_tokens=12",
        "eval.samples=2",
        "optimizer.warmup_steps=0",
        "optimizer.micro_batch_tokens=4096",
        "objective.top_k=20",
    ]
    monkeypatch.setattr(sys, "argv", ["sodfast", "train", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code

    first, line = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert "eval/mean@2" in first and "eval/mean@2" in line
    assert all(math.isfinite(value) for value in line.values())
    assert line["optim/grad_norm"] > 0 and line["teacher/drift"] > 0
    assert line["distill/reprompt_fraction"] > 0 and line["distill/divergence"] > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] in ("done", "collapsed") and summary["dropped_prompts"] == 0
    trained = load_model(
        str(tmp_path / "run" / "checkpoints" / "step-1" / "student"), torch.device("cpu")
    )
    start = load_model(str(tmp_path / "model"), torch.device("cpu"))
    assert not trained.head.equal(start.head)
    prompt = trained.decode(trained.encode(rows("train", 1)[0]["prompt"]))
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
