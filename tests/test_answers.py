"""What a run keeps of its answers: every field against the run itself, and nothing else changed."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TASK
from sodfast_kernels import reference
from torch import Tensor

from sodfast.answers import AnswerLog
from sodfast.config import load_config
from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import own_attention
from sodfast.model.random_weights import byte_tokenizer
from sodfast.rollout.engine import Sample
from sodfast.run.samples import read_samples, sampled_steps
from sodfast.tasks.arithmetic import ArithmeticTask
from sodfast.tasks.base import Grade, Question
from sodfast.trainer import Trainer

Train = Callable[..., Any]
TEMPERATURE = 0.7


def log_of(model: Any) -> AnswerLog:
    return AnswerLog(load_config("lab", []), model, lambda step, answers, evaluation: None)


# ---------------------------------------------------------------- the fields


@pytest.fixture(scope="module")
def first_step(
    build: Callable[..., Trainer], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run of one step, after which the student no longer is what answered, and its line."""
    out = tmp_path_factory.mktemp("first") / "run"
    wanted = ["steps=1", "log.samples_every=1", f"rollout.temperature={TEMPERATURE}"]
    trainer = build(out, *wanted, "objective.top_k=4", "objective.alpha=0.3")
    trainer.train()
    trainer.run.close()
    return out, trainer.lines[1]


def logits_of(model: LanguageModel, prompt: str, tokens: Sequence[int]) -> Tensor:
    """[L, V] before each of the tokens, by the network's own forward pass."""
    ids = model.encode_text(prompt)
    with torch.no_grad(), own_attention(model.network):
        logits: Tensor = model.network(torch.tensor([[*ids, *tokens]])).logits[0]
    return logits[len(ids) - 1 : -1].float()


def test_every_field_of_a_rollout(
    first_step: tuple[Path, dict[str, Any]], model: LanguageModel
) -> None:
    """All of it recomputed from the prompt texts and tokens with the model of before the step."""
    out, line = first_step
    rows = read_samples(out, 1)
    assert len(rows) == 16 and sampled_steps(out) == [1]
    task = ArithmeticTask(TASK)
    questions = {question.id: question for question in task.train}
    right = [row["reward"] >= 1 for row in rows]
    hinted = 0
    for index, row in enumerate(rows):
        question, tokens = questions[row["id"]], torch.tensor(row["tokens"])
        group = range(index - index % 4, index - index % 4 + 4)
        assert (row["step"], row["prompt"]) == (1, question.prompt)
        assert row["response"] == model.decode(tokens) == "".join(row["text"])
        assert row["text"] == [model.decode([token]) for token in row["tokens"]]
        assert row["length"] == len(tokens)
        assert row["feedback"] == task.feedback(question, row["response"])
        assert row["capped"] == (row["tokens"][-1] not in model.eos_ids)
        assert row["reward"] == task.score(question, row["response"])
        mean = sum(rows[other]["reward"] for other in group) / 4
        assert row["advantage"] == pytest.approx(row["reward"] - mean)

        logits = logits_of(model, row["prompt"], row["tokens"])
        student = (logits / TEMPERATURE).log_softmax(-1)
        found = student.gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["logprob"]), found, atol=2e-5, rtol=1e-4)
        entropy = -(student.exp() * student).sum(-1)
        torch.testing.assert_close(torch.tensor(row["entropy"]), entropy, atol=2e-5, rtol=1e-4)

        siblings = [other for other in group if other != index and right[other]]
        if not siblings:
            nothing = ("hint", "hint_source", "teacher_prompt", "divergence")
            assert [row[key] for key in nothing] == [None] * 4
            continue
        hinted += 1
        assert row["hint"] == "demonstration" and row["hint_source"] in siblings
        assert rows[row["hint_source"]]["response"] in row["teacher_prompt"]
        expected = reference.distillation_loss(
            logits,
            logits_of(model, row["teacher_prompt"], row["tokens"]),
            alpha=0.3,
            temperature=TEMPERATURE,
            top_k=4,
        ).divergence
        torch.testing.assert_close(torch.tensor(row["divergence"]), expected, atol=2e-5, rtol=1e-3)
    assert 0 < hinted < len(rows)
    # What the line of metrics.jsonl says is over the same numbers.
    distilled = [d for row in rows for d in row["divergence"] or ()]
    entropies = [entropy for row in rows for entropy in row["entropy"]]
    assert line["distill/divergence"] == pytest.approx(sum(distilled) / len(distilled), rel=1e-5)
    assert line["policy/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert line["distill/reprompt_fraction"] == hinted / len(rows)


def test_every_field_of_an_evaluation(
    first_step: tuple[Path, dict[str, Any]], model: LanguageModel
) -> None:
    out, line = first_step
    assert sampled_steps(out, evaluation=True) == [0, 1]
    rows = read_samples(out, 0, evaluation=True)
    task = ArithmeticTask(TASK)
    assert [row["id"] for row in rows] == [q.id for q in task.test for _ in range(2)]
    for row, question in zip(rows, [q for q in task.test for _ in range(2)], strict=True):
        assert "divergence" not in row
        nothing = ("hint", "hint_source", "teacher_prompt", "advantage")
        assert [row[key] for key in nothing] == [None] * 4
        assert row["feedback"] == task.feedback(question, row["response"])
        assert row["reward"] == task.score(question, row["response"])
        tokens = torch.tensor(row["tokens"])
        assert row["response"] == model.decode(tokens) == "".join(row["text"])
        assert row["text"] == [model.decode([token]) for token in row["tokens"]]
        assert row["length"] == len(tokens)
        assert row["capped"] == (row["tokens"][-1] not in model.eos_ids)
        logprob = (logits_of(model, row["prompt"], row["tokens"]) / 0.6).log_softmax(-1)
        found = logprob.gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["logprob"]), found, atol=2e-5, rtol=1e-4)
        entropy = -(logprob.exp() * logprob).sum(-1)
        torch.testing.assert_close(torch.tensor(row["entropy"]), entropy, atol=2e-5, rtol=1e-4)
    last = read_samples(out, 1, evaluation=True)
    assert sum(row["reward"] for row in last) / len(last) == pytest.approx(line["eval/mean@2"])


@pytest.mark.slow
def test_without_distillation_there_are_hints_but_no_divergences(
    train: Train, tmp_path: Path
) -> None:
    train(tmp_path / "run", "steps=1", "log.samples_every=1", "objective.distill_coef=0")
    rows = read_samples(tmp_path / "run", 1)
    assert any(row["hint"] for row in rows) and not any(row["divergence"] for row in rows)


# ---------------------------------------------------------------- when, and nothing else


def student(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step}" / "student" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_with_samples_differs_in_nothing_else(train: Train, tmp_path: Path) -> None:
    """Metrics and events bit for bit, and the weights."""
    found = {}
    for every, steps, evaluations in (
        ("1", [1, 2, 3], [0, 2, 3]),
        ("null", [2, 3], [0, 2, 3]),
        ("2", [2], [0, 2]),
        ("0", [], []),
    ):
        run = tmp_path / every
        overrides = ["steps=3", "eval.every=2", f"log.samples_every={every}"]
        found[every] = train(run, *overrides, "optimizer.updates_per_step=2")
        assert sampled_steps(run) == steps and sampled_steps(run, evaluation=True) == evaluations
        assert student(run, 3) == student(tmp_path / "1", 3)
        assert (run / "samples").exists() == bool(steps)
    assert found["1"] == found["null"] == found["2"] == found["0"]
    shared = Path("samples") / "step-3.jsonl"
    assert (tmp_path / "1" / shared).read_bytes() == (tmp_path / "null" / shared).read_bytes()


def files(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "samples").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("every", ["null", "1"])
def test_a_resumed_run_keeps_what_an_undisturbed_one_does(
    train: Train, tmp_path: Path, every: str
) -> None:
    """The closing evaluation of a shorter run, later steps and halves of files are dropped."""
    keys = [f"log.samples_every={every}", "checkpoint.every=2"]
    train(tmp_path / "whole", "steps=4", *keys)
    resumed = tmp_path / "resumed"
    train(resumed, "steps=3", *keys)
    assert "eval-3.jsonl" in files(resumed) and "step-3.jsonl" in files(resumed)
    for name in ("step-9.jsonl", "eval-9.jsonl", "step-3.jsonl.0123456789abcdef.tmp"):
        (resumed / "samples" / name).write_text('{"step": 9')
    train(resumed, "steps=4")
    assert files(resumed) == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_starts_over_has_no_samples_of_before(train: Train, tmp_path: Path) -> None:
    off = ("checkpoint.every=0", "log.samples_every=1")
    train(tmp_path / "run", "steps=2", *off)
    before = files(tmp_path / "run")
    (tmp_path / "run" / "samples" / "step-7.jsonl").write_text("{}")
    train(tmp_path / "run")
    assert files(tmp_path / "run") == before


# ---------------------------------------------------------------- texts of tokens


def byte_model() -> Any:
    tokenizer = byte_tokenizer()

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}  # as GPT-2 writes bytes
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    ids = {byte: tokenizer.convert_tokens_to_ids(letter) for byte, letter in letters.items()}
    return SimpleNamespace(decode=decode, ids=ids)


def pieces_of(model: Any, data: bytes) -> tuple[list[str], str]:
    ids = [model.ids[byte] for byte in data]
    text = model.decode(ids)
    return log_of(model).token_texts(ids, text), text


def test_a_character_of_several_tokens_stands_with_the_last() -> None:
    pieces, text = pieces_of(byte_model(), "hé你🤖!".encode())
    assert text == "hé你🤖!"
    assert pieces == ["h", "", "é", "", "", "你", "", "", "", "🤖", "!"]


def test_bytes_that_become_no_character_are_replaced_once() -> None:
    """A continuation without a beginning, a beginning without an end, and one at the very end."""
    pieces, text = pieces_of(byte_model(), b"a\x80b\xe4\xbdc\xf0\x9f")
    assert text == "a\ufffdb\ufffdc\ufffd" and "".join(pieces) == text
    assert [pieces[i] for i in (0, 5)] == ["a", "\ufffdc"] and pieces[-1] == "\ufffd"


def test_any_bytes_join_to_their_text() -> None:
    model, rng = byte_model(), random.Random(0)
    for _ in range(40):
        data = rng.randbytes(rng.randrange(1, 30))
        pieces, text = pieces_of(model, data)
        assert "".join(pieces) == text and len(pieces) == len(data)


def test_a_tokenizer_whose_texts_depend_on_their_place() -> None:
    """As sentencepiece's: alone, or first, a word has no space before it."""
    words = {1: "▁one", 2: "▁two", 3: "s", 4: ""}

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    log = log_of(SimpleNamespace(decode=decode))
    assert log.token_texts([1, 3, 2, 2, 4], "ones two two") == ["one", "s", " two", " two", ""]
    assert log.token_texts([4], "") == [""]


def test_a_text_that_the_tokens_do_not_spell_is_still_cut_whole() -> None:
    log = log_of(SimpleNamespace(decode=lambda ids: "ab" * len(ids)))
    for text in ("ababx", "a", ""):
        pieces = log.token_texts([1, 2], text)
        assert "".join(pieces) == text and len(pieces) == 2


def test_feedback_that_is_no_unicode_is_spelled_out(
    first_step: tuple[Path, dict[str, Any]], model: LanguageModel
) -> None:
    sample = Sample(torch.tensor([3]), torch.tensor([4, 1]), torch.zeros(2), torch.ones(2), False)
    written: list[Any] = []
    log = AnswerLog(load_config("lab", []), model, lambda step, rows, _: written.extend(rows))
    log.keep_evaluation(
        5, [Question("0", "1", None, "q")], [sample], ["1"], [Grade(1.0, "a\ud800")]
    )
    (row,) = written
    assert row.feedback == "a\\ud800" and row.entropy == [1.0, 1.0]
    assert json.loads(row.model_dump_json())["text"] == ["1", ""]
