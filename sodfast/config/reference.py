"""The reference of keys, as Markdown, from the models themselves.

What a key takes and its default are what pydantic holds, and its sentence is the text below it in
the model, so the page says what a run does. This stands beside the models because it reads nothing
else; what makes a site of the page is no business of the package.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sodfast.config import Config, Section, load_config
from sodfast.config.layers import DISCRIMINATORS
from sodfast.config.types import LARGEST, MOST

PRESETS = ("lab", "qwen3_8b_80gb")  # whose values stand beside the defaults
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text"}
_OPENING = f"""\
# Reference of keys

Every key of a configuration, generated from the models that check it. In a file groups are
mappings; an override is `group.key=value`. Behind a default stands what the presets
{" and ".join(PRESETS)} have instead, where they do; `sodfast train … --dry-run` prints all values
of a run. Upper bounds that all keys share, {MOST} for integers and {LARGEST:.0f} for numbers, are
left out.
"""


@dataclass(frozen=True)
class Key:
    """A row of the reference: the dotted key, and in Markdown what it takes, its default, what it
    does."""

    path: str
    takes: str
    default: str
    sentence: str


def keys_reference() -> str:
    """The page, a section for each group, and in a union for each member.

    Raises `ValueError`, which names the key, where one has no sentence.
    """
    presets = {name: load_config(name) for name in PRESETS}
    groups = {
        name: field
        for name, field in Config.model_fields.items()
        if field.discriminator or _section(field.annotation)
    }
    alone = [name for name in Config.model_fields if name not in groups]
    parts = [_OPENING, "## The run", _table(_rows(Config, "", presets, alone))]
    for name, field in groups.items():
        values = {preset: getattr(config, name) for preset, config in presets.items()}
        parts += [f"## {name}", _sentence(name, field), *_group(name, field, values)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _group(name: str, field: FieldInfo, presets: Mapping[str, Any]) -> Iterator[str]:
    """What stands below a group's heading: its keys, or those of each member of a union."""
    section = _section(field.annotation)
    if section is not None:
        yield _table(_rows(section, name, presets, list(section.model_fields)))
        return
    key, kind = DISCRIMINATORS[name]
    members = {one.model_fields[key].default: one for one in get_args(field.annotation)}
    chosen = {preset: getattr(value, key) for preset, value in presets.items()}
    choices = " · ".join(map(_yaml, members))
    yield _table([Key(f"{name}.{key}", choices, _values(kind, chosen), "Which of these it is.")])
    for kind, member in members.items():
        own = [other for other in member.model_fields if other != key]
        values = {preset: value for preset, value in presets.items() if isinstance(value, member)}
        yield f"### {name}.{key}={kind}"
        yield _sentence(f"{name}.{key}={kind}", member.model_fields[key])
        if own:
            yield _table(_rows(member, name, values, own))


def _rows(
    model: type[BaseModel], prefix: str, presets: Mapping[str, Any], names: Sequence[str]
) -> Iterator[Key]:
    """The keys `names` of a group, each that is a group itself followed by its own. `presets`: what
    each preset has for the group, None where it has no such group."""
    for name in names:
        field = model.model_fields[name]
        path = f"{prefix}.{name}".lstrip(".")
        values = {preset: getattr(value, name, None) for preset, value in presets.items()}
        inner = _section(field.annotation)
        default = "required"
        if inner is field.annotation:
            default = ""
        elif not field.is_required():
            known = {preset: value for preset, value in values.items() if presets[preset]}
            default = _values(field.get_default(call_default_factory=True), known)
        takes = " or ".join(_takes(field.annotation, field.metadata))
        yield Key(path, takes, default, _sentence(path, field))
        if inner is not None:
            yield from _rows(inner, path, values, list(inner.model_fields))


def _values(default: Any, presets: Mapping[str, Any]) -> str:
    changed = [f"{name}: {_yaml(value)}" for name, value in presets.items() if value != default]
    return "; ".join([_yaml(default), *changed])


def _yaml(value: Any) -> str:
    """A value as it is written on the command line, as code."""
    if isinstance(value, str) and value.replace("_", "").isalnum():
        return f"`{value}`"
    if isinstance(value, float):
        return f"`{_number(value)}`"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _number(value: float) -> str:
    return repr(value).replace("e-0", "e-").replace("e+", "e").removesuffix(".0")


def _takes(annotation: Any, metadata: Sequence[Any]) -> list[str]:
    """In words, the alternatives that pydantic accepts for a key or for an item of a list."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes(inner[0], [*inner[1:], *metadata])
    if origin in (Union, UnionType):
        return [words for one in inner for words in _takes(one, metadata)]
    if origin is Literal:
        return [" · ".join(map(_yaml, inner))]
    if origin is tuple:
        some = any(getattr(one, "min_length", None) for one in _flat(metadata))
        kind = "a non-empty list" if some else "a list"
        kind += "" if inner[-1] is Ellipsis else f" of {len(inner)}"
        return [f"{kind}: {' or '.join(_takes(inner[0], []))}"]
    if origin is dict:
        return ["a mapping"]
    if annotation is NoneType:
        return ["`null`"]
    return ["a group"] if _is_section(annotation) else [_TYPES[annotation] + _range(metadata)]


def _range(metadata: Sequence[Any]) -> str:
    """The range of a number, an interval where it has two ends; none for other values."""
    ends: dict[str, float] = {}
    for one in _flat(metadata):
        for name in ("ge", "gt", "le", "lt"):
            bound = getattr(one, name, None)
            if bound is not None and abs(bound) not in (MOST, LARGEST):
                ends[name] = bound
    low, high = ends.get("ge", ends.get("gt")), ends.get("le", ends.get("lt"))
    if low is not None and high is not None:
        left, right = "[" if "ge" in ends else "(", "]" if "le" in ends else ")"
        return f" in {left}{_number(low)}, {_number(high)}{right}"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return "".join(f" {signs[name]} {_number(bound)}" for name, bound in ends.items())


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for one in metadata:
        yield from one.metadata if isinstance(one, FieldInfo) else [one]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section(annotation: Any) -> type[Section] | None:
    """The group that a key is, or may be; None for a value and for a union of groups."""
    found = [one for one in (annotation, *get_args(annotation)) if _is_section(one)]
    return found[0] if len(found) == 1 else None


def _sentence(path: str, field: FieldInfo) -> str:
    if not field.description:
        raise ValueError(f"{path} has no sentence: write one below the key, in sodfast/config/")
    return " ".join(field.description.split())


def _table(rows: Iterator[Key] | Sequence[Key]) -> str:
    lines = ["| key | takes | default | |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.path}`", row.takes, row.default, row.sentence)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
