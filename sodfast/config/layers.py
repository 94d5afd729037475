"""Layers of a configuration: presets and files in YAML, dotted overrides, and their merging.

A file may be built on another: its key `base` names the preset or file (from its own folder) whose
values hold where it gives none. Two groups are unions told apart by a key: `schedule` by `kind` and
`task` by `name`. A layer that changes that key starts the group afresh, because the keys of one
kind mean nothing to another. What the values may be is said by the models in the files beside this
one, none of which it imports; every function raises `UsageError` with one line for a text that
cannot be used.
"""

import difflib
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from sodfast.errors import UsageError

_log = logging.getLogger(__name__)

PRESETS = Path(__file__).parents[1] / "configs"
# Keys of earlier releases, each accepted for one release after it was renamed.
RENAMED = {"optimizer.state": "optimizer.adamw"}
# What earlier releases did where a key of today was not there yet and its default is something
# else: a run that they began goes on as it was.
BEFORE = {"eval.common_draws": False}
# Groups that are unions, the key that tells their members apart, and its value where it is absent.
DISCRIMINATORS = {"schedule": ("kind", "cgtr"), "task": ("name", "arithmetic")}
# What a YAML text may hold. libyaml ends the process where nesting exhausts its stack.
_DEEPEST, _MOST_INTERPOLATIONS, _MOST_BITS = 100, 1000, 10_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KEY = re.compile(r"[^.\[\]]+(\.[^.\[\]]+){0,7}")  # of an override


def read_overrides(path: Path, overrides: list[str]) -> DictConfig:
    """A run's stored configuration with overrides applied, not yet validated. A key that the
    release which stored it did not have says what that release did (`BEFORE`)."""
    layer = read_layer(str(path))
    written: Any = OmegaConf.to_container(layer)
    for key, value in BEFORE.items():
        group, _, name = key.partition(".")
        section = written.get(group, {})
        if isinstance(section, dict) and name not in section:
            _set(layer, key, value)
    return apply(overrides, layer)


def apply(
    overrides: Sequence[str], layer: DictConfig, values: Mapping[str, Any] | None = None
) -> DictConfig:
    """`layer`, changed by `key=value` texts and by Python values; of a group that is given as a
    mapping, only the keys that it names are set."""
    pairs = [*parse_overrides(overrides), *_flattened(values or {})]
    for key, value in sorted(pairs, key=_sets_no_kind):
        _set(layer, key, value)
    return layer


def _flattened(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Groups as their dotted keys, and every value as YAML would give it."""
    for name, value in values.items():
        inner = value if isinstance(value, Mapping) and "." not in name else {"": value}
        for key, item in inner.items():
            item = os.fspath(item) if isinstance(item, os.PathLike) else item
            item = list(item) if isinstance(item, tuple) else item
            yield f"{name}.{key}".rstrip("."), literal(item)


def resolve(layer: DictConfig | dict[str, Any]) -> Any:
    """A merged layer's values, with references followed and the key of each union filled in."""
    try:
        created = OmegaConf.create(layer)
        _require_plain(OmegaConf.to_container(created))
        values: Any = OmegaConf.to_container(created, resolve=True)
    except (OmegaConfBaseException, TypeError, RecursionError) as error:
        raise UsageError(f"configuration: {first_line(error)}") from error
    for group, (key, default) in DISCRIMINATORS.items():
        if isinstance(values.get(group), dict):
            values[group] = {key: default, **values[group]}
    return values


def read_layer(source: str, above: tuple[Path, ...] = ()) -> DictConfig:
    """The values of a preset or file, merged over those of its base.

    `above`: the files, outermost first, whose `base` keys led to this one.
    """
    path = _preset(source)
    if not os.path.isfile(path):
        path = Path(source)
    if not os.path.isfile(path):
        names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise UsageError(f"no configuration file {source!r} and no such preset (presets: {names})")
    if path.resolve() in above:
        raise UsageError(f"{path} is built on itself: change its base or that of {above[-1]}")
    return _on_base(read_mapping(path), path, above)


def read_mapping(path: Path) -> DictConfig:
    """The mapping in a YAML file, its references unresolved. Raises `UsageError` for any other."""
    try:
        text = path.read_text(encoding="utf-8")
        _require_shallow(text)
        # A file that is a string OmegaConf would read a second time, as the YAML in the string.
        events = yaml.parse(text, Loader=_LOADER)
        root = next((event for event in events if isinstance(event, yaml.NodeEvent)), None)
        if not isinstance(root, yaml.MappingStartEvent):
            raise UsageError(f"{path} must hold a mapping with at least one key")
        layer = OmegaConf.load(io.StringIO(text))
        _require_plain(OmegaConf.to_container(layer))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(layer, DictConfig) or not layer:
        raise UsageError(f"{path} must hold a mapping with at least one key")
    return layer


def _on_base(layer: DictConfig, path: Path, above: tuple[Path, ...]) -> DictConfig:
    """The layer, merged over the preset or file that its key `base` names.

    A file's name is relative to the folder of `path`, the layer's own file.
    """
    try:
        _rename(layer)
        base = layer.pop("base", None)
        if base is None:
            return layer
        if not isinstance(base, str):
            raise TypeError(f"base must be a preset's name or a file, not {_short(base)}")
        if not os.path.isfile(_preset(base)) and not base.endswith((".yaml", ".yml")):
            # Of any other file, an error would print the text.
            raise TypeError(f"base: {_short(base)} is neither a preset nor a file named *.yaml")
        if not os.path.isfile(_preset(base)):
            base = str(path.parent / base)
        below = read_layer(base, (*above, path.resolve()))
        for group, (key, default) in DISCRIMINATORS.items():
            ours, theirs = layer.get(group), below.get(group)
            if isinstance(ours, DictConfig) and isinstance(theirs, DictConfig):
                kind = theirs.get(key, default)
                if ours.get(key, kind) != kind:
                    del below[group]
        merged = OmegaConf.merge(below, layer)
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: {first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _rename(layer: DictConfig) -> None:
    """Give the keys of earlier releases their names of today."""
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        section = layer.get(group)
        if isinstance(section, DictConfig) and name in section:
            _say_once(f"{old} is now {new}; the next release will not know its old name")
            section[new.removeprefix(f"{group}.")] = section.pop(name)


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


def _preset(name: str) -> Path:
    return PRESETS / f"{name}.yaml"


def parse_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Split `key=value` texts and read each value as YAML, in an order that is safe to apply.

    Raises `UsageError` for a text without a key or `=` and for a value that is not YAML.
    """
    pairs = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise UsageError(
                f"{_short(text)} is not an override: write key=value, for example steps=10"
            )
        try:
            _require_shallow(text.partition("=")[2])
            layer = OmegaConf.from_dotlist([text])
            _require_plain(OmegaConf.to_container(layer))
            _rename(layer)
            key = RENAMED.get(key, key)
            value = OmegaConf.select(layer, key)
            if isinstance(value, str):
                value = literal(value)  # `select` has resolved it
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
            raise UsageError(f"override {_short(text)}: {first_line(error)}") from error
        pairs.append((key, value))
    return sorted(pairs, key=_sets_no_kind)


def _sets_no_kind(pair: tuple[str, Any]) -> bool:
    """False for the kind of a group. A change of kind empties its group, so it must come before
    the keys set within the group."""
    group, _, name = pair[0].partition(".")
    return group not in DISCRIMINATORS or name != DISCRIMINATORS[group][0]


def _set(layer: DictConfig, key: str, value: Any) -> None:
    group, _, name = key.partition(".")
    discriminator, default = DISCRIMINATORS.get(group, (None, None))
    try:
        if discriminator and name == discriminator:
            current = layer.get(group) or {}
            if current.get(discriminator, default) != value:
                layer[group] = {}
        # A mapping as a value sets its whole group.
        OmegaConf.update(layer, key, value, merge=False)
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"cannot set {key}: {first_line(error)}") from error


def explain(schema: type[BaseModel], error: Any) -> str:
    """One pydantic error as `key: what is wrong`, without the union's tags in the path.

    `schema`: the whole configuration's model, in which a key is looked up.
    """
    location = [str(part) for part in error["loc"]]
    union = _union_depth(location)
    if union is not None and len(location) > union:
        del location[union]
    key = ".".join(location)
    message = str(error["msg"]).removeprefix("Value error, ")
    if len(message) > 600:  # pydantic repeats an unknown kind in full, before those that it knows
        message = f"{message[:200]} … {message[-200:]}"
    if error["type"] == "extra_forbidden":
        known = _known_keys(schema, location[:-1], error["loc"])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        return f"unknown key {key if len(key) <= 200 else _short(key)} ({hint})"
    if not key:
        return message
    return f"{key}: {message} (got {_short(error['input'])})"


def _known_keys(
    schema: type[BaseModel], parents: list[str], location: tuple[Any, ...]
) -> list[str]:
    section: Any = schema
    union = _union_depth(parents)
    if union is not None:
        group = parents[0] if union == 1 else "task"
        key, _ = DISCRIMINATORS[group]
        members = _union_members(schema.model_fields[group].annotation)
        models = {member.model_fields[key].default: member for member in members}
        section, parents = models[location[union]], parents[union:]
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        section = next(iter(get_args(annotation)), annotation)  # the first of `section | None`
    return list(getattr(section, "model_fields", []))


def _union_depth(location: Sequence[str]) -> int | None:
    """How many keys lead to the union that a location lies in; None where it lies in none."""
    if len(location) > 0 and location[0] in DISCRIMINATORS:
        return 1
    return 3 if len(location) > 2 and tuple(location[:2]) == ("eval", "tasks") else None


def _union_members(annotation: Any) -> tuple[Any, ...]:
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    return get_args(annotation)


def _require_shallow(text: str) -> None:
    """Raise `ValueError` where YAML is nested more deeply, or refers to more keys, than any
    configuration does."""
    if text.count("${") > _MOST_INTERPOLATIONS:
        raise ValueError(f"more than {_MOST_INTERPOLATIONS} interpolations")
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} levels deep")


def _require_plain(value: Any) -> None:
    """Raise `UsageError` for a value that reads the environment: it would end up in config.yaml,
    and a run is a function of its configuration alone. Likewise for an integer that Python reads,
    in hexadecimal, but does not print."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            _require_plain(item)
    elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise UsageError(f"an integer of {value.bit_length()} bits: write a smaller one")
    elif isinstance(value, str) and re.search(r"(?<!\\)(\\\\)*\$\{.*oc\.env", value):
        raise UsageError(f"{_short(value)} reads the environment: write the value itself")


def literal(value: Any) -> Any:
    """`value` with `${` escaped, so that OmegaConf gives it back instead of looking up a key."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def first_line(error: BaseException) -> str:
    """What is wrong, and where in a YAML text, without a copy of that text."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())[:300]
