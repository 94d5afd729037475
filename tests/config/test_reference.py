"""The reference of keys: complete, in plain sentences, and true to what pydantic accepts."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import cache
from typing import Any

import pytest
import yaml
from configurations import lab

from sodfast.config import Config
from sodfast.config.reference import keys_reference
from sodfast.errors import UsageError

# (member of a union such as "schedule.kind=hard", or ""; key)
Place = tuple[str, str]


@cache
def rows() -> dict[Place, tuple[str, str, str]]:
    """What the page says of each key: what it takes, its default, its sentence."""
    found, member = {}, ""
    for line in keys_reference().splitlines():
        if line.startswith("#"):
            member = line.removeprefix("### ") if line.startswith("### ") else ""
        elif line.startswith("| `"):
            cells = [cell.replace("\\|", "|") for cell in re.split(r"(?<!\\) \| ", line[2:-2])]
            place = member, cells[0].strip("`")
            assert place not in found
            found[place] = (cells[1], cells[2], cells[3])
    return found


@cache
def schema() -> dict[Place, Mapping[str, Any]]:
    """The same keys with what pydantic's own JSON schema says of them."""
    whole = Config.model_json_schema()
    definitions = whole["$defs"]

    def keys(model: Mapping[str, Any], path: str, member: str) -> Iterator[tuple[Place, Any]]:
        required = model.get("required", ())
        for name, one in model["properties"].items():
            key = f"{path}.{name}".lstrip(".")
            if path or name not in groups:
                yield (member, key), {**one, "required": name in required}
            for choice in (one, *one.get("anyOf", ())):
                if "$ref" in choice:
                    inner = definitions[choice["$ref"].rpartition("/")[2]]
                    yield from keys(inner, key, member)
            if "discriminator" in one:
                told = one["discriminator"]["propertyName"]
                yield ("", f"{key}.{told}"), {"default": one["default"][told], "required": False}
                for kind, reference in one["discriminator"]["mapping"].items():
                    found = keys(
                        definitions[reference.rpartition("/")[2]], key, f"{key}.{told}={kind}"
                    )
                    yield from (item for item in found if item[0][1] != f"{key}.{told}")

    groups = [n for n, one in whole["properties"].items() if "$ref" in one or "oneOf" in one]
    return dict(keys(whole, "", ""))


def test_the_page_lists_exactly_the_keys_of_the_configuration() -> None:
    assert rows().keys() == schema().keys()
    assert len(rows()) > 150


def test_unions_have_a_section_for_each_member_and_groups_one_of_their_own() -> None:
    headings = re.findall(r"^### (.*)$", keys_reference(), re.MULTILINE)
    defined = Config.model_json_schema()["properties"]
    told = {"schedule": "kind", "task": "name"}
    assert headings == [
        f"{group}.{told[group]}={kind}"
        for group in defined
        if group in told
        for kind in re.findall(r"`(\w+)`", rows()["", f"{group}.{told[group]}"][0])
    ]
    for group, key in told.items():
        assert sum(one.startswith(f"{group}.{key}=") for one in headings) == len(
            defined[group]["discriminator"]["mapping"]
        )
    groups = [name for name, value in Config().to_layer().items() if isinstance(value, dict)]
    assert re.findall(r"^## (.*)$", keys_reference(), re.MULTILINE) == ["The run", *groups]


def test_a_key_has_one_sentence() -> None:
    for place, (_, _, sentence) in rows().items():
        assert sentence.endswith(".") and ". " not in sentence and "  " not in sentence, place
        assert sentence[0].isupper() or sentence[0] == "`", place
        assert len(sentence) < 400, place


def test_a_key_without_a_sentence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = type(Config().rollout)
    for model, key, path in (
        (Config, "steps", "steps"),
        (Config, "rollout", "rollout"),
        (rollout, "top_k", "rollout.top_k"),
        (type(Config().schedule), "kind", "schedule.kind=cgtr"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(model.model_fields[key], "description", None)
            with pytest.raises(ValueError, match=f"^{path} has no sentence: "):
                keys_reference()


def test_defaults_are_those_that_pydantic_holds() -> None:
    for place, (takes, written, _) in rows().items():
        if schema()[place]["required"]:
            assert written == "required", place
        elif written == "":
            assert takes == "a group", place
        else:
            code = re.match(r"`(.*?)`(;|$)", written)
            assert code is not None, place
            read, expected = yaml.safe_load(code[1]), schema()[place].get("default", {})
            # YAML 1.1, which PyYAML reads, takes 1e-5 for a text.
            assert (float(read) if isinstance(expected, float) else read) == expected, place


RANGE = re.compile(r"(integer|number) (?:(≥|>) (\S+)|in ([\[(])(\S+), (\S+)([\])]))")


@pytest.mark.parametrize(("member", "key"), [k for k, row in rows().items() if RANGE.match(row[0])])
def test_ranges_are_those_that_pydantic_holds(member: str, key: str) -> None:
    """The end of a range is accepted or not as the page says, and what lies beyond is refused."""
    found = RANGE.match(rows()[member, key][0])
    assert found is not None
    whole, sign, least, left, low, high, right = found.groups()
    ends = [(Decimal(least or low), sign == "≥" or left == "[", -1)]
    ends += [(Decimal(high), right == "]", 1)] if high else []
    for end, inside, outwards in ends:
        step = outwards * (1 if whole == "integer" else abs(end) / 1000 or Decimal("0.001"))
        accepted, refused = (end, end + step) if inside else (end - step, end)
        assert not out_of_range(member, key, accepted), accepted
        assert out_of_range(member, key, refused), refused


def out_of_range(member: str, key: str, value: Decimal) -> bool:
    """Whether this value is refused for itself, and not only for what it stands beside."""
    try:
        lab(*([member] if member else []), f"{key}={value:f}")
    except UsageError as error:
        return bool(re.search(rf"(^|; ){re.escape(key)}(\.[\w-]+)?: Input should be", str(error)))
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
        ("", "log.sinks", "a list: `tensorboard` · `wandb` · `trackio`", "`[]`"),
        ("task.name=math", "task.train", "text", "required"),
        ("task.name=math", "task.timeout", "number > 0", "`10`"),
        ("task.name=code", "task.timeout", "number > 0", "`10`"),
        ("task.name=code", "task.options", "a group", ""),
        ("task.name=code", "task.options.processes", "integer ≥ 1", "`16`"),
        ("task.name=python", "task.options", "a mapping", "`{}`"),
        ("task.name=python", "task.timeout", "number > 0", "`60`"),
        ("schedule.kind=hard", "schedule.every", "integer ≥ 1", "`50`"),
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
