"""From a configuration to a finished command: builds the parts and hands them to each other."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from sodfast.config import Config, load_config, read_overrides, validate
from sodfast.context import Questions, fitting_questions
from sodfast.errors import Interrupted, UsageError
from sodfast.evaluate import Examination, evaluate, evaluate_others
from sodfast.files import copy_files, require_usable, whole_folder
from sodfast.model.attention import describe, require_flash, without_cudnn
from sodfast.model.chat import require_switches
from sodfast.model.joined import apart
from sodfast.model.language_model import (
    LanguageModel,
    cast_weights,
    decoder_layers,
    recompute_layers,
)
from sodfast.model.liger import use_liger
from sodfast.model.load import load_model, wrap_model
from sodfast.model.lora import add_adapters, merge_adapters, require_peft
from sodfast.model.random_weights import random_model
from sodfast.parallel.offload import pinned_setting
from sodfast.parallel.ranks import ALONE, Ranks, join
from sodfast.rollout.build import build_engine
from sodfast.rollout.engine import Engine
from sodfast.run import checkpoint
from sodfast.run.card import model_card
from sodfast.run.console import Reporter, Screen, build_reporter, print_run
from sodfast.run.directory import RunDirectory, check_out, default_out
from sodfast.run.environment import environment
from sodfast.run.fork import Beginning, prepare_fork
from sodfast.run.fork_keys import fork_config, read_fork, source_config
from sodfast.run.loggers import require_sinks
from sodfast.run.records import read_metrics
from sodfast.run.restore import restore_student
from sodfast.schedule import build_schedule
from sodfast.summary import best_step
from sodfast.tasks.base import Task
from sodfast.tasks.build import build_task
from sodfast.trainer import Trainer


def train_run(config: Config, resume: Path | None, begin: Beginning | None = None) -> None:
    """Start a run, or continue the one in `resume`, which `begin` makes if it is given. Raises
    `Interrupted` after saving."""
    with join() as ranks:
        screen = Screen()
        reporter = build_reporter(screen) if ranks.main else Reporter()
        try:
            trainer = build_trainer(config, resume, reporter, ranks, begin)
            try:
                status = trainer.train()
            finally:
                trainer.run.close()
        finally:
            reporter.stop()
    if ranks.main:
        print_run(trainer.run.path, trainer.summary(status), trainer.lines, screen)
    if status == "interrupted":
        raise Interrupted


def train_fork(source: Path, overrides: list[str]) -> None:
    """Fork the run `source` as the overrides say and train the fork to its end.

    `step` and `teacher.refresh` are the fork's own; all others are keys of the configuration.
    """
    step, refresh, others = read_fork(overrides)
    config = fork_config(source_config(source), step, others, refresh)
    out = config.out or default_out(config)
    config = config.model_copy(update={"out": out})
    train_run(config, Path(out), prepare_fork(source, step, config, refresh))


def build_trainer(
    config: Config,
    resume: Path | None,
    reporter: Reporter,
    ranks: Ranks = ALONE,
    begin: Beginning | None = None,
) -> Trainer:
    """A trainer ready to `train`, its run directory created (or, with `resume`, opened) and
    locked. Everything that a user can have got wrong is found before anything is written.

    Raises `UsageError`; with `resume`, the configuration must be that of `stored_config` or, where
    `begin` makes that directory, the one that it stores. A directory that it has made and that
    cannot be resumed is deleted again.
    """
    disable_progress_bar()  # transformers' own bars would tear ours apart
    require_sinks(config.log.sinks)
    _require_shardable(config, ranks)
    device = pick_device(config.device, ranks)
    if device.type == "cuda" and config.rollout.engine != "vllm":
        # Read when CUDA's allocator starts, after this line; vLLM has one of its own that knows no
        # such segments.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", allocator_settings())
    make_current(device)
    limit_memory(device, config.memory_gib)
    without_cudnn(device)
    # Ranks that name a new directory by the clock may not name the same one.
    out = Path(ranks.gather(config.out or default_out(config))[0]) if resume is None else resume
    config = config.model_copy(update={"out": str(out)})
    with ranks.together():
        if (resume is None or begin is not None) and ranks.main:
            check_out(out)
        task = build_task(config.task)
        model = build_model(config, device, reporter.phase, reporter.message)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        others = {name: build_task(other) for name, other in config.eval.tasks.items()}
        data, engine = _questions_and_engine(config, model, task, reporter, others)
        if config.teacher.storage == "host" or ranks.size > 1:
            decoder_layers(model.network)  # refused here rather than after the run has begun
        schedule = build_schedule(config.schedule)
    facts = partial(environment, torch.get_num_threads(), str(device), ranks.size)
    with ranks.together():
        if not ranks.main:
            run = RunDirectory(out, None)
            config = config.model_copy(update={"log": config.log.model_copy(update={"sinks": ()})})
        elif resume is None:
            run = RunDirectory.create(out, config, facts())
        else:
            if begin is not None:
                begin(facts())
            run = RunDirectory.open(out)
    try:
        exams = _examinations(config, data, others)
        trainer = Trainer(config, model, engine, task, data, schedule, run, reporter, ranks, exams)
        if resume is not None:
            trainer.resume()
    except BaseException as error:
        run.close()
        if begin is not None and ranks.main and isinstance(error, UsageError):
            shutil.rmtree(out)
            raise UsageError(f"out={out} was not made: {error}") from error
        raise
    place = str(device) if ranks.size == 1 else f"{ranks.size} × {device.type}"
    reporter.message(f"{out}: {config.schedule.kind}, seed {config.seed}, {place}")
    reporter.message(describe(*_attention(model, engine)))
    return trainer


def evaluate_model(
    source: str, overrides: list[str], screen: Screen | None = None, best: bool = False
) -> dict[str, Any]:
    """The `eval/*` metrics of a run's newest checkpoint or, with `best`, of the one with the
    highest score; or of a model by id or directory.

    A model is asked the lab's questions unless the overrides name another task, and then under
    the limits of the preset `base` rather than the lab's. Progress is shown on `screen`.
    """
    disable_progress_bar()
    run, step, path = Path(source), 0, None
    if os.path.isfile(run / "config.yaml"):
        config = validate(read_overrides(run / "config.yaml", overrides))
        if config.model.lora != validate(read_overrides(run / "config.yaml", [])).model.lora:
            raise UsageError("model.lora is a property of the run: leave it out")
        step, path = _chosen(run, best)
    elif best:
        raise UsageError(f"--best: {source} is no run directory, which alone has checkpoints")
    else:
        preset = "base" if any(text.startswith("task.name=") for text in overrides) else "lab"
        config = load_config(preset, [f"model.path={source}", *overrides])
    task = build_task(config.task)
    device = pick_device(config.device)
    make_current(device)
    without_cudnn(device)
    if path is None:
        model = load_model(source, device, getattr(torch, config.model.dtype))
    else:
        model = _student(config, path, device)
    model = _with_switches(config, model)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    reporter = build_reporter(screen)
    try:
        others = {name: build_task(other) for name, other in config.eval.tasks.items()}
        data, engine = _questions_and_engine(config, model, task, reporter, others)
        progress = partial(reporter.phase, "evaluate")
        metrics = evaluate(model, engine, task, data.test, config, step, progress)
        exams = _examinations(config, data, others)
        metrics |= evaluate_others(model, engine, exams, step, progress)
    finally:
        reporter.stop()
    return {"step": step, **metrics}


def export_model(run: Path, out: Path, best: bool = False) -> None:
    """Write the student of the newest checkpoint, or of the best, to `out`, a Hugging Face
    directory: the checkpoint's own or, under LoRA, the base with the adapters merged into it; and
    its model card."""
    require_usable(out, str(out))
    if os.path.lexists(out):
        raise UsageError(f"{out} exists: choose another directory")
    step, path = _chosen(run, best)
    config = validate(read_overrides(run / "config.yaml", []))
    card = model_card(run, config, step)
    student = None
    if config.model.lora is None:
        names = checkpoint.file_names(path, checkpoint.verify(path, "student/"), "student/")
    else:
        disable_progress_bar()
        student = _student(config, path, torch.device("cpu"))
        merge_adapters(student.network)
    try:
        # It gets its name only when it is whole, so that a full disk or a kill is in nobody's way.
        with whole_folder(out) as aside:
            if student is None:
                copy_files(path / "student", aside, names)
            else:
                weights = apart(student.network.state_dict())
                student.network.save_pretrained(aside, state_dict=weights)
                student.tokenizer.save_pretrained(aside)
            (aside / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{out} cannot be written: {error}") from error


def build_model(
    config: Config,
    device: torch.device,
    progress: Any = lambda phase, done, total: None,
    message: Callable[[str], object] = lambda text: None,
) -> LanguageModel:
    """The student of a new run, set up for training."""
    model = _with_switches(config, _untrained(config, device, progress))
    use_liger(model.network, config.model.liger, message)
    if config.model.gradient_checkpointing:
        recompute_layers(model.network, _kept_layers(config, message))
    return model


def _with_switches(config: Config, model: LanguageModel) -> LanguageModel:
    """The model, which renders prompts as the student's section says. Raises `UsageError` for a
    switch, of the student's or the teacher's, that its chat template does not know."""
    student, teacher = config.model.chat_template_kwargs, config.teacher.chat_template_kwargs
    require_switches(model.tokenizer, "model.chat_template_kwargs", student)
    require_switches(model.tokenizer, "teacher.chat_template_kwargs", teacher or {})
    return replace(model, chat_template_kwargs=student)


def _kept_layers(config: Config, message: Callable[[str], object]) -> int:
    """How many layers keep their activations although the others do not."""
    kept = config.model.kept_layers
    if kept == "auto":
        from sodfast.memory.estimate import Estimate

        estimate = Estimate(config)
        kept = estimate.kept_layers
        message(
            f"model.kept_layers: {kept} of {len(estimate.layers)} layers keep their activations"
        )
    return kept


def _untrained(
    config: Config, device: torch.device, progress: Any = lambda phase, done, total: None
) -> LanguageModel:
    """The configured model, one of random weights or the lab's own, with new adapters where they
    are configured."""
    if config.model.lora is not None:
        require_peft()
    dtype = getattr(torch, config.model.dtype)
    if config.model.path is not None:
        model = load_model(config.model.path, device, dtype)
    elif config.model.random is not None:
        model = random_model(config.model.random, device, dtype, config.seed)
    else:
        from sodfast.lab.warm_start import build

        network, tokenizer = build(config.lab, progress=progress)
        cast_weights(network, dtype)
        model = wrap_model(network, tokenizer, device, name="the lab's model")
    if config.model.lora is None:
        return model
    return add_adapters(model, config.model.lora, config.seed)


def _student(config: Config, path: Path, device: torch.device) -> LanguageModel:
    """The student of the checkpoint `path`."""
    if config.model.lora is None:
        return load_model(str(path / "student"), device, getattr(torch, config.model.dtype))
    model = _untrained(config, device)
    stored = checkpoint.load(path)
    restore_student(model, stored.student, stored.state.get("base"))
    return model


def _questions_and_engine(
    config: Config,
    model: LanguageModel,
    task: Task,
    reporter: Reporter,
    others: Mapping[str, Task],
) -> tuple[Questions, Engine]:
    """The questions that fit, and an engine that can run the longest with its answer.

    Raises `UsageError` where the attention that model.attention asks for is not installed.
    """
    try:
        data = fitting_questions(config, model, task, reporter, others)
    except UsageError as error:
        raise UsageError(f"{error}{_preset_hint(config)}") from error
    if data.dropped and (hint := _preset_hint(config)):
        reporter.message(f"prompts were dropped{hint}")
    engine = build_engine(config.rollout, model, reporter.message)
    if config.model.attention == "flash":
        require_flash(*_attention(model, engine)[:3])
    longest = data.longest
    if config.schedule.kind == "evidence" and config.teacher.context != "none":
        longest = max(longest, config.teacher.max_prompt_tokens)  # the probe's prompts
    engine.require(longest + config.rollout.max_new_tokens)
    return data, engine


def _examinations(
    config: Config, data: Questions, others: Mapping[str, Task]
) -> dict[str, Examination]:
    """What `eval.tasks` asks, by the names there; each ends its answers as its own task does."""
    configs = {
        name: config.model_copy(update={"task": other}) for name, other in config.eval.tasks.items()
    }
    return {n: Examination(configs[n], task, data.others[n]) for n, task in others.items()}


def _preset_hint(config: Config) -> str:
    """What to add where a limit is in the way that comes from the wrong preset, if it does."""
    lab = load_config("lab", []).rollout
    own_model = config.model.path is not None or config.model.random is not None
    if own_model and config.rollout.max_prompt_tokens == lab.max_prompt_tokens:
        return " (that is the lab's limit: for a model of your own begin with `sodfast train base`)"
    if not own_model and config.rollout.max_new_tokens > lab.max_new_tokens:
        return " (a file for the lab's own model begins with `base: lab`)"
    return ""


def _attention(
    model: LanguageModel, engine: Engine
) -> tuple[torch.device, torch.dtype, bool, bool]:
    """What `describe` is asked about; `require_flash` takes all but the last."""
    capped = getattr(model.network.config, "attn_logit_softcapping", None) is not None
    return model.device, model.head.dtype, capped, engine.name == "native"


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device that `name` means; with several ranks a GPU of its own for each of a machine's.

    A GPU has its index, 0 where none is named: some of torch's functions refuse a device without
    one, and it would equal no tensor's.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device, gpus = torch.device(name), torch.cuda.device_count()
    if ranks.size > 1 and device.type == "cuda":
        if device.index is not None:
            raise UsageError(f"device={name}: with several ranks each has its own; set device=cuda")
        if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
            raise UsageError(f"this machine has {gpus} GPUs: lower torchrun's --nproc-per-node")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    elif device.type == "cuda" and (device.index or 0) >= gpus:
        raise UsageError(f"device={name}: this machine has {gpus} GPUs")
    elif device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    return device


def make_current(device: torch.device) -> None:
    """Make a GPU the one that streams, graphs and figures of memory are of, and NCCL works on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def allocator_settings() -> str:
    """PYTORCH_ALLOC_CONF of a run on a GPU: phases ask for blocks of different sizes, and a teacher
    in host memory for pinned buffers of its own sizes."""
    return ",".join(filter(None, ["expandable_segments:True", pinned_setting()]))


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Let the allocator hand out at most `gib` GiB of a GPU, so that a larger card stands for a
    smaller one and no step takes more than `sodfast plan` was asked about.

    Raises `UsageError` where the GPU has less.
    """
    if gib is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if gib * 2**30 > total:
        raise UsageError(
            f"memory_gib={gib:g}: this GPU has {total / 2**30:.1f} GiB: lower memory_gib and ask "
            "`sodfast plan` what fits"
        )
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total, device)


def _require_shardable(config: Config, ranks: Ranks) -> None:
    """Raise `UsageError` for what runs in one process only."""
    if ranks.size == 1:
        return
    if config.rollout.engine == "vllm":
        raise UsageError(
            f"rollout.engine=vllm runs in one process, not in {ranks.size}: set rollout.engine=auto"
        )
    if config.model.lora is not None:
        raise UsageError(
            f"model.lora runs in one process, not in {ranks.size}: leave torchrun out, or set "
            "model.lora=null"
        )


def _chosen(run: Path, best: bool) -> tuple[int, Path]:
    """Step and path of the newest checkpoint, or of that with the highest `eval/mean@k`."""
    path = checkpoint.latest(run / "checkpoints")
    if path is None:
        raise UsageError(f"{run} holds no checkpoint: give a run directory of sodfast train")
    if best:
        samples = validate(read_overrides(run / "config.yaml", [])).eval.samples
        step = best_step(read_metrics(run), samples, checkpoint.steps(path.parent))
        if step is None:
            raise UsageError(
                f"{run}: no step with a checkpoint was evaluated: train with checkpoint.best=true"
            )
        path = path.parent / f"step-{step}"
    return checkpoint.load_state(path)["step"], path
