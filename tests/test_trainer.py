"""Whole short runs: what they write, what they depend on, and how they end."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SCHEDULES
from marks import slow
from transformers import AutoModelForCausalLM

from sodfast.commands import build_trainer, evaluate_model, export_model
from sodfast.config import load_config
from sodfast.errors import Interrupted, RunFailed, UsageError
from sodfast.files import read_lines
from sodfast.model.language_model import decoder_layers
from sodfast.run import checkpoint
from sodfast.run.console import Reporter
from sodfast.schedule import PROBE_KEYS
from sodfast.trainer import Trainer

Line = Mapping[str, Any]
Train = Callable[..., Any]
Build = Callable[..., Trainer]

EVALUATION = {f"eval/{name}" for name in ("mean@2", "best@1", "best@2", "maj@1", "maj@2")}
STEP = {
    "step",
    "reward/mean",
    "reward/success_group_fraction",
    "length/mean",
    "length/max",
    "length/tail_ratio",
    "length/capped_fraction",
    "distill/divergence",
    "distill/reprompt_fraction",
    "policy/entropy",
    "policy/ratio_mean",
    "optim/grad_norm",
    "optim/lr",
    "teacher/drift",
    "memory/peak_bytes",
    "rollout/tokens_per_pass",
}
COPIES = {"teacher/age", "teacher/refreshed"}
GATES = {"gate/reward_window", "gate/tail_window"}
# At every second step, except for what has no question yet while the teacher equals the student.
PROBE = {*PROBE_KEYS, "probe/candidate_reward", "probe/incumbent_reward", "probe/tokens"}
EVIDENCE = {"gate/gain_z", "gate/length_ratio", "gate/tail_growth"}
COPYING = ("hard", "cgtr", "evidence")  # at steps 2 and 4
DTYPES = ["float32", "bfloat16"]
# Beyond what other programs rely on.
OURS = {"optim/loss", "policy/clip_fraction", "reward/snr"} | {
    f"policy/sampler_ratio_{name}" for name in ("mean", "min", "max")
}


@pytest.fixture(scope="session")
def runs(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A run with the given overrides, once per session."""
    done: dict[tuple[str, ...], Any] = {}

    def run(*overrides: str) -> Any:
        if overrides not in done:
            done[overrides] = train(tmp_path_factory.mktemp("runs") / "run", *overrides)
        return done[overrides]

    return run


def without_evaluation(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines]


def assert_close(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------- what a run writes


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cgtr", "float32"),
        *slow(("cgtr", "bfloat16"), *((k, "float32") for k in SCHEDULES if k != "cgtr")),
    ],
)
def test_the_lines_hold_the_keys_of_their_schedule(
    train: Train, tmp_path: Path, kind: str, dtype: str
) -> None:
    out = tmp_path / "run"
    train(out, *SCHEDULES[kind], f"model.dtype={dtype}", "steps=5")
    lines = read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    evaluation = EVALUATION | {"rollout/eval_tokens_per_pass"}
    assert lines[0].keys() == {"step", "time/eval"} | evaluation
    for line in lines[1:]:
        step = line["step"]
        expected = set(STEP)
        expected |= evaluation if step in (4, 5) else set()
        expected |= COPIES if kind in ("fixed", *COPYING) else set()
        expected |= GATES if kind == "cgtr" and step % 2 == 0 else set()
        if kind == "evidence" and step % 2 == 0:
            expected |= PROBE | EVIDENCE if step == 4 else PROBE | EVIDENCE - {"gate/tail_growth"}
        clock = {key for key in line if key.startswith("time/")}
        assert clock >= {"time/rollout", "time/teacher", "time/train", "time/step"}
        assert ("time/probe" in clock) == (kind == "evidence" and step % 2 == 0)
        assert line.keys() - clock - OURS == expected
        assert all(math.isfinite(value) for value in line.values())
        assert line["teacher/drift"] > 0

    refreshed = [line["step"] for line in lines if line.get("teacher/refreshed")]
    assert refreshed == ([2, 4] if kind in COPYING else [])
    if kind in COPYING:
        assert [line["teacher/age"] for line in lines[1:]] == [1, 2, 1, 2, 1]
    if kind == "fixed":
        assert [line["teacher/age"] for line in lines[1:]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["cgtr", *slow(*(k for k in SCHEDULES if k != "cgtr"))])
def test_the_summary_follows_from_the_lines(runs: Train, kind: str) -> None:
    run = runs(*SCHEDULES[kind], "steps=5")
    values = {line["step"]: line["eval/mean@2"] for line in run.lines if "eval/mean@2" in line}
    entropies = [line["policy/entropy"] for line in run.lines[1:]]
    summary = run.summary
    assert summary["status"] == "done" and summary["collapse_step"] is None
    assert summary["steps"] == 5 and summary["seed"] == 0 and summary["schedule"] == kind
    assert summary["final"] == values[5]
    assert summary["peak"] == max(values.values()) == values[summary["peak_step"]]
    assert summary["entropy_mean"] == pytest.approx(sum(entropies) / 5)
    assert summary["entropy_final"] == entropies[-1]
    assert summary["refresh_steps"] == ([2, 4] if kind in COPYING else [])


@pytest.mark.slow
def test_every_schedule_starts_with_the_same_step(runs: Train) -> None:
    """At step 1 every teacher is the student; only later do they part."""
    first, later = [], []
    for overrides in SCHEDULES.values():
        lines = without_evaluation(runs(*overrides, "steps=5").lines)
        first.append({k: v for k, v in lines[1].items() if not k.startswith("teacher/")})
        later.append(lines[5]["distill/divergence"])
    assert all(line == first[0] for line in first)
    assert len(set(later)) == len(SCHEDULES) - 2  # three refreshed at the same steps


def test_decisions_can_be_recomputed_from_the_metrics(runs: Train) -> None:
    margin, limit, window, isolation = 0.02, 1.6, 3, 2
    run = runs(
        f"schedule.reward_margin={margin}",
        f"schedule.max_tail_ratio={limit}",
        f"schedule.window={window}",
        f"schedule.min_isolation={isolation}",
        "schedule.check_every=1",
        "steps=12",
    )
    gates = {event["step"]: event for event in run.events if event["event"] == "gate"}
    refreshes = {event["step"]: event for event in run.events if event["event"] == "refresh"}
    assert sorted(gates) == list(range(1, 13))
    last, bar = 0, None
    verdicts = set()
    for line in run.lines[1:]:
        step = line["step"]
        recent = run.lines[max(1, step - window + 1) : step + 1]
        reward = math.fsum(x["reward/mean"] for x in recent) / len(recent)
        mean = math.fsum(x["length/mean"] for x in recent) / len(recent)
        tail = max(x["length/max"] for x in recent) / mean
        if step == window:
            bar = reward
        passes = (
            step - last >= isolation,
            bar is not None and reward > bar + margin,
            tail <= limit,
        )
        event = gates[step]["gates"]
        assert line["gate/reward_window"] == event["reward"]["value"] == reward
        assert line["gate/tail_window"] == event["length"]["value"] == tail
        assert tuple(event[name]["pass"] for name in ("isolation", "reward", "length")) == passes
        assert gates[step]["refresh"] == all(passes) == bool(line["teacher/refreshed"])
        assert (step in refreshes) == all(passes)
        if all(passes):
            assert refreshes[step]["shock"] == line["teacher/drift"]
            last, bar = step, reward
        verdicts.add(passes)
    assert run.summary["refresh_steps"] == sorted(refreshes)
    assert refreshes and len(verdicts) > 2  # the run has seen gates open and blocked


def test_shards_are_logged_where_the_gate_reads_them(runs: Train) -> None:
    run = runs(
        "schedule.length_unit=shard", "schedule.shards=2", "schedule.check_every=1", "steps=2"
    )
    for line in run.lines[1:]:
        assert line["length/shard_mean"] == pytest.approx(8 * line["length/mean"])
    recent = run.lines[1:]
    tail = max(x["length/shard_max"] for x in recent) / (
        sum(x["length/shard_mean"] for x in recent) / 2
    )
    assert run.lines[2]["gate/tail_window"] == pytest.approx(tail)


@pytest.mark.slow
def test_a_question_visited_again_has_a_gain(runs: Train) -> None:
    run = runs("task.train=8", "steps=6")
    assert not any("reward/snr" in line for line in run.lines[:3])
    assert any("reward/snr" in line for line in run.lines[3:])


# ---------------------------------------------------------------- what is switched off


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["false", "true"])
def test_a_run_without_evaluation_and_checkpoints(
    train: Train, runs: Train, tmp_path: Path, stop: str
) -> None:
    """It ends properly, with the numbers of another; resumed, it starts over and ends likewise."""
    out = tmp_path / "run"
    off = ("eval.every=0", "checkpoint.every=0", f"collapse.stop={stop}", "steps=5")
    found = train(out, *off)
    assert found.summary["status"] == "done" and found.summary["steps"] == 5
    assert not found.summary.keys() & {"final", "peak", "peak_step"}
    assert found.lines == without_evaluation(runs("steps=5").lines)
    assert found.lines[0] == {"step": 0}
    assert checkpoint.steps(out / "checkpoints") == []
    assert not [
        event for event in read_lines(out / "events.jsonl") if event["event"] == "checkpoint"
    ]
    assert train(out) == found
    with pytest.raises(UsageError, match="no checkpoint"):
        export_model(out, tmp_path / "model")


@pytest.mark.slow
def test_a_run_without_evaluation_is_continued(train: Train, runs: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, "eval.every=0", "steps=3")
    assert checkpoint.steps(out / "checkpoints") == [0, 3]
    found = train(out, "steps=5")
    assert found.lines == without_evaluation(runs("steps=5").lines)
    assert train(out) == found


def test_an_interrupted_run_without_checkpoints_saves_nothing(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    trainer = build(out, "checkpoint.every=0")
    said: list[str] = []

    def interrupt(*arguments: Any) -> Any:
        raise Interrupted

    monkeypatch.setattr(trainer.reporter, "message", said.append)
    monkeypatch.setattr(trainer.teacher, "score", interrupt)
    assert trainer.train() == "interrupted"
    trainer.run.close()
    assert said == ["interrupted: not saved"]
    assert checkpoint.steps(out / "checkpoints") == []
    resumed = build(out)
    assert resumed.step == 0 and not (out / "metrics.jsonl").exists()
    resumed.run.close()


def test_a_run_says_which_attention_it_takes(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter, said = Reporter(), list[str]()
    monkeypatch.setattr(reporter, "message", said.append)
    config = load_config("lab", [*tiny_run, f"out={tmp_path / 'run'}", "device=cpu"])
    build_trainer(config, None, reporter).run.close()
    (line,) = [text for text in said if text.startswith("attention: ")]
    assert line == "attention: sdpa over packed sequences, products in decoding"


# ---------------------------------------------------------------- what a run depends on


@pytest.mark.parametrize(
    "overrides",
    [
        ("eval.samples=1", "eval.temperature=2.0"),
        *(
            pytest.param(overrides, marks=pytest.mark.slow)
            for overrides in (
                ("eval.every=1", "checkpoint.every=1", "checkpoint.keep=1"),
                ("eval.every=99", "checkpoint.every=99", "log.sinks=[tensorboard]"),
            )
        ),
    ],
)
def test_evaluation_checkpoints_and_sinks_change_nothing(
    runs: Train, overrides: tuple[str, ...]
) -> None:
    if "log.sinks=[tensorboard]" in overrides:
        pytest.importorskip("tensorboard", reason="needs tensorboard")
    expected = without_evaluation(runs("steps=5").lines)
    assert without_evaluation(runs(*overrides, "steps=5").lines) == expected


def test_a_longer_run_starts_with_the_shorter_one(runs: Train) -> None:
    shorter = without_evaluation(runs("steps=3").lines)
    assert without_evaluation(runs("steps=5").lines)[:4] == shorter


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize(
    "cut",
    ["optimizer.micro_batch_tokens=1", "optimizer.micro_batch_tokens=70", "rollout.batch_size=3"],
)
def test_how_a_step_is_cut_changes_only_the_rounding(runs: Train, reduction: str, cut: str) -> None:
    whole = runs(f"objective.reduction={reduction}", "steps=3")
    assert_close(runs(f"objective.reduction={reduction}", "steps=3", cut).lines, whole.lines)


@pytest.mark.slow
def test_recomputed_layers_change_no_bit(runs: Train) -> None:
    assert runs("model.gradient_checkpointing=true") == runs()


@pytest.mark.slow
def test_layers_that_keep_their_activations_change_no_bit(runs: Train) -> None:
    assert runs("model.gradient_checkpointing=true", "model.kept_layers=1") == runs()


@pytest.mark.slow
def test_a_scoring_budget_of_its_own(runs: Train) -> None:
    """That of training changes no bit, another one the rounding at most."""
    same = ["optimizer.micro_batch_tokens=70", "teacher.storage=host", "steps=3"]
    cut = runs(*same)
    assert runs(*same, "teacher.micro_batch_tokens=70") == cut
    assert_close(runs(*same, "teacher.micro_batch_tokens=9000").lines, cut.lines)


@pytest.mark.parametrize(("tokens", "passes"), [("null", 3), ("100000", 1)])
def test_a_streamed_teacher_passes_by_once_a_scoring_budget(
    build: Build, tmp_path: Path, tokens: str, passes: int
) -> None:
    longest = "optimizer.micro_batch_tokens=1"  # each sequence alone
    trainer = build(
        tmp_path / "run",
        "teacher.storage=host",
        "teacher.context=none",
        longest,
        f"teacher.micro_batch_tokens={tokens}",
        "rollout.prompts_per_step=1",
        "rollout.samples_per_prompt=3",
    )
    trainer.teacher.prepare_update()
    rollouts = trainer._rollout(1)
    seen: list[int] = []
    layer = decoder_layers(trainer.teacher.network)[0]
    layer.mlp.register_forward_pre_hook(lambda *_: seen.append(1))  # type: ignore[union-attr,operator]
    updates = trainer.student.plan(1, rollouts)
    trainer._score(rollouts, updates)
    trainer.run.close()
    assert len(seen) == passes


@pytest.mark.slow
def test_layers_are_recomputed_where_the_key_says_so(build: Build, tmp_path: Path) -> None:
    counts = []
    for recompute in ("false", "true"):
        run = build(tmp_path / recompute, "steps=1", f"model.gradient_checkpointing={recompute}")
        passes: list[int] = []
        layer = decoder_layers(run.model.network)[0]
        layer.mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))  # type: ignore[union-attr,operator]
        run.train()
        run.run.close()
        counts.append(len(passes))
    assert counts[1] > counts[0] > 0


@pytest.mark.slow
def test_noise_begins_at_its_step_and_none_changes_no_bit(runs: Train) -> None:
    plain = runs("steps=4").lines
    assert runs("steps=4", "task.label_noise={share: 0.0}").lines == plain
    later = runs("steps=4", "task.label_noise={share: 1.0, first: 3, last: 3}").lines
    assert later[:3] == plain[:3]
    key = "reward/mean"
    # The rollouts of step 3 are the same, and each of their rewards is the opposite one.
    assert later[3][key] == pytest.approx(1 - plain[3][key])
    assert later[3]["length/mean"] == plain[3]["length/mean"] and later[4] != plain[4]


@pytest.mark.slow
def test_a_later_phase_is_asked_from_its_step_on(build: Build, tmp_path: Path) -> None:
    plain = build(tmp_path / "plain", "task.train=40")
    trainer = build(tmp_path / "run", "task.train=40", "task.arrival={step: 3}")
    asked = {}
    for step in range(1, 30):
        asked[step] = {question.id for question in trainer._rollout(step).questions}
        if step == 4:  # as if all had been there from the start
            assert asked[step] == {question.id for question in plain._rollout(step).questions}
    for each in (plain, trainer):
        each.run.close()
    late = {question.id for question in trainer.data.train if question.arrival}
    assert late and not (asked[1] | asked[2]) & late
    assert set().union(*asked.values()) >= late


def test_the_seed_matters(runs: Train) -> None:
    assert runs("steps=3").lines[1] != runs("steps=3", "seed=1").lines[1]


# ---------------------------------------------------------------- 16-bit weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.adamw=fp32", "schedule.kind=ema"),
        ("optimizer.adamw=exact", "optimizer.updates_per_step=2"),
        ("rollout.engine=hf", "objective.top_k=5"),  # 8bit
    ],
)
def test_a_bf16_run_repeats_itself(
    train: Train, runs: Train, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    first = runs("model.dtype=bfloat16", *overrides, "steps=3")
    assert first.summary["status"] == "done"
    assert train(tmp_path / "run", "model.dtype=bfloat16", *overrides, "steps=3") == first


@pytest.mark.slow
def test_a_bf16_run_is_bf16_everywhere(build: Build, tmp_path: Path) -> None:
    """Weights, teacher, what is stored, exported and evaluated; rotary frequencies stay fp32."""
    out = tmp_path / "run"
    trainer = build(out, "model.dtype=bfloat16", "schedule.kind=ema", "steps=2")
    trainer.train()
    trainer.run.close()
    network, teacher = trainer.model.network, trainer.teacher.weights
    assert teacher is not None
    for module in (network, teacher):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    stored = checkpoint.load(newest)
    for tensors in (stored.student, stored.teacher):
        assert tensors is not None
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    moments = {v.dtype for k, v in stored.optimizer.items() if not k.endswith(".step")}
    assert moments == {torch.uint8}

    metrics = {k: v for k, v in trainer.lines[-1].items() if k.startswith("eval/")}
    assert evaluate_model(str(out), []) == {"step": 2, **metrics}
    export_model(out, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    for ours, theirs in zip(network.parameters(), exported.parameters(), strict=True):
        assert theirs.dtype == torch.bfloat16 and torch.equal(ours, theirs)


# ---------------------------------------------------------------- the objective's switches


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.top_k=5", "objective.add_tail=false"),
        ("teacher.context=none", "schedule.kind=ema"),
        *(
            pytest.param(overrides, marks=pytest.mark.slow)
            for overrides in (
                ("objective.alpha=0.0",),
                ("objective.alpha=1.0", "objective.ratio_cap=null"),
                ("objective.policy_coef=0.0",),
                ("objective.normalize_advantage=true",),
                ("rollout.temperature=0.7", "rollout.top_p=0.9"),
            )
        ),
    ],
)
def test_every_objective_trains(runs: Train, overrides: tuple[str, ...]) -> None:
    run = runs(*overrides, "steps=2")
    assert run.summary["status"] == "done"
    for line in run.lines[1:]:
        assert math.isfinite(line["optim/loss"]) and line["optim/grad_norm"] > 0
        first_none = overrides[0] == "teacher.context=none" and line["step"] == 1
        assert (line["distill/divergence"] > 0) != first_none


def test_without_distillation_no_divergence_is_reported(runs: Train) -> None:
    run = runs("objective.distill_coef=0.0", "steps=2")
    assert all("distill/divergence" not in line for line in run.lines)
    assert all(line["optim/grad_norm"] > 0 for line in run.lines[1:])
    assert all(0 < line["distill/reprompt_fraction"] <= 1 for line in run.lines[1:])


def test_merging_the_tail_can_only_lower_the_divergence(runs: Train) -> None:
    full, merged = runs("steps=3"), runs("objective.top_k=3", "steps=3")
    assert 0 < merged.lines[1]["distill/divergence"] < full.lines[1]["distill/divergence"]
    assert merged.lines[1]["reward/mean"] == full.lines[1]["reward/mean"]


def test_a_group_without_success_is_not_distilled(
    build: Build, read_run: Train, tmp_path: Path
) -> None:
    trainer = build(tmp_path / "run", "steps=1")
    trainer.task.score = lambda question, response: 0.0  # type: ignore[method-assign]
    trainer.train()
    trainer.run.close()
    line = read_run(tmp_path / "run").lines[1]
    assert line["distill/reprompt_fraction"] == line["optim/grad_norm"] == 0
    assert "distill/divergence" not in line and "policy/ratio_mean" not in line


@pytest.mark.parametrize(
    "cut", ["optimizer.micro_batch_tokens=1000", *slow("optimizer.micro_batch_tokens=1")]
)
def test_equal_weights_and_context_do_not_diverge(runs: Train, cut: str) -> None:
    run = runs("teacher.context=none", "schedule.kind=hard", "schedule.every=1", "steps=3", cut)
    for line in run.lines[1:]:
        assert line["distill/reprompt_fraction"] == 1
        assert abs(line["distill/divergence"]) <= 1e-9


def test_equal_weights_and_context_have_no_gradient(runs: Train) -> None:
    run = runs(
        "teacher.context=none",
        "schedule.kind=hard",
        "schedule.every=1",
        "objective.policy_coef=0.0",
        "steps=2",
    )
    assert all(line["optim/grad_norm"] <= 1e-7 for line in run.lines[1:])


@pytest.mark.slow
@pytest.mark.parametrize("updates", [2, 4])
def test_several_updates_per_step(runs: Train, updates: int) -> None:
    run = runs(f"optimizer.updates_per_step={updates}", "steps=3")
    one = runs("steps=3")
    assert run.summary["status"] == "done"
    assert run.lines[1]["reward/mean"] == one.lines[1]["reward/mean"]
    assert abs(one.lines[1]["policy/ratio_mean"] - 1) < 1e-6
    assert abs(run.lines[1]["policy/ratio_mean"] - 1) > 1e-5
    assert one.lines[1]["policy/clip_fraction"] == 0
    # Frozen weights: every rollout is used once, whatever part of the step it falls into.
    frozen = runs(f"optimizer.updates_per_step={updates}", "steps=2", "optimizer.lr=0.0")
    whole = runs("steps=2", "optimizer.lr=0.0")
    for key in ("distill/divergence", "policy/ratio_mean"):
        assert frozen.lines[2][key] == pytest.approx(whole.lines[2][key], rel=1e-5)
    assert frozen.lines[2]["teacher/drift"] == 0


# ---------------------------------------------------------------- how a run ends


@pytest.mark.parametrize("where", ["gradient", *slow("loss")])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("hard", "float32"), pytest.param("ema", "bfloat16", marks=pytest.mark.slow)],
)
def test_a_nan_names_its_step_and_the_last_good_state_is_saved(
    build: Build, train: Train, runs: Train, tmp_path: Path, where: str, kind: str, dtype: str
) -> None:
    overrides = [*SCHEDULES[kind], f"model.dtype={dtype}", "steps=5"]
    trainer = build(tmp_path / "run", *overrides, "checkpoint.every=99")
    accumulate = trainer.student._accumulate_gradients

    def poisoned(*arguments: Any) -> torch.Tensor:
        loss = accumulate(*arguments)
        if trainer.step + 1 < 3:
            return loss
        if where == "loss":
            return loss * torch.nan
        next(iter(trainer.model.network.parameters())).grad.view(-1)[7] = torch.nan
        return loss

    trainer.student._accumulate_gradients = poisoned  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match=r"^step 3: .*nan"):
        trainer.train()
    trainer.run.close()
    out = tmp_path / "run"
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    assert checkpoint.latest(out / "checkpoints") == out / "checkpoints" / "step-2"
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [0, 1, 2]
    # The state is that of step 2: from there on, all is as if nothing had happened.
    assert train(out) == runs(*overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        ("rollout", "rollout.cache_gib"),
        ("teacher", "teacher.storage=host"),
        ("train", "optimizer.micro_batch_tokens"),
        ("refresh", "teacher.storage=host"),
        ("evaluate", "rollout.cache_gib"),
    ],
)
def test_a_lack_of_memory_names_its_phase_and_the_key(
    build: Build, train: Train, runs: Train, tmp_path: Path, phase: str, remedy: str
) -> None:
    """At step 3, in whatever phase; what was saved carries on as if nothing had happened. A step
    that only lacks its evaluation is saved itself."""
    out = tmp_path / "run"
    trainer = build(out, "steps=5", "eval.every=3", "checkpoint.every=2")
    owner, name = {
        "rollout": (trainer.engine, "generate"),
        "teacher": (trainer.teacher, "score"),
        "train": (trainer.student, "_accumulate_gradients"),
        "refresh": (trainer.teacher, "apply"),
        "evaluate": (trainer.engine, "generate"),
    }[phase]
    original = getattr(owner, name)
    evaluates = phase == "evaluate"

    def scarce(*arguments: Any) -> Any:
        # The evaluation of step 3 is the one whose stream of draws is not the rollouts'.
        if trainer.step < 2 or (
            evaluates and trainer.clock.peaks.keys() != {"rollout", "teacher", "train"}
        ):
            return original(*arguments)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")

    setattr(owner, name, scarce)
    expected = rf"^step 3: out of GPU memory in phase {phase}: 2.50 GiB wanted.*{remedy}.*plan"
    with pytest.raises(RunFailed, match=expected):
        trainer.train()
    trainer.run.close()
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    saved = 3 if evaluates else 2
    assert checkpoint.latest(out / "checkpoints") == out / "checkpoints" / f"step-{saved}"
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [*range(saved + 1)]
    assert train(out) == runs("steps=5", "eval.every=3", "checkpoint.every=2")


@pytest.mark.parametrize("storage", ["host", *slow("device")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_name_their_step(
    build: Build, train: Train, tmp_path: Path, dtype: str, storage: str
) -> None:
    """Also where the drift, which would tell, is not measured in that step."""
    out = tmp_path / "run"
    overrides = ["optimizer.lr=1e38", "optimizer.warmup_steps=0", f"model.dtype={dtype}"]
    overrides += [f"teacher.storage={storage}"]
    trainer = build(out, *overrides, "steps=5")
    with pytest.raises(RunFailed, match=r"^step 1: .*not finite.*optimizer\.lr"):
        trainer.train()
    trainer.run.close()
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [0]
    stored = checkpoint.load(out / "checkpoints" / "step-0")
    assert all(tensor.isfinite().all() for tensor in stored.student.values())


@pytest.mark.slow
def test_runaway_length_collapses(runs: Train) -> None:
    collapse = ("collapse.length_fraction=0.1", "collapse.length_steps=2")
    stopped = runs(*collapse, "collapse.stop=true", "steps=5")
    assert [line["step"] for line in stopped.lines] == [0, 1, 2]
    assert "eval/mean@2" in stopped.lines[-1]
    assert stopped.summary["status"] == "collapsed" and stopped.summary["collapse_step"] == 2
    (event,) = [event for event in stopped.events if event["event"] == "collapse"]
    assert event["step"] == 2 and event["reason"] == "length"

    carried_on = runs(*collapse, "steps=5")
    assert carried_on.lines[5]["step"] == 5
    assert carried_on.summary["status"] == "collapsed" and carried_on.summary["collapse_step"] == 2
    assert [event for event in carried_on.events if event["event"] == "collapse"] == [event]


@pytest.mark.slow
def test_the_last_step_counts_once_towards_a_streak(runs: Train) -> None:
    collapse = ("collapse.length_fraction=0.1", "collapse.length_steps=4", "eval.every=99")
    assert runs(*collapse, "steps=3").summary["status"] == "done"
    assert runs(*collapse, "steps=4").summary["collapse_step"] == 4


@pytest.mark.slow
def test_a_lost_score_collapses(
    build: Build, read_run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in the evaluation that only the last step gets, it belongs to this run's length: a
    resume without new steps keeps it, a longer run has not seen it."""
    scores = {0: 0.5, 3: 0.0, 4: 0.5, 5: 0.5}
    monkeypatch.setattr(
        "sodfast.evaluate.evaluate", lambda *arguments: {"eval/mean@2": scores[arguments[5]]}
    )
    out = tmp_path / "run"

    def run(*overrides: str) -> Any:
        trainer = build(out, *overrides)
        trainer.train()
        trainer.run.close()
        return read_run(out)

    thresholds = "collapse.eval_floor=0.01", "collapse.eval_fraction=0.1"
    first = run("steps=3", "eval.every=4", *thresholds)
    assert first.summary["status"] == "collapsed" and first.summary["collapse_step"] == 3
    assert first.lines[3]["eval/mean@2"] == 0.0
    assert run() == first
    longer = run("steps=5")
    assert longer.summary["status"] == "done"
    assert "eval/mean@2" not in longer.lines[3]
    assert not [event for event in longer.events if event["event"] == "collapse"]


def test_stopping_at_a_collapse_is_final(train: Train, tmp_path: Path) -> None:
    collapse = ["collapse.length_fraction=0.1", "collapse.length_steps=2", "collapse.stop=true"]
    first = train(tmp_path / "run", *collapse, "steps=5")
    assert train(tmp_path / "run") == first


# ---------------------------------------------------------------- more than one examination


@pytest.mark.slow
def test_other_tasks_are_asked_beside_the_runs_own(runs: Train) -> None:
    """The same task under another name gives the same numbers, and training is not touched."""
    plain = runs("steps=4")
    same = "same: {name: arithmetic, train: 48, test: 8}"
    short = "short: {name: arithmetic, train: 48, test: 3}"
    run = runs("steps=4", "eval.tasks={" + f"{same}, {short}" + "}")
    for line, other in zip(run.lines, plain.lines, strict=True):
        own = {key: value for key, value in line.items() if key in other}
        assert own == other
        extra = {key: value for key, value in line.items() if key not in other}
        scores = {key.removeprefix("eval/") for key in other if key.startswith("eval/")}
        assert extra.keys() == {f"eval/{n}/{key}" for n in ("same", "short") for key in scores}
        assert all(extra[f"eval/same/{key}"] == other[f"eval/{key}"] for key in scores)
    assert run.summary == plain.summary


def test_a_fixed_number_of_questions_is_asked(build: Build, tmp_path: Path) -> None:
    trainers = [build(tmp_path / f"{seed}", "eval.questions=3", f"seed={seed}") for seed in (0, 1)]
    asked = [trainer.data.test for trainer in trainers]
    for trainer in trainers:
        trainer.run.close()
    assert asked[0] == asked[1] == [trainers[0].task.test[index] for index in (0, 2, 5)]


# ---------------------------------------------------------------- the best checkpoint


@pytest.mark.slow
def test_the_best_checkpoint_stays(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    """Kept beside the newest although none was due there, over a resume, and handed out."""
    scores = {0: 0.1, 1: 0.3, 2: 0.7, 3: 0.2, 4: 0.7, 5: 0.6, 6: 0.5, 7: 0.9}

    def scored(*arguments: Any, **keywords: Any) -> dict[str, float]:
        step: int = arguments[5]
        return {"eval/mean@2": scores[step]}

    monkeypatch.setattr("sodfast.evaluate.evaluate", scored)
    out = tmp_path / "run"
    keys = ("checkpoint.best=true", "checkpoint.every=3", "checkpoint.keep=1", "eval.every=1")
    trainer = build(out, *keys, "steps=7")
    kept = []
    for step in range(1, 5):
        trainer.train(until=step)
        kept.append(sorted(checkpoint.steps(trainer.run.checkpoints)))
    assert kept == [[1], [2], [2, 3], [2, 3]]  # a tie keeps the first
    trainer.leave()
    trainer.run.close()
    trainer = build(out)
    trainer.train(until=6)
    assert sorted(checkpoint.steps(trainer.run.checkpoints)) == [2, 6]
    trainer.leave()
    trainer.run.close()
    monkeypatch.undo()

    found = cli("eval", str(out), "--best", "eval.samples=1")
    assert found.code == 0 and json.loads(found.out.splitlines()[-1])["step"] == 2
    assert cli("export", str(out), str(tmp_path / "best"), "--best").code == 0
    weights = (out / "checkpoints" / "step-2" / "student" / "model.safetensors").read_bytes()
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == weights
    assert cli("eval", "no-run", "--best").code == 2


@pytest.mark.slow
@pytest.mark.parametrize(("every", "kept"), [(0, [0, 2, 5]), (3, [0, 2, 5, 6])])
def test_the_checkpoints_of_named_steps_stay(
    build: Build, tmp_path: Path, every: int, kept: list[int]
) -> None:
    keys = ("checkpoint.at=[5,0,2]", f"checkpoint.every={every}", "checkpoint.keep=1")
    trainer = build(tmp_path / "run", *keys, "eval.every=0", "steps=6")
    trainer.train()
    trainer.run.close()
    assert sorted(checkpoint.steps(trainer.run.checkpoints)) == kept
    again = build(tmp_path / "run", "steps=7")
    assert again.step == kept[-1]  # it goes on from the newest of them
    again.run.close()


@pytest.mark.slow
def test_an_evaluation_that_closes_a_run_takes_no_other_best_away(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {0: 0.1, 2: 0.6, 4: 0.2, 5: 0.9, 6: 0.3, 7: 0.3}

    def scored(*arguments: Any, **keywords: Any) -> dict[str, float]:
        return {"eval/mean@2": scores[arguments[5]]}

    monkeypatch.setattr("sodfast.evaluate.evaluate", scored)
    out = tmp_path / "run"
    keys = ("checkpoint.best=true", "checkpoint.every=9", "checkpoint.keep=1", "eval.every=2")
    for steps, expected in ((5, [2, 5]), (7, [2, 7])):
        trainer = build(out, *(() if out.exists() else keys), f"steps={steps}")
        trainer.train()
        trainer.run.close()
        assert sorted(checkpoint.steps(trainer.run.checkpoints)) == expected
