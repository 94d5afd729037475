"""Layers of a configuration: files, bases and overrides, and one line for everything wrong."""

from pathlib import Path
from typing import Any

import pytest
from configurations import lab, refusal, value
from hypothesis import given
from hypothesis import strategies as st

from sodfast.config import CGTRConfig, Config, EMAConfig, HardConfig, LogConfig, load_config
from sodfast.config import override as changed

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


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("override", ["steps", "=3", "", "lab.yaml"])
def test_an_override_needs_a_key_and_a_value(override: str) -> None:
    assert "write key=value" in refusal(override)


@pytest.mark.parametrize("text", ["steps=[", "out='", "out={a", "out=${", "out=${zebra}"])
def test_an_override_that_is_not_yaml_is_quoted(text: str) -> None:
    message = refusal(text)
    assert "override" in message and text in message


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


@pytest.mark.parametrize(
    "text", ["", "# nothing", "{}", "[1]", "3", "2001-01-01", "'a: 1'", "'{1, 2}'", "'!!set {a}'"]
)
def test_a_file_without_a_mapping(text: str, tmp_path: Path) -> None:
    """A string is a string, whatever its text would be as YAML."""
    file = write(tmp_path / "file.yaml", text)
    assert refusal(source=file) == f"{file} must hold a mapping with at least one key"


def test_base_is_a_key_of_files_only() -> None:
    assert refusal("base=lab").startswith("unknown key base")


# ---------------------------------------------------------------- hostile texts


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


@pytest.mark.parametrize("value", [f"0x{'f' * 5000}", f"-0b{'1' * 50_000}", f"[0x{'f' * 5000}]"])
def test_an_integer_that_python_reads_but_does_not_print_is_refused(
    value: str, tmp_path: Path
) -> None:
    assert "bits: write a smaller one" in refusal(f"steps={value}")
    (tmp_path / "config.yaml").write_text(f"steps: {value}\n")
    assert "bits: write a smaller one" in refusal(source=str(tmp_path / "config.yaml"))


def test_a_key_of_a_list_is_refused() -> None:
    assert "cannot set model.attention" in refusal("model=[1, 1]", "model.attention=auto")


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


@pytest.mark.slow
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
