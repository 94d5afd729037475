"""The configuration: presets, overrides, and one line for everything that is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sodfast.config import (
    PRESETS,
    CGTRConfig,
    Config,
    EMAConfig,
    HardConfig,
    LogConfig,
    load_config,
)
from sodfast.config import (
    override as changed,
)
from sodfast.errors import UsageError


def lab(*overrides: str) -> Config:
    return load_config(None, list(overrides))


def value(config: Config, key: str) -> Any:
    result: Any = config
    for part in key.split("."):
        result = getattr(result, part)
    return result


def refusal(*overrides: str, source: str | None = None) -> str:
    """The message of the refusal, which must be one line."""
    with pytest.raises(UsageError) as error:
        load_config(source, list(overrides))
    message = str(error.value)
    assert message and "\n" not in message
    return message


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


def test_defaults_of_the_other_schedules() -> None:
    assert value(lab("schedule.kind=hard"), "schedule.every") == 50
    assert value(lab("schedule.kind=ema"), "schedule.rate") == 0.04
    assert lab("schedule.kind=evidence").schedule.model_dump() == {
        "kind": "evidence",
        "min_isolation": 30,
        "probe_every": 2,
        "probe_questions": 16,
        "probe_samples": 4,
        "probes": 10,
        "min_z": 2.9,
        "max_length_ratio": 1.15,
        "max_tail_growth": 1.25,
        "gates": ("isolation", "reward", "length", "tail"),
    }
    with pytest.raises(UsageError, match="a gate is named twice"):
        lab("schedule={kind: evidence, gates: [tail,tail]}")
    assert value(lab("schedule.kind=trust_region"), "schedule.rate") == 0.04


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("steps=7", "steps", 7),
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("objective.top_k=20", "objective.top_k", 20),
        ("objective.ratio_cap=null", "objective.ratio_cap", None),
        ("objective.clip_range=[0.1, 0.3]", "objective.clip_range", (0.1, 0.3)),
        ("schedule.gates=[]", "schedule.gates", ()),
        ("schedule.gates=[length]", "schedule.gates", ("length",)),
        ("log.sinks=[wandb,tensorboard]", "log.sinks", ("wandb", "tensorboard")),
        ("collapse.stop=true", "collapse.stop", True),
        ("out=runs/a=b", "out", "runs/a=b"),
        ("out=", "out", None),
        ("device=cuda:3", "device", "cuda:3"),
    ],
)
def test_dotted_overrides(override: str, key: str, expected: Any) -> None:
    assert value(lab(override), key) == expected


def test_the_last_override_wins() -> None:
    assert lab("steps=7", "steps=9").steps == 9


def test_overrides_reach_into_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 40\nrollout: {prompts_per_step: 2, samples_per_prompt: 3}\n")
    config = load_config(str(file), ["rollout.prompts_per_step=8"])
    assert (config.steps, config.rollout.prompts_per_step) == (40, 8)
    assert config.rollout.samples_per_prompt == 3


def test_a_mapping_sets_its_whole_group() -> None:
    plain = Config()
    assert lab().rollout.max_new_tokens != plain.rollout.max_new_tokens
    config = lab("rollout={samples_per_prompt: 8}")
    assert config.rollout == plain.rollout.model_copy(update={"samples_per_prompt": 8})
    assert lab("schedule={kind: hard, every: 7}").schedule == HardConfig(every=7)
    assert lab("schedule={window: 3}").schedule == CGTRConfig(window=3)
    assert lab("optimizer={}").optimizer == plain.optimizer


@pytest.mark.parametrize("reverse", [False, True])
def test_another_kind_starts_its_group_afresh(tmp_path: Path, reverse: bool) -> None:
    file = tmp_path / "hard.yaml"
    file.write_text("schedule: {kind: hard, every: 7}\n")
    overrides = ["schedule.kind=ema", "schedule.rate=0.5"]
    config = load_config(str(file), overrides[::-1] if reverse else overrides)
    assert config.schedule.model_dump() == {"kind": "ema", "rate": 0.5}
    # The same kind keeps what the file says.
    assert load_config(str(file), ["schedule.kind=hard"]).schedule == HardConfig(every=7)


def test_a_file_without_a_kind_is_of_the_default_kind(tmp_path: Path) -> None:
    file = tmp_path / "cgtr.yaml"
    file.write_text("schedule: {min_isolation: 3}\ntask: {test: 5}\n")
    assert load_config(str(file), []).schedule == CGTRConfig(min_isolation=3)
    assert load_config(str(file), ["schedule.kind=cgtr"]).schedule == CGTRConfig(min_isolation=3)
    assert load_config(str(file), ["schedule.kind=hard"]).schedule == HardConfig()
    assert load_config(str(file), []).task.test == 5


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


def floats() -> list[str]:
    """Every key that takes a float, from the configuration itself."""
    keys = []
    for name, section in lab().model_dump().items():
        if isinstance(section, dict) and name != "lab":
            keys += [f"{name}.{key}" for key, value in section.items() if isinstance(value, float)]
    return keys


@pytest.mark.parametrize("key", floats())
@pytest.mark.parametrize("bad", [".nan", ".inf", "-.inf"])
def test_no_number_may_be_nan_or_infinite(key: str, bad: str) -> None:
    assert refusal(f"{key}={bad}").startswith(f"{key}: ")


def test_numbers_within_lists_may_not_be_nan_either() -> None:
    assert refusal("optimizer.betas=[0.9, .nan]").startswith("optimizer.betas.1: ")
    assert refusal("objective.clip_range=[.inf, 0.2]").startswith("objective.clip_range.0: ")
    assert refusal("steps=.nan").startswith("steps: ")


@pytest.mark.parametrize("override", ["steps", "=3", "", "lab.yaml"])
def test_an_override_needs_a_key_and_a_value(override: str) -> None:
    assert "write key=value" in refusal(override)


@pytest.mark.parametrize("text", ["steps=[", "out='", "out={a", "out=${", "out=${zebra}"])
def test_an_override_that_is_not_yaml_is_quoted(text: str) -> None:
    message = refusal(text)
    assert "override" in message and text in message


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}{demonstration}",
        "{prompt}{demonstration}{feedback}{answer}",
        "{prompt}{demonstration}{feedback}{}",
        "{prompt!r}{demonstration}{feedback}",
        "{prompt:d}{demonstration}{feedback}",
        "{prompt.id}{demonstration}{feedback}",
        "{prompt}{demonstration}{feedback}{",
    ],
)
def test_a_template_that_could_not_be_filled_is_refused(template: str) -> None:
    assert refusal(f"teacher.template='{template}'").startswith("teacher.template: ")


def test_templates_may_hold_literal_braces() -> None:
    config = lab("teacher.template='{prompt}{demonstration}{feedback} as {{json}}'")
    filled = config.teacher.template.format(prompt="a", demonstration="b", feedback="c")
    assert filled == "abc as {json}"
    assert refusal("teacher.demonstration_template=x").endswith(
        "must contain exactly the fields {demonstration} (got 'x')"
    )
    assert refusal("teacher.feedback_template='{demonstration}'").startswith(
        "teacher.feedback_template: "
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# nothing but a comment\n",
        b"{}",
        b"null",
        b"5",
        b"hello",
        b"- steps: 5\n",
        b"steps: [",
        b"steps: 3\nsteps: 4",
        b"steps: 3\n---\nsteps: 4",
        b"\xff\xfe\x00",
        b"\x00",
        b"null: 3",
        b"steps: !!python/object/apply:os.getcwd []",
        b"steps: !!binary aGVsbG8=",
        b"steps: ${steps}",
        b"schedule: hard",
        b"steps: " + b"9" * 5000,
        b"steps: " + b"[" * 3000 + b"]" * 3000,
    ],
    ids=lambda content: str(content[:24]),
)
def test_unusable_files(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    refusal(source=str(file))


def test_missing_files_name_the_presets(tmp_path: Path) -> None:
    for source in ("nope", "lab.yaml", str(tmp_path), str(tmp_path / "no.yaml"), "a" * 300):
        message = refusal(source=source)
        assert source in message and all(preset in message for preset in ("presets: ", "lab"))


def test_a_group_that_is_no_mapping_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("schedule: hard\n")
    assert "schedule.kind" in refusal("schedule.kind=ema", source=str(file))


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


@pytest.mark.parametrize("value", ["-1", "fast", "1.5", "true"])
def test_kept_layers_are_a_count_or_auto(value: str) -> None:
    message = refusal(f"model.kept_layers={value}", "model.gradient_checkpointing=true")
    assert "model.kept_layers" in message


def test_auto_means_nothing_where_all_layers_keep_their_activations() -> None:
    config = load_config("qwen3_8b_80gb", ["model.gradient_checkpointing=false", "memory_gib=null"])
    assert config.model.kept_layers == "auto"


def test_scoring_takes_trainings_micro_batches_unless_it_has_a_budget() -> None:
    assert lab("optimizer.micro_batch_tokens=123").scoring_tokens == 123
    own = lab("optimizer.micro_batch_tokens=123", "teacher.micro_batch_tokens=45")
    assert own.scoring_tokens == 45


def test_a_number_of_shards_that_is_not_used_need_not_divide() -> None:
    assert lab("schedule.shards=5").schedule.length_unit == "sequence"


# ---------------------------------------------------------------- a file built on another


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_base_gives_what_the_file_leaves_open(tmp_path: Path) -> None:
    write(tmp_path / "below.yaml", "base: lab\nsteps: 7\neval: {every: 3, samples: 2}\n")
    file = write(tmp_path / "above.yaml", "base: below.yaml\neval: {samples: 4}\n")
    config = load_config(file, ["eval.temperature=0"])
    assert config.steps == 7
    assert (config.eval.every, config.eval.samples, config.eval.temperature) == (3, 4, 0)
    assert config.rollout == lab().rollout
    assert "base" not in config.to_yaml()  # what a run stores stands alone


def test_a_list_and_a_null_replace_those_of_the_base(tmp_path: Path) -> None:
    write(tmp_path / "below.yaml", "objective: {top_k: 20, clip_range: [0.1, 0.1]}\n")
    text = "base: below.yaml\nobjective: {top_k: null, clip_range: [0.3, 0.4]}\n"
    objective = load_config(write(tmp_path / "above.yaml", text), []).objective
    assert objective.top_k is None and objective.clip_range == (0.3, 0.4)


def test_another_kind_starts_the_bases_group_afresh(tmp_path: Path) -> None:
    write(tmp_path / "below.yaml", "schedule: {kind: hard, every: 7}\n")
    same = write(tmp_path / "same.yaml", "base: below.yaml\nschedule: {every: 9}\n")
    other = write(tmp_path / "other.yaml", "base: below.yaml\nschedule: {kind: ema}\n")
    assert load_config(same, []).schedule == HardConfig(every=9)
    assert load_config(other, []).schedule == EMAConfig()
    write(tmp_path / "below.yaml", "schedule: {check_every: 7}\n")  # of cgtr, the default
    assert load_config(other, []).schedule == EMAConfig()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("base: nope", "nope"),
        ("base: [lab]", "base must be a preset's name or a file"),
        ("base: 3", "base must be a preset's name or a file"),
        ("base: ${steps}", "steps"),
        ("base: file.yaml", "is built on itself"),
        ("base: other.yaml", "is built on itself"),
        ("base: empty.yaml", "must hold a mapping"),
        ("base: lab\nrollout: 3", "rollout"),
        ("base: lab\nzebra: 3", "unknown key zebra"),
    ],
)
def test_unusable_bases(text: str, named: str, tmp_path: Path) -> None:
    write(tmp_path / "other.yaml", "base: file.yaml\n")
    write(tmp_path / "empty.yaml", "{}\n")
    file = write(tmp_path / "file.yaml", text + "\n")
    assert named in refusal(source=file)


def test_base_is_a_key_of_files_only() -> None:
    assert refusal("base=lab").startswith("unknown key base")


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


def test_paths_of_a_users_task_are_kept_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["task.train=a.jsonl", "task.test=org/name"]
    task = load_config("lab", ["task.name=python", "task.source=own.py:reward", *rows]).task
    assert task.source == f"{tmp_path}/own.py:reward"
    assert (task.train, task.test) == (f"{tmp_path}/a.jsonl", "org/name")
    task = load_config("lab", ["task.name=python", "task.source=package.own:reward"]).task
    assert task.source == "package.own:reward"
    for source in ("own.py", ":reward", "own.py:a.b"):
        message = refusal("task.name=python", f"task.source={source}")
        assert message.startswith("task.source: must be FILE.py:NAME or module.submodule:NAME")
    assert "did you mean memory_mib?" in refusal(
        "task.name=code", "task.train=a.jsonl", "model.path=m", "task.options.memory=3"
    )
    # What a task's rewards are compared with may be on their own scale, where they are the user's.
    keys = ["task.name=python", "task.source=package.own:reward", "collapse.eval_floor=-1"]
    assert load_config("lab", keys).collapse.eval_floor == -1


# ---------------------------------------------------------------- bounds and hostile texts


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.betas=[1,1]",
        "optimizer.eps=1e-300",
        "optimizer.lr=1e300",
        "rollout.temperature=1e-300",
        "rollout.temperature=1e300",
        "eval.temperature=1e-300",
        "schedule.window=1e20",
        "schedule.window=100000000000000000000",
        "schedule.window=9223372036854775807",
        "objective.ratio_cap=1e308",
        "rollout.cache_gib=1e300",
        "memory_gib=1e300",
        "threads=2147483648",
        "device=cuda:99999999999999999999",
        "device=cuda:1000",
        "lab.passes=[]",
        "lab.passes=[-1,2]",
        "lab.passes=[0.5]",
        "lab.passes=[1,0]",
        "lab.long_passes=9",
        "lab.heads=1000",
        "lab.heads=0",
        "lab.heads=5",
        "lab.hidden_size=100000000000000000000",
        "lab.product_error=[2,3]",
        "lab.sum_error=[-1,0]",
        "lab.lr=1e300",
        "model.path=" + "x" * 300,
        "model.path=" + "x/" * 2500,
        'out="a\\0b"',
    ],
    ids=lambda text: text[:40],
)
def test_values_that_would_fail_in_the_middle_of_a_run(override: str) -> None:
    message = refusal(override)
    assert override.partition("=")[0] in message and len(message) < 800


@pytest.mark.parametrize(
    "override", ["lab.passes=[0,1]", "lab.passes=[0.2,0.3,0.5]", "lab.long_passes=1", "lab.heads=3"]
)
def test_what_the_lab_can_do_is_accepted(override: str) -> None:
    assert lab(override) != lab()


NESTED = {
    "lists": "[" * 100_000,
    "closed lists": "[" * 50_000 + "]" * 50_000,
    "mappings": "{a: " * 30_000,
    "sequences": "- " * 30_000,
    "references": "${" * 30_000,
    "closed references": "'" + "${" * 900 + "}" * 900 + "'",
}


@pytest.mark.parametrize("name", NESTED)
def test_deep_nesting_is_refused_and_ends_no_process(name: str, tmp_path: Path) -> None:
    assert "override" in refusal(f"out={NESTED[name]}")
    file = tmp_path / "config.yaml"
    file.write_text(f"out: {NESTED[name]}")
    if name != "closed references":
        assert "cannot be read as YAML" in refusal(source=str(file))
    refusal(source=str(file))


@pytest.mark.parametrize("key", ["a." * 30_000 + "b", "steps" + "[" * 30_000, "steps[0]", "a..b"])
def test_a_key_that_is_no_dotted_name_is_refused(key: str) -> None:
    assert "write key=value" in refusal(f"{key}=1")


def test_a_lone_surrogate_is_refused() -> None:
    assert "surrogates" in refusal("log.project=\udcff")


ENVIRONMENT = ["${oc.env:HOME}", "x ${oc.env:HOME}", "${oc.decode:${oc.env:HOME}}"]


@pytest.mark.parametrize("text", ENVIRONMENT)
def test_the_environment_is_never_read(text: str, tmp_path: Path) -> None:
    assert "reads the environment" in refusal(f"log.project={text}")
    file = tmp_path / "config.yaml"
    for content in (
        f"log: {{project: '{text}'}}",
        f"base: '{text}'",
        f"log: {{sinks: ['{text}']}}",
    ):
        file.write_text(content)
        assert "reads the environment" in refusal(source=str(file))


@settings(deadline=None)
@given(st.text(alphabet="\\${}a:.'\" ,[]é", max_size=9), st.sampled_from(["", "${oc.env:HOME}"]))
def test_a_literal_text_stays_what_it_is(
    tmp_path_factory: pytest.TempPathFactory, text: str, environment: str
) -> None:
    """Written, read, overridden and read again: as on every resume."""
    config = Config(log=LogConfig(project=text + environment))
    file = tmp_path_factory.mktemp("literal") / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(str(file), []) == config
    assert load_config(str(file), ["steps=7"]).log == config.log
    assert changed(config, ["steps=7"]).log == config.log


def test_an_escaped_reference_in_a_file_or_an_override_is_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("log: {project: '\\${oc.env:HOME}'}")
    for config in (load_config(str(file), []), lab("log.project='\\${oc.env:HOME}'")):
        assert config.log.project == "${oc.env:HOME}"


@pytest.mark.parametrize("name", ["passwd", "secret.txt", "/etc/passwd"])
def test_a_base_that_is_no_configuration_is_not_printed(name: str, tmp_path: Path) -> None:
    for secret in ("root:x:0:0", "key: [token", "token"):
        (tmp_path / name).write_text(secret) if name[0] != "/" else None
        file = tmp_path / "config.yaml"
        file.write_text(f"base: {name}\n")
        message = refusal(source=str(file))
        assert name in message and "root:" not in message and "token" not in message


def test_a_yaml_error_names_the_place_and_not_the_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 3\nout: [token\nsteps: }")
    message = refusal(source=str(file))
    assert "line 3, column" in message and "token" not in message
