"""From a configuration to a finished command: builds the parts and hands them to each other."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from sodfast import checkpoint
from sodfast.config import Config, load_config, read_overrides, validate
from sodfast.console import build_reporter, print_run
from sodfast.errors import UsageError
from sodfast.evaluate import evaluate
from sodfast.interrupt import Interrupted
from sodfast.model import LanguageModel, load_model, wrap_model
from sodfast.rundir import (
    RunDirectory,
    check_out,
    default_out,
    environment,
)
from sodfast.sinks import require_sinks
from sodfast.tasks import build_task
from sodfast.trainer import Trainer


def train_run(config: Config, resume: Path | None) -> None:
    """Start a run, or continue the one in `resume`. Raises `Interrupted` after saving."""
    disable_progress_bar()  # transformers' own bars would tear ours apart
    require_sinks(config.log.sinks)
    device = pick_device(config.device)
    if resume is None:
        config = config.model_copy(update={"out": config.out or default_out(config)})
        check_out(Path(str(config.out)))
    task = build_task(config.task)
    reporter = build_reporter()
    try:
        model = build_model(config, device, reporter.phase)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        found = environment(torch.get_num_threads(), str(device))
        if resume is None:
            run = RunDirectory.create(Path(str(config.out)), config, found)
        else:
            run = RunDirectory.open(resume)
            run.write_config(config)  # `steps` may be a new one
        try:
            trainer = Trainer(config, model, task, run, reporter)
            if resume is not None:
                trainer.resume()
            reporter.message(f"{run.path}: {config.schedule.kind}, seed {config.seed}, {device}")
            status = trainer.train()
        finally:
            run.close()
    finally:
        reporter.stop()
    print_run(run.path, trainer.summary(status), trainer.lines)
    if status == "interrupted":
        raise Interrupted


def evaluate_model(source: str, overrides: list[str]) -> dict[str, Any]:
    """The `eval/*` metrics of a run's newest checkpoint, or of a model by id or directory."""
    run = Path(source)
    if (run / "config.yaml").is_file():
        config = validate(read_overrides(run / "config.yaml", overrides))
        step, path = _newest(run)
        model = load_model(str(path / "student"), pick_device(config.device))
    else:
        config = load_config(None, [f"model.path={source}", *overrides])
        step = 0
        model = build_model(config, pick_device(config.device))
    task = build_task(config.task)
    reporter = build_reporter()
    try:
        metrics = evaluate(
            model,
            task,
            task.test,
            config,
            step,
            lambda done, total: reporter.phase("evaluate", done, total),
        )
    finally:
        reporter.stop()
    return {"step": step, **metrics}


def export_model(run: Path, out: Path) -> None:
    """Copy the newest checkpoint's student, already a Hugging Face directory, to `out`."""
    if out.exists():
        raise UsageError(f"{out} exists: choose another directory")
    _, path = _newest(run)
    try:
        shutil.copytree(path / "student", out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error}") from error


def build_model(
    config: Config, device: torch.device, progress: Any = lambda phase, done, total: None
) -> LanguageModel:
    """The configured model, or the lab's own."""
    if config.model.path is not None:
        return load_model(config.model.path, device)
    from sodfast import lab

    network, tokenizer = lab.build(config.lab, progress=progress)
    return wrap_model(network, tokenizer, device, name="the lab's model")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device={name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def _newest(run: Path) -> tuple[int, Path]:
    path = checkpoint.latest(run / "checkpoints")
    if path is None:
        raise UsageError(f"{run} holds no checkpoint: give a run directory of sodfast train")
    return checkpoint.load(path).step, path
