"""The reference of keys: complete, in plain sentences, and true to what pydantic accepts."""

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from typing import Any

import pytest
import yaml
from configurations import lab
from pydantic import BaseModel

from sodfast.config import Config, load_config
from sodfast.config.reference import keys_reference
from sodfast.errors import UsageError

# What each member of a union needs to be a configuration. Their keys are listed one by one.
ROWS = ("task.train=rows.jsonl", "task.split={train: a, test: b}")
MEMBERS: dict[str, dict[str, tuple[str, ...]]] = {
    "schedule.kind": {
        **dict.fromkeys(("fixed", "hard", "ema", "cgtr", "evidence", "trust_region"), ()),
        "python": ("schedule.source=package.own:Name",),
    },
    "task.name": {
        "arithmetic": (),
        **dict.fromkeys(("multiple_choice", "tool_use", "math", "code"), ROWS),
        "python": ("task.source=package.own:Name", *ROWS),
    },
}
# Keys that are null or a text by default, as the groups that they may be.
GROUPS = ("model.lora={}", "optimizer.lr_burst={first: 1, last: 2, factor: 3.0}")
# Mappings of the user's own keys.
OPEN = ("chat_template_kwargs", "columns", "eval.tasks", "schedule.options")


@cache
def rows() -> dict[tuple[str, str], tuple[str, str, str]]:
    """(member of a union or "", key) → what it takes, its default, its sentence."""
    found, member = {}, ""
    for line in keys_reference().splitlines():
        if line.startswith("#"):
            member = line.removeprefix("### ") if line.startswith("### ") else ""
        elif line.startswith("| `"):
            cells = [cell.replace("\\|", "|") for cell in re.split(r"(?<!\\) \| ", line[2:-2])]
            found[member, cells[0].strip("`")] = (cells[1], cells[2], cells[3])
    return found


def member_overrides(member: str) -> list[str]:
    """What makes a configuration with this member of a union; "": any."""
    if not member:
        return []
    key, _, kind = member.partition("=")
    return [member, *MEMBERS[key][kind], *(["model.path=m"] if key == "task.name" else [])]


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of everything that a configuration holds, the groups' own but the topmost."""
    for name, inner in value.items():
        key = f"{path}.{name}".lstrip(".")
        group = isinstance(inner, dict) and not key.endswith(OPEN)
        if path or not group:
            yield key
        if group:
            yield from leaves(inner, key)


def test_the_page_lists_exactly_the_keys_of_the_configuration() -> None:
    expected = set()
    for union, members in MEMBERS.items():
        group = union.partition(".")[0]
        for kind in members:
            name = f"{union}={kind}"
            config = lab(*GROUPS, *member_overrides(name))
            for key in leaves(config.model_dump(mode="json")):
                if key == union or not key.startswith(("schedule.", "task.")):
                    expected.add(("", key))
                elif key.startswith(f"{group}."):
                    expected.add((name, key))
    assert set(rows()) == expected
    assert len(expected) > 150


def test_unions_have_a_section_for_each_member_and_groups_one_of_their_own() -> None:
    headings = re.findall(r"^### (.*)$", keys_reference(), re.MULTILINE)
    kinds = [f"{key}={kind}" for key, members in MEMBERS.items() for kind in members]
    assert sorted(headings) == sorted(kinds)
    groups = [name for name, value in Config().to_layer().items() if isinstance(value, dict)]
    assert re.findall(r"^## (.*)$", keys_reference(), re.MULTILINE) == ["The run", *groups]


@pytest.mark.parametrize(("member", "key"), rows())
def test_a_key_has_one_sentence(member: str, key: str) -> None:
    sentence = rows()[member, key][2]
    assert sentence.endswith(".") and ". " not in sentence and "  " not in sentence
    assert sentence[0].isupper() or sentence[0] == "`"
    assert len(sentence) < 400


def test_a_key_without_a_sentence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, key in ((Config, "steps"), (Config, "rollout"), (type(Config().rollout), "top_k")):
        with monkeypatch.context() as patch:
            patch.setattr(model.model_fields[key], "description", None)
            path = key if model is Config else f"rollout.{key}"
            with pytest.raises(ValueError, match=f"^{path} has no sentence: "):
                keys_reference()


@cache
def plain(member: str, groups: tuple[str, ...]) -> Config:
    return load_config("base", [*groups, *member_overrides(member)])


def default(member: str, key: str) -> Any:
    """What a key is where nobody sets it."""
    inside = any(f".{group}." in key for group in ("lora", "lr_burst"))
    value: Any = plain(member, GROUPS if inside else ())
    for name in key.split("."):
        value = getattr(value, name)
    if isinstance(value, BaseModel):
        return value.model_dump()
    return list(value) if isinstance(value, tuple) else value


def test_defaults_are_those_that_pydantic_holds() -> None:
    compared = 0
    for (member, key), (takes, written, _) in rows().items():
        given = any(text.startswith(f"{key}=") for text in member_overrides(member))
        if written == "required" or takes == "a group" or given or key.startswith("task.split"):
            continue
        code = re.match(r"`(.*?)`(;|$)", written)
        assert code is not None, key
        read, expected = yaml.safe_load(code[1]), default(member, key)
        # YAML 1.1, which PyYAML reads, takes 1e-5 for a text.
        assert (float(read) if isinstance(expected, float) else read) == expected, key
        compared += 1
    assert compared > 130


RANGE = re.compile(r"(integer|number) (?:(≥|>) (\S+)|in ([\[(])(\S+), (\S+)([\])]))")


@pytest.mark.parametrize(("member", "key"), [k for k, row in rows().items() if RANGE.match(row[0])])
def test_ranges_are_those_that_pydantic_holds(member: str, key: str) -> None:
    found = RANGE.match(rows()[member, key][0])
    assert found is not None
    whole, sign, least, left, low, high, right = found.groups()
    ends = [(Decimal(least or low), sign == "≥" or left == "[", -1)]
    ends += [(Decimal(high), right == "]", 1)] if high else []
    for end, inside, outwards in ends:
        step = outwards * (1 if whole == "integer" else abs(end) / 1000 or Decimal("0.001"))
        accepted, refused = (end, end + step) if inside else (end - step, end)
        assert not named(member, key, accepted), (key, accepted)
        assert named(member, key, refused), (key, refused)


def named(member: str, key: str, value: Decimal) -> bool:
    """Whether the refusal of this value, if it is refused, is about the key itself."""
    try:
        lab(*member_overrides(member), *GROUPS, f"{key}={value:f}")
    except UsageError as error:
        return str(error).startswith(key) and "Input should be" in str(error)
    return False


@pytest.mark.parametrize(
    ("member", "key", "takes", "default"),
    [
        ("", "steps", "integer ≥ 1", "`150`; qwen3_8b_80gb: `300`"),
        ("", "model.lora", "a group or `null`", "`null`"),
        ("", "model.lora.targets", "a non-empty list: text or `null`", "`null`"),
        ("", "objective.clip_range", "a list of 2: number ≥ 0", "`[0.2, 0.28]`"),
        ("", "optimizer.betas", "a list of 2: number in [0, 1)", "`[0.9, 0.999]`"),
        ("", "optimizer.lr", "number in [0, 1e38]", "`1e-5`; lab: `7e-5`"),
        ("", "optimizer.lr_burst.first", "integer ≥ 1", "required"),
        ("", "model.kept_layers", "integer ≥ 0 or `auto`", "`0`; qwen3_8b_80gb: `auto`"),
        ("task.name=math", "task.train", "text", "required"),
        ("task.name=code", "task.options", "a group", ""),
        ("task.name=code", "task.options.processes", "integer ≥ 1", "`16`"),
        ("task.name=python", "task.options", "a mapping", "`{}`"),
        ("schedule.kind=hard", "schedule.every", "integer ≥ 1", "`50`"),
        ("", "log.sinks", "a list: `tensorboard` · `wandb` · `trackio`", "`[]`"),
        (
            "",
            "task.name",
            "`arithmetic` · `multiple_choice` · `tool_use` · `math` · `code` · `python`",
            "`arithmetic`; qwen3_8b_80gb: `multiple_choice`",
        ),
    ],
)
def test_some_rows_to_the_letter(member: str, key: str, takes: str, default: str) -> None:
    assert rows()[member, key][:2] == (takes, default)


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    line = next(one for one in keys_reference().splitlines() if "dual_clip" in one)
    assert r"c·\|A\|" in line and len(re.findall(r"(?<!\\)\|", line)) == 5
