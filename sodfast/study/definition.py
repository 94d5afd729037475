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

The trials of a study with a `fork` go on from checkpoints of other runs, as `sodfast fork` does:

    fork:
      from: {schedule: {kind: hard, every: 50}, seed: 0}   # what a source has beside the above
      step: [20, 45, 80]         # the checkpoints that are forked
      further: 90                # steps of each fork after its own
    axes:
      teacher.refresh: [now, never]
      seed: [1, 2, 3, 4]         # another seed: other random numbers after the fork

The sweep makes the sources first. `from` may also be a list of such mappings, which is one more
axis, or the directory of a run, beside the study file; that run's configuration then is the base,
and overrides and variants change its forks alone.

What a study directory holds is in directory.py.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sodfast.config import PRESETS, Config, load_config, parse_overrides, read_mapping
from sodfast.errors import UsageError
from sodfast.run.fork_keys import fork_config, read_fork, read_stored, source_config

STUDIES = PRESETS / "studies"
VARIANT = "variant"  # what the axis of the variants is called


@dataclass(frozen=True)
class ForkPoint:
    """Where a trial begins: after `step` of `source`, which is the name of one of the study's
    sources, or the full path of a run directory."""

    source: str
    step: int


@dataclass(frozen=True)
class Trial:
    """One configuration of a study. `point`: axis key → label of its value. `overrides`: what
    `sodfast train` takes beside the study's base or, with `fork`, what `sodfast fork` takes."""

    name: str
    point: dict[str, str]
    overrides: list[str]
    config: Config = field(repr=False, compare=False)
    fork: ForkPoint | None = None


class Forks(BaseModel):
    """The section `fork` of a study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | dict[str, Any] | list[dict[str, Any]] = Field(alias="from")
    step: Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)]
    further: Annotated[int, Field(strict=True, ge=1)]

    @field_validator("source", mode="before")
    @classmethod
    def _is_a_source(cls, source: Any) -> Any:
        several = source if isinstance(source, list) and source else [source]
        if isinstance(source, str) or all(isinstance(one, dict) for one in several):
            return source
        raise ValueError("a mapping of keys, a list of such mappings, or the directory of a run")


class Study(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = ""  # after `load_study` there is one
    fork: Forks | None = None
    overrides: dict[str, Any] = {}  # dotted key → value, after `load_study`
    axes: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    variants: dict[str, dict[str, Any]] = {}  # name → dotted key → value

    @cached_property
    def trials(self) -> list[Trial]:
        """The product of the axes in file order, the last axis fastest.

        Raises `UsageError` for a configuration that `load_config` refuses, and for two trials of
        one name or one configuration.
        """
        if self.fork is None:
            points = itertools.product(*self._shared, *self._axes)
            trials = [self._trial(choices) for choices in points]
        else:
            trials = self._forks(self.fork)
        _check_distinct([*self.sources, *trials])
        return trials

    @cached_property
    def sources(self) -> list[Trial]:
        """The runs that the trials are forks of, in the order of the variants and of `fork.from`;
        none where the trials are no forks, or are forks of a run that is there already."""
        if self.fork is None or isinstance(self.fork.source, str):
            return []
        own = [f"steps={max(self.fork.step)}", _assignment("checkpoint.at", self.fork.step)]
        points = itertools.product(*self._shared)
        return [self._trial(choices, "source", own) for choices in points]

    def _trial(
        self, choices: Sequence["_Choice"], called: str = "", own: Sequence[str] = ()
    ) -> Trial:
        name = _name(choices, called)
        overrides = [*self._fixed, *_texts(choices), *own]
        try:
            config = load_config(self.base, overrides)
        except UsageError as error:
            raise UsageError(f"trial {name}: {error}") from error
        return Trial(name, _point(choices), overrides, config)

    def _forks(self, plan: Forks) -> list[Trial]:
        """For each source its forks, a step after the other."""
        steps = [_Choice("fork.step", str(s), f"step{s}", [f"step={s}"]) for s in plan.step]
        trials = []
        for number, shared in enumerate(itertools.product(*self._shared)):
            if isinstance(plan.source, str):
                source, original = plan.source, read_stored(Path(self.base))
                overrides = [*self._fixed, *_texts(shared)]
            else:
                source, original = self.sources[number].name, self.sources[number].config
                overrides = []
            for step, *arm in itertools.product(steps, *self._axes):
                choices = [*shared, step, *arm]
                name, last = _name(choices), int(step.label) + plan.further
                # The source's checkpoints that are kept to be forked are not the fork's.
                own = [*overrides, *_texts([step, *arm]), f"steps={last}", "checkpoint.at=[]"]
                try:
                    at, refresh, others = read_fork(own)
                    config = fork_config(original, at, others, refresh)
                except UsageError as error:
                    raise UsageError(f"trial {name}: {error}") from error
                trials.append(Trial(name, _point(choices), own, config, ForkPoint(source, at)))
        return trials

    @property
    def _fixed(self) -> list[str]:
        return [_assignment(key, value) for key, value in self.overrides.items()]

    @property
    def _shared(self) -> list[list["_Choice"]]:
        """The axes that a source has in common with its forks: the variants, then `fork.from`."""
        shared = []
        if self.variants:
            shared.append([_changes(VARIANT, "name", *item) for item in self.variants.items()])
        if self.fork is not None and isinstance(self.fork.source, dict):
            shared.append([_Choice("", "", "", _assignments(self.fork.source))])
        elif self.fork is not None and isinstance(self.fork.source, list):
            sources = [(_label(values), values) for values in self.fork.source]
            shared.append([_changes("fork.from", "from", *item) for item in sources])
        return shared

    @property
    def _axes(self) -> list[list["_Choice"]]:
        """For each axis what there is to choose from."""
        words = [key.rpartition(".")[2] for key in self.axes]
        choices = []
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
        absent = {name for name in ("fork", "variants") if not getattr(self, name)}
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(by_alias=True, exclude=absent)))


@dataclass(frozen=True)
class _Choice:
    """A value of an axis: what it is called, its part of a trial's name, and what it changes. One
    without an axis is no choice: it changes what the only source has."""

    axis: str
    label: str
    part: str
    overrides: list[str]


def _changes(axis: str, prefix: str, label: str, values: Mapping[str, Any]) -> _Choice:
    """A value of an axis that changes several keys together."""
    return _Choice(axis, label, _name_part(prefix, label), _assignments(values))


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [_assignment(key, value) for key, value in flatten(values).items()]


def _name(choices: Sequence[_Choice], called: str = "") -> str:
    return ",".join(filter(None, [called, *(choice.part for choice in choices)]))


def _texts(choices: Sequence[_Choice]) -> list[str]:
    return [text for choice in choices for text in choice.overrides]


def _point(choices: Sequence[_Choice]) -> dict[str, str]:
    return {choice.axis: choice.label for choice in choices if choice.axis}


def find_study(source: str) -> Path:
    """The file of a shipped study's name, or of a path."""
    path = STUDIES / f"{source}.yaml"
    if not os.path.isfile(path):
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
    joined = flatten(study.overrides)
    for key, value in parse_overrides(list(overrides)):
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        joined |= flatten({key: plain})
    try:
        study = _placed(study, path).model_copy(update={"overrides": joined})
        _check_keys(study)
        _ = study.trials  # expanded once, here: what is wrong with a trial is wrong with the file
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return study


def _placed(study: Study, path: Path) -> Study:
    """The study of the file `path` with a base, whose path and that of a given source are full."""
    base, fork = study.base, study.fork
    if base and not os.path.isfile(PRESETS / f"{base}.yaml"):
        base = str((path.parent / base).absolute())
    if fork is not None and isinstance(fork.source, str):
        run = (path.parent / fork.source).absolute()
        fork, base = fork.model_copy(update={"source": str(run)}), _base_of_forks(base, run)
    if not base:
        raise UsageError("base is missing: name a preset or a configuration file")
    return study.model_copy(update={"base": base, "fork": fork})


def _base_of_forks(base: str, run: Path) -> str:
    """The configuration of `run`, or the copy that a study directory has of it; the run may have
    been deleted or continued since."""
    if not base or os.path.isfile(run / "config.yaml"):
        original = source_config(run)
        base = base or str(run / "config.yaml")
        later = {name: getattr(original, name) for name in ("out", "steps")}
        if read_stored(Path(base)).model_copy(update=later) != original:
            raise UsageError(f"base is not the configuration of {run}: leave it out")
    return base


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = (Forks if key.startswith("fork.") else Study).model_json_schema()["properties"]
        return f"unknown key {key} (known: {', '.join(known)})"
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
    if study.fork is not None:
        _check_fork(study.fork, [*study.overrides, *varied], study.axes)
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


def _check_fork(plan: Forks, above: Sequence[str], axes: Iterable[str]) -> None:
    sources = plan.source if isinstance(plan.source, list) else [plan.source]
    own = {key for source in sources if isinstance(source, dict) for key in flatten(source)}
    for key in ("steps", "checkpoint.at"):
        if key in {*above, *axes, *own}:
            raise UsageError(f"{key} follows from fork.step and fork.further: leave it out")
    for key in above:
        if key in own:
            raise UsageError(f"{key} is changed by fork.from and elsewhere: drop one of them")


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
        # A fork's teacher may be refreshed where it begins: that is no key of its configuration.
        own = sorted(trial.overrides) if trial.fork else ""
        whole = f"{trial.config.model_dump_json(exclude={'out'})} {trial.fork} {own}"
        other = configs.setdefault(whole, trial)
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
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
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
