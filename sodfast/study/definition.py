"""Study files: a base configuration, overrides and axes, expanded into named trials.

    base: lab                  # a preset's name, or a configuration file beside the study file
    overrides:                 # dotted keys; nested mappings mean the same
      steps: 300
    axes:                      # dotted key → values; the trials are their product, in file order
      schedule: [{kind: fixed}, {kind: hard, every: 50}]    # a mapping sets its whole group
      seed: [0, 1, 2]
    variants:                  # one more axis, before the others: points that change keys together
      plain: {}
      long: {steps: 600, optimizer.lr: 5e-6}

What a study directory holds is in directory.py.
"""

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sodfast.config import PRESETS, Config, load_config, parse_overrides, read_mapping
from sodfast.errors import UsageError

STUDIES = PRESETS / "studies"
VARIANT = "variant"  # what the axis of the variants is called


@dataclass(frozen=True)
class Trial:
    """One configuration of a study. `point`: axis key → label of its value."""

    name: str
    point: dict[str, str]
    overrides: list[str]
    config: Config = field(repr=False, compare=False)


class Study(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    overrides: dict[str, Any] = {}  # dotted key → value, after `load_study`
    axes: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    variants: dict[str, dict[str, Any]] = {}  # name → dotted key → value

    @cached_property
    def trials(self) -> list[Trial]:
        """The product of the axes in file order, the last axis fastest.

        Raises `UsageError` for a configuration that `load_config` refuses, and for two trials of
        one name or one configuration.
        """
        fixed = [_assignment(key, value) for key, value in self.overrides.items()]
        trials = []
        for choices in itertools.product(*self._choices):
            name = ",".join(choice.part for choice in choices)
            overrides = fixed + [text for choice in choices for text in choice.overrides]
            try:
                config = load_config(self.base, overrides)
            except UsageError as error:
                raise UsageError(f"trial {name}: {error}") from error
            point = {choice.axis: choice.label for choice in choices}
            trials.append(Trial(name, point, overrides, config))
        _check_distinct(trials)
        return trials

    @property
    def _choices(self) -> list[list["_Choice"]]:
        """For each axis what there is to choose from; the variants are the first axis."""
        words = [key.rpartition(".")[2] for key in self.axes]
        choices = []
        if self.variants:
            choices.append([_variant(name, values) for name, values in self.variants.items()])
        for (key, values), word in zip(self.axes.items(), words, strict=True):
            # Called by its last word, or by its whole key where two end in the same word.
            called = word if words.count(word) == 1 else key
            choices.append(
                [
                    _Choice(key, _label(v), _name_part(called, v), [_assignment(key, v)])
                    for v in values
                ]
            )
        return choices

    def to_yaml(self) -> str:
        values = self.model_dump(exclude=set() if self.variants else {"variants"})
        return OmegaConf.to_yaml(OmegaConf.create(values))


@dataclass(frozen=True)
class _Choice:
    """A value of an axis: what it is called, its part of a trial's name, and what it changes."""

    axis: str
    label: str
    part: str
    overrides: list[str]


def _variant(name: str, values: Mapping[str, Any]) -> _Choice:
    changed = [_assignment(key, value) for key, value in flatten(values).items()]
    return _Choice(VARIANT, name, _name_part("name", name), changed)


def find_study(source: str) -> Path:
    """The file of a shipped study's name, or of a path."""
    path = STUDIES / f"{source}.yaml"
    if not path.is_file():
        path = Path(source)
    if not os.path.isfile(path):
        names = ", ".join(sorted(study.stem for study in STUDIES.glob("*.yaml"))) or "none"
        raise UsageError(f"no study file {source!r} and no such study (studies: {names})")
    return path


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and join `key=value` texts to its overrides.

    Raises `UsageError` with one line for whatever is wrong with it or with any of its trials.
    """
    try:
        values = OmegaConf.to_container(read_mapping(path), resolve=True)
        json.dumps(values)
        study = Study.model_validate(values)
    except TypeError as error:  # YAML has dates and bytes
        raise UsageError(f"{path}: {error}: write numbers, texts, lists and mappings") from error
    except OmegaConfBaseException as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        reasons = "; ".join(_explain(item) for item in error.errors())
        raise UsageError(f"{path}: {reasons}") from error
    if not (PRESETS / f"{study.base}.yaml").is_file():
        study = study.model_copy(update={"base": str((path.parent / study.base).absolute())})
    joined = flatten(study.overrides)
    for key, value in parse_overrides(list(overrides)):
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        joined |= flatten({key: plain})
    study = study.model_copy(update={"overrides": joined})
    try:
        _check_keys(study)
        _ = study.trials  # expanded once, here: what is wrong with a trial is wrong with the file
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return study


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key} (known: {', '.join(Study.model_fields)})"
    if error["type"] == "too_short":
        return f"{key} is empty: give it at least one {'axis' if key == 'axes' else 'value'}"
    if error["type"] == "list_type":
        return f"{key}: an axis is a dotted key with a list of values (got {error['input']!r})"
    return f"{key}: {error['msg']}"


def _check_keys(study: Study) -> None:
    """Each key is decided in one place: not in two, and not undone by a later whole group."""
    varied = list(
        dict.fromkeys(key for values in study.variants.values() for key in flatten(values))
    )
    if "out" in [*study.axes, *study.overrides, *varied]:
        raise UsageError("out is no key of a study: give out=DIRECTORY on the command line")
    for first, key in itertools.combinations([*study.overrides, *varied, *study.axes], 2):
        if first == key and key in varied:
            raise UsageError(f"{key} is changed by variants and elsewhere: drop one of them")
        if first == key:
            raise UsageError(f"{key} is an axis and an override: drop one of them")
        if first.startswith(f"{key}."):
            raise UsageError(
                f"axis {key} sets a whole group and would undo {first}: write {first} as a later "
                "axis or into the axis's values"
            )


def _check_distinct(trials: Sequence[Trial]) -> None:
    names: dict[str, Trial] = {}
    configs: dict[str, Trial] = {}
    for trial in trials:
        # Some file systems do not tell upper case from lower case.
        other = names.setdefault(trial.name.casefold(), trial)
        if other is not trial:
            raise UsageError(
                f"two trials are named {trial.name}: {_differing(other, trial)} and "
                f"{_differing(trial, other)}"
            )
        other = configs.setdefault(trial.config.model_dump_json(exclude={"out"}), trial)
        if other is not trial:
            raise UsageError(
                f"trials {other.name} and {trial.name} have the same configuration: drop one"
            )
        if len(trial.name.encode()) > 200:
            raise UsageError(f"trial name {trial.name} is too long for a directory: use fewer axes")


def _differing(trial: Trial, other: Trial) -> str:
    """The overrides that only `trial` has; for equal values, all of them."""
    own = [text for text in trial.overrides if text not in other.overrides]
    return " ".join(own or trial.overrides)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _assignment(key: str, value: Any) -> str:
    """`key=value` for `load_config` and the command line; JSON is YAML of one line."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _name_part(prefix: str, value: Any) -> str:
    label = _label(value)
    text = label if isinstance(value, Mapping) and value else _pair(prefix, label)
    text = re.sub(r"[^A-Za-z0-9._+-]+", "-", text)
    if len(text) > 60:  # a template or the like: its beginning, and what tells it from another
        return f"{text[:50]}-{sha256(label.encode()).hexdigest()[:8]}"
    return text


def _label(value: Any) -> str:
    """A value in a few characters: `hard-every50` for {kind: hard, every: 50}."""
    if isinstance(value, Mapping):
        return "-".join(_pair(key, _label(item)) for key, item in value.items()) or "default"
    if isinstance(value, list):
        return "+".join(map(_label, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _pair(key: str, label: str) -> str:
    if key in ("kind", "name"):  # the value says what it is
        return label
    return f"{key}{label}" if label[:1].isdigit() else f"{key}-{label}"
