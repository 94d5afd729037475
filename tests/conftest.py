"""What the tests share: the gpu marker, a tiny model that answers half right, short runs."""

import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from pair import Pair
from transformers.utils.logging import disable_progress_bar

from sodfast.cli import main
from sodfast.commands import build_trainer
from sodfast.config import ArithmeticConfig, load_config
from sodfast.files import alone, read_lines
from sodfast.lab.model import build_tokenizer
from sodfast.model.language_model import LanguageModel
from sodfast.model.load import load_model
from sodfast.run.console import Reporter
from sodfast.run.directory import stored_config
from sodfast.tasks.arithmetic import ArithmeticTask
from sodfast.trainer import Trainer

TASK = ArithmeticConfig(train=48, test=8)
# Every kind of schedule, so that within five steps a teacher that can move has moved.
SCHEDULES = {
    "fixed": ["schedule.kind=fixed"],
    "hard": ["schedule.kind=hard", "schedule.every=2"],
    "ema": ["schedule.kind=ema", "schedule.rate=0.3"],
    "trust_region": ["schedule.kind=trust_region", "schedule.rate=0.3"],
    "cgtr": [
        "schedule.kind=cgtr",
        "schedule.min_isolation=2",
        "schedule.check_every=2",
        "schedule.window=2",
        "schedule.gates=[isolation]",
    ],
    "evidence": [
        "schedule.kind=evidence",
        "schedule.min_isolation=2",
        "schedule.probe_questions=3",
        "schedule.probe_samples=2",
        "schedule.probes=2",
        "schedule.gates=[isolation]",
    ],
}


# A busy machine makes an example slow, not wrong.
settings.register_profile("sodfast", deadline=None)
settings.load_profile("sodfast")


def pytest_configure() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    gc.disable()  # until all is imported: see `pytest_collection_finish`
    if not torch.cuda.is_available():
        # Read when a Triton kernel is defined: without a GPU kernels run in the interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")


# Before pytest's own hook, which deselects by the markers that it finds.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
        # For a pair, starting two more processes takes longer than what they are asked.
        if "exhaustive" in item.keywords or "pair" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if torch.cuda.is_available() or item.get_closest_marker("triton") is None:
        return
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")


def pytest_collection_finish() -> None:
    """What has been imported stays until the end: the garbage collector, which took a tenth of the
    tests' time and a fifth of the imports', need not look at it. Nor need pytest hang its handlers
    on each of torch's forty loggers, six times a test."""
    gc.freeze()
    gc.enable()
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch."):
            logging.getLogger(name).propagate = True


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: a Qwen3 of 60 k parameters that has learned the questions of
    `TASK` by heart and gets about every second one wrong."""
    return _learned_once(tmp_path_factory, head_dim=24)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The like with heads of 32 elements, whose bits do not depend on drafts on a CPU."""
    return _learned_once(tmp_path_factory, head_dim=32)


def _learned_once(factory: pytest.TempPathFactory, head_dim: int) -> Path:
    """Made by the worker that needs it first; the others wait for it and read it."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    path = shared / f"learned-{head_dim}"
    with alone(shared / "learning"):
        if not path.exists():
            _learned(path, head_dim)
    return path


def _learned(path: Path, head_dim: int) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    network = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=head_dim,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    task, rng = ArithmeticTask(TASK), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(150):
        texts = []
        for question in [*task.train, *task.test]:
            left, right, addend = map(int, question.prompt[:-1].replace("*", "+").split("+"))
            wrong = 10 * int(rng.integers(2))
            texts.append(f"{question.prompt}{left * right}+{addend}={int(question.answer) + wrong}")
        ids = tokenizer([text + "<eos>" for text in texts], padding=True, return_tensors="pt")
        labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
        network(**ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    network.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture
def model(tiny_model: Path) -> LanguageModel:
    """The tiny model, loaded anew for each test."""
    return load_model(str(tiny_model), torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path) -> list[str]:
    """Overrides of the preset `lab` that make a run of seconds."""
    return [
        f"model.path={tiny_model}",
        f"task.train={TASK.train}",
        f"task.test={TASK.test}",
        "steps=6",
        "rollout.prompts_per_step=4",
        "rollout.max_new_tokens=16",
        "optimizer.lr=2e-3",
        "optimizer.warmup_steps=2",
        "eval.every=4",
        "eval.samples=2",
        "checkpoint.every=3",
        # Eight questions may all go wrong by chance, and what chance gives depends on the machine.
        "collapse.eval_floor=0",
        "collapse.eval_fraction=0",
    ]


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two ranks: `pair(function, ...)` calls `function(ranks, ...)` on both."""
    pair = Pair()
    yield pair
    pair.close()


@dataclass(frozen=True)
class Run:
    """What a run directory says, without what depends on the clock or on being interrupted:
    `time/*`, `memory/*`, `rollout/*`, and the events `resume` and `checkpoint`."""

    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any]


def _read_run(path: Path) -> Run:
    lines = [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "memory/", "rollout/"))
        }
        for line in read_lines(path / "metrics.jsonl")
    ]
    events = [
        event
        for event in read_lines(path / "events.jsonl")
        if event["event"] not in ("resume", "checkpoint")
    ]
    return Run(lines, events, json.loads((path / "summary.json").read_text()))


@pytest.fixture(scope="session")
def read_run() -> Callable[[Path], Run]:
    return _read_run


@pytest.fixture(scope="session")
def build(tiny_run: list[str]) -> Callable[..., Trainer]:
    """`build(out, "key=value", ...)`: a trainer for a new tiny run in `out`, or for the one that
    is already there. Close its `run` after use."""

    def build(out: Path, *overrides: str) -> Trainer:
        if (out / "config.yaml").exists():
            return build_trainer(stored_config(out, list(overrides)), out, Reporter())
        config = load_config("lab", [*tiny_run, f"out={out}", *overrides])
        return build_trainer(config, None, Reporter())

    return build


@pytest.fixture(scope="session")
def train(build: Callable[..., Trainer]) -> Callable[..., Run]:
    """`train(out, "key=value", ...)`: start a tiny run in `out`, or resume the one there."""

    def train(out: Path, *overrides: str) -> Run:
        trainer = build(out, *overrides)
        try:
            trainer.train()
        finally:
            trainer.run.close()
        return _read_run(out)

    return train


@pytest.fixture(scope="session")
def finished(train: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory to look at, not to touch."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(out, "steps=2")
    return out


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`cli("train", "steps=3")` as on the command line, in this process."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sodfast", *arguments])
        terminate = signal.getsignal(signal.SIGTERM)
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, terminate)
        return Outcome(code, *capsys.readouterr())

    return run
