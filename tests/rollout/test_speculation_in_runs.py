"""Drafts change no number of a run but times, memory and `rollout/*`, bit for bit: metrics, events,
summary, every kept answer and all that the last checkpoint holds.

Two ranks: tests/parallel/test_ranks.py. Single calls (stop strings, caps, an EOS within a draft,
refills, adapters, 1 to 1,024 rows): test_speculation.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SCHEDULES, Command
from marks import exhaustive

from sodfast.commands import train_fork
from sodfast.files import read_lines
from sodfast.rollout.cache import Cache, up_to_step

pytestmark = pytest.mark.slow

Train = Callable[..., Any]
Read = Callable[[Path], Any]
STEPS = 7
SETTINGS = ["task.train=12", f"steps={STEPS}", "checkpoint.every=1", "log.samples_every=1"]
OFF, ON = "rollout.speculate=off", "rollout.speculate=7"
MANY = "rollout.samples_per_prompt=12"


@pytest.fixture(scope="module")
def settings(wide_model: Path) -> list[str]:
    return [*SETTINGS, f"model.path={wide_model}"]


@pytest.fixture
def same(read_run: Read) -> Callable[[Path, Path], bool]:
    """Whether two runs have the same numbers, and the first one's drafts saved it passes."""

    def same(drafted: Path, plain: Path) -> bool:
        assert drafts_held(drafted) and not drafts_held(plain)
        return (
            read_run(drafted) == read_run(plain)
            and checkpoint(drafted) == checkpoint(plain)
            and answers(drafted) == answers(plain)
        )

    return same


def drafts_held(out: Path) -> bool:
    """Whether rows got more than one token from a pass of the last rollout."""
    return read_lines(out / "metrics.jsonl")[-1]["rollout/tokens_per_pass"] > 1.0


def checkpoint(out: Path) -> dict[str, bytes]:
    """The last one's files by their names."""
    last = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(last.rglob("*.safetensors"))
    } | {"state": json.dumps(json.loads((last / "state.json").read_text())).encode()}


def answers(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The kept answers by their files."""
    return {path.name: read_lines(path) for path in sorted((out / "samples").glob("*.jsonl"))}


@pytest.mark.parametrize(
    "kind", ["trust_region", "evidence", *exhaustive("fixed", "hard", "ema", "cgtr")]
)
def test_a_run_and_one_that_is_stopped_after_every_step(
    kind: str, train: Train, same: Callable[..., bool], settings: list[str], tmp_path: Path
) -> None:
    """A resumed run remembers no answers, so that its first drafts are others than those of the run
    that never stopped."""
    off, on, cut = (tmp_path / name for name in ("off", "on", "cut"))
    train(off, *settings, *SCHEDULES[kind], OFF)
    train(on, *settings, *SCHEDULES[kind], ON)
    train(cut, *settings, *SCHEDULES[kind], ON, "steps=1")
    for step in range(2, STEPS + 1):
        assert len(train(cut, f"steps={step}").lines) == step + 1
    assert len(answers(off)) >= STEPS
    assert same(on, off)
    assert same(cut, off)


def test_a_run_that_drafts_as_many_as_pay(
    train: Train, same: Callable[..., bool], settings: list[str], tmp_path: Path
) -> None:
    """How many drafts `auto` takes depends on the clock."""
    train(tmp_path / "off", *settings, OFF)
    train(tmp_path / "on", *settings, "rollout.speculate=auto")
    assert same(tmp_path / "on", tmp_path / "off")


def test_a_run_with_adapters(
    train: Train, same: Callable[..., bool], settings: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="needs peft (pip install 'sodfast[lora]')")
    for name, setting in (("off", OFF), ("on", ON)):
        train(tmp_path / name, *settings, "model.lora.rank=4", setting)
    assert same(tmp_path / "on", tmp_path / "off")


def test_a_run_whose_cache_holds_few_of_the_rows(
    train: Train,
    build: Callable[..., Any],
    same: Callable[..., bool],
    settings: list[str],
    tmp_path: Path,
) -> None:
    """Sixteen rows, the least of a CPU, for more samples in a step: the others wait for a row."""
    trainer = build(tmp_path / "size", *settings, MANY)
    trainer.run.close()
    rollout, network = trainer.config.rollout, trainer.model.network
    assert rollout.prompts_per_step * rollout.samples_per_prompt > 16
    positions = up_to_step(trainer.data.longest + rollout.max_new_tokens)
    gib = 16.5 * positions * Cache.bytes_per_token(network) / 2**30
    for name, setting in (("off", OFF), ("on", ON)):
        train(tmp_path / name, *settings, MANY, f"rollout.cache_gib={gib}", setting)
    assert same(tmp_path / "on", tmp_path / "off")


@pytest.mark.parametrize("kind", ["hard", "trust_region"])
def test_a_fork_with_drafts_goes_on_as_its_source_does_without(
    kind: str,
    train: Train,
    same: Callable[..., bool],
    read_run: Read,
    settings: list[str],
    tmp_path: Path,
) -> None:
    """Whether its source had drafts or not: what they were looked up in is no part of a
    checkpoint."""
    for name, setting in (("off", OFF), ("on", ON)):
        train(tmp_path / name, *settings, *SCHEDULES[kind], setting, "checkpoint.keep=9")
        for fork, own in (("plain", OFF), ("drafted", ON)):
            out = tmp_path / f"{name}-{fork}"
            train_fork(tmp_path / name, [f"out={out}", "step=3", "seed=5", own])
        assert same(tmp_path / f"{name}-drafted", tmp_path / f"{name}-plain")
    off, on = (read_run(tmp_path / f"{name}-plain") for name in ("off", "on"))
    assert on.lines == off.lines  # the events name the source
    assert checkpoint(tmp_path / "on-plain") == checkpoint(tmp_path / "off-plain")


def test_the_command_eval(train: Train, cli: Command, settings: list[str], tmp_path: Path) -> None:
    """It remembers nothing of the run: its drafts are what the other answers of the call say."""
    train(tmp_path / "run", *settings, ON, "steps=2")
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    expected = {k: v for k, v in last.items() if k == "step" or k.startswith("eval/")}
    for setting in (OFF, ON, "rollout.speculate=auto"):
        outcome = cli("eval", str(tmp_path / "run"), setting)
        assert outcome.code == 0
        assert json.loads(outcome.out.splitlines()[-1]) == expected
