"""Two ranks do what one does: the same metrics up to rounding, from and to the same checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SCHEDULES
from hypothesis import given
from hypothesis import strategies as st
from pair import Pair
from safetensors.torch import load_file
from torch import Tensor

from sodfast import student as student_module
from sodfast.commands import build_trainer, export_model
from sodfast.config import load_config
from sodfast.errors import Interrupted, RunFailed, UsageError
from sodfast.files import read_lines
from sodfast.parallel.ranks import Ranks, join
from sodfast.run.console import Reporter
from sodfast.run.directory import stored_config
from sodfast.run.interrupt import Interruption
from sodfast.run.samples import read_samples, sampled_steps
from sodfast.trainer import Trainer

Read = Callable[[Path], Any]

STEPS = 5


@pytest.fixture(scope="module")
def settings(tiny_run: list[str]) -> list[str]:
    # On some processors' rounding an evaluation of so few answers finds none right: no collapse.
    never = ["collapse.eval_floor=0.0", "collapse.eval_fraction=0.0"]
    kept = ["eval.samples=1", "log.samples_every=1"]
    return [*tiny_run, "optimizer.updates_per_step=2", f"steps={STEPS}", *kept, *never]


@pytest.fixture(scope="module")
def runs(
    pair: Pair, settings: list[str], read_run: Read, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """The directories of a schedule's undisturbed runs by one rank and by two."""
    done: dict[str, tuple[Path, Path]] = {}

    def runs(kind: str) -> tuple[Path, Path]:
        if kind not in done:
            base = tmp_path_factory.mktemp(kind)
            overrides = [*settings, *SCHEDULES[kind]]
            assert train(Ranks(), base / "one", overrides) == "done"
            assert pair(train, base / "two", overrides) == ["done", "done"]
            done[kind] = base / "one", base / "two"
        return done[kind]

    return runs


def build(ranks: Ranks, out: Path, overrides: list[str]) -> Trainer:
    """A trainer for a new run in `out`, or for the one that is already there."""
    if ranks.gather((out / "config.yaml").exists())[0]:
        return build_trainer(stored_config(out, overrides), out, Reporter(), ranks)
    return build_trainer(load_config("lab", [*overrides, f"out={out}"]), None, Reporter(), ranks)


def train(ranks: Ranks, out: Path, overrides: list[str]) -> str:
    trainer = build(ranks, out, overrides)
    try:
        return trainer.train()
    finally:
        trainer.run.close()


def close(one: Any, other: Any) -> bool:
    """Whether two records differ by rounding only."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float):
        return one == pytest.approx(other, rel=1e-4, abs=1e-6)
    return one == other


def same_run(read_run: Read, one: Path, other: Path) -> bool:
    left, right = read_run(one), read_run(other)
    return (
        close(left.lines, right.lines)
        and close(left.events, right.events)
        and close(left.summary, right.summary)
    )


def tensors(out: Path, step: int = STEPS) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by file and name."""
    found = {}
    for file in sorted((out / "checkpoints" / f"step-{step}").rglob("*.safetensors")):
        found |= {f"{file.name}:{name}": tensor for name, tensor in load_file(file).items()}
    return found


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("kind", SCHEDULES)
def test_two_ranks_train_as_one_does(
    runs: Callable[[str], tuple[Path, Path]], read_run: Read, kind: str
) -> None:
    """Metrics, decisions and checkpoints, over steps of two updates each."""
    one, two = runs(kind)
    assert same_run(read_run, one, two)
    left, right = tensors(one), tensors(two)
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[n], right[n], rtol=1e-3, atol=1e-5) for n in left)
    if kind in ("hard", "cgtr", "evidence"):
        assert read_run(two).summary["refresh_steps"]
    else:
        assert any(name.startswith("teacher") for name in right)


def test_two_ranks_keep_the_answers_of_one(
    runs: Callable[[str], tuple[Path, Path]], read_run: Read
) -> None:
    """Each has trained on a part of the rollouts; the divergences of all are in the file."""
    one, two = runs("hard")
    for evaluation in (False, True):
        steps = sampled_steps(one, evaluation)
        assert steps == sampled_steps(two, evaluation) and STEPS in steps
        for step in steps:
            rows = read_samples(one, step, evaluation)
            assert close(rows, read_samples(two, step, evaluation))
    distilled = [
        any(row["divergence"] for row in read_samples(two, step)) for step in range(1, STEPS + 1)
    ]
    lines = read_run(two).lines[1:]
    assert any(distilled) and distilled == ["distill/divergence" in line for line in lines]


@pytest.mark.parametrize(("first", "kind"), [(1, "ema"), (2, "cgtr")])
def test_a_checkpoint_moves_between_one_rank_and_two(
    pair: Pair,
    settings: list[str],
    runs: Callable[[str], tuple[Path, Path]],
    read_run: Read,
    tmp_path: Path,
    first: int,
    kind: str,
) -> None:
    out = tmp_path / "run"
    halves = [*settings, *SCHEDULES[kind], "steps=3"], [f"steps={STEPS}"]
    for overrides, ranks in zip(halves, (first, 3 - first), strict=True):
        if ranks == 1:
            train(Ranks(), out, overrides)
        else:
            pair(train, out, overrides)
    assert same_run(read_run, out, runs(kind)[0])


def test_two_ranks_resumed_are_the_run_that_never_stopped(
    pair: Pair,
    settings: list[str],
    runs: Callable[[str], tuple[Path, Path]],
    read_run: Read,
    tmp_path: Path,
) -> None:
    """Bit for bit, like one rank."""
    out, kind = tmp_path / "run", "ema"
    pair(train, out, [*settings, *SCHEDULES[kind], "steps=2"])
    pair(train, out, [f"steps={STEPS}"])
    assert read_run(out) == read_run(runs(kind)[1])


@pytest.mark.parametrize("kind", ["hard", "trust_region"])
def test_drafts_change_nothing_on_two_ranks(
    pair: Pair, settings: list[str], wide_model: Path, read_run: Read, tmp_path: Path, kind: str
) -> None:
    """Bit for bit, also in a run that is stopped, whose ranks then remember no answers."""
    overrides = [*settings, *SCHEDULES[kind], f"model.path={wide_model}"]
    parts = {"off": ("off", [STEPS]), "on": ("7", [STEPS]), "cut": ("7", [1, 3, STEPS])}
    for name, (setting, ends) in parts.items():
        first, *others = ends
        pair(train, tmp_path / name, [*overrides, f"rollout.speculate={setting}", f"steps={first}"])
        for end in others:
            pair(train, tmp_path / name, [f"steps={end}"])
        passes = read_lines(tmp_path / name / "metrics.jsonl")[-1]["rollout/tokens_per_pass"]
        assert (passes > 1) == (setting != "off")
    plain, stored = read_run(tmp_path / "off"), tensors(tmp_path / "off")
    for name in ("on", "cut"):
        assert read_run(tmp_path / name) == plain
        found = tensors(tmp_path / name)
        assert found.keys() == stored.keys()
        assert all(tensor.equal(stored[key]) for key, tensor in found.items())
        for step in range(1, STEPS + 1):
            assert read_samples(tmp_path / name, step) == read_samples(tmp_path / "off", step)


def test_an_exported_model_is_the_one_of_one_rank(
    runs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    loaded = []
    for name, run in zip(("one", "two"), runs("fixed"), strict=True):
        export_model(run, tmp_path / name)
        loaded.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    ids = torch.arange(8)[None]
    one, two = (network(ids).logits for network in loaded)
    assert type(loaded[0]) is type(loaded[1])
    assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)


def test_an_odd_update_leaves_a_rank_idle(
    pair: Pair, settings: list[str], read_run: Read, tmp_path: Path
) -> None:
    """Three updates of one rollout each: the second rank has none to train on."""
    overrides = [
        *settings,
        "rollout.prompts_per_step=3",
        "rollout.samples_per_prompt=1",
        "optimizer.updates_per_step=3",
        "teacher.context=none",
        "schedule.kind=ema",
        "steps=3",
    ]
    train(Ranks(), tmp_path / "one", overrides)
    pair(train, tmp_path / "two", overrides)
    assert same_run(read_run, tmp_path / "one", tmp_path / "two")


def test_unequal_micro_batches_an_untied_head_and_a_teacher_on_the_host(
    pair: Pair, settings: list[str], untied_model: Path, read_run: Read, tmp_path: Path
) -> None:
    """Also recomputed layers, and rollouts by transformers' own forward."""
    overrides = [
        *settings,
        f"model.path={untied_model}",
        "model.gradient_checkpointing=true",
        "optimizer.micro_batch_tokens=30",
        "rollout.engine=hf",
        "teacher.storage=host",
        "schedule.kind=ema",
        "objective.reduction=token_mean",
        "steps=3",
    ]
    train(Ranks(), tmp_path / "one", overrides)
    pair(train, tmp_path / "two", overrides)
    assert same_run(read_run, tmp_path / "one", tmp_path / "two")


@pytest.fixture(scope="module")
def untied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False)
    network.lm_head.weight = torch.nn.Parameter(
        network.get_input_embeddings().weight.detach() * 1.01
    )
    path = tmp_path_factory.mktemp("untied")
    network.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


def test_16_bit_weights_and_8_bit_moments_move_between_rank_counts(
    pair: Pair, settings: list[str], read_run: Read, tmp_path: Path
) -> None:
    """Their blocks are never cut. The numbers agree as far as bf16 gradients do."""
    overrides = [*settings, "model.dtype=bfloat16", "schedule.kind=ema", "steps=2"]
    train(Ranks(), tmp_path / "one", overrides)
    pair(train, tmp_path / "two", overrides)
    one, two = tensors(tmp_path / "one", 2), tensors(tmp_path / "two", 2)
    assert any(name.endswith("exp_avg_exponent") for name in one)
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {
        n: (t.shape, t.dtype) for n, t in two.items()
    }
    first, second = (read_run(tmp_path / name).lines for name in ("one", "two"))
    assert first[0] == second[0]
    assert first[1]["optim/grad_norm"] == pytest.approx(second[1]["optim/grad_norm"], rel=0.02)
    train(Ranks(), tmp_path / "two", ["steps=3"])
    assert read_run(tmp_path / "two").summary["steps"] == 3


# ---------------------------------------------------------------- ends


def fail(ranks: Ranks, out: Path, overrides: list[str], what: str) -> str:
    """A run in which something happens to one rank only, in its second step; how it ends here."""
    trainer = build(ranks, out, overrides)
    engine = trainer.engine.engine  # type: ignore[attr-defined]
    generate, batch_loss = engine.generate, student_module.micro_batch_loss

    def broken_generate(*arguments: Any) -> Any:
        if what == "engine" and trainer.step == 1:
            raise RunFailed("the model's logits are not finite")
        if what == "signal" and trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*arguments)

    def broken_loss(*arguments: Any) -> Any:
        output = batch_loss(*arguments)
        return output._replace(loss=output.loss * (torch.nan if trainer.step == 1 else 1.0))

    append = trainer.run.append

    def broken_append(file: Path, line: dict[str, Any]) -> None:
        if what == "disk" and line["step"] == 2:
            raise RunFailed("no space")
        append(file, line)

    if ranks.main:  # which alone writes
        trainer.run.append = broken_append  # type: ignore[method-assign]
    else:
        engine.generate = broken_generate
        if what == "nan":
            student_module.micro_batch_loss = broken_loss
    try:
        return trainer.train()
    except RunFailed as error:
        return str(error)
    finally:
        student_module.micro_batch_loss = batch_loss
        trainer.run.close()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "step 2: loss nan, gradient norm nan: the update was not made"),
        ("engine", "step 2: the model's logits are not finite"),
        ("disk", "step 2: no space"),
        ("signal", "interrupted"),
    ],
)
def test_what_happens_to_one_rank_ends_both_and_leaves_an_earlier_step(
    pair: Pair,
    settings: list[str],
    runs: Callable[[str], tuple[Path, Path]],
    read_run: Read,
    tmp_path: Path,
    what: str,
    message: str,
) -> None:
    out = tmp_path / "run"
    assert pair(fail, out, [*settings, *SCHEDULES["ema"]], what) == [message, message]
    summary = read_run(out).summary
    assert summary["status"] == ("interrupted" if what == "signal" else "failed")
    saved = 0 if what == "disk" else 1  # the second step's update was already made
    assert (out / "checkpoints" / f"step-{saved}").is_dir()
    pair(train, out, [f"steps={STEPS}"])
    assert read_run(out) == read_run(runs("ema")[1])


def refused(ranks: Ranks, out: Path, overrides: list[str]) -> str:
    with pytest.raises(UsageError) as error:
        build(ranks, out, overrides)
    return str(error.value)


def test_what_cannot_run_is_refused_on_both_ranks(
    pair: Pair, settings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")  # only rank 0 looks at it
    for message in pair(refused, tmp_path / "file", settings):
        assert "is a file" in message
    for message in pair(refused, tmp_path / "run", [*settings, "rollout.engine=vllm"]):
        assert "rollout.engine=vllm runs in one process" in message
    for message in pair(refused, tmp_path / "run", [*settings, "model.lora={}"]):
        assert "model.lora runs in one process" in message
    assert not (tmp_path / "run").exists()


def together(ranks: Ranks) -> str:
    try:
        with ranks.together():
            if ranks.rank == 1:
                raise UsageError("only here")
    except UsageError as error:
        return str(error)
    return "nothing"


def boundary(ranks: Ranks, signalled: int) -> bool:
    with Interruption(ranks.any) as interruption:
        if ranks.rank == signalled:
            os.kill(os.getpid(), signal.SIGINT)
        try:
            interruption.boundary()
        except Interrupted:
            return True
    return False


def test_errors_and_signals_are_shared(pair: Pair) -> None:
    assert pair(together) == ["only here", "only here"]
    assert pair(boundary, 0) == pair(boundary, 1) == [True, True]
    assert pair(boundary, 2) == [False, False]


SCRIPT = """
import os
from sodfast import student
from sodfast.cli import main

if os.environ["RANK"] == os.environ.get("BREAKS"):
    whole = student.micro_batch_loss
    def broken(*arguments):
        output = whole(*arguments)
        return output._replace(loss=output.loss * float("nan"))
    student.micro_batch_loss = broken
main()
"""


def torchrun(tmp_path: Path, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "--master-port", "0", "--standalone", str(script), "train", *arguments],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.exhaustive
def test_a_nan_on_one_rank_ends_torchrun_with_one_message(
    settings: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = torchrun(tmp_path, *settings, f"out={out}", BREAKS="1")
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    messages = [line for line in errors.splitlines() if line.startswith("sodfast: ")]
    assert messages == ["sodfast: step 1: loss nan, gradient norm nan: the update was not made"]
    assert printed.count("2 × cpu") == 1  # rank 0 alone speaks
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    assert json.loads((out / "environment.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_torchrun_forwards_a_signal_and_the_run_resumes(
    settings: list[str], read_run: Read, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = torchrun(tmp_path, *settings, f"out={out}", "steps=1000", "eval.every=1000")
    deadline = time.monotonic() + 120
    while len(read_lines(out / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    lines = read_run(out).lines
    assert read_run(out).summary["status"] == "interrupted"
    last = lines[-1]["step"]
    assert 2 <= last < 1000 and (out / "checkpoints" / f"step-{last}").is_dir()
    train(Ranks(), out, [f"steps={last + 1}"])
    assert read_run(out).lines[: last + 1] == lines


# ---------------------------------------------------------------- shares


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 7))
def test_shares_and_deals_are_all_of_it(lengths: list[int], size: int) -> None:
    ranks = [Ranks(rank, size) for rank in range(size)]
    assert [item for rank in ranks for item in rank.share(lengths)] == lengths
    assert max(len(r.share(lengths)) for r in ranks) - min(len(r.share(lengths)) for r in ranks) < 2
    dealt = ranks[0].deal(lengths)
    assert all(rank.deal(lengths) == dealt for rank in ranks) and len(dealt) == size
    assert sorted(index for hand in dealt for index in hand) == list(range(len(lengths)))
    assert max(map(len, dealt)) - min(map(len, dealt)) < 2
    sums = [sum(lengths[index] for index in hand) for hand in dealt]
    assert max(sums) - min(sums) <= max(lengths, default=0)


def test_one_rank_says_nothing() -> None:
    alone = Ranks()
    value, tensor = object(), torch.ones(2)
    assert alone.gather(value) == [value] and alone.sum(tensor) is tensor and alone.main
    assert not alone.any(False) and alone.any(True)
    with pytest.raises(RunFailed, match="own"), alone.together():
        raise RunFailed("own")
    assert alone.deal([1, 3, 2]) == [[0, 1, 2]]


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "zero"}])
def test_variables_that_are_not_torchruns_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="start it by torchrun"), join():
        raise AssertionError
