"""The whole configuration: its defaults and presets, what goes together, and what is said of it."""

from pathlib import Path

import pytest
import yaml
from configurations import lab, refusal, value
from pydantic import ValidationError

from sodfast.config import (
    PRESETS,
    CGTRConfig,
    Config,
    load_config,
)
from sodfast.errors import UsageError

# ---------------------------------------------------------------- presets and defaults


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_load_and_survive_their_own_yaml(preset: str, tmp_path: Path) -> None:
    config = load_config(preset, [])
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert load_config(str(resolved), []) == config


LAB_DEFAULTS = {
    "seed": 0,
    "out": None,
    "steps": 150,
    "device": "auto",
    "model.path": None,
    "model.random": None,
    "model.attention": "auto",
    "model.kept_layers": 0,
    "teacher.micro_batch_tokens": None,
    "task.name": "arithmetic",
    "rollout.prompts_per_step": 16,
    "rollout.samples_per_prompt": 4,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.engine": "auto",
    "objective.alpha": 0.5,
    "objective.top_k": None,
    "objective.add_tail": True,
    "objective.distill_coef": 1.0,
    "objective.policy_coef": 1.0,
    "objective.ratio_cap": 2.0,
    "objective.clip_range": (0.2, 0.28),
    "objective.reduction": "sequence_mean",
    "teacher.context": "demonstration",
    "teacher.storage": "device",
    "schedule.kind": "cgtr",
    "schedule.min_isolation": 30,
    "schedule.check_every": 5,
    "schedule.window": 5,
    "schedule.reward_margin": 0.05,
    "schedule.max_tail_ratio": 3.2,
    "schedule.gates": ("isolation", "reward", "length"),
    "schedule.length_unit": "sequence",
    "optimizer.warmup_steps": 10,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
    "optimizer.updates_per_step": 1,
    "eval.every": 10,
    "eval.samples": 16,
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
    "checkpoint.every": 25,
    "checkpoint.keep": 2,
    "collapse.stop": False,
}


@pytest.mark.parametrize("key", LAB_DEFAULTS)
def test_lab_defaults(key: str) -> None:
    assert value(lab(), key) == LAB_DEFAULTS[key]
    assert type(value(lab(), key)) is type(LAB_DEFAULTS[key])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule.kind=fixed"],
        ["schedule.kind=hard", "schedule.every=3"],
        ["schedule.kind=ema", "schedule.rate=1"],
        ["schedule.kind=trust_region"],
        ["schedule.gates=[]", "optimizer.betas=[0.8, 0.9]", "optimizer.lr=1e-7"],
        ["objective.top_k=20", "objective.ratio_cap=null", "out='5'", "model.path='on'"],
        ["task.name=tool_use", "task.train=a.jsonl", "task.test=b.jsonl", "model.path=Qwen/Qwen3"],
        ["log.project='ünï: #code'", "log.sinks=[trackio]"],
    ],
)
def test_the_resolved_yaml_loads_to_the_same_configuration(
    overrides: list[str], tmp_path: Path
) -> None:
    config = lab(*overrides)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(str(file), []) == config
    assert list(yaml.safe_load(config.to_yaml())) == list(Config.model_fields)


def test_a_configuration_is_frozen() -> None:
    config = lab()
    for section, key in ((config, "steps"), (config.optimizer, "lr"), (config.schedule, "window")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stepps=3", "did you mean steps?"),
        ("zebra=3", "known: seed, out, steps"),
        ("optimizer.lrr=1", "did you mean lr?"),
        ("optimizer.zebra=1", "known: lr, warmup_steps"),
        ("model.paht=x", "did you mean path?"),
        ("lab.seeed=1", "did you mean seed?"),
        ("task.tset=1", "did you mean test?"),
        ("schedule.windw=1", "did you mean window?"),
        ("schedule.every=1", "check_every"),
    ],
)
def test_unknown_keys(override: str, hint: str) -> None:
    message = refusal(override)
    assert message.startswith(f"unknown key {override.partition('=')[0]} (")
    assert hint in message


def test_a_key_of_another_kind_is_unknown() -> None:
    assert refusal("schedule.kind=ema", "schedule.every=3").startswith(
        "unknown key schedule.every (known: kind, rate)"
    )
    message = refusal("task.name=tool_use", "task.train=a", "task.subjct=b", "model.path=x")
    assert message.startswith("unknown key task.subjct (")


def test_several_mistakes_are_all_named() -> None:
    message = refusal("stepps=3", "optimizer.lr=fast", "eval.every=-1")
    for key in ("stepps", "optimizer.lr", "eval.every"):
        assert key in message


def test_a_message_stays_readable_whatever_is_wrong() -> None:
    many = "{" + ", ".join(f"key{n}: {n}" for n in range(500)) + "}"
    message = refusal(f"rollout={many}")
    assert message.startswith("unknown key rollout.key0 (") and message.endswith("; and 480 more")
    message = refusal(f"schedule.kind={many}")
    assert "'trust_region'" in message and len(message) < 1000


@pytest.mark.parametrize(
    "override",
    [
        "steps='5'",
        "steps=true",
        "steps=1.5",
        "steps=1e3",
        "steps=0",
        "steps=-1",
        "steps=",
        "steps=[1]",
        "steps={a: 1}",
        "seed=-1",
        "seed=9223372036854775808",
        "out=5",
        "device=tpu",
        "device=cuda:x",
        "model.path=3",
        "task.train=x",
        "task.train=0",
        "rollout.temperature=0",
        "rollout.top_p=0",
        "rollout.top_p=1.1",
        "rollout.engine=magic",
        "objective.alpha=-0.1",
        "objective.alpha=1.1",
        "objective.add_tail=1",
        "objective.add_tail='true'",
        "objective.top_k=0",
        "objective.ratio_cap=0",
        "objective.clip_range=3",
        "objective.reduction=mean",
        "teacher.context=hint",
        "teacher.template={prompt}",
        "schedule.reward_margin=-0.1",
        "schedule.check_every=0",
        "schedule.max_tail_ratio=0",
        "schedule.gates=length",
        "schedule.gates=[length,length]",
        "schedule.length_unit=rank",
        "teacher.micro_batch_tokens=0",
        "optimizer.lr=fast",
        "optimizer.lr=-1",
        "optimizer.lr='1e-5'",
        "optimizer.clip_norm=0",
        "optimizer=5",
        "optimizer=",
        "eval.every=-1",
        "eval.every=1.5",
        "checkpoint.every=-1",
        "model.random=3",
        "model.attention=fast",
        "checkpoint.keep=0",
        "collapse.stop=1",
        "collapse.eval_floor=2",
        "log.sinks=wandb",
        "lab.seed=true",
    ],
)
def test_wrong_types_and_values_name_their_key(override: str) -> None:
    assert refusal(override).startswith(f"{override.partition('=')[0]}: ")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("objective.clip_range=[0.2]", "objective.clip_range.1"),
        ("schedule.gates=[isolation,speed]", "schedule.gates.1"),
        ("log.sinks=[mlflow]", "log.sinks.0"),
    ],
)
def test_wrong_items_of_a_list_name_their_place(override: str, key: str) -> None:
    assert refusal(override).startswith(f"{key}: ")


def test_wrong_kinds_list_the_right_ones() -> None:
    for override in ("schedule.kind=cosine", "schedule={kind: cosine}", "schedule.kind=null"):
        message = refusal(override)
        assert message.startswith("schedule") and "'trust_region'" in message
    message = refusal("task.name=chess")
    assert message.startswith("task") and "'multiple_choice'" in message
    assert refusal("schedule=hard").startswith("schedule: ")


# ---------------------------------------------------------------- parts that must fit together


@pytest.mark.parametrize(
    ("overrides", "named", "repaired"),
    [
        (
            ["optimizer.updates_per_step=3"],
            ["optimizer.updates_per_step", "rollout.prompts_per_step"],
            ["rollout.prompts_per_step=9"],
        ),
        (
            ["rollout.samples_per_prompt=1"],
            ["rollout.samples_per_prompt", "teacher.context"],
            ["teacher.context=none"],
        ),
        (
            ["teacher.feedback=true", "teacher.context=none"],
            ["teacher.feedback", "teacher.context"],
            ["teacher.context=demonstration"],
        ),
        (
            ["teacher.feedback=without_solution", "teacher.context=feedback"],
            ["teacher.feedback", "teacher.context"],
            ["teacher.feedback=never"],
        ),
        (
            ["schedule.length_unit=shard", "schedule.shards=5"],
            ["schedule.shards"],
            ["rollout.samples_per_prompt=5"],
        ),
        (
            ["task.name=multiple_choice", "task.train=train.jsonl", "task.test=test.jsonl"],
            ["model.path", "task.name"],
            ["model.path=Qwen/Qwen3-8B"],
        ),
        (
            ["task.name=multiple_choice", "task.train=train.jsonl", "task.test=test.jsonl"],
            ["model.path", "task.name"],
            ["model.random=Qwen/Qwen3-8B"],
        ),
        (
            ["model.path=Qwen/Qwen3-8B", "model.random=Qwen/Qwen3-8B"],
            ["model.path", "model.random"],
            ["model.path=null"],
        ),
        (
            ["model.kept_layers=2"],
            ["model.kept_layers", "model.gradient_checkpointing"],
            ["model.gradient_checkpointing=true"],
        ),
        (
            ["model.kept_layers=auto", "model.gradient_checkpointing=true"],
            ["model.kept_layers", "memory_gib"],
            ["memory_gib=4"],
        ),
        (
            [
                "model.kept_layers=auto",
                "model.gradient_checkpointing=true",
                "memory_gib=4",
                "rollout.engine=vllm",
            ],
            ["model.kept_layers", "rollout.engine"],
            ["model.kept_layers=2"],
        ),
    ],
)
def test_parts_must_fit(overrides: list[str], named: list[str], repaired: list[str]) -> None:
    message = refusal(*overrides)
    assert all(key in message for key in named)
    lab(*overrides, *repaired)


def test_one_rollout_a_prompt_needs_another_hint_than_a_sibling() -> None:
    one = "rollout.samples_per_prompt=1"
    for context in ("reference", "demonstration_or_reference", "feedback", "none"):
        lab(one, f"teacher.context={context}")
    lab(one, "teacher.demonstrate_self=true")


def test_scoring_takes_trainings_micro_batches_unless_it_has_a_budget() -> None:
    assert lab("optimizer.micro_batch_tokens=123").scoring_tokens == 123
    own = lab("optimizer.micro_batch_tokens=123", "teacher.micro_batch_tokens=45")
    assert own.scoring_tokens == 45


# ---------------------------------------------------------------- the presets for one 80 GB GPU


def test_the_8b_preset_is_the_papers_setting() -> None:
    config = load_config("qwen3_8b_80gb", [])
    rollout, objective, optimizer = config.rollout, config.objective, config.optimizer
    assert (config.model.path, config.model.dtype) == ("Qwen/Qwen3-8B", "bfloat16")
    assert (config.steps, config.device, config.memory_gib) == (300, "cuda", 78)
    assert (rollout.prompts_per_step, rollout.samples_per_prompt) == (16, 4)
    assert (rollout.max_prompt_tokens, rollout.max_new_tokens) == (2048, 8192)
    assert (objective.alpha, objective.top_k, objective.add_tail) == (0.5, 20, True)
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.updates_per_step) == (1e-5, 10, 4)
    assert optimizer.adamw == "auto"  # 8-bit moments for bfloat16 weights
    assert (config.eval.every, config.eval.samples) == (10, 16)
    assert (config.teacher.storage, config.scoring_tokens) == ("host", 65_536)
    assert config.model.kept_layers == "auto"
    assert config.schedule == CGTRConfig()
    assert config.task.name == "multiple_choice"


@pytest.mark.parametrize(
    ("preset", "path", "top_k"),
    [
        ("qwen3_8b_80gb_full_vocabulary", "Qwen/Qwen3-8B", None),
        ("qwen3_4b_80gb", "Qwen/Qwen3-4B", 20),
        ("qwen3_1_7b_80gb", "Qwen/Qwen3-1.7B", 20),
        ("qwen3_0_6b_80gb", "Qwen/Qwen3-0.6B", 20),
    ],
)
def test_its_siblings_differ_in_one_key(preset: str, path: str, top_k: int | None) -> None:
    config = load_config(preset, [])
    assert (config.model.path, config.objective.top_k) == (path, top_k)
    same = [f"model.path={path}", f"objective.top_k={'null' if top_k is None else top_k}"]
    assert config == load_config("qwen3_8b_80gb", same)


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*qwen3*.yaml")))
def test_a_large_model_keeps_the_answers_of_few_steps(preset: str) -> None:
    """3,360 answers of an evaluation, a thousand tokens and more each, at 50 bytes a token."""
    config = load_config(preset, [])
    every = config.log.samples_every
    assert every is not None and every >= 10 * config.eval.every > 0
    assert config.steps % every == every % config.eval.every == 0  # the last evaluation's stay


# ---------------------------------------------------------------- values from Python


def test_python_values_are_overrides(tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 8}
    config = load_config(
        "lab",
        ["seed=3"],
        steps=7,
        out=tmp_path / "${run}",
        schedule={"every": 5, "kind": "hard"},
        model={"lora": lora},
        teacher={"template": "{prompt} ${{x}} {demonstration}{feedback}"},
        objective={"clip_range": (0.1, 0.3)},
        **{"eval.every": 2},
    )
    assert config.seed == 3 and config.steps == 7 and config.out == str(tmp_path / "${run}")
    assert config.schedule.model_dump() == {"kind": "hard", "every": 5}
    assert config.model.lora is not None and config.model.lora.rank == 4
    assert config.teacher.template == "{prompt} ${{x}} {demonstration}{feedback}"
    assert config.teacher.max_prompt_tokens == load_config("lab", []).teacher.max_prompt_tokens
    assert config.objective.clip_range == (0.1, 0.3) and config.eval.every == 2
    with pytest.raises(UsageError, match="steps: "):
        load_config("lab", steps="many")
    with pytest.raises(UsageError):
        load_config("lab", steps=object())


# ---------------------------------------------------------------- wherever it is, it is named


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("eval.tasks={a: {name: arithmetic, tset: 3}}", "eval.tasks.a.tset (did you mean test?)"),
        ("eval.tasks={a: {name: arithmetic, test: x}}", "eval.tasks.a.test: "),
        ("eval.tasks={a: {name: nothing}}", "eval.tasks.a: "),
        ("eval.tasks={a: {test: 3}}", "eval.tasks.a: "),
        ("eval.tasks={a/b: {name: arithmetic}}", "eval.tasks.a/b"),
        ("eval.tasks={a: {name: math, train: r.jsonl}}", "eval.tasks.a.name=math needs a model"),
        ("eval.questions=0", "eval.questions"),
        ("checkpoint={best: true, every: 0}", "checkpoint.best=true needs"),
        ("objective.dual_clip=1.0", "objective.dual_clip"),
        ("objective.old_logprob=other", "objective.old_logprob"),
        ("schedule={kind: python}", "schedule.source"),
        ("schedule={kind: python, source: here}", "schedule.source: must be FILE.py:NAME"),
    ],
)
def test_what_is_wrong_there_is_named(overrides: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_config("lab", [overrides])
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["sdpo", "grpo", "opsd"])
def test_a_baseline_has_the_same_objective_on_both_scales(name: str) -> None:
    small, large = load_config(name, []), load_config(f"{name}_qwen3_8b", [])
    assert small.objective == large.objective and small.schedule == large.schedule
    assert small.teacher.context == large.teacher.context
    assert large.model.path == "Qwen/Qwen3-8B" and small.model.path is None
    if name != "opsd":
        assert (large.rollout.prompts_per_step, large.rollout.samples_per_prompt) == (32, 8)


def test_the_literal_preset_shows_the_teacher_nothing_else() -> None:
    paper = load_config("qwen3_8b_80gb", ["teacher.context=none"])
    assert load_config("qwen3_8b_80gb_literal", []) == paper
