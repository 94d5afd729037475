"""Optional sinks: TensorBoard for real, wandb and trackio through stand-ins."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sodfast.config import load_config
from sodfast.errors import UsageError
from sodfast.run.loggers import Logger, require_sinks

LINES = [
    {"step": 0, "eval/mean@4": 0.25},
    {"step": 1, "reward/mean": 0.5, "length/max": 12},
    {"step": 2, "reward/mean": 0.75, "eval/mean@4": 0.5},
]


def log(tmp_path: Path, *sinks: str) -> None:
    config = load_config(None, [f"log.sinks=[{','.join(sinks)}]", "log.project=study", "seed=3"])
    logger = Logger(config, tmp_path / "my-run")
    for line in LINES:
        logger.log(line)
    logger.close()


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, Any]:
    """A module with the part of wandb's interface that is used; what it was told."""
    told: dict[str, Any] = {"lines": [], "finished": 0}

    def finish() -> None:
        told["finished"] += 1

    def init(**arguments: Any) -> Any:
        told["init"] = arguments
        return SimpleNamespace(
            log=lambda values, step: told["lines"].append((step, values)), finish=finish
        )

    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return told


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_line_and_the_configuration(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = stand_in(monkeypatch, name)
    require_sinks((name,))
    log(tmp_path, name)
    assert told["lines"] == [
        (line["step"], {key: value for key, value in line.items() if key != "step"})
        for line in LINES
    ]
    assert told["finished"] == 1
    assert (told["init"]["project"], told["init"]["name"]) == ("study", "my-run")
    assert told["init"]["config"]["seed"] == 3
    assert told["init"]["config"]["schedule"]["gates"] == ["isolation", "reward", "length"]


def test_several_sinks_get_the_same_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb, trackio = stand_in(monkeypatch, "wandb"), stand_in(monkeypatch, "trackio")
    log(tmp_path, "wandb", "trackio")
    assert wandb["lines"] == trackio["lines"] != []


def test_without_sinks_nothing_is_opened(tmp_path: Path) -> None:
    require_sinks(())
    log(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_every_value(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    require_sinks(("tensorboard",))
    log(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "my-run" / "tensorboard"))
    events.Reload()
    written = {
        key: [(event.step, event.value) for event in events.Scalars(key)]
        for key in events.Tags()["scalars"]
    }
    assert written == {
        "eval/mean@4": [(0, 0.25), (2, 0.5)],
        "reward/mean": [(1, 0.5), (2, 0.75)],
        "length/max": [(1, 12.0)],
    }


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"^log\.sinks={name} .*pip install 'sodfast\[{name}\]'"):
        require_sinks((name,))
