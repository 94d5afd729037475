"""A run of sodfast whose answers have given lengths, on random weights: what suite_8b_* measure.

Every second answer that is scored counts as right, so that each group has a gradient and each
sequence a demonstration, and any answer is shown to the teacher at its own length.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sodfast.commands import build_model
from sodfast.config import Config, load_config, override
from sodfast.context import Questions
from sodfast.memory.estimate import Estimate, Lengths
from sodfast.model.language_model import LanguageModel
from sodfast.rollout import native
from sodfast.rollout.admission import Draw
from sodfast.rollout.batch import Batch
from sodfast.rollout.native import NativeEngine
from sodfast.run.console import Reporter
from sodfast.run.directory import RunDirectory
from sodfast.run.environment import environment
from sodfast.schedule import build_schedule
from sodfast.student import Rollouts
from sodfast.tasks.base import Question
from sodfast.trainer import Trainer


class ForcedBatch(Batch):
    """Ends each answer at the length of its sample, whatever its tokens are."""

    lengths: Tensor  # [samples] int64

    def _admit(self, draws: Sequence[Draw]) -> None:
        samples = torch.tensor([draw.sample for draw in draws], device=self.device)
        first = len(self.rows)
        self.passes.cap[first : first + len(draws)] = self.lengths[samples]
        super()._admit(draws)


@contextmanager
def forced(lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """Sample n of a rollout has lengths[n] tokens."""
    ForcedBatch.lengths = torch.tensor(lengths, device=device)
    native.Batch = ForcedBatch  # type: ignore[misc]
    try:
        yield
    finally:
        native.Batch = Batch  # type: ignore[misc]


def forced_lengths(count: int, mean: int, cap: int, at_cap: int) -> list[int]:
    """`at_cap` of the `count` lengths at least are the cap, the rest exponential up to it; their
    mean is `mean`."""
    others = np.random.default_rng(1).exponential(size=count - at_cap)
    for _ in range(50):  # what the cap takes away makes the others longer
        others *= (count * mean - at_cap * cap) / others.clip(1, cap).sum()
    return [cap] * at_cap + [int(n) for n in others.clip(1, cap).round()]


class HalfRight:
    """Questions of random words; every second answer that is scored counts as right."""

    name = "half_right"

    def __init__(self, vocabulary: int, count: int, words: int) -> None:
        generator = np.random.default_rng(0)
        rows = generator.integers(2, vocabulary, (count, words))
        self.train = [Question(_text(row), "", None, str(i)) for i, row in enumerate(rows)]
        self.test = self.train[:1]
        self.scored = 0

    def score(self, question: Question, response: str) -> float:
        self.scored += 1
        return float(self.scored % 2)

    def feedback(self, question: Question, response: str) -> str | None:
        return None

    def extract(self, response: str) -> str | None:
        return None


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def word_tokenizer(vocabulary: int) -> Any:
    """One word for each id, so that any answer can be shown to the teacher at its own length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A special token must not come of a text, not even of an unknown word.
    words = {"<pad>": 0, "<eos>": 1} | {f"w{token}": token for token in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@dataclass(frozen=True)
class Setting:
    """A preset with overrides, and the lengths of its answers."""

    preset: str
    overrides: tuple[str, ...]
    prompt_words: int
    mean_length: int
    at_cap: int

    def config(self, device: torch.device) -> Config:
        """With as many layers that keep their activations as a run of the preset would have, which
        plans for the caps: the lengths of one step would leave room for more."""
        config = load_config(
            self.preset,
            [
                f"device={device.type}",
                "model.path=null",
                "checkpoint.every=0",
                "eval.every=0",
                *self.overrides,
            ],
        )
        return override(config, [f"model.kept_layers={Estimate(config).kept_layers}"])

    def lengths(self, config: Config) -> list[int]:
        rollout = config.rollout
        answers = rollout.prompts_per_step * rollout.samples_per_prompt
        return forced_lengths(answers, self.mean_length, rollout.max_new_tokens, self.at_cap)


EIGHT_B = Setting("qwen3_8b_80gb", ("model.random=Qwen/Qwen3-8B",), 250, 1500, 3)
REHEARSAL = Setting(
    "qwen3_8b_80gb",
    (
        "model.random=sodfast/tiny",
        "memory_gib=4",
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=4",
        "rollout.max_prompt_tokens=16",
        "rollout.max_new_tokens=24",
        "teacher.max_prompt_tokens=64",
        "teacher.micro_batch_tokens=160",
        "optimizer.micro_batch_tokens=80",
    ),
    8,
    9,
    1,
)


def start(setting: Setting, device: torch.device, folder: Path) -> Trainer:
    """A trainer ready for its first step, its run directory in `folder`."""
    config = setting.config(device)
    model = build_model(config, device, message=print)
    vocabulary = len(model.head)
    task = HalfRight(vocabulary, 64, setting.prompt_words)
    model: LanguageModel = replace(model, tokenizer=word_tokenizer(vocabulary), eos_ids=())
    engine = NativeEngine(model, config.rollout.batch_size, config.rollout.cache_gib)
    data = Questions(task.train, task.test, 0, setting.prompt_words)
    found = environment(torch.get_num_threads(), str(device))
    run = RunDirectory.create(folder / "run", config, found)
    return Trainer(
        config, model, engine, task, data, build_schedule(config.schedule), run, Reporter()
    )


def lengths_of(rollouts: Rollouts) -> list[Lengths]:
    return [
        Lengths(
            len(sample.prompt), None if hint is None else len(hint.prompt), len(sample.response)
        )
        for sample, hint in zip(rollouts.samples, rollouts.contexts, strict=True)
    ]


def training_flops(network: Any, rollouts: Rollouts) -> float:
    """Products of forward and backward (three times the forward's), prompt tokens included, without
    what checkpointing computes again; the head sees the responses only, and the teacher's head its
    forward."""
    shape = network.config
    heads, size = shape.num_attention_heads, shape.head_dim
    layer = shape.hidden_size * size * (2 * heads + 2 * shape.num_key_value_heads)
    layer += 3 * shape.hidden_size * shape.intermediate_size
    flops = 0.0
    for sample in rollouts.samples:
        tokens = len(sample.prompt) + len(sample.response) - 1
        # Causal attention: two products of T²/2 · A · D, two flops each.
        attention = 2 * tokens**2 * heads * size
        flops += 3 * shape.num_hidden_layers * (2 * layer * tokens + attention)
        flops += (3 + 1) * 2 * shape.hidden_size * shape.vocab_size * len(sample.response)
    return flops
