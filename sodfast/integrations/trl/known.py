"""Which TRL, and which of its trainers: everything that is refused before training begins."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sodfast.errors import UsageError

RELEASES = ("1.16",)
# What the callback and the loss read and replace.
_NAMES = (
    "_compute_rollout_logps",
    "_compute_self_distillation_loss",
    "_forward_logits",
    "_log_self_distillation_metric",
    "_metrics",
    "_step",
    "accelerator",
    "callback_handler",
    "model_kwarg_keys",
    "teacher_model",
    "temperature",
    "use_teacher_server",
)
_NAMES_OF_SDPO = ("_compute_policy_loss",)  # SDFT has no rewards


def require_trl() -> None:
    """Raise `UsageError` unless a release of TRL is installed that this was written against."""
    known = " or ".join(f"{release}.*" for release in RELEASES)
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise UsageError(
            f"TRL is not installed: pip install 'sodfast[trl]', which brings TRL {known}"
        ) from error
    if not found.startswith(tuple(f"{release}." for release in RELEASES)):
        raise UsageError(
            f"TRL {found} is installed, and sodfast.integrations.trl was written against {known}: "
            f"pip install 'trl=={RELEASES[-1]}.*'"
        )


def require_trainer(trainer: Any) -> None:
    """Raise `UsageError` unless `trainer` is an SDPO or SDFT trainer that runs here as it is: in
    one process, or in several that each hold all weights."""
    require_trl()
    sdpo, sdft = (
        getattr(import_module(f"trl.experimental.{kind.lower()}"), f"{kind}Trainer")
        for kind in ("SDPO", "SDFT")
    )
    name = type(trainer).__name__
    if not isinstance(trainer, (sdpo, sdft)):
        raise UsageError(
            f"{name} has no teacher that is an earlier student: use TRL's SDPOTrainer or "
            "SDFTTrainer, of trl.experimental"
        )
    names = _NAMES + (_NAMES_OF_SDPO if isinstance(trainer, sdpo) else ())
    missing = [one for one in names if not hasattr(trainer, one)]
    if missing:
        raise UsageError(
            f"{name} of TRL {version('trl')} has no {missing[0]}: pip install "
            f"'trl=={RELEASES[-1]}.*', whose trainers have it"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UsageError(
            f"{name} shards its weights (DeepSpeed or FSDP), which is not supported: train with "
            "DistributedDataParallel, or with sodfast itself under torchrun"
        )


def own_teacher(trainer: Any) -> Any:
    """The trainer's teacher, weights apart from the student's.

    Raises `UsageError` where its teacher is the student.
    """
    if trainer.teacher_model is not trainer.model:
        return trainer.teacher_model
    name, kind = type(trainer).__name__, trainer.args.teacher_model_kind
    if kind == "live":
        raise UsageError(
            f"{name} has no teacher that could move: its teacher is the student itself "
            "(teacher_model_kind='live'); set teacher_model_kind='ema'"
        )
    raise UsageError(
        f"{name} keeps its teacher as an adapter of a PEFT model, which is not supported: train "
        "all weights, or use sodfast itself with model.lora"
    )
