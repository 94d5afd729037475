"""Optional sinks beside metrics.jsonl: TensorBoard, wandb, trackio, behind one small logger."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sodfast.config import Config
from sodfast.errors import UsageError

Sink = Callable[[Mapping[str, Any]], None]


class Logger:
    """Sends each metrics line to every configured sink."""

    def __init__(self, config: Config, directory: Path) -> None:
        opened = [_OPEN[name](config, directory) for name in config.log.sinks]
        self._write = [write for write, _ in opened]
        self._close = [close for _, close in opened]

    def log(self, line: Mapping[str, Any]) -> None:
        for write in self._write:
            write(line)

    def close(self) -> None:
        for close in self._close:
            close()


def require_sinks(names: tuple[str, ...]) -> None:
    """Raise `UsageError` for a sink whose package is missing, before any work."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"log.sinks={name} needs a package: pip install 'sodfast[{name}]'")


def _tensorboard(config: Config, directory: Path) -> tuple[Sink, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"))

    def write(line: Mapping[str, Any]) -> None:
        for key, value in line.items():
            if key != "step":
                writer.add_scalar(key, value, line["step"])

    return write, writer.close


def _tracker(module: Any, config: Config, directory: Path) -> tuple[Sink, Callable[[], None]]:
    """A run of wandb, or of trackio, which copies wandb's interface."""
    run = module.init(
        project=config.log.project, name=directory.name, config=config.model_dump(mode="json")
    )

    def write(line: Mapping[str, Any]) -> None:
        run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    return write, run.finish


def _wandb(config: Config, directory: Path) -> tuple[Sink, Callable[[], None]]:
    import wandb

    return _tracker(wandb, config, directory)


def _trackio(config: Config, directory: Path) -> tuple[Sink, Callable[[], None]]:
    import trackio

    return _tracker(trackio, config, directory)


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
