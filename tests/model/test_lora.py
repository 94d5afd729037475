"""LoRA: what is trained, what stays, where the teacher is, and what is stored and read again."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SCHEDULES, Command
from marks import slow
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sodfast import optimizer
from sodfast.commands import evaluate_model, export_model
from sodfast.config import (
    CGTRConfig,
    EMAConfig,
    HardConfig,
    LoRAConfig,
    TrustRegionConfig,
    load_config,
)
from sodfast.errors import UsageError
from sodfast.files import read_lines
from sodfast.model import lora
from sodfast.model.language_model import LanguageModel, trained_parameters
from sodfast.model.load import load_model
from sodfast.model.lora import add_adapters, merge_adapters
from sodfast.model.packing import own_attention
from sodfast.run import checkpoint
from sodfast.run.restore import restore_student
from sodfast.schedule import Decision
from sodfast.teacher import Teacher
from sodfast.trainer import Trainer

Train = Callable[..., Any]
Build = Callable[..., Trainer]

RANK, ALPHA = 4, 6
SCALE = ALPHA / RANK
LORA = [f"model.lora.rank={RANK}", f"model.lora.alpha={ALPHA}", "optimizer.lr=2e-2"]
IDS = torch.tensor([[3, 9, 4, 14, 5, 6, 1, 8, 7]])
KEEP, COPY = Decision("keep"), Decision("copy")


def adapted(model: LanguageModel, seed: int = 0, **settings: Any) -> LanguageModel:
    """With adapters whose product is not zero."""
    model = add_adapters(model, LoRAConfig(**{"rank": RANK, "alpha": ALPHA, **settings}), 0)
    move(model.network, seed)
    return model


def move(network: nn.Module, seed: int, size: float = 0.05) -> None:
    """What an optimizer update does: to the adapters alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(network).values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in parameters])


def frozen(network: nn.Module) -> dict[str, Tensor]:
    """Parameters of the base by their names in a plain model, copied."""
    return {
        name.replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in network.named_parameters()
        if ".lora_" not in name
    }


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def logits(network: Any) -> Tensor:
    """Of all tokens of `IDS` but the first four, a prompt."""
    with torch.no_grad(), own_attention(network):
        return network(IDS).logits[0, 3:-1]


def teacher_logits(teacher: Teacher) -> Tensor:
    """The same as the teacher scores them."""
    scores = teacher.score([IDS[0, :4]], [IDS[0, 4:]], 100)
    assert scores.hidden[0] is not None
    return scores.hidden[0] @ scores.head.T


# ---------------------------------------------------------------- the layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_compute_what_the_base_does(tiny_model: Path, dtype: torch.dtype) -> None:
    model = load_model(str(tiny_model), torch.device("cpu"), dtype)
    before, weights, state = logits(model.network), frozen(model.network), torch.get_rng_state()
    model = add_adapters(model, LoRAConfig(rank=RANK), 0)
    assert logits(model.network).equal(before)
    assert same_bits(frozen(model.network), weights)
    assert torch.get_rng_state().equal(state)
    trained = trained_parameters(model.network)
    assert len(trained) == 2 * 2 * 7  # A and B, two layers, seven projections
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        if ".lora_A." in name:
            assert parameter.shape[0] == RANK and float(parameter.detach().abs().min()) > 0
        else:
            assert parameter.shape[1] == RANK and not parameter.detach().any()


def test_the_first_adapters_are_a_function_of_the_seed(tiny_model: Path) -> None:
    def drawn(seed: int) -> Tensor:
        model = load_model(str(tiny_model), torch.device("cpu"))
        model = add_adapters(model, LoRAConfig(), seed)
        return flat(trained_parameters(model.network).values())

    torch.manual_seed(7)
    first = drawn(0)
    torch.manual_seed(8)
    assert drawn(0).equal(first)
    assert not drawn(1).equal(first)


def test_only_the_targets_get_adapters(model: LanguageModel) -> None:
    adapted(model, targets=("q_proj", "down_proj"))
    found = {name.split(".lora_")[0].split(".", 2)[2] for name in trained_parameters(model.network)}
    assert found == {f"{n}.{p}" for n in (0, 1) for p in ("self_attn.q_proj", "mlp.down_proj")}


@pytest.mark.parametrize("settings", [{}, {"rank": 1, "alpha": 1}, {"targets": ("v_proj",)}])
def test_merged_weights_compute_the_same(model: LanguageModel, settings: dict[str, Any]) -> None:
    base = frozen(model.network)
    before = logits(model.network)
    network = adapted(model, **settings).network
    expected = logits(network)
    assert not torch.allclose(expected, before, atol=1e-2)
    merge_adapters(network)
    torch.testing.assert_close(logits(network), expected, rtol=1e-5, atol=1e-5)
    assert frozen(network).keys() == base.keys() == dict(network.named_parameters()).keys()
    assert not hasattr(network, "peft_config")


def test_a_merge_rounds_once(tiny_model: Path) -> None:
    """bfloat16: B·A reaches the sum in fp32."""
    model = load_model(str(tiny_model), torch.device("cpu"), torch.bfloat16)
    network = adapted(model).network
    layer = network.model.layers[1].mlp.up_proj
    a, b = (p.detach().double() for p in trained_parameters(layer).values())
    exact = layer.base_layer.weight.detach().double() + SCALE * b @ a
    merge_adapters(network)
    merged = network.model.layers[1].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16
    assert float((merged != exact.bfloat16()).double().mean()) < 1e-3  # fp32's ties


def test_gradients_follow_from_those_of_the_full_weights(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dL/dB = s·dL/dW·Aᵀ and dL/dA = s·Bᵀ·dL/dW, with dL/dW from full fine-tuning of the merged
    weights on the same rollouts."""

    class Stop(Exception):
        pass

    def stop(*_: Any) -> float:
        raise Stop

    monkeypatch.setattr(optimizer, "update", stop)
    trainer = build(tmp_path / "lora", *LORA)
    network = trainer.model.network
    move(network, 3)
    merged = copy.deepcopy(network)
    merge_adapters(merged)
    merged.save_pretrained(tmp_path / "merged")
    trainer.model.tokenizer.save_pretrained(tmp_path / "merged")
    full = build(tmp_path / "full", f"model.path={tmp_path / 'merged'}")
    rollouts = trainer._rollout(1)
    assert any(rollouts.rewards) and any(context is not None for context in rollouts.contexts)
    for one in (trainer, full):
        one.run.close()
        with pytest.raises(Stop):
            updates = one.student.plan(1, rollouts)
            scores = one._score(rollouts, updates)
            one.student.update(
                1, rollouts, updates, scores, before_first=one.teacher.prepare_update
            )
    whole = {name: p.grad for name, p in full.model.network.named_parameters()}
    checked = 0
    for path, module in network.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        grad_w = whole[f"{path}.weight"]
        torch.testing.assert_close(b.grad, SCALE * grad_w @ a.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.grad, SCALE * b.T @ grad_w, rtol=1e-4, atol=1e-5)
        assert float(a.grad.abs().max()) > 1e-4 and float(b.grad.abs().max()) > 1e-4
        checked += 1
    assert checked == 14
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


# ---------------------------------------------------------------- the teacher


def test_the_teacher_shares_the_base_and_owns_its_adapters(model: LanguageModel) -> None:
    student = adapted(model).network
    teacher = Teacher(student, CGTRConfig(), 0)
    teacher.prepare_update()
    ours, theirs = (dict(n.named_parameters()) for n in (student, teacher.network))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert (theirs[name] is parameter) == (".lora_" not in name)
    assert not any(p.requires_grad for p in theirs.values())
    assert all(p.requires_grad == (".lora_" in name) for name, p in ours.items())
    assert teacher.own().keys() == trained_parameters(student).keys()


def test_the_teacher_stays_and_the_student_is_not_disturbed(model: LanguageModel) -> None:
    student, base = model.network, logits(model.network)
    add_adapters(model, LoRAConfig(rank=RANK), 0)
    teacher = Teacher(student, CGTRConfig(), 0)
    first = teacher_logits(teacher)
    torch.testing.assert_close(first, base, rtol=0, atol=1e-4)  # the initial teacher is the base
    teacher.prepare_update()
    move(student, 1)
    weights, live = flat(student.parameters()), logits(student)
    assert teacher_logits(teacher).equal(first)
    assert flat(student.parameters()).equal(weights)
    assert logits(student).equal(live) and not torch.allclose(live, base, atol=1e-2)


@pytest.mark.parametrize("schedule", [HardConfig(every=1), CGTRConfig()])
def test_after_a_copy_the_teacher_scores_as_the_student(
    model: LanguageModel, schedule: HardConfig | CGTRConfig
) -> None:
    student = adapted(model).network
    teacher = Teacher(student, schedule, 0)
    teacher.prepare_update()
    before = flat(teacher.own().values())
    move(student, 1)
    shock = teacher.apply(COPY, 1)
    distance = (flat(trained_parameters(student).values()) - before).norm()
    assert float(shock) == pytest.approx(float(distance), rel=1e-5)
    assert teacher.weights is None
    refreshed = logits(student)
    teacher.prepare_update()
    assert logits(teacher.network).equal(refreshed)
    move(student, 2)
    assert logits(teacher.network).equal(refreshed) and not logits(student).equal(refreshed)


@pytest.mark.slow
def test_ema_follows_its_recursion_on_the_adapters(model: LanguageModel) -> None:
    student = adapted(model).network
    teacher, rate = Teacher(student, EMAConfig(rate=0.3), 0), 0.3
    average = flat(trained_parameters(student).values())
    for step in range(1, 21):
        teacher.prepare_update()
        move(student, step)
        live = flat(trained_parameters(student).values())
        drift = teacher.apply(Decision("average", rate=rate), step)
        assert float(drift) == pytest.approx(float((live - average).norm()), rel=1e-5)
        average = (1 - rate) * average + rate * live
        torch.testing.assert_close(flat(teacher.own().values()), average, rtol=1e-5, atol=1e-6)


def test_trust_region_mixes_the_logits(model: LanguageModel) -> None:
    student = adapted(model).network
    teacher = Teacher(student, TrustRegionConfig(rate=0.3), 0)
    initial = logits(student)
    torch.testing.assert_close(teacher_logits(teacher), initial, rtol=0, atol=1e-4)
    teacher.prepare_update()
    move(student, 1)
    teacher.apply(KEEP, 1)
    mixed = 0.7 * initial + 0.3 * logits(student)
    torch.testing.assert_close(teacher_logits(teacher), mixed, rtol=0, atol=1e-4)
    assert not torch.allclose(mixed, initial, atol=1e-2)


def test_stored_adapters_are_the_teacher_again(model: LanguageModel) -> None:
    student = adapted(model).network
    teacher = Teacher(student, CGTRConfig(), 0)
    teacher.prepare_update()
    stored = {name: p.clone() for name, p in teacher.own().items()}
    expected = logits(teacher.network)
    move(student, 1)
    other = Teacher(student, CGTRConfig(), 0)
    other.load_weights(stored)
    assert logits(other.network).equal(expected)
    with pytest.raises(ValueError, match="other parameters"):
        other.load_weights(dict(student.named_parameters()))


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["cgtr", *slow(*(k for k in SCHEDULES if k != "cgtr"))])
def test_a_run_moves_adapters_alone_and_logs_their_drift(
    build: Build, tmp_path: Path, kind: str, dtype: str
) -> None:
    trainer = build(tmp_path / "run", *LORA, *SCHEDULES[kind], f"model.dtype={dtype}", "steps=4")
    network, teacher = trainer.model.network, trainer.teacher
    base, apply = frozen(network), teacher.apply
    # φ by hand in fp64, from the student's adapters after each update.
    phi, drifts = flat(trained_parameters(network).values()), []

    def watched(decision: Decision, step: int) -> Tensor:
        nonlocal phi
        theta = flat(trained_parameters(network).values())
        drifts.append(float((theta - phi).norm()))
        rate = {"copy": 1.0, "average": decision.rate, "keep": 0.0}[decision.action]
        phi = (1 - rate) * phi + rate * theta
        assert all(p.grad is None for p in network.parameters())
        return apply(decision, step)

    teacher.apply = watched  # type: ignore[method-assign]
    assert trainer.train() == "done"
    trainer.run.close()
    assert [line["teacher/drift"] for line in trainer.lines[1:]] == pytest.approx(drifts, rel=1e-4)
    assert min(drifts) > 0
    assert same_bits(frozen(network), base)
    given = [p for group in trainer.student.optimizer.param_groups for p in group["params"]]
    assert len(given) == len(trained_parameters(network)) == 28
    assert all(p.dtype == torch.float32 and p.requires_grad for p in given)
    assert type(trainer.student.optimizer) is torch.optim.AdamW
    torch.testing.assert_close(flat(teacher.own().values()), phi, rtol=1e-5, atol=1e-6)
    refreshed = bool([line for line in trainer.lines if line.get("teacher/refreshed")])
    assert refreshed == (kind in ("hard", "cgtr", "evidence"))


@pytest.mark.slow
def test_the_first_step_compares_the_base_with_itself(train: Train, tmp_path: Path) -> None:
    """Without a demonstration teacher and student are equal: no divergence in step 1, some later;
    and the rollouts of step 1 are those of full fine-tuning."""
    plain = ["teacher.context=none", "schedule.kind=fixed", "steps=3"]
    lines = train(tmp_path / "lora", *LORA, *plain).lines
    full = train(tmp_path / "full", *plain).lines
    assert lines[1]["distill/divergence"] == pytest.approx(0, abs=1e-9)
    assert lines[3]["distill/divergence"] > 1e-5
    for key in ("reward/mean", "length/mean", "policy/entropy"):
        assert lines[1][key] == pytest.approx(full[1][key], rel=1e-5)


@pytest.mark.slow
def test_recomputed_layers_change_nothing(train: Train, tmp_path: Path) -> None:
    expected = train(tmp_path / "kept", *LORA, "steps=3")
    again = train(tmp_path / "recomputed", *LORA, "model.gradient_checkpointing=true", "steps=3")
    assert again == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.kind=ema", "schedule.rate=0.3"],
        ["schedule.kind=hard", "schedule.every=4", "model.dtype=bfloat16"],
        ["schedule.kind=trust_region", "rollout.engine=hf", "optimizer.adamw=8bit"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_runs_resume_bit_for_bit(train: Train, tmp_path: Path, overrides: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(whole, *LORA, *overrides, "steps=4")
    train(parts, *LORA, *overrides, "steps=2")
    assert train(parts, "steps=4") == expected
    ends = [checkpoint.load(out / "checkpoints" / "step-4") for out in (whole, parts)]
    assert ends[0].state == ends[1].state
    assert same_bits(ends[0].student, ends[1].student) and len(ends[0].student) == 28
    assert same_bits(ends[0].optimizer, ends[1].optimizer) and len(ends[0].optimizer) >= 3 * 28
    if ends[0].teacher is None or ends[1].teacher is None:
        assert ends[0].teacher is ends[1].teacher and "kind=hard" in overrides[0]
    else:
        assert same_bits(ends[0].teacher, ends[1].teacher) and len(ends[0].teacher) == 28


# ---------------------------------------------------------------- what is stored


@pytest.fixture(scope="session")
def finished(build: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run of four steps under EMA, and the trainer that made it."""
    out = tmp_path_factory.mktemp("lora") / "run"
    trainer = build(out, *LORA, *SCHEDULES["ema"], "steps=4")
    trainer.train()
    trainer.run.close()
    return out, trainer


@pytest.mark.slow
def test_a_checkpoint_holds_adapters_that_peft_reads(finished: tuple[Path, Trainer]) -> None:
    out, trainer = finished
    path = out / "checkpoints" / "step-4"
    student = path / "student"
    assert {file.name for file in student.glob("*.safetensors")} == {"adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(trainer.config.model.path)
    read = PeftModel.from_pretrained(base, str(student)).eval()
    assert logits(read).equal(logits(trainer.model.network))
    settings = json.loads((student / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == trainer.config.model.path
    assert (settings["r"], settings["lora_alpha"]) == (RANK, ALPHA)
    stored = checkpoint.load(path)
    assert stored.teacher is not None
    assert stored.teacher.keys() == trained_parameters(trainer.model.network).keys()
    assert stored.state["base"] == trainer.model.base
    assert {key.rpartition(".")[0] for key in stored.optimizer} == stored.teacher.keys()


def test_adapters_that_are_not_whole_are_refused(finished: tuple[Path, Trainer]) -> None:
    out, trainer = finished
    student = checkpoint.load(out / "checkpoints" / "step-4").student
    for name in student:
        rest = {key: tensor for key, tensor in student.items() if key != name}
        with pytest.raises(UsageError, match="another model"):
            restore_student(trainer.model, rest, trainer.model.base)


def test_export_is_a_plain_model_with_the_same_logits(
    finished: tuple[Path, Trainer], tmp_path: Path
) -> None:
    out, trainer = finished
    export_model(out, tmp_path / "exported")
    assert not list((tmp_path / "exported").glob("adapter*"))
    exported = load_model(str(tmp_path / "exported"), torch.device("cpu"))
    assert {type(m) for n, m in exported.network.named_modules() if n.endswith("_proj")} == {
        nn.Linear
    }
    expected = logits(trainer.model.network)
    torch.testing.assert_close(logits(exported.network), expected, rtol=1e-5, atol=1e-5)
    changed = frozen(exported.network)
    base = frozen(trainer.model.network)
    for name, weight in changed.items():
        assert torch.equal(weight, base[name]) == ("_proj" not in name)
    assert evaluate_model(str(tmp_path / "exported"), _evaluation(trainer)).keys() > {"eval/mean@2"}


def _evaluation(trainer: Trainer) -> list[str]:
    task = trainer.config.task.model_dump()
    return [f"task.train={task['train']}", f"task.test={task['test']}", "eval.samples=2"]


def test_eval_repeats_the_runs_last_evaluation(finished: tuple[Path, Trainer]) -> None:
    out, _ = finished
    last = {k: v for k, v in read_lines(out / "metrics.jsonl")[-1].items() if k[:5] == "eval/"}
    assert evaluate_model(str(out), []) == {"step": 4, **last}


@pytest.mark.slow
def test_another_base_at_the_same_path_is_noticed(
    tiny_model: Path, train: Train, cli: Command, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_model, base)
    train(out, *LORA, f"model.path={base}", "steps=2")
    network = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[3, 5] *= 1.001
    network.save_pretrained(base)
    for command in (
        ["train", "--resume", str(out), "steps=3"],
        ["eval", str(out)],
        ["export", str(out), str(tmp_path / "exported")],
    ):
        code, _, err = cli(*command)
        assert code == 2 and err.count("\n") == 1 and "other base weights" in err
    assert not (tmp_path / "exported").exists()
    # Moved elsewhere and unchanged, it is the base still.
    assert cli("eval", str(out), f"model.path={tiny_model}").code == 0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.lora.rank=0"], "model.lora.rank"),
        (["model.lora.rnk=4"], "did you mean rank?"),
        (["model.lora.targets=[]"], "model.lora.targets"),
        (["model.lora.targets=[q_proj, w_proj]"], "w_proj"),
        (["model.lora.targets=[lm_head]"], "lm_head"),
        (["model.lora.targets=[embed_tokens]"], "embed_tokens"),
        (["model.lora.rank=4", "teacher.storage=host"], "set teacher.storage=device"),
        (["model.lora.rank=4", "rollout.engine=vllm"], "rollout.engine"),
        (["model.lora.rank=4", "model.dtype=bfloat16", "optimizer.adamw=exact"], "model.lora"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    cli: Command, tiny_run: list[str], tmp_path: Path, overrides: list[str], reason: str
) -> None:
    out = tmp_path / "run"
    code, _, err = cli("train", *tiny_run, *overrides, f"out={out}")
    assert code == 2 and err.count("\n") == 1 and reason in err
    assert not out.exists()


def test_without_peft_nothing_begins(
    cli: Command, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("work before the refusal")

    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    monkeypatch.setattr("sodfast.commands.load_model", load)
    code, _, err = cli("train", *tiny_run, *LORA, f"out={tmp_path / 'run'}")
    assert code == 2 and "pip install 'sodfast[lora]'" in err
    assert not (tmp_path / "run").exists()


def test_a_runs_adapters_are_evaluated_as_they_were_trained(
    cli: Command, finished: tuple[Path, Trainer]
) -> None:
    code, _, err = cli("eval", str(finished[0]), "model.lora.alpha=60")
    assert code == 2 and "model.lora" in err and err.count("\n") == 1


def test_a_model_without_linear_layers_is_refused(model: LanguageModel) -> None:
    for path, module in list(model.network.named_modules()):
        if path.endswith("_proj"):
            parent, _, name = path.rpartition(".")
            setattr(model.network.get_submodule(parent), name, nn.Sequential(nn.Identity(), module))
    with pytest.raises(UsageError, match=r"model\.lora\.targets"):
        add_adapters(model, LoRAConfig(targets=("q_proj",)), 0)


def test_lora_is_off_unless_it_is_asked_for() -> None:
    assert load_config("lab", []).model.lora is None
    assert load_config("lab", ["model.lora={}"]).model.lora == LoRAConfig()
    assert load_config("lab", ["model.lora.rank=4"]).model.lora == LoRAConfig(rank=4)
